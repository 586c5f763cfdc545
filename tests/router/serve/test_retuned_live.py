"""A router process whose settings file changes under load: every query is answered, and replay agrees."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from router.serve.recording import replay
from superserve.client.client import Client
from superserve.net.connection import ask_status
from superserve.roles import processes
from tests.router.serve.test_server import emulated_worker
from tests.superserve.client.fakes import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from superserve.client.futures import QueryFuture

pytestmark = pytest.mark.e2e

SETTINGS = (
    {"policy": "maxacc", "max_queries": 5_000},
    {"policy": "slackfit", "margin_ms": 0.5},
    {"policy": "fixed:smallest", "max_bytes": 1 << 20},
    {"policy": "planfit"},
)
SLO_MS = 20_000.0


def _until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def test_a_router_under_load_takes_what_its_file_says(tmp_path: Path) -> None:
    """Policies that see demand and that do not, in turn; then a wrong one, which it names and leaves."""
    path, log = tmp_path / "router.json", tmp_path / "log"
    path.write_text(json.dumps({"policy": "planfit"}))
    with processes.ProcessGroup() as group:
        router = group.start("router", ["-m", "router", "--settings", str(path), "--record", str(log)])
        processes.wait_ready(router, WAIT_S)
        emulated_worker(group, router)
        endpoint = router.ready["client"]
        with Client(endpoint) as client:
            futures: list[QueryFuture] = []

            def is_in_force(wanted: dict[str, object]) -> bool:
                futures.extend(client.submit(bytes(8), slo_ms=SLO_MS) for _ in range(20))
                info = ask_status(endpoint, WAIT_S).router
                return all(getattr(info, name) == value for name, value in wanted.items())

            for settings in SETTINGS:
                path.write_text(json.dumps(settings))
                _until(lambda wanted=settings: is_in_force(wanted))  # type: ignore[misc]
            path.write_text(json.dumps({"policy": "fixed:none"}))
            _until(lambda: "none" in ask_status(endpoint, WAIT_S).router.settings_error)
            assert ask_status(endpoint, WAIT_S).router.policy == "planfit"
            futures += [client.submit(bytes(8), slo_ms=SLO_MS) for _ in range(20)]
            for future in futures:
                future.result(WAIT_S)
        assert router.stop() == 0
    found = replay(log)
    assert found.mismatches == ()
    assert found.n_events > 5
