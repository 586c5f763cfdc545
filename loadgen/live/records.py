"""What a sender is to do, what it sends, and what becomes of each query: its plan, payloads and records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve import wire
from superserve.clock import MS
from superserve.errors import WireError
from superserve.net.sockets import ZERO_COPY_BYTES
from superserve.wire import HAS_OUTPUT, Group, queued_us_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

_SETTLE_AT = 128
"""Groups of answers entered at once, at most."""
_SETTLE_QUERIES = 1_024
"""Their queries, at about which they are entered: 10,000 at once would hold up the next send by 2 ms."""
_ZEROS_BYTES = 16 << 20
COLUMNS = (
    "sent_ns", "answered_ns", "status", "subnet", "batch_size", "accuracy", "queued_ns", "executing_ns"
)  # fmt: skip
"""What a sender writes for each query."""
UNANSWERED = 255
"""In `status`: no answer came."""
LIVE_ROW = np.dtype([("sent_ns", "<i8"), ("answered_ns", "<i8"), ("accuracy", "<f4"), ("status", "u1")])
"""What a watched sender writes for each query while it runs."""


@dataclass(frozen=True, slots=True)
class SenderPlan:
    """The orders of one sender; written as JSON beside the arrays.

    Attributes:
        endpoint: Where it sends: a router's client endpoint or several, separated by commas; or an echo's.
        slo_ns: From due to deadline.
        payload_bytes: Bytes of each payload, unless payloads are real.
        grace_ns: How long after the last deadline answers are awaited.
        keep_outputs: Whether outputs are written too.
        is_watched: Whether rows are written while it runs: see `loadgen.live.progress`.
        keys: As in `RunSettings`.
        target: The target in `loadgen.bench.senders`; "" for `BulkTarget`.
        least_sleep_ns: The least time between two wake-ups to send: timers are usually later than a shorter
            one, and the lag that it adds is recorded. With 0 it wakes for each query.
        control: Where the coordinator listens, which fills in this field and the next ones.
        name: This sender's name.
        folder: Contains `<name>-due.npy` (int64 ns offsets, ascending) and, for real payloads,
            `payloads.npy` (uint8, shape (n, n_bytes)) and `<name>-pick.npy`.
    """

    endpoint: str
    slo_ns: int
    payload_bytes: int = 64
    grace_ns: int = 500 * MS
    keep_outputs: bool = False
    is_watched: bool = False
    keys: str = ""
    target: str = ""
    least_sleep_ns: int = MS // 2
    control: str = ""
    name: str = ""
    folder: str = ""

    @property
    def live_path(self) -> Path:
        """Return where the rows are written while it runs."""
        return Path(self.folder) / f"{self.name}-live.rows"

    def path(self, what: str) -> Path:
        """Return the path of one of this sender's arrays."""
        return Path(self.folder) / f"{self.name}-{what}.npy"


class Payloads:
    """The payloads of queries lo to hi, end to end: real ones by index, or zeros."""

    def __init__(self, plan: SenderPlan) -> None:
        shared = Path(plan.folder) / "payloads.npy"
        self._rows = np.load(shared, mmap_mode="r") if shared.exists() else None
        self._pick = np.load(plan.path("pick")) if self._rows is not None else None
        self.each = plan.payload_bytes if self._rows is None else int(self._rows.shape[1])
        self._zeros = memoryview(bytes(max(self.each, min(self.each * 4096, _ZEROS_BYTES))))

    @property
    def framed(self) -> bool:
        """Whether each is a separate frame: large payloads must not be copied."""
        return self.each >= ZERO_COPY_BYTES

    def buffers(self, lo: int, hi: int) -> Sequence[bytes | memoryview]:
        """Return the payloads of queries lo to hi: one buffer for each if `framed`, otherwise one for all."""
        if self.framed:
            return [self.packed(i, i + 1) for i in range(lo, hi)]
        return (self.packed(lo, hi),)

    def packed(self, lo: int, hi: int) -> bytes | memoryview:
        """Return the payloads of queries lo to hi in one buffer."""
        if self._rows is not None and self._pick is not None:
            packed: bytes = self._rows[self._pick[lo:hi]].tobytes()
            return packed
        n_bytes = self.each * (hi - lo)
        return self._zeros[:n_bytes] if n_bytes <= len(self._zeros) else bytes(n_bytes)

    def picked(self, ids: npt.NDArray[np.int64]) -> Sequence[bytes | memoryview]:
        """Return the payloads of these queries, in the form of `buffers`."""
        found = [self.packed(i, i + 1) for i in ids.tolist()]
        return found if self.framed else (b"".join(found),)


class Records:
    """How each query of one sender ended, as columns of length n; -1 where it did not happen."""

    def __init__(self, n: int) -> None:
        self.sent_ns = np.full(n, -1, np.int64)
        self.answered_ns = np.full(n, -1, np.int64)
        self.status = np.full(n, UNANSWERED, np.uint8)
        # Filled, not np.zeros: its pages would be faulted in during the run.
        self.subnet = np.full(n, 0, np.uint16)
        self.batch_size = np.full(n, 0, np.uint16)
        self.accuracy = np.full(n, 0, np.float32)
        self.queued_ns = np.full(n, 0, np.int64)
        self.executing_ns = np.full(n, 0, np.int64)
        self.outputs: npt.NDArray[np.uint8] | None = None
        self.n_answered = 0
        self.n_duplicates = 0
        self.is_copied: npt.NDArray[np.bool_] | None = None  # sent to two routers, of which both may answer
        self.reasons: dict[str, str] = {}
        self._gathered: list[tuple[Group, int]] = []
        self._n_gathered = 0

    @property
    def n_ended(self) -> int:
        """Queries answered, those gathered included: a duplicate among these counts until `settle`."""
        return self.n_answered + self._n_gathered

    def gather(self, group: Group, now_ns: int) -> bool:
        """Keep a group that arrived at `now_ns`; True if it is time to `settle`."""
        self._gathered.append((group, now_ns))
        self._n_gathered += group.count
        return self._n_gathered >= _SETTLE_QUERIES or len(self._gathered) >= _SETTLE_AT

    def settle(self, *, keep_outputs: bool) -> None:
        """Enter what was gathered: all at once, for one by one NumPy's calls cost more than the rest."""
        gathered, self._gathered, self._n_gathered = self._gathered, [], 0
        groups = [group for group, _ in gathered]
        if not groups:
            return
        index = np.frombuffer(b"".join([group.ids for group in groups]), "<i8")
        is_plain = all([group.status in HAS_OUTPUT for group in groups])  # noqa: C419  a generator is slower
        if keep_outputs or not is_plain or self._has_duplicates(index):
            for group, now_ns in gathered:
                self.take(group, now_ns, keep_outputs=keep_outputs)
            return
        counts = [group.count for group in groups]
        self.n_answered += len(index)
        self.answered_ns[index] = np.repeat([now_ns for _, now_ns in gathered], counts)
        self.status[index] = np.repeat([group.status for group in groups], counts)
        self.subnet[index] = np.repeat([group.subnet for group in groups], counts)
        self.batch_size[index] = np.repeat([group.batch_size for group in groups], counts)
        self.accuracy[index] = np.repeat([group.accuracy for group in groups], counts)
        self.executing_ns[index] = np.repeat([group.executing_ns for group in groups], counts)
        waits_us = b"".join([queued_us_of(group) for group in groups])
        self.queued_ns[index] = np.frombuffer(waits_us, "<u4") * np.int64(1000)

    def _has_duplicates(self, index: npt.NDArray[np.int64]) -> bool:
        is_answered: bool = (self.status[index] != UNANSWERED).any()
        # Not np.unique: its first call imports a module, and the sender stands still for 8 to 20 ms.
        ordered = np.sort(index)
        return is_answered or bool((ordered[1:] == ordered[:-1]).any())

    def take(self, group: Group, now_ns: int, *, keep_outputs: bool) -> None:
        """Enter a group of answers that arrived at `now_ns`."""
        index = np.frombuffer(group.ids, "<i8")
        before = self.status[index]
        queued_ns: Any = group.queued_ns
        if group.queued_us is not None:
            queued_ns = np.frombuffer(group.queued_us, "<u4").astype(np.int64) * 1000
        if before.min() != UNANSWERED:
            is_new = before == UNANSWERED
            second = index[~is_new]
            if self.is_copied is not None:
                second = second[~self.is_copied[second]]
            self.n_duplicates += len(second)
            index = index[is_new]
            queued_ns = queued_ns[is_new] if group.queued_us is not None else queued_ns
        self.n_answered += len(index)
        self.answered_ns[index] = now_ns
        self.status[index] = group.status
        self.queued_ns[index] = queued_ns
        if group.status not in HAS_OUTPUT:
            status = wire.Status(group.status).name
            if status not in self.reasons:
                self.reasons[status] = bytes(group.output).decode(errors="replace")[:500]
            return
        self.subnet[index] = group.subnet
        self.batch_size[index] = group.batch_size
        self.accuracy[index] = group.accuracy
        self.executing_ns[index] = group.executing_ns
        if keep_outputs and len(index) == group.count:
            self._keep(group, index)

    def _keep(self, group: Group, index: npt.NDArray[np.int64]) -> None:
        """Store the outputs of a group. All have the same length, because a model has one output shape."""
        each = len(group.output) // group.count
        if group.lengths is not None and set(memoryview(group.lengths).cast("I")) != {each}:
            raise WireError(f"results: expected outputs of {each} bytes, got lengths that differ")
        if self.outputs is None:
            self.outputs = np.zeros((len(self.status), each), np.uint8)
        self.outputs[index] = np.frombuffer(group.output, np.uint8).reshape(group.count, -1)

    def save(self, plan: SenderPlan) -> None:
        """Write every column to the plan's folder."""
        for name in COLUMNS:
            np.save(plan.path(name), getattr(self, name))
        if self.outputs is not None:
            np.save(plan.path("outputs"), self.outputs)
