"""A session with several routers: every query ends once, whatever becomes of them."""

from __future__ import annotations

import random
import threading
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from superserve.client.session import HOPELESS_NS, LOST_LATE, Session
from superserve.client.spread import BEAT_NS, DEAD_NS, PATIENCE_NS
from superserve.clock import MS
from superserve.wire import Cancel, Queries, Results, Status
from tests.superserve.client.fakes import group, ids_of
from tests.superserve.client.test_session import FakeQuery

if TYPE_CHECKING:
    from collections.abc import Sequence

SLO_NS = 500 * MS


class Routers:
    """A session with `n` routers, of which each holds what it was sent."""

    def __init__(self, n: int = 2, seed: int = 1) -> None:
        self.session: Session[FakeQuery] = Session(
            threading.RLock(), "no router", max_outstanding=10_000, max_bytes=1 << 40,
            start=seed % 97 / 97,
        )  # fmt: skip
        for _ in range(n - 1):
            self.session.add_router()
        self.held: list[list[int]] = [[] for _ in range(n)]
        self.cancelled: list[list[int]] = [[] for _ in range(n)]
        self.resubmitted: list[int] = []
        self.ends: Counter[int] = Counter()
        self.errors: list[str] = []
        self.now_ns = 0
        for i in range(n):
            self.welcome(i)

    def welcome(self, i: int) -> None:
        """A router is there."""
        self.session.welcomed(100 + i, i)
        self.send()

    def submit(self, n: int = 1, slo_ns: int = SLO_NS) -> list[int]:
        """Submit and send; return the ids."""
        queries = [FakeQuery(b"image", self.now_ns + slo_ns) for _ in range(n)]
        for query in queries:
            self.session.submit(query)
        self.send()
        return [query.query_id for query in queries]

    def send(self) -> None:
        """Carry what the session sends to the routers."""
        for i, message in self.session.outbound_to(self.now_ns):
            assert message.epoch == 100 + i
            if isinstance(message, Cancel):
                self.cancelled[i] += memoryview(message.ids).cast("Q").tolist()
                continue
            assert isinstance(message, Queries)
            self.held[i] += ids_of(message)
            if message.resubmitted:
                self.resubmitted += ids_of(message)

    def answer(self, i: int, ids: Sequence[int] | None = None, status: Status = Status.OK) -> None:
        """A router answers what it has, or some of it."""
        found = list(self.held[i] if ids is None else ids)
        self.held[i] = [one for one in self.held[i] if one not in found]
        if found:
            results = Results(100 + i, [group(array("Q", found).tobytes(), status, b"")])
            for _, queries in self.session.answered(results, self.now_ns, i):
                self.ends.update([query.query_id for query in queries if query is not None])

    def pass_to(self, now_ns: int, *heard: int) -> None:
        """Let time pass; these routers say something."""
        self.now_ns = now_ns
        for i, route in enumerate(self.session.spread.routes):
            route.hear(now_ns if i in heard else route.heard_ns)
        _, dead = self.session.beat(now_ns)
        for i in dead:
            self.session.lost(i)
        self.send()
        for query, error in self.session.expired(now_ns, now_ns):
            self.ends[query.query_id] += 1
            self.errors.append(str(error))


def test_what_a_lost_router_had_goes_to_another_at_once() -> None:
    """All of it that has slack left, marked as sent before, and nothing that the other one had."""
    world = Routers()
    ids = [one for _ in range(10) for one in world.submit()]
    lost, kept = list(world.held[0]), list(world.held[1])
    assert lost
    assert kept

    world.held[0] = []
    world.session.lost(0)
    world.send()
    world.answer(1)

    assert sorted(world.resubmitted) == lost
    assert world.ends == Counter(ids)


def test_what_has_no_slack_left_ends_when_its_router_is_lost() -> None:
    """It does not wait for an answer that cannot come."""
    world = Routers()
    ids = [one for _ in range(6) for one in world.submit(slo_ns=10 * MS)]
    lost = list(world.held[0])

    world.now_ns = 10 * MS - HOPELESS_NS
    world.session.lost(0)
    world.send()
    world.pass_to(world.now_ns)

    assert sorted(world.ends) == lost
    assert all(LOST_LATE in error for error in world.errors)
    world.answer(1)
    assert world.ends == Counter(ids)


def test_of_two_answers_the_first_counts_and_the_other_copy_is_cancelled() -> None:
    """A suspect router may answer after all: its answer is not a second end."""
    world = Routers()
    ids = [one for _ in range(8) for one in world.submit()]
    doubtful = list(world.held[0])
    world.pass_to(BEAT_NS, 1)
    world.pass_to(BEAT_NS + PATIENCE_NS[0], 1)
    assert sorted(world.resubmitted) == doubtful

    world.answer(1)
    world.send()
    assert sorted(world.cancelled[0]) == doubtful
    world.answer(0)

    assert world.ends == Counter(ids)
    assert world.session.outstanding == 0


def test_a_dead_router_needs_no_broken_connection() -> None:
    """One that has been silent for six heartbeats hands over all, beyond the budget too."""
    world = Routers()
    world.submit(2_000, 5_000 * MS)
    world.submit(2_000, 5_000 * MS)
    world.pass_to(BEAT_NS, 1)
    world.pass_to(BEAT_NS + PATIENCE_NS[0], 1)
    assert len(set(world.resubmitted)) < 2_000

    world.pass_to(BEAT_NS + DEAD_NS, 1)

    assert len(set(world.resubmitted)) == 2_000
    assert len(world.held[1]) == 4_000


def test_a_draining_router_hands_back_what_it_refuses() -> None:
    """DRAINING is no end while another router takes work; the query goes there."""
    world = Routers()
    ids = [one for _ in range(8) for one in world.submit()]
    world.answer(0, status=Status.DRAINING)
    assert not world.ends

    world.send()
    more = [one for _ in range(8) for one in world.submit()]

    assert not world.held[0]
    world.answer(1)
    assert world.ends == Counter([*ids, *more])


def test_without_another_router_draining_is_an_end() -> None:
    """There is nowhere else to send the query to."""
    world = Routers()
    world.session.lost(1)
    ids = world.submit(3)

    world.answer(0, status=Status.DRAINING)

    assert world.ends == Counter(ids)


def test_a_router_that_joins_later_gets_nothing_twice() -> None:
    """What the only router had before a second one was known stays with it."""
    world = Routers(1)
    ids = world.submit(5)
    assert world.session.add_router() == 1
    world.held.append([])
    world.cancelled.append([])

    world.welcome(1)

    assert world.held == [ids, []]
    world.session.lost(0)
    world.send()
    assert world.held[1] == ids


def test_a_cancelled_query_is_cancelled_everywhere() -> None:
    """Either router may have it."""
    world = Routers()
    query = FakeQuery(b"image", SLO_NS)
    world.session.submit(query)
    world.send()

    world.session.cancel(query)
    world.send()

    assert world.cancelled == [[query.query_id], [query.query_id]]


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6))
def test_every_query_ends_exactly_once(seed: int) -> None:
    """Routers break, return, fall silent, drain and answer twice in any order."""
    rng = random.Random(seed)
    world = Routers(rng.randint(1, 4), seed)
    n = len(world.held)
    submitted: list[int] = []
    there = [True] * n
    for _ in range(rng.randint(10, 60)):
        i = rng.randrange(n)
        match rng.choice(["submit", "submit", "answer", "lose", "return", "drain", "pass", "pass"]):
            case "submit":
                submitted += world.submit(rng.choice([1, 1, 7]), rng.choice([5, 50, 500]) * MS)
            case "answer":
                world.answer(i, world.held[i][: rng.randint(0, 9)])
            case "lose":
                world.session.lost(i)
                there[i] = False
                if rng.random() < 0.7:  # otherwise it was only cut off, and still answers later
                    world.held[i] = []
                world.send()
            case "return" if not there[i]:
                there[i] = True
                world.welcome(i)
            case "drain" if there[i]:
                world.answer(i, world.held[i][:3], Status.DRAINING)
                world.send()
            case "pass":
                heard = [one for one in range(n) if rng.random() < 0.7]
                world.pass_to(world.now_ns + rng.choice([1, 30, 120, 700]) * MS, *heard)
    for _ in range(40):
        world.pass_to(world.now_ns + 100 * MS, *range(n))

    assert world.ends == Counter(submitted)
    assert world.session.outstanding == world.session.held_bytes == 0
