"""Credits move to another router and back: one at a time, acknowledged, and never to two at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gpu_worker.core import WorkerCore
from gpu_worker.core.batches import Outcome
from gpu_worker.core.lending import ANSWER_NS, STAY_NS, UNUSED_NS, Lender, LendingSettings
from gpu_worker.core.link import LinkState
from gpu_worker.core.played import PlayedGpu, PlayedGpus
from profiles.table import load_profile
from superserve.clock import MS
from superserve.wire import Control, Done, Kind, Message, Ping, Pong, Pull, PullRow

CNN = load_profile("cnn-8gpu-modelled")
OWN, OTHER = 0, 1
AT_ONCE = LendingSettings(step=1.0)


@dataclass(slots=True)
class Order:
    """A batch as the core sees one."""

    epoch: int
    batch_id: int
    slot: int = 0
    subnet: int = 0
    n: int = 1


class Worker:
    """A worker process of one GPU that belongs to router 0, and what it says to both routers."""

    def __init__(self, settings: LendingSettings = AT_ONCE, n_gpus: int = 1) -> None:
        self.now_ns = 0
        gpus: PlayedGpus[Order] = PlayedGpus(
            [PlayedGpu(CNN, lambda order, _: Outcome(order.n, 0, b"")) for _ in range(n_gpus)]
        )
        hello = {"name": "w", "shared": True}
        self.core: WorkerCore[Order] = WorkerCore(gpus, hello, 0)
        self.lender = Lender(self.core, gpus, hello, settings)
        self.core.receive(Control(Kind.WELCOME, {"epoch": 7}), 0)
        self.prices = {OTHER: 1.0}

    def say(self, message: Control | Ping | Pong | Order, router: int = OTHER) -> None:
        """Take a router's message."""
        if router == OWN:
            self.core.receive(message, self.now_ns)
        else:
            self.lender.receive(router, message, self.now_ns)

    def run(self, for_ns: int = 0) -> list[tuple[int, Message]]:
        """Let time pass, then return what it says, and to whom."""
        self.now_ns += for_ns
        self.lender.turn(OWN, self.prices, self.now_ns)
        said = [(OWN, message) for message in self.core.poll(self.now_ns)]
        return said + self.lender.poll(self.now_ns)

    def link(self) -> LinkState:
        """Return the state of its link to its router."""
        return self.core.link

    def visit(self, price: float = 1.0, own_price: float = 0.0) -> None:
        """Become a guest at the other router, and hear both prices."""
        self.run()
        self.say(Pong(0, 0, own_price), OWN)
        hello = kinds(self.run(), OTHER)
        assert hello == [Kind.HELLO]
        self.say(Control(Kind.WELCOME, {"epoch": 3}))
        self.run()
        self.say(Pong(self.now_ns, 0, price))

    def recall(self) -> int:
        """Return the stamp of the PING behind a recall, which must be the next thing it says."""
        said = self.run()
        assert [row.credit for row in rows(said, OWN)] == [0]
        assert not rows(said, OTHER), "nothing is offered before its router knows"
        return pinged(said, OWN)

    def lend(self) -> None:
        """Lend the credit."""
        self.visit()
        self.say(Pong(self.recall(), 0, 0.0), OWN)
        assert [row.credit for row in rows(self.run(), OTHER)] == [1]


def kinds(said: list[tuple[int, Message]], router: int) -> list[Kind]:
    """Return the kinds of what was said to a router."""
    return [message.kind for to, message in said if to == router]


def rows(said: list[tuple[int, Message]], router: int) -> list[PullRow]:
    """Return the rows of PULLs to a router."""
    return [row for to, message in said if to == router and isinstance(message, Pull) for row in message.rows]


def pinged(said: list[tuple[int, Message]], router: int) -> int:
    """Return the stamp of the last PING to a router."""
    return [message.stamp_ns for to, message in said if to == router and isinstance(message, Ping)][-1]


def test_a_credit_is_lent_once_its_router_knows_that_it_is_recalled() -> None:
    """The PULL of a recall comes first, its PING's PONG is awaited, and only then is the credit offered."""
    worker = Worker()
    worker.visit()
    stamp_ns = worker.recall()
    worker.say(Pong(stamp_ns + 1_000, 0, 0.0), OWN)  # that of another PING

    assert not rows(worker.run(), OTHER)
    worker.say(Pong(stamp_ns, 0, 0.0), OWN)
    said = worker.run()

    assert [row.credit for row in rows(said, OTHER)] == [1]
    assert worker.lender.counts == (1, 0, 0)


def test_a_guest_says_so_and_asks_for_no_shared_memory() -> None:
    """It is a guest's HELLO, and payloads of another router's clients come in messages."""
    worker = Worker()
    worker.run()
    worker.say(Pong(0, 0, 0.0), OWN)

    (hello,) = [message for to, message in worker.run() if to == OTHER]

    assert isinstance(hello, Control)
    assert hello.body == {"name": "w", "guest": True}


def test_a_lent_batch_is_reported_to_the_router_that_sent_it() -> None:
    """The credit is the own router's again as soon as that batch runs; each hears of its own batches only."""
    worker = Worker()
    worker.lend()
    worker.say(Order(3, 1))

    said = worker.run()
    row, _ = rows(said, OWN)  # and the next recall
    assert (row.credit, row.running_batch, row.last_batch) == (1, 0, 0)
    assert row.running_for_ns == -CNN.latency_ns(0, 1), "it says how long the other's batch will run"
    worker.say(Order(7, 1), OWN)
    said = worker.run(CNN.latency_ns(0, 1))
    done = [(to, message) for to, message in said if isinstance(message, Done)]

    assert [(to, message.epoch, message.rows[0].batch_id) for to, message in done] == [(OTHER, 3, 1)]
    said = worker.run(CNN.latency_ns(0, 1))
    done = [(to, message) for to, message in said if isinstance(message, Done)]
    assert [(to, message.epoch) for to, message in done] == [(OWN, 7)]


def test_a_lent_credit_waits_behind_the_batch_that_runs() -> None:
    """The other router is told when the GPU is free; then that holds two batches, and no credit is left."""
    worker = Worker()
    worker.visit()
    worker.say(Order(7, 1), OWN)
    worker.say(Pong(worker.recall(), 0, 0.0), OWN)
    (row,) = rows(worker.run(), OTHER)
    assert row.running_for_ns == -CNN.latency_ns(0, 1)
    worker.say(Order(3, 1))

    assert not rows(worker.run(), OWN), "the batch waits, and the credit is still away"
    offered = [row.credit for row in rows(worker.run(CNN.latency_ns(0, 1)), OWN)]
    assert offered == [1, 0], "it comes back, and is recalled for the next batch"


def test_an_unused_credit_is_withdrawn_and_comes_back_once_the_other_knows() -> None:
    """Until the PONG a batch may still be on its way."""
    worker = Worker()
    worker.lend()
    said = worker.run(UNUSED_NS)
    assert [row.credit for row in rows(said, OTHER)] == [0]
    assert not rows(said, OWN)
    stamp_ns = pinged(said, OTHER)
    worker.prices = {OTHER: 0.0}
    worker.say(Pong(stamp_ns, 0, 0.0))

    assert [row.credit for row in rows(worker.run(), OWN)] == [2]


def test_a_batch_that_crosses_a_withdrawal_runs() -> None:
    """The router that sent it had the credit when it did."""
    worker = Worker()
    worker.lend()
    worker.run(UNUSED_NS)
    worker.say(Order(3, 1))
    said = worker.run(CNN.latency_ns(0, 1))

    assert Kind.DONE in kinds(said, OTHER)
    assert worker.lender.counts.used == 1


@pytest.mark.parametrize("how", ["bye", "say-hello", "unreachable", "silent", "price unknown"])
def test_a_visit_that_ends_gives_its_credit_back(how: str) -> None:
    """Whatever becomes of the other router, the own one has the credit again, and a late batch is refused."""
    worker = Worker()
    worker.lend()
    if how == "bye":
        worker.say(Control(Kind.BYE))
    elif how == "say-hello":
        worker.say(Control(Kind.REFUSED, {"code": "say-hello"}))
    elif how == "unreachable":
        worker.lender.lost(OTHER, worker.now_ns)
    worker.prices = {} if how == "price unknown" else {OTHER: 0.0}
    said = worker.run()
    if how == "silent":
        said = worker.run(UNUSED_NS) + worker.run(ANSWER_NS)

    assert [row.credit for row in rows(said, OWN)][-1] == 2
    assert not worker.lender.visits
    worker.say(Order(3, 1))
    assert kinds(worker.run(), OTHER) == [Kind.BYE]


def test_a_batch_without_credit_ends_the_visit() -> None:
    """Its queries go to others, rather than a third batch waits here."""
    worker = Worker()
    worker.visit(price=0.5, own_price=0.5)
    worker.prices = {OTHER: 0.5}
    worker.say(Order(3, 1))

    assert Kind.BYE in kinds(worker.run(), OTHER)
    assert not worker.lender.visits


def test_a_batch_of_an_earlier_visit_is_not_run() -> None:
    """Not even with a credit that this visit has: its router hears BYE, and sends the queries to others."""
    worker = Worker()
    worker.visit()
    worker.say(Pong(worker.recall(), 0, 0.0), OWN)
    assert rows(worker.run(), OTHER)
    worker.say(Order(2, 1))

    assert Kind.BYE in kinds(worker.run(), OTHER)
    assert worker.lender.counts[:2] == (1, 0)


def test_a_recall_without_an_answer_is_given_up() -> None:
    """And its late PONG lends nothing."""
    worker = Worker()
    worker.visit()
    stamp_ns = worker.recall()
    worker.prices = {OTHER: 0.0}
    worker.say(Pong(worker.now_ns, 0, 0.0))  # nothing is worth anything there any more
    said = worker.run(ANSWER_NS)
    worker.say(Pong(stamp_ns, 0, 0.0), OWN)

    assert [row.credit for row in rows(said, OWN)][-1] == 2
    assert not rows(worker.run(), OTHER)


@pytest.mark.parametrize(("price", "own_price"), [(0.05, 0.0), (0.6, 0.5), (0.4, 0.5)])
def test_nothing_is_lent_where_time_is_not_worth_clearly_more(price: float, own_price: float) -> None:
    """Prices are some milliseconds old, and below a tenth every router can afford its largest subnet."""
    worker = Worker()
    worker.visit(price, own_price)

    assert not rows(worker.run(), OWN)
    assert worker.lender.counts.lent == 0


def test_a_router_that_states_no_price_lends_nothing() -> None:
    """An older one; nor is a router visited that states none."""
    worker = Worker()
    worker.run()
    worker.say(Pong(0, 0), OWN)

    assert not kinds(worker.run(), OTHER)


def test_more_is_lent_step_by_step() -> None:
    """With steps of a tenth, ten GPUs lend one more at each beat while their time is worth more elsewhere."""
    worker = Worker(LendingSettings(step=0.1), n_gpus=10)
    worker.visit()
    recalled = []
    for _ in range(3):
        recalled.append(len([row for row in rows(worker.run(), OWN) if row.credit == 0]))
        worker.say(Pong(worker.now_ns, 0, 1.0))

    assert sum(recalled) in (2, 3)
    assert max(recalled) == 1


def test_a_visit_without_a_lend_ends_after_a_while() -> None:
    """Nothing is lent at this price, and PINGs cost something."""
    worker = Worker()
    worker.visit(0.5, 0.5)
    worker.prices = {OTHER: 0.5}
    for _ in range(0, STAY_NS + 200 * MS, 100 * MS):
        worker.say(Pong(worker.now_ns, 0, 0.5))
        worker.run(100 * MS)

    assert not worker.lender.visits


def test_a_worker_that_drains_waits_for_what_it_was_lent_for() -> None:
    """Its router's BYE does not end it before the other router's batch has run."""
    worker = Worker()
    worker.lend()
    worker.say(Order(3, 1))
    worker.core.stop(worker.now_ns)
    worker.say(Control(Kind.BYE), OWN)
    worker.run()
    assert worker.link() is LinkState.DRAINING
    said = worker.run(CNN.latency_ns(0, 1))
    worker.run()

    assert Kind.DONE in kinds(said, OTHER)
    assert worker.link() is LinkState.STOPPED
    assert kinds(worker.lender.farewells(), OTHER) == [Kind.BYE]


def test_what_one_router_loses_is_not_the_others() -> None:
    """The own router is lost: its waiting batch is dropped; the one lent for runs, and is reported."""
    worker = Worker()
    worker.lend()
    worker.say(Order(3, 1))
    worker.run()
    worker.say(Order(7, 1), OWN)
    worker.core.lost("the connection broke", worker.now_ns)
    said = worker.run(CNN.latency_ns(0, 1))

    assert Kind.DONE in kinds(said, OTHER)
    assert not [message for message in worker.core.poll(worker.now_ns + 50 * MS) if isinstance(message, Done)]
