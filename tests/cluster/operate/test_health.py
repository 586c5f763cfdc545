"""What the operator sees of a router that does not answer, or cannot be asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.operate import health
from superserve.errors import ConfigError, NoRouterError


def test_only_silence_is_a_router_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps this process from asking is an error of its own, which names the limit."""
    cluster: Any = SimpleNamespace(client_endpoint="tcp://127.0.0.1:5555")

    def fail(error: ConfigError) -> None:
        def ask(_endpoint: str) -> None:
            raise error

        monkeypatch.setattr(health, "ask_status", ask)

    fail(NoRouterError("no router answers at tcp://127.0.0.1:5555"))
    assert health.ask_router(cluster) is None

    fail(ConfigError("asking a router for its status: needs 32 file descriptors"))
    with pytest.raises(ConfigError, match="32 file descriptors"):
        health.ask_router(cluster)
