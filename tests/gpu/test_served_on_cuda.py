"""A worker on a CUDA device behind a router: the demo's digits, end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import superserve
from gpu_worker.models.kinds import digits_data
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A router and one worker on the first CUDA device."""
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(30.0)
        group.start(
            "worker",
            [
                "-m",
                "gpu_worker",
                "--connect",
                router.ready["worker"],
                "--supernet",
                "digits",
                "--device",
                "cuda",
            ],
        )
        group.wait_ready(120.0)
        yield router.ready["client"]


@pytest.mark.timeout(180)
def test_a_cuda_worker_reads_digits(endpoint: str) -> None:
    """Answers come in time, and are right as often as the profile says, within three points."""
    held_out = digits_data().held_out
    images, labels = np.asarray(held_out.inputs[:512]), held_out.labels[:512]
    with superserve.Client(endpoint) as client:
        replies = [future.result() for future in [client.submit(image, slo_ms=2_000) for image in images]]
    right = [int(np.argmax(reply.output)) == label for reply, label in zip(replies, labels, strict=True)]

    assert 100 * sum(right) / len(right) > min(reply.accuracy for reply in replies) - 3
    assert not any(reply.is_late for reply in replies)
