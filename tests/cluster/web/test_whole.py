"""The whole of several routers: sums of theirs, on one clock, and each one's own frame beside it."""

from __future__ import annotations

import threading
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cluster.web.feed import FrameFeed
from cluster.web.hub import Asking
from cluster.web.watch import RouterLook, RouterWatch
from cluster.web.whole import WholeFeed, river_of
from profiles.table import Profile
from tests.cluster.web.statuses import WatchedRouter
from tests.loadgen.study.explain.flown import even, spike

if TYPE_CHECKING:
    from superserve.status import RouterStatus

SHIFT_MS = 5_000.0


class Seen:
    """A simulated router and the feed that follows it."""

    def __init__(self, router: WatchedRouter) -> None:
        self.router = router
        self.feed = FrameFeed("test")
        self.cursor: int | None = None

    def look(self, ms: int, endpoint: str) -> RouterLook:
        """Let time pass, and look."""
        status, found = self.router.at(ms, self.cursor)
        if self.feed.is_new:
            self.feed.learn([Profile.from_dict(one) for one in found["profiles"]], found["profile_of"])
        self.feed.name_gpus([(name, slot) for name, slot in found["gpus"]])
        frame = self.feed.frame(status, found, b64decode(found["entries"]))
        self.cursor = found["cursor"]
        return RouterLook(endpoint, status, frame)


def test_the_whole_is_the_sum_of_its_routers() -> None:
    """Rates, ends, subnets, queues and GPUs add up; batches and misses are on the page's clock."""
    seen = [Seen(WatchedRouter(even(400), gpus=2)), Seen(WatchedRouter(spike(300), 3, "fixed:cnn-80.16"))]
    whole, frames = WholeFeed("test"), []
    for ms in range(10, 401, 10):
        looks = [one.look(ms, f"tcp://r{i}") for i, one in enumerate(seen)]
        frames.append(whole.frame(looks, looks[0].frame["t"] + SHIFT_MS))  # type: ignore[index]
    orjson.dumps(frames)

    for frame in frames:
        first, second = frame["parts"]
        assert frame["in"] == first["in"] + second["in"]
        assert sum(frame["missed"].values()) == pytest.approx(
            sum(first["missed"].values()) + sum(second["missed"].values())
        )
        assert sum(frame["river"]["counts"]) == sum(first["river"]["counts"]) + sum(second["river"]["counts"])
        assert frame["queue"] == first["queue"] + second["queue"]
        assert len(frame["gpus"]) == len(frame["workers"]) == 5
        assert frame["ready"] == 5
        assert {batch[0] for batch in frame["batches"]} <= set(range(5))
        assert all(frame["t"] - 200 < batch[1] <= frame["t"] for batch in frame["batches"])
        assert len(frame["batches"]) == len(first["batches"]) + len(second["batches"])
    misses = [one["name"] for frame in frames for one in frame["misses"]]
    assert {name.split(" at ")[1] for name in misses} == {"2"}
    assert {batch[0] for frame in frames for batch in frame["batches"]} == {0, 1, 2, 3, 4}
    last = frames[-1]
    assert [row["gpus"] for row in last["routers"]] == [2, 3]
    assert last["att"][2] == pytest.approx(_att(seen[0].router.at(400, 0)[0], seen[1].router.at(400, 0)[0]))
    assert sorted(row["client"] for row in last["clients"]) == ["1 at 1", "1 at 2"]


def _att(*statuses: RouterStatus) -> float:
    counts = [one.queries.answered for one in statuses]
    return sum(one.ok for one in counts) / sum(one.wanted for one in counts)


def test_a_router_that_is_gone_is_named_and_the_others_go_on() -> None:
    """It has no part, and the verdict begins with it."""
    seen = Seen(WatchedRouter(even(400)))
    frame = WholeFeed("test").frame(
        [RouterLook("tcp://a", why="nobody home"), seen.look(100, "tcp://b")], 7.0
    )

    assert frame["findings"][0] == {
        "verdict": "wrong", "text": "router 1 does not answer: nobody home", "fix": "",
    }  # fmt: skip
    assert [row["answers"] for row in frame["routers"]] == [False, True]
    assert frame["parts"][0] is None
    assert frame["gpus"] == frame["parts"][1]["gpus"]


def test_histograms_of_different_widths_add_up() -> None:
    """Each bin goes to the wider one that contains it."""
    rivers = [
        {"width_ms": 1, "counts": [1, 2, 3, 4, 5], "quickest_ms": 2.0},
        {"width_ms": 2, "counts": [10, 20], "quickest_ms": 1.5},
    ]

    assert river_of(rivers) == {"width_ms": 2, "counts": [13, 27, 5, 0, 0], "quickest_ms": 1.5}
    assert river_of([]) is None


class HeldWatch(RouterWatch):
    """A router that answers when the test lets it."""

    def __init__(self, frame: dict[str, Any]) -> None:
        self.may_answer = threading.Event()
        self.n_asked = 0
        self._frame = frame

    def look(self) -> RouterLook:
        """Wait until the test says so."""
        self.n_asked += 1
        assert self.may_answer.wait(20.0)
        return RouterLook("tcp://held", frame=self._frame)


def test_a_router_that_stalls_holds_up_no_frame() -> None:
    """Until it answers again its last frame stays, with nothing new; it is not asked twice meanwhile."""
    quick, slow = HeldWatch({"t": 1, "batches": [1]}), HeldWatch({"t": 1, "batches": [1], "queue": 3})
    quick.may_answer.set()
    slow.may_answer.set()
    asking = Asking([quick, slow], ["tcp://a", "tcp://b"])
    try:
        first = asking.looks()
        slow.may_answer.clear()
        second, third = asking.looks(), asking.looks()
    finally:
        slow.may_answer.set()
        asking.close()

    assert [one.frame and one.frame["batches"] for one in first] == [[1], [1]]
    for looks in (second, third):
        assert looks[0].frame == {"t": 1, "batches": [1]}
        assert looks[1].frame == {
            "t": 1, "batches": [], "queue": 3, "misses": [], "subnets": {}, "served_accuracy": None,
        }  # fmt: skip
    assert (quick.n_asked, slow.n_asked) == (3, 2)
