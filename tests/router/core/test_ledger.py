"""The ledger alone: counts that agree, one end for each query, bytes given back."""

from __future__ import annotations

from itertools import count

import pytest

from router.core.edf import ANSWERED, DISPATCHED, QUEUED, Cohort
from router.core.estimates import RecentQuantiles
from router.core.events import Answer, Dispatch
from router.core.ledger import ClientState, Ledger
from router.core.model import Model
from router.core.workers import Batch, Peer, Worker
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.wire import DoneRow, Status
from tests.router.core.harness import CNN, START_NS, make_queries

QUICKEST_NS = 2 * MS
OK, LATE, LOST = Status.OK, Status.LATE, Status.WORKER_LOST


class Desk:
    """A ledger with one client and one GPU."""

    def __init__(self) -> None:
        self.model = Model(SlackFit)
        self.ledger = Ledger(self.model)
        self.client = ClientState("client", 1, 1, RecentQuantiles([0] * 8))
        self.worker = Worker(Peer("w", "host", 1, START_NS), 0, CNN, SlackFit(CNN), START_NS)
        self._serials = count(1)

    def arrive(self, *slacks_ms: float) -> Cohort:
        """Enter a message of queries, 8 bytes each."""
        slacks_ns = [round(slack * MS) for slack in slacks_ms]
        message = make_queries(range(len(slacks_ns)), slacks_ns)
        deadlines_ns = [START_NS + slack for slack in slacks_ns]
        serial = next(self._serials)
        cohort = Cohort(serial, self.client, deadlines_ns, START_NS, START_NS, message=message)
        self.ledger.receive(len(slacks_ns), message.n_bytes())
        self.ledger.hold(self.client, cohort, message.n_bytes())
        self.model.queue.push(cohort, 0, len(slacks_ns))
        return cohort

    def send(self, n: int, now_ns: int = START_NS) -> Batch:
        """Dispatch the n earliest queries on the smallest subnet."""
        stretches, n = self.model.queue.take(n, 0)
        batch = Batch(
            batch_id=self.ledger.n_batches + 1, worker=self.worker, subnet=0, n=n, stretches=stretches,
            dispatched_ns=now_ns, begin_ns=now_ns, profiled_ns=MS, limit_ns=10 * MS,
        )  # fmt: skip
        self.ledger.dispatch(batch)
        return batch

    def report(self, batch: Batch, after_ms: float, statuses: bytes | None = None) -> None:
        """Have a batch's report come in, of 2 ms of GPU time and 1 ms of transport."""
        row = DoneRow(
            batch.batch_id, 0, 2, 0, batch.n, waited_ns=0, executing_ns=2 * MS, last_batch=batch.batch_id,
            running_batch=0, running_for_ns=0, output_bytes=4, output=bytes(4 * batch.n), statuses=statuses,
        )  # fmt: skip
        self.ledger.finish(batch, row, MS, START_NS + round(after_ms * MS))

    def answers(self) -> list[Answer]:
        """Return the answers since the last time; whatever was done, the counts agree."""
        self.ledger.check()
        return [action for action in self.ledger.take_actions() if isinstance(action, Answer)]


def test_a_batch_goes_out_and_its_queries_end() -> None:
    """Queued, in flight, answered: each query is in one count at a time, and the bytes come back."""
    desk = Desk()
    cohort = desk.arrive(36, 36, 36)
    ledger = desk.ledger
    assert (len(ledger.queue), ledger.in_flight, ledger.held_bytes) == (3, 0, 24)

    batch = desk.send(2)
    assert [type(action) for action in ledger.take_actions()] == [Dispatch]
    assert (len(ledger.queue), ledger.in_flight, ledger.n_batches) == (1, 2, 1)
    assert list(cohort.states) == [DISPATCHED, DISPATCHED, QUEUED]
    assert ledger.batches == {1: batch}

    desk.report(batch, after_ms=5)
    (answer,) = desk.answers()
    assert (answer.status, answer.n, answer.lo, answer.hi) == (OK, 2, 0, 2)
    assert (ledger.in_flight, ledger.answered[OK], ledger.batches) == (0, 2, {})
    assert (ledger.busy_ns, ledger.n_executed, ledger.output_bytes) == (2 * MS, 2, 8)
    assert ledger.ok_accuracy == pytest.approx(2 * CNN.subnets[0].accuracy)
    assert ledger.held_bytes == 24  # one query waits yet

    desk.report(desk.send(1), after_ms=9)
    assert (ledger.held_bytes, desk.client.cohorts) == (0, {})


def test_an_answer_that_comes_after_the_deadline_is_late() -> None:
    """Of one batch, those due before the report are LATE and the rest OK, each with its place."""
    desk = Desk()
    desk.arrive(5, 10, 20)
    desk.report(desk.send(3), after_ms=10.5)

    assert [(a.status, a.lo, a.hi, a.at) for a in desk.answers()] == [(LATE, 0, 2, 0), (OK, 2, 3, 2)]


def test_statuses_of_a_report_are_its_queries() -> None:
    """FAILED stays so; an OK that comes too late is LATE."""
    desk = Desk()
    desk.arrive(5, 20, 20)
    desk.report(desk.send(3), after_ms=10, statuses=bytes([OK, Status.FAILED, OK]))

    assert [a.status for a in desk.answers()] == [LATE, Status.FAILED, OK]


def test_what_ends_alike_side_by_side_is_one_answer() -> None:
    """Two messages of a client in one batch are answered as one group; what lies between parts them."""
    desk = Desk()
    first, second = desk.arrive(36, 36), desk.arrive(36)
    desk.report(desk.send(3), after_ms=5)
    (answer,) = desk.answers()
    assert answer.stretches == [(first, 0, 2), (second, 0, 1)]
    assert answer.n == 3

    desk.arrive(36, 36, 36)
    batch = desk.send(3)
    desk.ledger.cancel(batch.stretches[0][0], 1, START_NS)
    assert [a.status for a in desk.answers()] == [Status.CANCELLED]
    desk.report(batch, after_ms=5)
    assert [(a.status, a.at, a.n) for a in desk.answers()] == [(OK, 0, 1), (OK, 2, 1)]


def test_a_lost_batch_is_queued_once_more_and_then_ends() -> None:
    """Its queries run again if slack is left; lost twice they end, with the reason."""
    desk = Desk()
    desk.arrive(1, 36)
    desk.ledger.lose(desk.send(2), QUICKEST_NS, START_NS)
    (answer,) = desk.answers()
    assert (answer.status, answer.lo) == (LOST, 0)
    assert "host:0 was lost and no slack was left" in answer.reason
    assert (len(desk.ledger.queue), desk.ledger.n_redispatched, desk.ledger.batches) == (1, 1, {})

    desk.ledger.lose(desk.send(2), QUICKEST_NS, START_NS)
    (answer,) = desk.answers()
    assert (answer.status, answer.lo) == (LOST, 1)
    assert "so did the one before it" in answer.reason
    assert len(desk.ledger.queue) == 0


def test_of_a_rescued_batch_the_first_answer_wins() -> None:
    """Both workers answer: each query ends once, by whichever report came first."""
    desk = Desk()
    cohort = desk.arrive(1, 900, 900)
    slow = desk.send(3)
    desk.ledger.rescue(slow, QUICKEST_NS, START_NS)
    assert list(cohort.states) == [DISPATCHED, QUEUED, QUEUED]  # the first has no slack left
    quick = desk.send(1)

    desk.report(quick, after_ms=20)
    assert [(a.status, a.lo) for a in desk.answers()] == [(OK, 1)]
    desk.report(slow, after_ms=30)
    assert [(a.status, a.lo) for a in desk.answers()] == [(LATE, 0), (OK, 2)]
    assert list(cohort.states) == [ANSWERED] * 3
    assert (desk.ledger.received, desk.ledger.n_answered) == (3, 3)


def test_a_batch_lost_after_its_rescue_loses_only_what_it_still_holds() -> None:
    """What is queued again or held by another batch is not lost with the first."""
    desk = Desk()
    desk.arrive(900, 900)
    slow = desk.send(2)
    desk.ledger.rescue(slow, QUICKEST_NS, START_NS)
    quick = desk.send(1)
    desk.ledger.lose(slow, QUICKEST_NS, START_NS)
    assert not desk.answers()
    assert desk.ledger.n_redispatched == 2

    desk.report(quick, after_ms=5)
    assert [(a.status, a.n) for a in desk.answers()] == [(OK, 1)]


def test_a_client_that_left_is_not_answered() -> None:
    """Its queued queries end at once, those in flight with their batch, and nothing is sent."""
    desk = Desk()
    desk.arrive(36, 36, 36)
    batch = desk.send(1)
    desk.client.key = None
    desk.ledger.abandon(desk.client)
    assert (len(desk.ledger.queue), desk.ledger.answered[Status.CANCELLED]) == (0, 2)

    desk.report(batch, after_ms=5)
    assert not desk.answers()
    assert (desk.ledger.n_answered, desk.ledger.held_bytes) == (3, 0)


def test_a_query_is_cancelled_once() -> None:
    """Queued or in flight it ends at once; one that has ended stays as it is."""
    desk = Desk()
    cohort = desk.arrive(36, 36)
    desk.send(1)
    for i in (0, 1, 1):
        desk.ledger.cancel(cohort, i, START_NS + 3 * MS)

    found = desk.answers()
    assert [(a.status, a.lo, a.queued_ns) for a in found] == [
        (Status.CANCELLED, 0, 3 * MS),
        (Status.CANCELLED, 1, 3 * MS),
    ]
    assert desk.ledger.in_flight == len(desk.ledger.queue) == 0


def test_counts_that_disagree_are_noticed() -> None:
    """`check` names all of them."""
    desk = Desk()
    desk.arrive(36)
    desk.ledger.in_flight += 1

    with pytest.raises(AssertionError, match="received 1, answered 0, queued 1, in flight 1"):
        desk.ledger.check()
