"""Lending: a GPU's credit goes to another router for one batch, where its time is worth more. Pure.

A process belongs to one router, and *visits* others as a guest: it says HELLO there too, with `guest`, and
hears in each PONG what GPU time is worth to that router now (`router.core.price`). For each GPU:

    OWN ------recall-----> RECALLING --its router's PONG--> LENT --a batch comes--> USED --it starts--> OWN
     ^                         |                              |
     +--it is worth no more----+                              +--no batch comes--> WITHDRAWING --PONG--> OWN

*Recall* is a PULL that offers nothing, and a PING behind it: messages stay in order, so once the PONG is
here, the router has read the PULL, and whatever it sent before is here too. Only then is the credit offered
to the other router, with the time until the GPU is free, so that router also decides just in time. It may
send one batch. As soon as that runs, the credit is the own router's again: a GPU never holds more than two
batches, and no two routers have a credit for the same place.

What is lost comes back by itself. If the visited router dies, falls silent or answers no PONG, the visit
ends, and its credits are the own router's again. A batch that it sends under the epoch of that visit is
dropped and answered with BYE, and it queues those queries again, as for any worker that is lost.
"""

from __future__ import annotations

import enum
from math import log
from typing import TYPE_CHECKING, Any, Generic, NamedTuple
from zlib import crc32

from gpu_worker.core.batches import end_of, refused
from gpu_worker.core.link import HEARTBEAT_NS, HELLO_EVERY_NS, LinkState
from gpu_worker.core.queue import OWN, B, QueueReport, TakenBatch
from superserve.clock import MS, SECOND
from superserve.hello import WorkerWelcome
from superserve.wire import LOWEST, Control, Done, Kind, Message, Ping, Pong, Pull, PullRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpu_worker.core import WorkerCore
    from gpu_worker.core.batches import EndedBatch
    from gpu_worker.core.queue import Gpus

UNUSED_NS = 3 * MS
"""A lent credit is withdrawn if its GPU is idle for so long and two round trips: the time is worth no more
there than here."""

ANSWER_NS = 200 * MS
"""A router that answers no PONG for this long is not waited for: a recall is given up, a visit ends."""

FRESH_NS = 3 * HEARTBEAT_NS
"""A price that is older than this says nothing."""

STAY_NS = 10 * SECOND
"""A visit on which nothing was lent for so long ends."""


class LendingSettings(NamedTuple):
    """When how much is lent.

    Attributes:
        least_price: Below this nobody borrows: a router whose smallest subnet would need a tenth of its GPU
            time can afford the largest one for nearly all.
        dearer: GPU time must be worth this many times as much elsewhere, or no more is lent. At 1.1 eight
            equal routers lend to and fro for nothing, and lose 0.007 points.
        step: At most this part of a process's GPUs is lent more, or fewer, from beat to beat. At 0.1 a router
            with three times the load of seven others got so much so soon that those lost 2 queries in 1,000.
        beat_ns: Time between two PINGs to a router that credits may be lent to. With 100 ms, a third less is
            won while loads change.
    """

    least_price: float = 0.1
    dearer: float = 1.25
    step: float = 0.05
    beat_ns: int = 20 * MS


AS_IT_PAYS = LendingSettings()


class CreditState(enum.Enum):
    """Where a GPU's credit is."""

    OWN = "own"
    RECALLING = "recalling"
    LENT = "lent"
    WITHDRAWING = "withdrawing"
    USED = "used"


_OWN, _RECALLING, _LENT, _WITHDRAWING, _USED = CreditState


class Visit:
    """A process at a router that it does not belong to.

    Attributes:
        router: The router's number at this process.
        source: The number of this visit; batches that come on it have it.
        epoch: That of the WELCOME; None until it comes.
        price: What GPU time is worth there; 0 if unknown.
        way_ns: How long a PING and its PONG lately took at most.
        share: How many GPUs of this process that router has the time of, if it wants it. Not whole, so that
            of many processes with one GPU only some lend it.
    """

    __slots__ = (
        "asked_ns",
        "epoch",
        "hello_ns",
        "lent_ns",
        "ping_ns",
        "price",
        "priced_ns",
        "router",
        "share",
        "source",
        "way_ns",
    )  # fmt: skip

    def __init__(self, router: int, source: int, now_ns: int) -> None:
        self.router = router
        self.source = source
        self.epoch: int | None = None
        self.price = 0.0
        self.priced_ns = now_ns
        self.hello_ns = now_ns
        self.ping_ns = now_ns
        self.asked_ns: int | None = None  # the earliest PING without an answer
        self.share = 0.0
        self.way_ns = 0
        self.lent_ns = now_ns


class _Credit:
    """The credit of one GPU."""

    __slots__ = ("n_visiting", "since_ns", "stamp_ns", "state", "visit")

    def __init__(self) -> None:
        self.state = _OWN
        self.visit: Visit | None = None
        self.stamp_ns = 0
        self.since_ns = 0
        self.n_visiting = 0  # batches of visits that this GPU holds


class LendingCounts(NamedTuple):
    """Counts of what credits did.

    Attributes:
        lent: Credits offered to another router.
        used: Of those, the ones that a batch came for.
        kept: Recalled, and then worth no more elsewhere.
    """

    lent: int
    used: int
    kept: int


class Lender(Generic[B]):
    """Lends the credits of one process.

    Args:
        core: The process's side of the protocol with the router that it belongs to.
        gpus: What runs the batches.
        hello: The body of HELLO.
        settings: When how much is lent.

    Attributes:
        price: What GPU time is worth to the own router, as it last said; None before.
        visits: By the router's number.
    """

    def __init__(
        self, core: WorkerCore[B], gpus: Gpus[B], hello: Mapping[str, Any],
        settings: LendingSettings = AS_IT_PAYS,
    ) -> None:  # fmt: skip
        self.price: float | None = None
        self.visits: dict[int, Visit] = {}
        self._core = core
        self._gpus = gpus
        # Without `shared`: payloads of another router's clients come in messages.
        self._hello = {**{key: value for key, value in hello.items() if key != "shared"}, "guest": True}
        self._settings = settings
        self._credits = [_Credit() for _ in range(gpus.n_slots)]
        self._by_source: dict[int, Visit] = {}
        self._own: int | None = None
        self._said: list[tuple[int, Message]] = []
        self._n_visits = 0
        self._n_stamps = 0
        self._lent = self._used = self._kept = 0
        self._refused: set[int] = set()
        # Processes differ in when a share becomes one GPU more.
        self._phase = (crc32(str(hello["name"]).encode()) % 997) / 997
        core.lender = self

    @property
    def counts(self) -> LendingCounts:
        """How many credits were lent so far."""
        return LendingCounts(self._lent, self._used, self._kept)

    # --- what the core asks ---------------------------------------------------------------

    def is_away(self, slot: int) -> bool:
        """Return whether the own router may not have this GPU's credit."""
        return self._credits[slot].state is not _OWN

    def masked(self, slot: int, report: QueueReport, now_ns: int) -> QueueReport:
        """Return a GPU's report to the own router, as lending leaves it."""
        if self.is_away(slot):
            report = report._replace(credit=0)
        if not report.running_batch:
            report = report._replace(running_for_ns=self.running_for_ns(slot, OWN, now_ns))
        return report

    def running_for_ns(self, slot: int, source: int, now_ns: int) -> int:
        """Return what a report says if no batch of its router runs: 0, or less by how long another's does."""
        if not self._credits[slot].n_visiting:
            return 0
        running = self._gpus.running(slot)
        if running is None or running.source == source:
            return 0
        return -max(1, running.ends_ns - now_ns)

    def ended(self, batch: EndedBatch, now_ns: int) -> None:
        """Take the end of a batch that came on a visit, and report it to that router."""
        slot = batch.row.slot
        self._credits[slot].n_visiting -= 1
        self._tell_own(slot, now_ns)  # the GPU's time is that router's again
        visit = self._by_source.get(batch.source)
        if visit is None or batch.epoch is None or batch.epoch != visit.epoch:
            return
        row = batch.row
        row.credit = 0
        row.running_for_ns = row.running_for_ns or self.running_for_ns(slot, visit.source, now_ns)
        self._said.append((visit.router, Done(batch.epoch, [row])))

    def looked(self, slot: int, now_ns: int) -> None:
        """A GPU has ended a batch: if a lent one runs now, the credit is the own router's again."""
        credit = self._credits[slot]
        if credit.state is _USED:
            self._take_back_if_running(slot, credit, now_ns)

    def holds_any(self) -> bool:
        """Return whether a GPU holds a batch of another router."""
        return any(credit.n_visiting for credit in self._credits)

    def farewells(self) -> list[tuple[int, Message]]:
        """Return what to say to visited routers when the process ends."""
        return [(i, Control(Kind.BYE, {"worker": str(self._hello["name"])})) for i in self.visits]

    def own_lost(self) -> None:
        """The process belongs to no router now, or to another: what is recalled is nobody's."""
        self.price = None
        for credit in self._credits:
            if credit.state is _RECALLING:
                credit.state = _OWN

    def ponged(self, pong: Pong, now_ns: int) -> None:
        """Take the own router's PONG: its price, and perhaps the answer to a recall."""
        if pong.price is not None:
            self.price = pong.price
        for slot, credit in enumerate(self._credits):
            if credit.state is _RECALLING and credit.stamp_ns == pong.stamp_ns:
                self._recalled(slot, credit, now_ns)

    def strays(self) -> list[int]:
        """Return the GPUs whose credit is away for a visit that has ended: always none."""
        return [
            slot for slot, credit in enumerate(self._credits)
            if credit.state is not _OWN and credit.visit not in self.visits.values()
        ]  # fmt: skip

    # --- what the host does ---------------------------------------------------------------

    def turn(self, own: int | None, prices: Mapping[int, float], now_ns: int) -> None:
        """Begin and end visits.

        Args:
            own: The number of the router that the process belongs to or greets.
            prices: What other routers that can be reached say that GPU time is worth there.
            now_ns: The present instant.
        """
        self._own = own
        for visit in list(self.visits.values()):
            router = visit.router
            if router == own:
                self._end(visit, now_ns)  # its HELLO there ends the visit
            elif router not in prices or (now_ns - visit.lent_ns > STAY_NS and not self._has_lent(visit)):
                self._leave(visit, now_ns)
        if self.price is None or self._core.link is not LinkState.SERVING:
            return
        for router, price in prices.items():
            is_new = router not in self.visits and router not in self._refused and router != own
            if is_new and self._is_dearer(price):
                self._n_visits += 1
                visit = Visit(router, self._n_visits, now_ns)
                self.visits[router] = self._by_source[visit.source] = visit

    def receive(self, router: int, message: Control | Ping | Pong | B, now_ns: int) -> None:
        """Take what a router said that the process does not belong to."""
        visit = self.visits.get(router)
        if isinstance(message, Ping):
            self._said.append((router, Pong(message.stamp_ns, now_ns)))
            if visit is None:  # it takes this process for one of its own
                self._say_bye(router)
        elif isinstance(message, Pong):
            if visit is not None:
                self._priced(visit, message, now_ns)
        elif isinstance(message, Control):
            if visit is not None:
                self._control(visit, message, now_ns)
        elif visit is None or visit.epoch != message.epoch:
            self._say_bye(router)
        else:
            self._batch(visit, message, now_ns)

    def lost(self, router: int, now_ns: int) -> None:
        """A message could not be sent, nor may any after it: the visit there ends, or the router is lost."""
        if router == self._own:  # it may have got a PING, and not the PULL before it
            self._core.lost("the router cannot be reached", now_ns)
        visit = self.visits.get(router)
        if visit is not None:
            self._end(visit, now_ns)

    def next_due_ns(self) -> int | None:
        """Return when `poll` has something to do."""
        due = [visit.ping_ns if visit.epoch is not None else visit.hello_ns for visit in self.visits.values()]
        for credit in self._credits:
            if credit.state in (_RECALLING, _WITHDRAWING):
                due.append(credit.since_ns + ANSWER_NS)
            elif credit.state is _LENT:
                assert credit.visit is not None, "it is lent to some router"
                due.append(credit.since_ns + UNUSED_NS + 2 * credit.visit.way_ns)
        return min(due, default=None)

    def poll(self, now_ns: int) -> list[tuple[int, Message]]:
        """Return what to say, with the number of the router, in order; after `WorkerCore.poll`."""
        for visit in list(self.visits.values()):
            self._keep(visit, now_ns)
        for slot, credit in enumerate(self._credits):
            if credit.state is not _OWN:
                self._judge(slot, credit, now_ns)
        if self.visits and self._own is not None and self._core.link is LinkState.SERVING:
            self._recall(now_ns)
        said, self._said = self._said, []
        return said

    # --- visits ---------------------------------------------------------------------------

    def _keep(self, visit: Visit, now_ns: int) -> None:
        """Greet the router, or show it that the process lives."""
        if visit.epoch is None:
            if now_ns >= visit.hello_ns:
                visit.hello_ns = now_ns + HELLO_EVERY_NS
                self._said.append((visit.router, Control(Kind.HELLO, self._hello, LOWEST)))
        elif visit.asked_ns is not None and now_ns - visit.asked_ns > 2 * ANSWER_NS:
            self._leave(visit, now_ns)
        elif now_ns >= visit.ping_ns:
            visit.ping_ns = now_ns + (
                self._settings.beat_ns if self._is_dearer(visit.price) else HEARTBEAT_NS
            )
            if visit.asked_ns is None:
                visit.asked_ns = now_ns
            self._said.append((visit.router, Ping(now_ns)))

    def _control(self, visit: Visit, message: Control, now_ns: int) -> None:
        if message.kind is Kind.WELCOME:
            epoch = WorkerWelcome.from_body(message.body).epoch
            if visit.epoch is not None:
                self._forget(visit, now_ns)
            visit.epoch = epoch
            visit.asked_ns, visit.ping_ns = None, now_ns
        elif message.kind is Kind.REFUSED and message.body.get("code") != "say-hello":
            self._refused.add(visit.router)
            self._end(visit, now_ns)
        elif message.kind in (Kind.REFUSED, Kind.BYE):
            self._end(visit, now_ns)

    def _say_bye(self, router: int) -> None:
        self._said.append((router, Control(Kind.BYE, {"worker": str(self._hello["name"])})))

    def _leave(self, visit: Visit, now_ns: int) -> None:
        self._say_bye(visit.router)
        self._end(visit, now_ns)

    def _end(self, visit: Visit, now_ns: int) -> None:
        """End a visit: what came on it and has not started is dropped, and its credits come back."""
        del self.visits[visit.router]
        del self._by_source[visit.source]
        self._forget(visit, now_ns)

    def _forget(self, visit: Visit, now_ns: int) -> None:
        visit.epoch = None
        waiting = {
            slot for slot, credit in enumerate(self._credits)
            if credit.state is _USED and credit.visit is visit
        }  # fmt: skip
        self._gpus.forget_held(visit.source)
        for slot, credit in enumerate(self._credits):
            if credit.visit is visit and credit.state is not _OWN:
                if slot in waiting:
                    credit.n_visiting -= 1  # it was dropped, and no end of it will come
                self._give_back(slot, credit, now_ns)

    def _has_lent(self, visit: Visit) -> bool:
        return any(credit.visit is visit and credit.state is not _OWN for credit in self._credits)

    # --- credits --------------------------------------------------------------------------

    def _is_dearer(self, price: float) -> bool:
        settings, own = self._settings, self.price
        return own is not None and price >= max(settings.least_price, settings.dearer * own)

    def _set_share(self, visit: Visit) -> None:
        """Lend a router more or fewer credits at a time, by what GPU time is worth there and here.

        In small steps: everybody else sees the same prices, and those follow some milliseconds later.
        """
        own, price, step = self.price, visit.price, self._settings.step
        if own is None or price < self._settings.least_price:
            step = -step
        elif own <= 0.0 or price <= 0.0:
            step *= self._is_dearer(price)
        elif self._is_dearer(price) or price < own:
            step *= max(-1.0, min(1.0, log(price / own)))
        else:
            return
        n = len(self._credits)
        visit.share = min(float(n), max(0.0, visit.share + n * step))

    def _slots_of(self, visit: Visit) -> list[int]:
        """Return the GPUs whose credit a visited router has, or is to get, or whose time it has."""
        found = []
        for slot, credit in enumerate(self._credits):
            if credit.state is not _OWN:
                is_theirs = credit.visit is visit
            elif credit.n_visiting:
                running = self._gpus.running(slot)
                is_theirs = running is not None and running.source == visit.source
            else:
                is_theirs = False
            if is_theirs:
                found.append(slot)
        return found

    def _recall(self, now_ns: int) -> None:
        """Recall credits for routers to which they are worth more."""
        for visit in sorted(self.visits.values(), key=_by_price):
            if visit.epoch is None or now_ns - visit.priced_ns > FRESH_NS:
                continue
            quota = int(visit.share + self._phase)
            if not quota:
                continue
            slots = self._slots_of(visit)
            n = len(slots)
            if n <= quota:  # the same GPUs again, as soon as they run what they were lent for
                for slot in slots:
                    self._recall_one(slot, visit, now_ns)
            for slot, credit in enumerate(self._credits):
                if n < quota and not credit.n_visiting and self._recall_one(slot, visit, now_ns):
                    n += 1

    def _recall_one(self, slot: int, visit: Visit, now_ns: int) -> bool:
        """Recall a credit, unless it is away, or the GPU's next batch is here; return whether it was."""
        credit = self._credits[slot]
        if credit.state is not _OWN or self._gpus.report(slot, now_ns).held:
            return False
        credit.state, credit.visit = _RECALLING, visit
        self._offer(slot, credit, now_ns)
        return True

    def _offer(self, slot: int, credit: _Credit, now_ns: int) -> None:
        """Tell the own router that it has no credit for a GPU, and ask it to say that it knows."""
        self._n_stamps += 1
        credit.stamp_ns, credit.since_ns = -self._n_stamps, now_ns
        self._tell_own(slot, now_ns)
        assert self._own is not None, "credits are recalled from a router"
        self._said.append((self._own, Ping(credit.stamp_ns)))

    def _tell_own(self, slot: int, now_ns: int) -> None:
        pull = self._core.pull_of(slot, now_ns)
        if pull is not None and self._own is not None:
            self._said.append((self._own, pull))

    def _recalled(self, slot: int, credit: _Credit, now_ns: int) -> None:
        """The own router knows: offer the credit to the other, unless that is worth no more."""
        visit = credit.visit
        assert visit is not None, "a credit is recalled for a visit"
        is_worth = visit.epoch is not None and len(self._slots_of(visit)) <= int(visit.share + self._phase)
        if not is_worth or self._gpus.report(slot, now_ns).held:
            self._kept += 1
            self._give_back(slot, credit, now_ns)
            return
        credit.state = _LENT
        credit.since_ns = visit.lent_ns = now_ns
        self._lent += 1
        self._ask(visit, slot, 1, credit, now_ns)

    def _ask(self, visit: Visit, slot: int, n: int, credit: _Credit, now_ns: int) -> None:
        """Tell a visited router how much credit it has for a GPU, and ask it to say that it knows."""
        assert visit.epoch is not None, "only a welcomed guest reports"
        report = self._gpus.report(slot, now_ns, visit.source)._replace(credit=n)
        running = self._gpus.running(slot)
        if running is not None and running.source != visit.source:
            report = report._replace(running_for_ns=-max(1, running.ends_ns - now_ns))
        self._n_stamps += 1
        credit.stamp_ns = -self._n_stamps
        row = PullRow(slot, *report, *self._core.gauges)
        self._said += [(visit.router, Pull(visit.epoch, [row])), (visit.router, Ping(credit.stamp_ns))]
        if visit.asked_ns is None:
            visit.asked_ns = now_ns

    def _priced(self, visit: Visit, pong: Pong, now_ns: int) -> None:
        visit.asked_ns = None
        if pong.price is not None:
            visit.price, visit.priced_ns = pong.price, now_ns
            if pong.stamp_ns >= 0:  # once a beat
                visit.way_ns = max(now_ns - pong.stamp_ns, visit.way_ns * 7 // 8)
                self._set_share(visit)
        for slot, credit in enumerate(self._credits):
            if credit.visit is not visit or credit.stamp_ns != pong.stamp_ns:
                continue
            if credit.state is _WITHDRAWING:
                self._give_back(slot, credit, now_ns)

    def _batch(self, visit: Visit, order: B, now_ns: int) -> None:
        slot = order.slot
        credit = self._credits[slot] if 0 <= slot < len(self._credits) else None
        if credit is None or credit.visit is not visit or credit.state not in (_LENT, _WITHDRAWING):
            self._leave(visit, now_ns)  # it has no credit: its queries go to others
            return
        self._used += 1
        refusal = self._gpus.submit(order, now_ns, visit.source)
        if refusal is not None:
            report = self._gpus.report(slot, now_ns, visit.source)._replace(credit=0)
            batch = TakenBatch(order, now_ns, visit.source)
            row = end_of(batch, refused(order, *refusal), report, now_ns, now_ns).row
            self._said.append((visit.router, Done(order.epoch, [row])))
            self._give_back(slot, credit, now_ns)
            return
        credit.n_visiting += 1
        credit.state, credit.since_ns = _USED, now_ns
        self._take_back_if_running(slot, credit, now_ns)

    def _take_back_if_running(self, slot: int, credit: _Credit, now_ns: int) -> None:
        running, visit = self._gpus.running(slot), credit.visit
        if running is None or (visit is not None and running.source == visit.source):
            self._give_back(slot, credit, now_ns)

    def _judge(self, slot: int, credit: _Credit, now_ns: int) -> None:
        """Give up waiting for an answer, and withdraw what is not used."""
        visit, waited_ns = credit.visit, now_ns - credit.since_ns
        assert visit is not None, "a credit that is away is some visit's"
        if credit.state is _RECALLING and waited_ns >= ANSWER_NS:
            self._give_back(slot, credit, now_ns)
        elif credit.state is _WITHDRAWING and waited_ns >= ANSWER_NS:
            self._leave(visit, now_ns)
        elif credit.state is _LENT:
            is_too_many = self._core.link is LinkState.DRAINING or len(self._slots_of(visit)) > int(
                visit.share + self._phase
            )
            if self._gpus.running(slot) is not None and not is_too_many:
                credit.since_ns = now_ns
            elif waited_ns >= UNUSED_NS + 2 * visit.way_ns or is_too_many:
                if not is_too_many:
                    visit.share = max(0.0, visit.share - 1.0)
                credit.state, credit.since_ns = _WITHDRAWING, now_ns
                self._ask(visit, slot, 0, credit, now_ns)

    def _give_back(self, slot: int, credit: _Credit, now_ns: int) -> None:
        credit.state, credit.visit = _OWN, None
        self._tell_own(slot, now_ns)


def _by_price(visit: Visit) -> tuple[float, int]:
    """Order visits, the one where GPU time is worth most first."""
    return -visit.price, visit.source
