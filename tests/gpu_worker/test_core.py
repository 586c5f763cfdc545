"""The worker's core keeps its word whatever comes: credit, order, epochs, heartbeats, and nothing lost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.core import RefusedError, WorkerCore
from gpu_worker.core.batches import Outcome
from gpu_worker.core.link import DRAIN_TIMEOUT_NS, HEARTBEAT_NS, HELLO_EVERY_NS, SILENCE_NS, LinkState
from gpu_worker.core.played import MINUTE_NS, MOST_DRIFT, Pace, PlayedGpu, PlayedGpus
from gpu_worker.core.queue import CAPACITY, MAX_OUTSTANDING, GpuQueue
from profiles.table import load_profile
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError, WireError
from superserve.wire import Control, Done, Kind, Ping, Pong, Pull, PullRow, Status
from tests.effort import examples

if TYPE_CHECKING:
    from superserve.wire import DoneRow, Message

CNN = load_profile("cnn-8gpu-modelled")
N_GPUS = 2


@dataclass(frozen=True, slots=True)
class Order:
    """A batch as the core sees one."""

    epoch: int
    batch_id: int
    slot: int = 0
    subnet: int = 0
    n: int = 1


def all_ok(order: Order, _waited_ns: int) -> Outcome:
    """Let every query run."""
    return Outcome(order.n, 0, b"")


def make_core(now_ns: int = 0) -> WorkerCore[Order]:
    """Return the core of a process of two played GPUs."""
    gpus = PlayedGpus([PlayedGpu(CNN, all_ok) for _ in range(N_GPUS)])
    return WorkerCore(gpus, {"name": "w"}, now_ns)


def welcome(epoch: int, router: int = 77) -> Control:
    """Return a WELCOME of the router that calls itself so."""
    return Control(Kind.WELCOME, {"epoch": epoch, "router": router})


SAY_HELLO = Control(Kind.REFUSED, {"code": "say-hello"})
BYE = Control(Kind.BYE)


class Router:
    """What a router can derive from one worker process's messages, checked message by message."""

    def __init__(self) -> None:
        self.core = make_core()
        self.now_ns = 0
        self.n_epochs = 1
        self.n_sent = 0
        self.sent: dict[int, Order] = {}  # of the present epoch, and not answered
        self.last_ended = [0] * N_GPUS
        self.pinged_ns: int | None = None

    def send(self, slot: int, subnet: int, n: int) -> None:
        """Send a batch under the present epoch, with credit or without."""
        epoch = self.core.epoch
        self.n_sent += 1
        order = Order(0 if epoch is None else epoch, self.n_sent, slot, subnet, n)
        self.core.receive(order, self.now_ns)
        if epoch is not None and self.core.link is not LinkState.STOPPED:
            self.sent[order.batch_id] = order

    def say(self, message: Control) -> None:
        """Send a message that may end an epoch; its batches then belong to another epoch."""
        before = self.core.epoch
        self.core.receive(message, self.now_ns)
        self.pinged_ns = None  # each WELCOME is answered by a PING
        if self.core.epoch != before:
            self.sent.clear()
            self.last_ended = [0] * N_GPUS

    def poll(self) -> None:
        """Take the core's messages, and check each one."""
        for message in self.core.poll(self.now_ns):
            self.hear(message)

    def hear(self, message: Message) -> None:
        """Check one message."""
        if isinstance(message, Ping):
            assert self.pinged_ns is None or self.now_ns - self.pinged_ns >= HEARTBEAT_NS
            self.pinged_ns = self.now_ns
        if not isinstance(message, Done | Pull):
            return
        assert message.epoch == self.core.epoch, "an old epoch is over"
        for row in message.rows:
            self.check_row(row)

    def check_row(self, row: DoneRow | PullRow) -> None:
        """Check a report: credit is bounded, order is kept, and what runs is a batch of ours."""
        assert 0 <= row.credit <= CAPACITY
        assert row.credit + row.held + (row.running_batch > 0) <= max(CAPACITY, row.held + 1)
        assert 0 <= row.running_for_ns <= self.now_ns
        if not isinstance(row, PullRow):
            order = self.sent.pop(row.batch_id)  # raises for what was never sent, or has ended
            refused = row.statuses is not None
            assert refused or row.batch_id > self.last_ended[row.slot], "first in, first out"
            assert (row.slot, row.n) == (order.slot, order.n)
            if not refused:
                self.last_ended[row.slot] = row.batch_id
                assert row.executing_ns == CNN.latency_ns(order.subnet, order.n)
        if row.running_batch:
            assert self.sent[row.running_batch].slot == row.slot
        assert row.last_batch <= self.n_sent

    def run_dry(self) -> None:
        """Advance the clock by the core's own wake-ups until every batch has ended."""
        for _ in range(10_000):
            if self.core.link is LinkState.STOPPED or not (self.sent or self.core._gpus.next_event_ns()):
                return
            self.now_ns = max(self.now_ns + 1, self.core.next_due_ns())
            self.core.receive(Pong(0, 0), self.now_ns)
            self.poll()
        raise AssertionError("it never comes to rest")


SLOTS = st.integers(0, N_GPUS - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), SLOTS, st.integers(0, CNN.n_subnets), st.integers(1, 17)),
        st.tuples(st.just("pass"), st.integers(0, 300 * MS)),
        st.tuples(st.just("wait"), st.just(0)),
        st.tuples(st.just("welcome"), st.booleans()),
        st.tuples(st.sampled_from(["say hello", "bye", "lost", "stop", "ping"]), st.just(0)),
    ),
    max_size=60,
)  # fmt: skip


def play(router: Router, step: tuple[str | int, ...]) -> None:
    """Do one step."""
    what, *numbers = step
    match what:
        case "send":
            router.send(*map(int, numbers))
        case "pass":
            router.now_ns += int(numbers[0])
        case "wait":
            router.now_ns = max(router.now_ns, router.core.next_due_ns())
        case "welcome":
            router.n_epochs += bool(numbers[0])  # else the same again
            router.say(welcome(router.n_epochs))
        case "say hello":
            router.say(SAY_HELLO)
        case "bye":
            router.say(BYE)
        case "ping":
            pong = router.core.receive(Ping(7), router.now_ns)
            assert pong == (None if router.core.link is LinkState.STOPPED else Pong(7, router.now_ns))
        case "stop":
            router.core.stop(router.now_ns)
        case _:
            before = router.core.epoch
            router.core.lost("a send failed", router.now_ns)
            if router.core.epoch != before:
                router.sent.clear()


@settings(max_examples=examples(150), deadline=None)
@given(steps=STEPS)
def test_whatever_comes_the_core_keeps_its_word(steps: list[tuple[str | int, ...]]) -> None:
    """Each batch of the present epoch ends once and in order, credit is bounded, old epochs are silent."""
    router = Router()
    router.say(welcome(router.n_epochs))
    for step in steps:
        play(router, step)
        router.poll()
    router.run_dry()

    assert not router.sent or router.core.link in (LinkState.STOPPED, LinkState.DRAINING)


@given(gaps=st.lists(st.integers(0, 400 * MS), max_size=30))
def test_it_beats_as_often_as_it_promises(gaps: list[int]) -> None:
    """A host that polls when something is due hears a PING every 100 ms, whatever else happens."""
    core, now_ns, pings = make_core(), 0, []
    core.receive(welcome(1), 0)
    for batch_id, gap_ns in enumerate(gaps, 1):
        until_ns = now_ns + gap_ns
        while (due_ns := core.next_due_ns()) <= until_ns:
            pings += [due_ns for message in core.poll(due_ns) if isinstance(message, Ping)]
            now_ns = due_ns
        now_ns = until_ns
        core.receive(Order(1, batch_id), now_ns)

    assert pings == [i * HEARTBEAT_NS for i in range(len(pings))]
    assert now_ns - (pings[-1] if pings else 0) <= HEARTBEAT_NS


def test_a_report_says_what_runs_and_since_when() -> None:
    """It contains no end: 3 ms into the first of two batches it names both, and the first one's progress."""
    core = make_core()
    core.receive(welcome(1), 0)
    core.receive(Order(1, 1, subnet=5, n=16), 0)
    core.receive(Order(1, 2, subnet=5), 0)
    pull = next(one for one in core.poll(3 * MS) if isinstance(one, Pull))

    expected = [PullRow(0, 0, 1, 1, 2, 1, 3 * MS), PullRow(1, CAPACITY, 0, 0, 0, 0, 0)]
    assert repr(pull.rows) == repr(expected)  # gauges that are NaN do not equal themselves


def test_a_batch_of_an_older_epoch_is_not_named() -> None:
    """A new router may have the same number: the GPU is busy, with a credit less, and names no batch."""
    core = make_core()
    core.receive(welcome(1), 0)
    core.receive(Order(1, 5, subnet=5, n=16), 0)
    core.receive(welcome(2), MS)
    (row, _) = next(one for one in core.poll(2 * MS) if isinstance(one, Pull)).rows

    assert (row.credit, row.held, row.running, row.running_batch, row.running_for_ns) == (1, 0, 1, 0, 0)
    ends_ns = CNN.latency_ns(5, 16)
    after = core.poll(ends_ns)
    assert not [one for one in after if isinstance(one, Done)]
    assert [row.credit for one in after if isinstance(one, Pull) for row in one.rows] == [CAPACITY] * 2


def test_a_restarted_router_that_gives_the_same_epoch_is_another_one() -> None:
    """Routers count epochs and batches from 1: what the one before had sent is dropped, or ends unheard."""
    core = make_core()
    core.receive(welcome(1, router=7), 0)
    for batch_id in (1, 2):
        core.receive(Order(1, batch_id, subnet=5, n=16), 0)
    core.receive(welcome(1, router=8), MS)
    core.receive(Order(1, 1), MS)

    ends_ns = CNN.latency_ns(5, 16) + CNN.latency_ns(0, 1)
    rows = [row for one in core.poll(ends_ns) if isinstance(one, Done) for row in one.rows]
    assert [(row.batch_id, row.n, row.last_batch) for row in rows] == [(1, 1, 1)]


def test_it_says_hello_until_it_is_welcomed_and_to_a_silent_router() -> None:
    """Every 200 ms while it joins; once welcomed, after two seconds of silence, every second or so."""
    core, hellos = make_core(), []
    for now_ns in range(0, SECOND, 10 * MS):
        hellos += [now_ns for one in core.poll(now_ns) if one.kind is Kind.HELLO]
    assert hellos == list(range(0, SECOND, HELLO_EVERY_NS))

    core.receive(welcome(1), SECOND)
    greeted = [
        now_ns
        for now_ns in range(SECOND, 6 * SECOND, 10 * MS)
        for one in core.poll(now_ns)
        if one.kind is Kind.HELLO
    ]
    assert greeted[0] == SECOND + SILENCE_NS + 10 * MS
    assert [after - before for before, after in pairwise(greeted)] == [SECOND, SECOND]


def test_a_drain_gives_no_credit_and_ends_with_the_router_or_in_time() -> None:
    """It reports the drain, offers nothing, and goes with the router's BYE, or after four seconds without."""
    for is_told in (True, False):
        core = make_core()
        core.receive(welcome(1), 0)
        core.receive(Order(1, 1), 0)
        core.stop(0)
        said = core.poll(0)
        assert [one.kind for one in said] == [Kind.DRAIN, Kind.PING, Kind.PULL]
        (done,) = [one for one in core.poll(CNN.latency_ns(0, 1)) if isinstance(one, Done)]
        assert [row.credit for row in done.rows] == [0]
        if is_told:
            core.receive(BYE, 10 * MS)
        else:
            core.receive(Pong(0, 0), DRAIN_TIMEOUT_NS - MS)
            core.poll(DRAIN_TIMEOUT_NS)
        assert core.link is LinkState.STOPPED
        assert core.goodbye() == Control(Kind.BYE, {"worker": "w"})


def test_what_no_gpu_can_run_is_answered_at_once() -> None:
    """A subnet or a size that the profile lacks is FAILED, a batch beyond every credit OVERLOADED."""
    core = make_core()
    core.receive(welcome(1), 0)
    core.receive(Order(1, 1, subnet=99), 0)
    core.receive(Order(1, 2, n=17), 0)
    for batch_id in range(3, 3 + MAX_OUTSTANDING + 1):
        core.receive(Order(1, batch_id), 0)
    (done,) = [one for one in core.poll(0) if isinstance(one, Done)]

    found = {row.batch_id: row.statuses for row in done.rows}
    assert found == {
        1: bytes([Status.FAILED]),
        2: bytes([Status.FAILED]) * 17,
        3 + MAX_OUTSTANDING: bytes([Status.OVERLOADED]),
    }
    with pytest.raises(WireError, match="slot: expected 0 to 1, got 2"):
        core.receive(Order(1, 50, slot=2), 0)


def test_a_router_that_will_not_have_it_ends_it() -> None:
    """REFUSED for any reason but an old epoch raises, with the router's words."""
    with pytest.raises(RefusedError, match="profile: other subnets"):
        make_core().receive(Control(Kind.REFUSED, {"code": "profile", "reason": "other subnets"}), 0)


def test_a_queue_starts_the_next_batch_when_it_is_there_and_the_one_before_has_ended() -> None:
    """Back to back if it waited, at once if it came later."""
    queue: GpuQueue[Order] = GpuQueue()
    for batch_id, received_ns in ((1, 0), (2, 5)):
        queue.take(Order(1, batch_id), received_ns)
    second = queue.end(70)
    assert second is not None
    assert second.started_ns == 70
    assert queue.end(90) is None
    third = queue.take(Order(1, 3), 100)
    assert third is not None
    assert (queue.running, third.started_ns) == (third, 100)


@given(speed=st.floats(0.1, 10), drift=st.floats(-1, 1), minutes=st.floats(0, 100))
def test_a_pace_is_what_it_says_within_its_bounds(speed: float, drift: float, minutes: float) -> None:
    """Speed changes by its share a minute, and by no more than four times in all."""
    pace = Pace(speed, drift, began_ns=SECOND)
    at_ns = SECOND + int(minutes * MINUTE_NS)
    share = min(MOST_DRIFT, max(1 / MOST_DRIFT, 1 + drift * (at_ns - SECOND) / MINUTE_NS))

    assert pace.slowness(SECOND) == pytest.approx(1 / speed)
    assert pace.slowness(at_ns) == pytest.approx(1 / (speed * share))


@pytest.mark.parametrize(
    ("speed", "drift"), [(0.0, 0.0), (-1.0, 0.0), (101.0, 0.0), (1.0, 1.5), (1.0, float("nan"))]
)
def test_a_pace_out_of_range_is_refused(speed: float, drift: float) -> None:
    """Neither a GPU that never ends a batch nor one that is done before it began."""
    with pytest.raises(ConfigError, match="expected"):
        Pace(speed, drift)
