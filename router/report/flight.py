"""The router's flight record: its last minutes, kept in memory for `explain`, traces and the live page.

The loop notes each pass's actions after it has carried them out; nothing here decides. Entries are bytes
(`superserve.wire.flight`) in pages, and the oldest pages go: the record is bounded in memory, not in time. A
reader asks with STATUS for what follows a *cursor*, the number of bytes written before it, and gets the rest
of one page at a time, so that no answer keeps the loop for long.
"""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from router.core.edf import QUEUED, queued_stretches
from router.core.events import Answer, Dispatch
from superserve.clock import MS
from superserve.wire import Status
from superserve.wire.flight import (
    BATCH,
    REPORT,
    miss_bytes,
    pack_alone,
    pack_batch,
    pack_report,
    traced_bytes,
    waiting_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from router.core import RouterCore
    from router.core.edf import Cohort, Stretch
    from router.core.events import Action, Ran
    from router.core.ledger import ClientState
    from router.core.workers import Batch, Worker

PAGE_BYTES = 64 << 10
"""Of a page, and so about the most of an answer: it takes the loop some 50 us to send."""
DEFAULT_BYTES = 16 << 20
"""Of the whole record: at 60 to 90 bytes a query, about 200,000 queries."""

_MOST_CLIENTS = 4_096
_MOST_WORKERS = 8_192
_SHOWN_CLIENTS = 20
_SAMPLED = 500
"""Messages that the queue's histogram looks at, at most: with more waiting, every k-th stands for k."""
_RIVER_BINS = 32
_OK = Status.OK


class FlightRecorder:
    """Keeps the record of one router.

    Args:
        n_bytes: Most bytes kept; 0 keeps nothing.
        page_bytes: When a page is full.

    Attributes:
        ok_of: Queries of each client that ended OK and that did not, by the client's number.
    """

    def __init__(self, n_bytes: int = DEFAULT_BYTES, page_bytes: int = PAGE_BYTES) -> None:
        self.ok_of: dict[int, list[int]] = {}
        self._n_pages = max(2, n_bytes // page_bytes)
        self._page_bytes = page_bytes
        self._page = bytearray()
        self._pages: deque[tuple[int, bytearray]] = deque([(0, self._page)])
        self._written = 0
        self._names: dict[tuple[str, int], int] = {}
        self._gpus: dict[Worker, int] = {}
        self._last_ran: Ran | None = None

    # --- writing ----------------------------------------------------------------------------

    def note(self, core: RouterCore, actions: Sequence[Action], now_ns: int) -> None:
        """Record what a pass did."""
        for action in actions:
            # By type: isinstance on each answer of each query would cost twice as much.
            kind = type(action)
            if kind is Answer:
                self._ended(core, action, now_ns)  # type: ignore[arg-type]
            elif kind is Dispatch:
                self._sent(action.batch)  # type: ignore[union-attr]

    def trace(self, client: int, query_id: int, context: bytes) -> None:
        """Record that a query which has just arrived came with a trace context, packed as on the wire."""
        page = self._room()
        page += traced_bytes(client, query_id, context)

    def _room(self) -> bytearray:
        """Return the page to add an entry to: a new one if the last is full."""
        page = self._page
        if len(page) >= self._page_bytes:
            self._written += len(page)
            self._page = page = bytearray()
            self._pages.append((self._written, page))
            if len(self._pages) > self._n_pages:
                self._pages.popleft()
        return page

    def _sent(self, batch: Batch) -> None:
        # In one go, without a function for each part: this runs for every batch.
        page, stretches = self._room(), batch.stretches
        worker = batch.worker
        gpu = self._gpus.get(worker)
        if gpu is None:
            gpu = self._gpu(worker)
        page += pack_batch(
            BATCH, gpu, batch.subnet, len(stretches), batch.batch_id, batch.dispatched_ns, batch.begin_ns,
            batch.profiled_ns,
        )  # fmt: skip
        for stretch in stretches:
            cohort, lo, hi = stretch
            if hi - lo == 1 and cohort.floors is None and cohort.classes is None:
                page += pack_alone(
                    cohort.client.serial, 1, 0, cohort.arrived_ns, cohort.base_ns,
                    bytes(cohort.message.ids[8 * lo : 8 * hi]), cohort.deadlines_ns[lo],
                )  # fmt: skip
            else:
                page += _stretch(stretch)

    def _ended(self, core: RouterCore, answer: Answer, now_ns: int) -> None:
        client: ClientState = answer.cohort.client
        counts = self.ok_of.get(client.serial)
        if counts is None:
            counts = self._new_client(client.serial)
        ran = answer.ran
        if ran is not None and ran is not self._last_ran:
            self._last_ran, row = ran, ran.row
            page = self._room()
            page += pack_report(
                REPORT, row.batch_id, now_ns, ran.to_start_ns, row.waited_ns, ran.executing_ns,
                ran.returning_ns,
            )  # fmt: skip
        if answer.status is _OK:
            counts[0] += answer.n
            return
        counts[1] += answer.n
        batch_id = 0 if ran is None else ran.row.batch_id
        for stretch in answer.stretches:
            page = self._room()
            page += miss_bytes(
                answer.status, now_ns, batch_id, client.return_ns, core.fleet.quickest_ns, answer.reason,
                _stretch(stretch),
            )  # fmt: skip

    def _gpu(self, worker: Worker) -> int:
        """Return a GPU's number in the record: that of its name, which outlives its process."""
        name = (worker.peer.name, worker.slot)
        known = self._names.get(name)
        if known is None:
            known = self._names[name] = len(self._names)
        if len(self._gpus) > _MOST_WORKERS:
            self._gpus.clear()  # of processes that have ended, most of them
        self._gpus[worker] = known
        return known

    def _new_client(self, serial: int) -> list[int]:
        if len(self.ok_of) >= _MOST_CLIENTS:  # those that came first have most likely left
            for old in list(islice(self.ok_of, _MOST_CLIENTS // 2)):
                del self.ok_of[old]
        counts = self.ok_of[serial] = [0, 0]
        return counts

    # --- reading ----------------------------------------------------------------------------

    def data(self) -> bytes:
        """Return the whole record."""
        return b"".join(bytes(page) for _, page in self._pages)

    def after(self, cursor: int | None) -> tuple[bytes, int, bool]:
        """Return the entries after a cursor, up to a page's end; the next cursor; and whether there are more.

        A cursor whose page is gone, or of another life of the router, counts as the oldest page's begin;
        None as the end: nothing has happened since.
        """
        if cursor is None:
            return b"", self._written + len(self._page), False
        oldest, end = self._pages[0][0], self._written + len(self._page)
        if not oldest <= cursor <= end:
            cursor = oldest
        begin, page = next(one for one in reversed(self._pages) if one[0] <= cursor)
        data = bytes(page[cursor - begin :])
        cursor += len(data)
        return data, cursor, cursor < end

    def answer(self, core: RouterCore, asked: dict[str, Any], now_ns: int) -> dict[str, Any]:
        """Return what a STATUS question asks for in `flight`, as JSON.

        Args:
            core: The router's.
            asked: `since`, a cursor, -1 for the oldest; absent, the end. `profiles`, whether to send them.
                `river`, whether to send the queue as a histogram.
            now_ns: The instant.
        """
        since = asked.get("since")
        data, cursor, has_more = self.after(since if isinstance(since, int) else None)
        found: dict[str, Any] = {
            "now_ns": now_ns,
            "since": since,
            "cursor": cursor,
            "more": has_more,
            "entries": b64encode(data).decode(),
            "gpus": [list(one) for one in self.gpus(core)],
        }
        if asked.get("profiles"):
            profiles, of_gpu = profiles_of(core)
            found["profiles"] = profiles
            found["profile_of"] = [of_gpu.get(one, 0) for one in self.gpus(core)]
        if asked.get("river"):
            found["river"] = river_of(core, now_ns)
            found["clients"] = [
                [serial, ok, missed] for serial, (ok, missed) in list(self.ok_of.items())[-_SHOWN_CLIENTS:]
            ]
        return found

    def gpus(self, core: RouterCore) -> list[tuple[str, int]]:
        """Return name and slot of each GPU, by the index that the entries use; idle ones too."""
        for worker in core.workers():
            self._gpu(worker)
        return list(self._names)


def profiles_of(core: RouterCore) -> tuple[list[dict[str, Any]], dict[tuple[str, int], int]]:
    """Return the GPUs' distinct profiles, and which one each GPU has."""
    places: dict[int, int] = {}
    found: list[dict[str, Any]] = []
    of_gpu: dict[tuple[str, int], int] = {}
    for worker in core.workers():
        place = places.get(id(worker.profile))
        if place is None:
            place = places[id(worker.profile)] = len(found)
            found.append(worker.profile.to_dict())
        of_gpu[worker.peer.name, worker.slot] = place
    return found, of_gpu


def river_of(core: RouterCore, now_ns: int) -> dict[str, Any]:
    """Return the queue as a histogram of the time to each query's deadline.

    Up to `_SAMPLED` messages are looked at; if more have queries that wait, evenly spread ones.

    Returns:
        `width_ms` of a bin, `counts` from 0 on, and `quickest_ms`: with less, a query cannot be served.
    """
    left: list[tuple[int, int]] = []
    cohorts = [cohort for client in core.clients.values() for cohort in client.cohorts.values()]
    step = -(-len(cohorts) // _SAMPLED) or 1
    for cohort in cohorts[::step]:
        left += _left(cohort, now_ns)
    longest_ms = max((slack_ns for slack_ns, _ in left), default=0) / MS
    width_ms = 1
    while width_ms * _RIVER_BINS <= longest_ms:
        width_ms *= 2
    counts = [0] * _RIVER_BINS
    width_ns = width_ms * MS
    for slack_ns, n in left:
        counts[max(0, slack_ns // width_ns)] += n
    seen = sum(counts)
    scale = len(core.queue) / seen if seen and step > 1 else 1.0
    return {
        "width_ms": width_ms,
        "counts": [round(n * scale) for n in counts],
        "quickest_ms": core.fleet.quickest_ns / MS,
    }


def _left(cohort: Cohort, now_ns: int) -> Iterator[tuple[int, int]]:
    """Yield the time to the deadline of a message's queries that wait, with how many have it."""
    deadlines_ns = cohort.deadlines_ns
    if len(deadlines_ns) == 1:
        if cohort.states[0] == QUEUED:
            yield deadlines_ns[0] - now_ns, 1
        return
    for lo, hi in queued_stretches(cohort, 0, len(deadlines_ns)):
        if deadlines_ns[hi - 1] - deadlines_ns[lo] < MS:  # most messages have one SLO
            yield deadlines_ns[lo] - now_ns, hi - lo
        else:
            for deadline_ns in deadlines_ns[lo:hi]:
                yield deadline_ns - now_ns, 1


def _stretch(stretch: Stretch) -> bytes:
    cohort, lo, hi = stretch
    floors, classes = cohort.floors, cohort.classes
    return waiting_bytes(
        cohort.client.serial, cohort.arrived_ns, cohort.base_ns,
        bytes(cohort.message.ids[8 * lo : 8 * hi]), cohort.deadlines_ns[lo:hi],
        None if floors is None else floors[lo:hi], None if classes is None else classes[lo:hi],
    )  # fmt: skip
