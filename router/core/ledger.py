"""The ledger: every query from its arrival to its end, and the only place where one ends.

    QUEUED -> DISPATCHED -> OK | LATE | FAILED | ...      (`finish`)
       |           +------> QUEUED | WORKER_LOST          (`lose`, `rescue`)
       +-> EXPIRED | INFEASIBLE | CANCELLED | ...         (`refuse`, `cancel`, `abandon`)

Always: received = answered + queued + in flight.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from router.core.edf import ANSWERED, DISPATCHED, QUEUED, EdfQueue, state_stretches
from router.core.estimates import RecentQuantiles
from router.core.events import Action, Answer, Dispatch, Ran
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from router.core.edf import Cohort
    from router.core.events import Key
    from router.core.model import Model
    from router.core.workers import Batch
    from superserve.wire import DoneRow


_SAMPLE_EVERY_NS = 2 * MS
"""A client's transit is sampled at most this often: a drained backlog must not fill the window
with one bad moment."""
_ENOUGH_SAMPLES = 100
"""From this many messages on, a client's own 99th percentile means something: below, it is the maximum."""


class ClientState:
    """A connected application and the cohorts that it waits for. `key` is None once it has left.

    Args:
        key: Its connection.
        session: Its own identifier, the same on every connection.
        serial: Its number on this router, ascending.
        of_all: The transits of all clients' messages.
    """

    __slots__ = ("cohorts", "key", "of_all", "sampled_ns", "serial", "session", "transits")

    def __init__(self, key: Key, session: int, serial: int, of_all: RecentQuantiles) -> None:
        self.key: Key | None = key
        self.serial = serial
        self.session = session
        self.of_all = of_all
        self.cohorts: dict[int, Cohort] = {}
        self.transits = RecentQuantiles([0] * 8)
        self.sampled_ns = 0

    def sample_transit(self, transit_ns: int, now_ns: int) -> bool:
        """Record how long a message was under way, unless the last sample is recent."""
        if now_ns - self.sampled_ns < _SAMPLE_EVERY_NS:
            return False
        self.sampled_ns = now_ns
        self.transits.add(max(0, transit_ns))
        return True

    @property
    def return_ns(self) -> int:
        """The usual time of an answer to reach the client: as long as its queries took."""
        return self.transits.median_ns

    def return_bound_ns(self, differ_ns: int) -> int:
        """Nearly the worst time of an answer to reach the client.

        The 99th percentile of a few messages is the slowest of them, and one client of a thousand
        sends few. Until it has sent a hundred, it gets the spread of all clients' transits, or that of the
        ways to workers: where those jitter, so will these. Without that, spikes whose messages jitter by 3 ms
        lose 1 query in 1,000.

        Args:
            differ_ns: By how much ways to a worker differ.
        """
        transits = self.transits
        if len(transits) >= _ENOUGH_SAMPLES:
            return transits.bound_ns()
        spread_ns = self.of_all.bound_ns() - self.of_all.median_ns
        return transits.median_ns + max(differ_ns, spread_ns)


class Ledger:
    """The queries that wait or are in flight, how queries ended, and the counts that must agree.

    Args:
        model: What the queries ask for; the ledger uses its queue.

    Attributes:
        actions: What to do since the host last took them, in order. The fleet adds to them too.
        batches: Batches in flight, by id.
        received: Queries that arrived, except those sent again whose first copy has no answer yet.
        in_flight: Queries that are DISPATCHED.
        held_bytes: Payload bytes of messages with a query that has not ended.
        answered: Queries that ended, by `Status`.
        n_batches: Batches dispatched so far; also the id of the last one.
        n_redispatched: Queries queued a second time.
        payload_bytes_in: Payload bytes of all messages that arrived.
        output_bytes: Bytes of all outputs that workers sent.
        ok_accuracy: Percent, summed over the queries that ended OK.
        busy_ns: Time that GPUs executed batches, as they report it.
        n_executed: Queries in those batches.
    """

    __slots__ = (
        "actions", "answered", "batches", "busy_ns", "held_bytes", "in_flight", "model", "n_batches",
        "n_executed", "n_redispatched", "ok_accuracy", "output_bytes", "payload_bytes_in", "received",
    )  # fmt: skip

    def __init__(self, model: Model) -> None:
        self.model = model
        self.actions: list[Action] = []
        self.batches: dict[int, Batch] = {}
        self.received = 0
        self.in_flight = 0
        self.held_bytes = 0
        self.answered = [0] * len(Status)
        self.n_batches = 0
        self.n_redispatched = 0
        self.payload_bytes_in = 0
        self.output_bytes = 0
        self.ok_accuracy = 0.0
        self.busy_ns = 0
        self.n_executed = 0

    @property
    def queue(self) -> EdfQueue:
        """The queries that wait."""
        return self.model.queue

    @property
    def n_answered(self) -> int:
        """Queries that got their terminal answer."""
        return sum(self.answered)

    def check(self) -> None:
        """Assert conservation; cheap enough for every step of a test."""
        assert self.received == self.n_answered + len(self.queue) + self.in_flight, (
            f"received {self.received}, answered {self.n_answered}, queued {len(self.queue)}, "
            f"in flight {self.in_flight}"
        )

    def take_actions(self) -> list[Action]:
        """Return the actions to carry out, in order, and start a new list."""
        actions, self.actions = self.actions, []
        return actions

    # --- from arrival to dispatch -----------------------------------------------------------

    def receive(self, n: int, n_bytes: int) -> None:
        """Count a message's queries and payload bytes, whether or not they are admitted."""
        self.received += n
        self.payload_bytes_in += n_bytes

    def hold(self, client: ClientState, cohort: Cohort, n_bytes: int) -> None:
        """Keep a cohort for its client until its last query ends, and count its bytes as held.

        Call it before any of its queries can end: the last one to end gives the bytes back.
        """
        client.cohorts[cohort.serial] = cohort
        cohort.n_bytes = n_bytes
        self.held_bytes += n_bytes

    def dispatch(self, batch: Batch) -> None:
        """Put a batch in flight: its queries have left the queue, and its id is the next one."""
        batch_id = batch.batch_id
        self.n_batches += 1
        assert batch_id == self.n_batches, "batches are numbered in the order of dispatch"
        for cohort, lo, hi in batch.stretches:
            if hi - lo == 1:
                cohort.states[lo] = DISPATCHED
            else:
                cohort.states[lo:hi] = b"\x01" * (hi - lo)
            # Dispatched twice, two batches have the query; its state byte does not show which counts.
            if cohort.holders is not None:
                cohort.holders.update(dict.fromkeys(range(lo, hi), batch_id))
        self.in_flight += batch.n
        self.batches[batch_id] = batch
        self.actions.append(Dispatch(batch))

    # --- ends without a worker's report -----------------------------------------------------

    def refuse(
        self, cohort: Cohort, lo: int, hi: int, status: Status, reason: str, now_ns: int | None = None
    ) -> None:
        """End queries lo to hi without an output.

        They must already be out of the queue's and the flight's counts. `now_ns` shows how long
        they were queued; without it they never were.
        """
        self._close(cohort, lo, hi, status)
        queued_ns = 0 if now_ns is None else now_ns - cohort.arrived_ns
        key = cohort.client.key
        if key is not None:
            # Positional, as in `_end`: in overload most queries end here.
            self.actions.append(Answer(key, cohort, lo, hi, hi - lo, status, queued_ns, None, 0, reason))

    def cancel(self, cohort: Cohort, i: int, now_ns: int) -> None:
        """End one query at its client's request; one that has ended stays as it is."""
        if cohort.states[i] != ANSWERED:
            self._leave_state(cohort, i)
            self.refuse(cohort, i, i + 1, Status.CANCELLED, "cancelled by the client", now_ns)

    def abandon(self, client: ClientState) -> None:
        """End the queued queries of a client that left, without an answer; batches in flight run on."""
        for cohort in tuple(client.cohorts.values()):
            for lo, hi in tuple(state_stretches(cohort, 0, len(cohort.states), QUEUED)):
                self.queue.forget(cohort, lo, hi)
                self._close(cohort, lo, hi, Status.CANCELLED)

    def lose(self, batch: Batch, quickest_ns: int, now_ns: int) -> None:
        """Give up a batch: queue its queries again, once, if slack is left; else they end WORKER_LOST.

        Args:
            batch: Its worker has lost it, or will not answer it.
            quickest_ns: The quickest answer of any worker: with less slack a query cannot be served.
            now_ns: This instant.
        """
        del self.batches[batch.batch_id]
        name = f"{batch.worker.peer.name}:{batch.worker.slot}"
        for cohort, lo, hi in batch.stretches:
            for i in range(lo, hi):
                if cohort.states[i] != DISPATCHED or _holder(cohort, i, batch) != batch.batch_id:
                    continue
                # Only once: a query that crashes its worker must not crash every worker in turn.
                losses = cohort.losses = cohort.losses or {}
                losses[i] = losses.get(i, 0) + 1
                has_slack = cohort.deadlines_ns[i] >= now_ns + quickest_ns
                if losses[i] == 1 and has_slack and cohort.client.key is not None:
                    self._requeue(cohort, i)
                    continue
                self.in_flight -= 1
                why = "no slack was left" if not has_slack else "so did the one before it"
                self.refuse(cohort, i, i + 1, Status.WORKER_LOST, f"worker {name} was lost and {why}", now_ns)

    def rescue(self, batch: Batch, quickest_ns: int, now_ns: int) -> None:
        """Queue an overrun batch's queries again if slack is left; the first answer wins."""
        for cohort, lo, hi in batch.stretches:
            if cohort.client.key is None:
                continue
            for i in range(lo, hi):
                if (
                    cohort.states[i] == DISPATCHED
                    and _holder(cohort, i, batch) == batch.batch_id
                    and cohort.deadlines_ns[i] >= now_ns + quickest_ns
                ):
                    self._requeue(cohort, i)

    def _requeue(self, cohort: Cohort, i: int) -> None:
        holders = cohort.holders = cohort.holders or {}
        holders[i] = None
        cohort.states[i] = QUEUED
        self.in_flight -= 1
        self.n_redispatched += 1
        self.queue.push(cohort, i, i + 1)

    # --- ends by a worker's report ----------------------------------------------------------

    def finish(self, batch: Batch, row: DoneRow, transport_ns: int, now_ns: int) -> None:
        """Answer a batch's queries from its worker's report.

        Args:
            batch: The batch, in flight until now.
            row: The report.
            transport_ns: How long the batch and its report were under way, together.
            now_ns: This instant.
        """
        del self.batches[batch.batch_id]
        self.busy_ns += row.executing_ns
        self.n_executed += batch.n
        self.output_bytes += len(row.output)
        outbound_ns = transport_ns // 2  # clocks of two hosts are never compared: assume equal ways
        # Positional, as in `_end`.
        ran = Ran(
            row, batch.subnet, batch.n, batch.worker.profile.subnets[batch.subnet].accuracy,
            outbound_ns + row.waited_ns, row.executing_ns, transport_ns - outbound_ns,
        )  # fmt: skip
        at = 0
        for cohort, lo, hi in batch.stretches:
            if cohort.holders is None and cohort.states.count(DISPATCHED, lo, hi) == hi - lo:
                self.in_flight -= hi - lo
                self._answer(batch, ran, cohort, lo, hi, at, now_ns)
            else:
                self._answer_remaining(batch, ran, cohort, lo, hi, at, now_ns)
            at += hi - lo

    def _answer_remaining(
        self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int
    ) -> None:
        """Answer those of lo to hi without an answer: the first one wins."""
        for i in range(lo, hi):
            if cohort.states[i] != ANSWERED:
                self._leave_state(cohort, i)
                self._answer(batch, ran, cohort, i, i + 1, at + i - lo, now_ns)

    def _answer(self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int) -> None:
        """End queries lo to hi, which begin at index `at` in the batch, as reported."""
        queued_ns = batch.dispatched_ns - cohort.arrived_ns
        # LATE is judged at the client: an answer that leaves in time can still arrive too late.
        arrives_ns = now_ns + cohort.client.return_ns
        statuses = ran.row.statuses
        if statuses is None and cohort.deadlines_ns[lo] >= arrives_ns:
            self._end(ran, cohort, lo, hi, Status.OK, at, queued_ns)
            return
        # Deadlines in a stretch ascend: those before the cut are late.
        late = bisect_left(cohort.deadlines_ns, arrives_ns, lo, hi)
        if statuses is None:
            self._end(ran, cohort, lo, late, Status.LATE, at, queued_ns)
            if late < hi:
                self._end(ran, cohort, late, hi, Status.OK, at + late - lo, queued_ns)
            return
        for i, byte in enumerate(statuses[at : at + hi - lo], lo):
            status = _worker_status(byte, late=i < late)
            self._end(ran, cohort, i, i + 1, status, at + i - lo, queued_ns)

    def _end(
        self, ran: Ran, cohort: Cohort, lo: int, hi: int, status: Status, at: int, queued_ns: int
    ) -> None:
        self._close(cohort, lo, hi, status)
        if status is Status.OK:
            self.ok_accuracy += ran.accuracy * (hi - lo)
        key = cohort.client.key
        if key is None:
            return
        actions = self.actions
        last = actions[-1] if actions else None
        if (
            isinstance(last, Answer)
            and last.ran is ran
            and last.client == key
            and last.status is status
            and last.at + last.n == at
            and ran.row.statuses is None
        ):  # continues the last answer, with the same end: one group of RESULTS instead of two
            if last.more is None:
                last.more = []
            last.more.append((cohort, lo, hi))
            last.n += hi - lo
            return
        # Positional: most queries cost one of these, and with keywords it takes 1.1 us instead of 0.5.
        actions.append(Answer(key, cohort, lo, hi, hi - lo, status, queued_ns, ran, at))

    def _close(self, cohort: Cohort, lo: int, hi: int, status: Status) -> None:
        """End queries lo to hi, which are already out of the queue's and the flight's counts."""
        n = hi - lo
        if n == 1:
            cohort.states[lo] = ANSWERED
        else:
            cohort.states[lo:hi] = b"\x02" * n
        cohort.live -= n
        self.answered[status] += n
        # Payloads are slices of the message, so all its bytes stay in memory until its last query ends.
        if cohort.live == 0 and cohort.client.cohorts.pop(cohort.serial, None) is not None:
            self.held_bytes -= cohort.n_bytes

    def _leave_state(self, cohort: Cohort, i: int) -> None:
        """Remove one unanswered query from the count that includes it."""
        if cohort.states[i] == QUEUED:
            self.queue.forget(cohort, i, i + 1)
        else:
            self.in_flight -= 1


def _holder(cohort: Cohort, i: int, batch: Batch) -> int | None:
    return batch.batch_id if cohort.holders is None else cohort.holders.get(i, batch.batch_id)


def _worker_status(byte: int, *, late: bool) -> Status:
    status = Status(byte)
    return Status.LATE if late and status is Status.OK else status
