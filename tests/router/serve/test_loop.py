"""When the router's loop sleeps, and when it looks again at once."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from router.serve import loop
from router.serve.loop import RouterServer, ServerSettings
from superserve.errors import ConfigError


@pytest.mark.parametrize(
    ("spin_ns", "expected"),
    [
        (0, ["pass", "rest", "pass", "wait", "pass", "wait"]),
        (10**15, ["pass", "pass", "pass"]),
        (1, ["pass", "pass", "wait", "pass", "wait"]),
    ],
)
def test_a_loop_that_spins_does_not_sleep(
    monkeypatch: pytest.MonkeyPatch, spin_ns: int, expected: list[str]
) -> None:
    """For as long after a message as it was told to; otherwise it rests after one, and waits for the next."""
    seen: list[str] = []
    server = RouterServer(ServerSettings(spin_ns=spin_ns))
    server.open()

    def one_pass() -> int:
        seen.append("pass")
        if seen.count("pass") == 3:
            server.stop()
        return int(len(seen) == 1)

    monkeypatch.setattr(server, "_pass", one_pass)
    monkeypatch.setattr(server, "_await", lambda _: seen.append("wait"))
    monkeypatch.setattr(loop, "rest", lambda _: seen.append("rest"))
    server.run()

    assert seen == expected


def test_a_router_that_cannot_open_gives_every_port_back() -> None:
    """Also the one it had bound already: an application that tries the next port must not keep the first."""
    running = RouterServer(ServerSettings())
    running.open()
    before = _held()
    server = RouterServer(ServerSettings(worker_endpoint=running.worker_endpoint))

    with pytest.raises(ConfigError, match=r"bind tcp://127\.0\.0\.1:\d+: Address already in use"):
        server.open()

    assert _held() == before
    running.close()


def _held() -> tuple[int, int]:
    """Return how many descriptors this process has, and how many TCP ports it listens on."""
    mine = psutil.Process()
    return mine.num_fds(), sum(found.status == psutil.CONN_LISTEN for found in mine.net_connections("tcp"))
