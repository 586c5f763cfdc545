"""The open-loop sender: a process that sends its share of a schedule at the planned instants.

The schedule is computed before the run; nothing that happens in the run moves a query. A sender that
wakes late sends everything that is due at once, and records the lag: latency counts from the instant
at which a query was *due*, so a slow sender can only make results worse. It sleeps between sends, and
never spins.

`Sender` keeps the schedule; a `SenderTarget` is where queries go and answers come from. `BulkTarget` sends
everything that is due as one message to a router; those of `loadgen.bench.senders` send one query at a
time, as applications do.
"""

from __future__ import annotations

import abc
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from superserve import wire
from superserve.clock import MS
from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.net.connection import Connection
from superserve.net.context import new_context
from superserve.net.keys import peer_keys
from superserve.net.sockets import ZERO_COPY_BYTES, Waiter, connect_dealer, receive, send, wait
from superserve.roles.command import one_line
from superserve.roles.processes import announce_ready, die_with_parent
from superserve.wire import (
    HAS_OUTPUT,
    MAX_QUERIES,
    Queries,
    RunProgress,
    RunReady,
    RunReport,
    RunStart,
    RunStop,
    decode_run,
    encode_run,
    queued_us_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy.typing as npt
    import zmq

    from superserve.wire import Group

    Steps = Generator[int, None, None]
    """Yields how long there is nothing to do, in ns: the caller waits or sleeps that long."""

_PROGRESS_NS = 250 * MS
_SETTLE_AT = 128
"""Groups of answers entered at once, at most."""
_SETTLE_QUERIES = 1_024
"""Their queries, at about which they are entered: 10,000 at once would hold up the next send by 2 ms."""
_ZEROS_BYTES = 16 << 20
_WELCOME_NS = 10_000 * MS
COLUMNS = (
    "sent_ns", "answered_ns", "status", "subnet", "batch_size", "accuracy", "queued_ns", "executing_ns"
)  # fmt: skip
"""What a sender writes for each query."""
UNANSWERED = 255
"""In `status`: no answer came."""
LIVE_ROW = np.dtype([("sent_ns", "<i8"), ("answered_ns", "<i8"), ("accuracy", "<f4"), ("status", "u1")])
"""What a watched sender writes for each query while it runs."""
LATE_NS = 250 * MS
"""How long after its deadline a query's row is written: only a stuck answer takes longer."""


@dataclass(frozen=True, slots=True)
class SenderPlan:
    """The orders of one sender; written as JSON beside the arrays.

    Attributes:
        endpoint: Where it sends: a router's client endpoint, or an echo's.
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


class Records:
    """What became of each query of one sender, as columns of length n; -1 where it did not happen."""

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
            self.n_duplicates += int((~is_new).sum())
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


class SenderTarget(abc.ABC):
    """Where queries go and answers come from; both are entered in `records`.

    Attributes:
        at_once: Most queries sent in a row before answers are received.
        idle_ns: How long to wait at a time once all is sent; short if an answer does not end `wait`.
        subnets: Name and accuracy of each row of the profile, as far as it is known.
    """

    at_once = MAX_QUERIES
    idle_ns = 20 * MS

    def __init__(self, plan: SenderPlan, records: Records) -> None:
        self.plan = plan
        self.records = records
        self.subnets: list[tuple[str, float]] = []

    @abc.abstractmethod
    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries from `lo` on, with the slack left to each; return how many were taken."""

    @abc.abstractmethod
    def take(self) -> None:
        """Receive the answers that have come."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Enter all that was received."""

    def tick(self, now_ns: int) -> None:  # noqa: B027  most have nothing to do
        """Do periodic work, such as heartbeats."""

    @abc.abstractmethod
    def wait(self, duration_ns: int) -> None:
        """Wait this long, or until there is something to take."""


class BulkTarget(SenderTarget):
    """A router: everything due at one wake-up goes as one message, over one connection."""

    def __init__(self, plan: SenderPlan, records: Records, connection: Connection) -> None:
        super().__init__(plan, records)
        self.connection = connection
        self.payloads = Payloads(plan)
        self._waiter = Waiter((connection.socket,))

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries as one message; a full connection takes none."""
        n, hi = len(slacks_ns), lo + len(slacks_ns)
        ids = np.arange(lo, hi, dtype="<u8").tobytes()
        message = Queries(
            self.connection.epoch or 0, now_ns, n, ids, slacks_ns.tobytes(),
            self.payloads.each, self.payloads.buffers(lo, hi), self.payloads.framed,
        )  # fmt: skip
        if not self.connection.send_queries(message):
            return 0
        self.records.sent_ns[lo:hi] = now_ns
        return n

    def take(self) -> None:
        """Collect the answers that have come."""
        for results in self.connection.receive():
            arrived_ns = time.monotonic_ns()
            for group in results.groups:
                if self.records.gather(group, arrived_ns):
                    self.settle()

    def settle(self) -> None:
        """Enter the collected answers."""
        self.records.settle(keep_outputs=self.plan.keep_outputs)

    def wait(self, duration_ns: int) -> None:
        """Wait for answers."""
        self._waiter.wait(duration_ns)

    def tick(self, now_ns: int) -> None:
        """Send heartbeats, and HELLO again if the router has gone."""
        self.connection.tick(now_ns)
        self.subnets = self.connection.subnets


class Sender:
    """Sends a schedule to a target; `run` returns when every query is answered or given up."""

    def __init__(self, target: SenderTarget, due_ns: npt.NDArray[np.int64]) -> None:
        self.plan = target.plan
        self.records = target.records
        self.n_sent = 0
        self.target = target
        self._due_ns = due_ns
        self._n_written = 0

    def run(self, start_ns: int, on_progress: Callable[[int], int | None]) -> None:
        """Send every query at `start_ns` plus its offset, and collect the answers; see `steps`."""
        for duration_ns in self.steps(start_ns, on_progress):
            self.target.wait(duration_ns)

    def steps(self, start_ns: int, on_progress: Callable[[int], int | None]) -> Steps:
        """Send every query at `start_ns` plus its offset, and collect the answers.

        `on_progress` receives how many were due; it may return the offset at which the schedule ends early.
        """
        plan, target, records, due_ns = self.plan, self.target, self.records, self._due_ns
        n, i = len(due_ns), 0
        next_due_ns = start_ns + int(due_ns[0]) if n else 0
        patience_ns = plan.slo_ns + plan.grace_ns
        give_up_ns = start_ns + (int(due_ns[-1]) if n else 0) + patience_ns
        next_progress_ns = start_ns
        while True:
            now_ns = time.monotonic_ns()
            if i < n and next_due_ns <= now_ns:
                part_ns = due_ns[i : min(n, i + target.at_once)]
                part_ns = part_ns[: part_ns.searchsorted(now_ns - start_ns, "right")]
                # Refused queries count as unsent: an open loop does not wait for a router that is full.
                self.n_sent += target.send(i, part_ns + (start_ns + plan.slo_ns - now_ns), now_ns)
                i += len(part_ns)
                next_due_ns = start_ns + int(due_ns[i]) if i < n else 0
            target.take()
            if now_ns >= next_progress_ns:
                next_progress_ns = now_ns + _PROGRESS_NS
                target.tick(now_ns)
                stop_ns = on_progress(i)
                if stop_ns is not None:
                    n = max(i, min(n, int(due_ns.searchsorted(stop_ns))))
                    give_up_ns = max(now_ns, start_ns + (int(due_ns[n - 1]) if n else 0)) + patience_ns
            if i >= n and (records.n_ended >= self.n_sent or now_ns >= give_up_ns):
                target.settle()  # this may find duplicates, and then answers are still missing
                if records.n_ended >= self.n_sent or now_ns >= give_up_ns:
                    return
            # Waking for every query would cost more than sending it: see `SenderPlan.least_sleep_ns`.
            next_ns = max(next_due_ns, now_ns + plan.least_sleep_ns) if i < n else now_ns + target.idle_ns
            left_ns = min(next_ns, next_progress_ns) - time.monotonic_ns()
            if left_ns > 0 and not (i < n and next_due_ns <= now_ns):
                yield left_ns

    def write_rows(self, until_ns: int | None) -> int:
        """Write the rows of queries due before this offset, None for all; return how many are written."""
        records, low = self.records, self._n_written
        self.target.settle()
        high = len(self._due_ns) if until_ns is None else int(np.searchsorted(self._due_ns, until_ns))
        if high > low:
            rows = np.empty(high - low, LIVE_ROW)
            for name in LIVE_ROW.names or ():
                rows[name] = getattr(records, name)[low:high]
            with self.plan.live_path.open("ab") as file:
                file.write(rows.tobytes())
            self._n_written = high
        return self._n_written

    # --- on a coordinator's orders ------------------------------------------------------------

    def play(self, context: zmq.Context[zmq.Socket[bytes]]) -> Steps:
        """Report readiness, start when ordered to, send; then write the records, and report."""
        gc.collect()
        gc.freeze()
        gc.disable()  # answers are kept until the end of the run: each collection would walk all of them
        announce_ready({"name": self.plan.name})
        control = connect_dealer(context, self.plan.control)
        try:
            while not send(control, encode_run(RunReady(self.plan.name))):
                yield 5 * MS
            while (frames := receive(control)) is None:
                self.target.tick(time.monotonic_ns())
                self.target.take()
                yield 20 * MS
            order = decode_run(frames)
            assert isinstance(order, RunStart), "the first order is to start"
            assert order.at_ns is not None, "a sender and its coordinator share a clock"
            start_ns = order.at_ns
            yield from self.steps(start_ns, lambda i: self._report(control, i, start_ns))
            rows = self.write_rows(None) if self.plan.is_watched else 0
            self.records.save(self.plan)
            reasons, n_duplicates = self.records.reasons, self.records.n_duplicates
            report = RunReport(tuple(self.target.subnets), reasons, n_duplicates, self.plan.name, rows)
            send(control, encode_run(report))
        finally:
            control.close(linger=2_000)

    def _report(self, control: zmq.Socket[bytes], i: int, start_ns: int) -> int | None:
        """Report what was due, sent and answered so far. Return when to stop, if one was ordered."""
        rows, until_ns = None, 0
        if self.plan.is_watched:
            until_ns = max(0, time.monotonic_ns() - start_ns - self.plan.slo_ns - LATE_NS)
            rows = self.write_rows(until_ns)
        progress = RunProgress(i, self.n_sent, self.records.n_ended, self.plan.name, rows, until_ns)
        send(control, encode_run(progress))
        frames = receive(control)
        if frames is None:
            return None
        message = decode_run(frames)
        assert isinstance(message, RunStop), "a sender that has started is only ordered to stop"
        return message.after_ns


def _await_welcome(connection: Connection) -> None:
    give_up_ns = time.monotonic_ns() + _WELCOME_NS
    while connection.epoch is None or connection.model is None:
        now_ns = time.monotonic_ns()
        if now_ns > give_up_ns or connection.mismatch is not None:
            if connection.epoch is None:
                raise ConfigError(connection.absence)
            raise ConfigError(f"{connection.endpoint}: no worker has joined this router")
        connection.tick(now_ns)
        wait((connection.socket,), 20 * MS)
        for _ in connection.receive():
            pass


def run_sender(plan: SenderPlan) -> None:
    """Connect, wait for the coordinator's start, send the schedule, write the records.

    Raises:
        SuperServeError: The router is absent, or the plan's files are malformed.
    """
    due_ns = np.load(plan.path("due"))
    records = Records(len(due_ns))
    with new_context() as context:
        connection = Connection(plan.endpoint, context, peer_keys(plan.keys))
        try:
            _await_welcome(connection)
            target = BulkTarget(plan, records, connection)
            expected = None if connection.model is None else connection.model.input
            if expected is not None and expected.n_bytes != target.payloads.each:
                raise ConfigError(
                    f"payload: the model takes {expected.n_bytes} bytes a query "
                    f"({expected.dtype} {expected.shape}), got {target.payloads.each}: use --payload-bytes"
                )
            for duration_ns in Sender(target, due_ns).play(context):
                target.wait(duration_ns)
        finally:
            connection.close()


def main(argv: list[str], run: Callable[[SenderPlan], None] = run_sender) -> int:
    """Run the sender of the plan, a JSON file named on the command line."""
    die_with_parent()
    plan = SenderPlan(**orjson.loads(Path(argv[0]).read_bytes()))
    try:
        run(plan)
    except SuperServeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main(sys.argv[1:]))
