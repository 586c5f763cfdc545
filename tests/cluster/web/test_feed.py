"""Frames: what has happened since the one before, from STATUS and the flight record."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import orjson

from cluster.web.feed import FrameFeed
from profiles.table import Profile
from tests.cluster.web.statuses import WatchedRouter
from tests.loadgen.study.explain.flown import even, spike


def frames_of(router: WatchedRouter, until_ms: int, every_ms: int = 50) -> list[dict[str, Any]]:
    """Return the frames of a simulated router, as the hub makes them."""
    feed, cursor, frames = FrameFeed("test"), None, []
    for ms in range(every_ms, until_ms + 1, every_ms):
        status, found = router.at(ms, cursor)
        if feed.is_new:
            feed.learn([Profile.from_dict(one) for one in found["profiles"]], found["profile_of"])
        feed.name_gpus([(name, slot) for name, slot in found["gpus"]])
        frames.append(feed.frame(status, found, b64decode(found["entries"])))
        cursor = found["cursor"]
    orjson.dumps(frames)
    return frames


def test_frames_add_up_to_the_run() -> None:
    """Summed over the frames, what came in, ended and was served is what the router counted."""
    router = WatchedRouter(even(400))
    frames = frames_of(router, 700)

    arrived = sum(frame["in"] * 0.05 for frame in frames)
    assert round(arrived) == 180  # of 200; those before the second frame have no frame to count from
    served = sum(sum(frame["subnets"].values()) for frame in frames)
    assert served == 180
    assert sum(len(frame["batches"]) for frame in frames) > 50
    last = frames[-1]
    assert last["att"] == [1.0, 1.0, 1.0]
    assert last["findings"] == []
    assert last["subnet_names"][0] == "cnn-73.82"
    gpu, start_ms, took_ms, subnet, n = frames[4]["batches"][0]
    assert gpu in (0, 1)
    assert took_ms == float(router.simulation.processes[0].gpus[0].profile.latency_ns(subnet, n) / 1e6)
    assert start_ms < frames[4]["t"]


def test_a_spike_is_seen_and_explained() -> None:
    """The river holds what waits, misses say where their time went, and the verdict says that it is bad."""
    router = WatchedRouter(spike(300), policy="fixed:cnn-80.16")
    frames = frames_of(router, 400, every_ms=10)

    assert max(sum(frame["river"]["counts"]) for frame in frames) > 200
    misses = [miss for frame in frames for miss in frame["misses"]]
    assert misses
    assert {miss["cause"] for miss in misses} == {"queue"}
    for miss in misses:
        assert abs(sum(ms for _, ms in miss["parts"]) - miss["took"]) < 0.1
    assert frames[-1]["att"][2] < 0.5
    assert any("of the queries of the last 10 s missed" in one["text"] for one in frames[-1]["findings"])
    assert sum(sum(frame["missed"].values()) for frame in frames) > 0
    (client,) = frames[-1]["clients"]
    assert client["all"] == frames[-1]["att"][2]


def test_what_is_kept_is_bounded() -> None:
    """After some seconds the index holds the last seconds only."""
    router = WatchedRouter(even(100, 12.0))
    feed, cursor = FrameFeed("test"), None
    for ms in range(250, 12_001, 250):
        status, found = router.at(ms, cursor)
        if feed.is_new:
            feed.learn([Profile.from_dict(one) for one in found["profiles"]], found["profile_of"])
        feed.frame(status, found, b64decode(found["entries"]))
        cursor = found["cursor"]

    assert 250 < len(feed._flight.queries) < 700


def test_another_router_starts_again() -> None:
    """The counters of a router that was restarted are not compared with those of the one before."""
    router = WatchedRouter(even(400))
    feed = FrameFeed("test")
    status, found = router.at(100, None)
    feed.learn([Profile.from_dict(one) for one in found["profiles"]], found["profile_of"])
    feed.frame(status, found, b"")
    router.epoch = 2
    status, found = router.at(200, found["cursor"])

    assert feed.frame(status, found, b"")["in"] == 0.0
