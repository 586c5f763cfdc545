"""Which router a message goes to, and when one counts as suspect or dead."""

from __future__ import annotations

import pytest

from superserve.client.spread import BEAT_NS, COPY_EVERY_NS, DEAD_NS, PATIENCE_NS, SHARE, Spread
from superserve.clock import MS


def spread_of(n: int, **gpus: int) -> Spread:
    """Return `n` live routers, with the GPUs given as r0=, r1=, ..."""
    spread = Spread()
    for _ in range(n - 1):
        spread.add()
    for i, route in enumerate(spread.routes):
        route.epoch = i + 1
        route.gpus = gpus.get(f"r{i}")
    return spread


def test_work_is_shared_by_the_gpus_behind_each_router() -> None:
    """A router with three times the GPUs owes three times as much."""
    spread = spread_of(2, r0=6, r1=2)

    for k in range(800):
        i = spread.choose(1)
        assert i is not None
        spread.sent(i, [k], 0)

    owed = [route.n_out for route in spread.routes]
    assert sum(owed) == 800
    assert owed[0] == pytest.approx(600, abs=4)


def test_of_equal_routers_none_is_preferred() -> None:
    """An idle client's single queries go to all of them."""
    spread = spread_of(4)

    chosen = {spread.choose(1) for _ in range(100)}

    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize("what", ["draining", "suspect", "without GPUs", "gone"])
def test_new_work_avoids_a_router_that_will_not_serve_it(what: str) -> None:
    """It goes to the other one, however much that owes."""
    spread = spread_of(2, r0=4, r1=4)
    route = spread.routes[0]
    route.is_draining, route.is_suspect = what == "draining", what == "suspect"
    route.gpus = 0 if what == "without GPUs" else 4
    route.epoch = None if what == "gone" else 1
    spread.sent(1, list(range(1_000)), 0)

    assert {spread.choose(1) for _ in range(20)} == {1}


def test_doubtful_routers_serve_if_there_are_no_others() -> None:
    """A suspect or draining router is better than none."""
    spread = spread_of(2)
    for route in spread.routes:
        route.is_suspect = route.is_draining = True

    assert spread.choose(1) in (0, 1)
    assert spread_of(1).choose(1) == 0


def test_a_silent_router_is_asked_then_suspect_then_dead() -> None:
    """It has 25 ms until it is asked, its patience until it is suspect, and 600 ms until it is dead."""
    spread = spread_of(2)
    spread.sent(0, [1], 0)
    pending = {1}

    assert spread.beat(BEAT_NS - 1, pending) == ([], [])
    assert spread.next_beat_ns() == BEAT_NS
    assert spread.beat(BEAT_NS, pending) == ([0], [])
    assert spread.beat(BEAT_NS + PATIENCE_NS[0] - 1, pending) == ([], [])
    assert spread.suspects() == []
    spread.beat(BEAT_NS + PATIENCE_NS[0], pending)
    assert spread.suspects() == [0]
    assert spread.beat(BEAT_NS + DEAD_NS, pending) == ([], [0])


def test_an_answer_ends_the_suspicion_and_teaches_patience() -> None:
    """A router whose answers take long gets four times as long the next time."""
    spread = spread_of(2)
    spread.sent(0, [1], 0)
    spread.beat(BEAT_NS, {1})
    spread.beat(BEAT_NS + PATIENCE_NS[0], {1})

    spread.routes[0].hear(BEAT_NS + 50 * MS)

    assert spread.suspects() == []
    assert spread.routes[0].patience_ns == 200 * MS


def test_an_idle_router_may_be_silent() -> None:
    """It owes nothing: neither from the start, nor once what it had was answered, here or by another."""
    spread = spread_of(2)
    spread.sent(0, [1], 0)

    assert spread.beat(10 * DEAD_NS, set()) == ([], [])
    assert spread.next_beat_ns() is None


def test_a_lone_router_is_never_suspect() -> None:
    """With nothing to turn to, what it owes may as well wait for it."""
    spread = spread_of(2)
    spread.routes[1].epoch = None
    spread.sent(0, [1], 0)

    assert spread.beat(10 * DEAD_NS, {1}) == ([], [])
    assert spread.suspects() == []


def test_suspicion_repeats_at_most_a_tenth_of_what_was_sent() -> None:
    """However often a router stalls: what is sent again stays a share of what is sent."""
    spread = spread_of(2)
    n = n_copied = 0
    for second in range(20):
        for k in range(100):
            spread.sent(0, [n], second * 1_000 * MS + 10 * k * MS)
            n += 1
        spread.routes[0].is_suspect = True
        n_copied += len(spread.copies(0, lambda _: True, (second + 1) * 1_000 * MS))

    assert 0 < n_copied <= SHARE * n + 17  # a new client may repeat 16
    assert n_copied >= 0.9 * SHARE * n


def test_what_another_router_will_serve_is_not_copied_again() -> None:
    """Until that one is in doubt too: then a third gets it."""
    spread = spread_of(3)
    spread.sent(0, [1, 2], 0)
    spread.routes[0].is_suspect = True
    assert spread.copies(0, lambda _: True, 0) == [1, 2]
    assert spread.copies(0, lambda _: True, COPY_EVERY_NS - 1) == []

    spread.sent(1, [1], 0)
    assert spread.copies(0, lambda _: True, COPY_EVERY_NS) == [2]

    spread.routes[1].is_suspect = True
    assert spread.copies(1, lambda _: True, COPY_EVERY_NS) == [1]


def test_a_router_without_gpus_hands_over_everything() -> None:
    """It serves nothing, so no load is doubled: the budget does not count."""
    spread = spread_of(2, r0=4, r1=4)
    spread.sent(0, list(range(5_000)), 0)
    spread.routes[0].gpus = 0

    assert spread.copies(0, lambda one: one % 2 == 0, 0) == list(range(0, 5_000, 2))
