"""A router at its limit of file descriptors goes on serving, reports it once, and lets its processor rest."""

from __future__ import annotations

import os
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from superserve.client.client import Client
from superserve.errors import ConfigError
from superserve.net.connection import ask_status
from superserve.roles import processes
from tests.superserve.client.fakes import WAIT_S, poll

if TYPE_CHECKING:
    from superserve.roles.processes import RoleProcess
    from superserve.status import RouterStatus

pytestmark = [pytest.mark.timeout(90), pytest.mark.e2e]

LIMIT = 300
BUSY_S = 0.2
SPINS = "an accept() that fails at once takes a processor"


def connected(endpoint: str, n: int, stack: ExitStack) -> None:
    """Open connections that send nothing; those that the router does not accept stay pending."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    for _ in range(n):
        one = stack.enter_context(socket.socket())
        one.setblocking(False)
        one.connect_ex((host, int(port)))


def busy_s(router: RoleProcess, for_s: float) -> float:
    """Return the processor time that the router takes in this many seconds."""
    before_s, end_s = cpu_s(router.pid), time.monotonic() + for_s
    poll(lambda: time.monotonic() >= end_s)
    return cpu_s(router.pid) - before_s


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has had, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> int:
    """Return how many file descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def test_a_router_at_its_limit_rests_and_says_so_once() -> None:
    """Who is connected is served; others get in once there is room again."""
    said = "all file descriptors are in use: this process may open"
    with processes.start("router", ["-m", "router"]) as router, ExitStack() as stack:
        endpoint = str(processes.wait_ready(router, WAIT_S)["client"])
        with Client(endpoint) as client:
            resource.prlimit(router.pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
            connected(endpoint, LIMIT + 60, stack)
            poll(lambda: said in router.tail(200))

            assert busy_s(router, 1.0) < BUSY_S, SPINS
            poll(lambda: descriptors(router.pid) > LIMIT // 2)  # open again, with a smaller reserve
            connected(endpoint, LIMIT, stack)
            assert busy_s(router, 3.0) < BUSY_S, SPINS
            assert client.submit(b"image", slo_ms=100).exception(WAIT_S) is not None
            assert router.tail(200).count(said) == 1
        stack.close()
        poll(lambda: bool(answer(endpoint)), WAIT_S * 2)
        assert router.tail(200).count(said) == 1


def answer(endpoint: str) -> RouterStatus | None:
    """Return a router's STATUS, or None if it admits no client."""
    try:
        return ask_status(endpoint, 1.0)
    except ConfigError:
        return None
