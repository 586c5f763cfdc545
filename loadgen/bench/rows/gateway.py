"""What a request costs the gateway, beside a bare ASGI echo with the same callers in the same run.

Both are one process, on uvloop and httptools. The echo does nothing with a request; the gateway reads its
JSON, sends a query to a router, and answers with what came back. The generator is the crowd of `messages`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it has no stubs

from loadgen.bench.rows.messages import N_GPUS, Server, crowd
from loadgen.bench.rows.row import BenchRow, SkippedError
from loadgen.bench.senders.crowd import CrowdPlan
from loadgen.live.run import Emulation, emulated
from superserve.clock import MS
from superserve.errors import ProcessError
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loadgen.bench.rows.messages import CrowdRun

N_CALLERS = 256
_LONG_NS = 2_000 * MS
_SMALL, _IMAGE = 64, 150_000
_RATES_QPS = {_SMALL: 2_000.0, _IMAGE: 300.0}
"""Open loop, the same for both: in a closed one the echo, which answers at once, would share a wake-up among
more requests. All messages of a run are made before it, 150 kB each."""
_START_S = 20.0
_NEEDS = ("httptools", "uvicorn", "uvloop")


@contextlib.contextmanager
def asgi_echo() -> Iterator[Server]:
    """Run the bare echo."""
    with ProcessGroup() as group:
        server = group.start("asgi-echo", ["-m", "loadgen.bench.senders.asgi_echo"])
        group.wait_ready(_START_S)
        yield Server(server.ready["port"], "http", [server.pid])


@contextlib.contextmanager
def gateway() -> Iterator[Server]:
    """Run a gateway of one process in front of a router and emulated GPUs.

    Raises:
        ProcessError: It was not ready in time.
    """
    with emulated(Emulation("cnn-8gpu-modelled", N_GPUS, "mincost")) as cluster, ProcessGroup() as group:
        argv = ["-m", "gateway", "--connect", cluster.client_endpoint, "--http-port", "0", "--model", "m"]
        server = group.start("gateway", [*argv, "--drain-notice-s", "0"])
        group.wait_ready(_START_S)
        url = server.ready["http"]
        _await_ready(url)
        (serving,) = [one for one in psutil.Process(server.pid).children() if "process" in one.cmdline()]
        yield Server(int(url.rpartition(":")[2]), "protocol", [serving.pid])


def _await_ready(url: str) -> None:
    give_up_s = time.monotonic() + _START_S
    while time.monotonic() < give_up_s:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):  # noqa: S310  our own
                return
        except urllib.error.HTTPError:
            time.sleep(0.05)
    raise ProcessError(f"the gateway was not ready within {_START_S:g} s")


class GatewayCost:
    """Measures the rows of this page.

    Args:
        seconds: How long each run counts.
        say: Receives what is being done.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._say = say

    def gateway_us(self) -> BenchRow:
        """The gateway's processor time for a request of 64 bytes."""
        return self._row("gateway_us", _SMALL)

    def gateway_150kb_us(self) -> BenchRow:
        """The same for an image of 150 kB."""
        return self._row("gateway_150kb_us", _IMAGE)

    def _row(self, name: str, payload_bytes: int) -> BenchRow:
        missing = [one for one in _NEEDS if importlib.util.find_spec(one) is None]
        if missing:
            raise SkippedError(f"{', '.join(missing)} is not installed")
        runs: dict[str, list[CrowdRun]] = {"gateway": [], "asgi": []}
        servers = {"gateway": gateway, "asgi": asgi_echo}
        for _ in range(3):
            for which, found in runs.items():
                found.append(self._run(servers[which], payload_bytes))
                last = found[-1]
                self._say(f"  {which}, {payload_bytes} bytes: {last.cpu_us:.1f} us, {last.qps:,.0f} q/s")
        ours, echo = (statistics.median(run.cpu_us for run in runs[which]) for which in ("gateway", "asgi"))
        conditions = {
            "callers": f"{N_CALLERS} connections, one request each under way, open loop",
            "rate_qps": _RATES_QPS[payload_bytes], "payload_bytes": payload_bytes,
            "seconds": self._seconds, "rounds": "servers in turn", "over_the_echo_us": round(ours - echo, 1),
            "runs": {which: [asdict(run) for run in found] for which, found in runs.items()},
        }  # fmt: skip
        return BenchRow(name, ours, "us", "bare ASGI echo, same crowd", echo, conditions)

    def _run(
        self, serve: Callable[[], contextlib.AbstractContextManager[Server]], payload_bytes: int
    ) -> CrowdRun:
        plan = CrowdPlan(
            "127.0.0.1", 0, "", "", _RATES_QPS[payload_bytes], self._seconds, n_connections=N_CALLERS,
            slo_ns=_LONG_NS, payload_bytes=payload_bytes,
        )  # fmt: skip
        with serve() as server:
            return crowd(server, plan)
