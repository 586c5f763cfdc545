"""Draining and restarting: one at a time, never the last, and stopped where something does not come back."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.operate.rolling import RollingOperator
from cluster.operate.supervised import chosen
from superserve.errors import ConfigError, ProcessError
from tests.cluster.operated import FakeCluster, role

GONE: dict[str, Any] = {"state": "STOPPED", "pid": None}


class Scene:
    """Three workers on two hosts."""

    def __init__(self, **first: Any) -> None:
        self.said: list[str] = []
        self.cluster = FakeCluster(
            role("router"), role("w0", **first), role("w1"), role("w2", host="b")
        )  # fmt: skip
        self.operator = RollingOperator(
            self.cluster, self.said.append, clock=self.cluster.clock, pause=self.cluster.pause
        )

    def restart(self, *names: str, at_once: int = 1, force: bool = False) -> None:
        """Restart workers."""
        self.operator.restart(names, at_once=at_once, force=force, timeout_s=60.0)


def test_workers_are_restarted_one_at_a_time() -> None:
    """The next one only once the one before is live again; the router is left alone."""
    scene = Scene()

    scene.restart()

    assert scene.cluster.did == ["stop w0", "start w0", "stop w1", "start w1", "stop w2", "start w2"]
    assert scene.cluster.always_live == 2
    assert scene.said[:2] == ["w0: drained in 0.4 s", "w0: live again after 1.2 s, as pid 200"]


def test_more_at_once_are_taken_only_if_told_so() -> None:
    """Two are away together, and one is left."""
    scene = Scene()

    scene.restart(at_once=2)

    assert scene.cluster.did[:2] == ["stop w0", "stop w1"]
    assert scene.cluster.always_live == 1


def test_a_host_stands_for_its_workers() -> None:
    """Names may be of either, and each worker is taken once."""
    scene = Scene()

    scene.restart("w0", "a")

    assert scene.cluster.did == ["stop w0", "start w0", "stop w1", "start w1"]


def test_a_worker_that_does_not_come_back_ends_it() -> None:
    """The other workers stay and serve; the error has the end of the log and how far the restart came."""
    scene = Scene()
    scene.cluster.wont["w1"] = "no memory"

    with pytest.raises(ProcessError) as caught:
        scene.restart()

    assert str(caught.value).splitlines() == [
        "w1: did not come back (FATAL): no memory",
        "restarted before: w0; not touched: w2",
    ]
    assert scene.cluster.did[-1] == "start w1"


def test_a_worker_that_does_not_end_ends_it() -> None:
    """And is named."""
    scene = Scene()
    scene.cluster.stuck.add("w0")

    with pytest.raises(ProcessError, match="w0: expected to end within 30 s, still there"):
        scene.restart()

    assert scene.cluster.did == ["stop w0"]


def test_the_last_live_worker_is_not_taken() -> None:
    """Nothing is done at all, unless forced."""
    scene = Scene()

    with pytest.raises(ConfigError, match="w0, w1, w2: expected another live worker"):
        scene.restart(at_once=3)

    assert scene.cluster.did == []
    scene.restart(at_once=3, force=True)
    assert scene.cluster.always_live == 0
    assert len(scene.cluster.did) == 6


def test_who_has_ended_is_started_first() -> None:
    """It can stand in for the next, and needs no drain."""
    scene = Scene()
    scene.operator.drain(["w0", "w1"])
    scene.cluster.did.clear()

    scene.restart("w2", "w1")

    assert scene.cluster.did == ["start w1", "stop w2", "start w2"]


def test_the_router_comes_back_before_its_workers_are_counted() -> None:
    """Only it is restarted."""
    scene = Scene()

    scene.operator.restart_router(60.0)

    assert scene.cluster.did == ["stop router", "start router"]


def test_a_drained_worker_stays_away() -> None:
    """It lists the workers that are left; the second time there is nothing to do."""
    scene = Scene()

    scene.operator.drain(["w0"])
    scene.operator.drain(["w0"])

    assert scene.cluster.did == ["stop w0"]
    assert scene.said == ["w0: drained in 0.4 s", "2 left: w1, w2", "w0: has ended already (STOPPED)"]


def test_the_last_worker_may_be_drained_with_a_warning() -> None:
    """The operator may want just that; the output shows what happens to queries."""
    scene = Scene()

    scene.operator.drain(["a", "b"])

    assert scene.said[0].startswith("warning: no worker is left after this: queries wait, and expire")
    assert scene.said[-1] == "no worker is left"


def test_what_was_drained_is_started_again() -> None:
    """As `up` does."""
    scene = Scene()
    scene.operator.drain(["a"])

    assert scene.operator.start_ended(60.0) == ["w0", "w1"]
    assert all(role.is_up for role in scene.cluster.roles())
    assert scene.operator.start_ended(60.0) == []


def test_without_a_router_nothing_is_drained() -> None:
    """A worker drains only if another takes its place."""
    scene = Scene()
    scene.cluster.is_silent = True

    with pytest.raises(ProcessError, match="the router does not answer"):
        scene.operator.drain(["w0"])

    assert scene.cluster.did == []


def test_an_interrupted_restart_says_what_to_type() -> None:
    """Ctrl-C between a stop and a start leaves a worker away."""
    scene = Scene()

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    operator = RollingOperator(scene.cluster, scene.said.append, clock=scene.cluster.clock, pause=interrupt)

    with pytest.raises(ProcessError, match="interrupted at w0: `cluster restart w0` starts"):
        operator.restart((), at_once=1, force=False, timeout_s=60.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w00", "w00: no such worker or host; did you mean w0?"),
        ("elsewhere", "elsewhere: expected a worker or a host, one of w0, w1, w2, a, b"),
        ("router", "router: expected a worker or a host; `cluster restart --rolling --router`"),
        ("c", "c: expected a host with workers; it has none"),
    ],
)
def test_names_that_stand_for_nothing_have_their_nearest_told(name: str, words: str) -> None:
    """An operator's slip costs one more line."""
    roles = [role("router", host="c"), role("w0"), role("w1"), role("w2", host="b")]

    with pytest.raises(ConfigError) as caught:
        chosen(roles, [name])

    assert str(caught.value).startswith(words)
