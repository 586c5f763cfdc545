"""A router's client without a router: futures that a test settles."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gateway.calls.backend import Backend
from gateway.calls.board import Board
from superserve.client import Reply, Timeline
from superserve.hello import ModelSpec
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.client import AsyncClient

DIGITS = ModelSpec(TensorSpec("float32", (1, 2, 2)), TensorSpec("float32", (3,)), "digits")
ANY = ModelSpec(None, None, "any")
SUBNETS = (("small", 70.0), ("large", 80.0))


@dataclass
class Submitted:
    """One query that the gateway has submitted."""

    payload: bytes
    slo_ms: float
    min_accuracy: float | None
    priority: int
    future: Future[Reply]
    traceparent: str | None = None


@dataclass
class FakeClient:
    """Takes queries as AsyncClient does; `refusal` is raised instead, from the query of that number on."""

    model: ModelSpec | None = DIGITS
    subnets: tuple[tuple[str, float], ...] = SUBNETS
    is_connected: bool = True
    refusal: Exception | None = None
    refuse_from: int = 0
    submitted: list[Submitted] = field(default_factory=list)

    def submit(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0,
        traceparent: str | None = None,
    ) -> Future[Reply]:  # fmt: skip
        """Take a query."""
        if self.refusal is not None and len(self.submitted) >= self.refuse_from:
            raise self.refusal
        one = Submitted(bytes(payload), slo_ms, min_accuracy, priority, Future(), traceparent)
        self.submitted.append(one)
        return one.future

    def answer(self, output: Any = None, *, subnet: str = "large", is_late: bool = False) -> None:
        """Answer every query that waits."""
        value = np.arange(3, dtype=np.float32) if output is None else output
        for one in self.submitted:
            if not one.future.done():
                one.future.set_result(reply(value, subnet=subnet, is_late=is_late))


def reply(output: Any, *, subnet: str = "large", is_late: bool = False, batch_size: int = 2) -> Reply:
    """Return a reply with times that differ from each other."""
    accuracy = dict(SUBNETS)[subnet]
    return Reply(output, is_late, subnet, accuracy, batch_size, Timeline(1.5, 0.25, 4.0, 0.5), 7.0)


def backend(client: FakeClient, folder: Path, default_slo_ns: int | None = None) -> Backend:
    """Return a backend on a fake client, with a board of one row."""
    path = folder / "board"
    Board.make(path, 1)
    return Backend(cast("AsyncClient", client), Board(path, 0), default_slo_ns=default_slo_ns)
