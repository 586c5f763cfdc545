"""`cluster web` beside a real router: it answers as soon as it is announced, and frames come."""

from __future__ import annotations

import contextlib
import urllib.request
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from loadgen.live.run import Emulation, emulated
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from http.client import HTTPResponse

pytestmark = pytest.mark.e2e


def frame_of(answer: HTTPResponse) -> dict[str, object]:
    """Return the next frame of a stream."""
    for line in answer:
        if line.startswith(b"data: "):
            frame: dict[str, object] = orjson.loads(line[6:])
            return frame
    raise AssertionError("the stream ended")


def test_readers_are_served_from_the_first_moment() -> None:
    """Three readers that connect when it is announced get the same frames, of the router that is there."""
    with emulated(Emulation("cnn-8gpu-modelled", 2)) as cluster, ProcessGroup() as group:
        argv = ["-m", "cluster", "web", "--connect", cluster.client_endpoint, "--port", "0"]
        web = group.start("web", argv)
        group.wait_ready(60.0)
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(urllib.request.urlopen(f"{web.ready['address']}stream", timeout=30))
                for _ in range(3)
            ]
            frames = [[frame_of(stream) for _ in range(3)] for stream in streams]

    for one in frames:
        assert [len(frame["workers"]) for frame in one] == [2, 2, 2]  # type: ignore[arg-type]
        assert one[0]["ready"] == 2
        assert one[0]["t"] < one[1]["t"] < one[2]["t"]  # type: ignore[operator]
    assert frames[0][-1] in frames[1] or frames[1][-1] in frames[0]


def test_of_several_routers_the_whole_and_each_are_shown() -> None:
    """Each has its GPU in the whole; one that is killed is named, and the other one goes on."""
    with ProcessGroup() as group:
        routers = [group.start(f"router-{i}", ["-m", "router"]) for i in range(2)]
        group.wait_ready(60.0)
        for i, router in enumerate(routers):
            argv = ["-m", "gpu_worker", "--connect", router.ready["worker"], "--emulate", "cnn-8gpu-modelled"]
            group.start(f"worker-{i}", [*argv, "--gpus", f"{i + 1}", "--name", f"gpus-{i}"])
        group.wait_ready(60.0)
        connect = ",".join(router.ready["client"] for router in routers)
        web = group.start("web", ["-m", "cluster", "web", "--connect", connect, "--port", "0"])
        group.wait_ready(60.0)
        with urllib.request.urlopen(f"{web.ready['address']}stream", timeout=30) as stream:
            frame: Any = frame_of(stream)
            while None in frame["parts"]:
                frame = frame_of(stream)
            assert [row["gpus"] for row in frame["routers"]] == [1, 2]
            assert frame["gpus"] == ["gpus-0:0", "gpus-1:0", "gpus-1:1"]
            assert [part["ready"] for part in frame["parts"]] == [1, 2]
            assert frame["ready"] == 3
            routers[0].kill()
            while frame["parts"][0] is not None:
                frame = frame_of(stream)
    assert frame["findings"][0]["text"].startswith("router 1 does not answer")
    assert frame["ready"] == 2
