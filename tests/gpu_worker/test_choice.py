"""Which router a worker process joins, leaves and turns to."""

from __future__ import annotations

from gpu_worker.core.choice import ASK_EVERY_NS, CHOOSE_NS, FRESH_NS, PROMPT_NS, RouterChoice
from superserve.clock import MS
from superserve.hello import RouterBrief


def brief(life: int, gpus: int, *, is_draining: bool = False) -> RouterBrief:
    """Return a router's answer."""
    return RouterBrief(life, gpus, is_draining)


def asked(now_ns: int, *gpus: int, own: int | None = None) -> RouterChoice:
    """Return the choice among routers with these GPUs, which have just answered."""
    choice = RouterChoice([f"tcp://r{i}:1" for i in range(len(gpus))], 2, now_ns)
    choice.own = own
    assert choice.questions(now_ns) == list(range(len(gpus)))
    for i, n in enumerate(gpus):
        choice.told(i, brief(i + 1, n), now_ns)
    return choice


def test_with_one_router_nothing_is_asked() -> None:
    """It belongs to that one from the start."""
    choice = RouterChoice(["tcp://r:1"], 1, 0)

    assert choice.own == 0
    assert choice.questions(10**12) == []
    assert choice.next_due_ns() is None


def test_it_joins_the_router_with_the_fewest_gpus() -> None:
    """Of equals the first in its list."""
    assert asked(0, 4, 2, 6).first(0) == 1
    assert asked(0, 2, 2, 2).first(0) == 0


def test_it_waits_for_all_answers_but_not_for_ever() -> None:
    """A router that is down delays a start by 250 ms at most."""
    choice = RouterChoice(["tcp://a:1", "tcp://b:1"], 1, 0)
    choice.questions(0)
    choice.told(1, brief(2, 9), 1 * MS)

    assert choice.first(CHOOSE_NS - 1) is None
    assert choice.first(CHOOSE_NS) == 1


def test_a_lost_router_is_followed_by_the_best_of_the_others_at_once() -> None:
    """By the last answers, and never by the lost one."""
    choice = asked(0, 0, 8, 4, own=0)

    assert choice.next_after_loss(900 * MS) == 2
    assert choice.own == 2


def test_a_draining_router_or_an_old_answer_attracts_nobody() -> None:
    """Nor does a router without a connection."""
    choice = asked(0, 4, 0, own=0)
    choice.told(1, brief(2, 0, is_draining=True), 1)
    assert choice.next_after_loss(1 * MS) is None

    choice = asked(0, 4, 0, own=0)
    assert choice.next_after_loss(FRESH_NS + 1) is None

    choice = asked(0, 4, 0, own=0)
    choice.forget(1)
    assert choice.next_after_loss(1 * MS) is None


def test_it_leaves_for_a_router_with_fewer_gpus_by_more_than_its_own() -> None:
    """With two GPUs: from 5 to 2, not from 4 to 2, since that would only turn things round."""
    assert asked(0, 5, 2, own=0).better(1) == 1
    assert asked(0, 4, 2, own=0).better(1) is None


def test_a_move_needs_prompt_answers_of_this_round() -> None:
    """A router that goes on after a stop answers all at one instant, and they would all move to it."""
    choice = asked(0, 8, 0, own=0)
    choice.told(1, brief(2, 0), PROMPT_NS + 1)
    assert choice.better(PROMPT_NS + 1) is None

    choice = asked(0, 8, 0, own=0)
    choice.questions(ASK_EVERY_NS)
    choice.told(0, brief(1, 8), ASK_EVERY_NS)
    assert choice.better(ASK_EVERY_NS) is None


def test_its_own_router_under_another_name_is_no_other_router() -> None:
    """A list may name by address what a command line names by host."""
    choice = asked(0, 8, 8, own=0)
    choice.told(1, brief(1, 8), 1)

    assert choice.better(2) is None
    assert choice.next_after_loss(2) is None


def test_a_greeted_router_that_sends_no_welcome_is_given_up() -> None:
    """After 250 ms, for another that is known to live."""
    choice = asked(0, 4, 0, 1, own=0)
    assert choice.next_after_loss(0) == 1

    assert choice.next_after_silence(CHOOSE_NS - 1) is None
    assert choice.next_after_silence(CHOOSE_NS) == 2


def test_it_learns_of_routers_and_keeps_their_numbers() -> None:
    """Adding a router restarts no worker."""
    choice = asked(0, 1, 1, own=0)

    assert choice.learn(["tcp://new:1", "tcp://r0:1"]) == [2]
    assert choice.endpoints == ["tcp://r0:1", "tcp://r1:1", "tcp://new:1"]
    assert choice.questions(2 * ASK_EVERY_NS) == [0, 1, 2]
