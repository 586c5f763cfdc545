"""Two live routers under load, of which one is killed, stopped, cut off or restarted, time after time.

    python -m tests.e2e.router_faults --fault kill --times 20
    python -m tests.e2e.router_faults --fault cut --times 20        in namespaces of its own: needs root
    python -m tests.e2e.router_faults --fault restart --times 5 --slo-ms 1000

Each time prints how long it took from the fault to the first answer of a query that had to be sent again, and
how every query ended. It exits with 1 if a query failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import orjson

from superserve.client.client import Client
from superserve.clock import MS
from superserve.errors import NoRouterError, QueryError
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.client.futures import QueryFuture

PROFILE = "cnn-8gpu-modelled"
FAULTS = ("kill", "stop", "cut", "restart")
_INSIDE = "SUPERSERVE_ROUTER_FAULTS"  # the namespace that this command runs in
_ROUTER_AT, _OTHERS_AT = "10.78.0.1", "10.78.0.2"
_WAIT_S = 60.0
_PORTS = ((27_555, 27_556), (27_557, 27_558), (27_559, 27_560))


@dataclass
class Struck:
    """How one fault went.

    Attributes:
        first_ms: From the fault to the first answer of a query that was sent again; None if none was.
        ends: How the queries ended.
        n_again: Queries sent to a second router.
        slowest_ms: The longest that a query took.
    """

    first_ms: float | None
    ends: Counter[str] = field(default_factory=Counter)
    n_again: int = 0
    slowest_ms: float = 0.0

    @property
    def n_failed(self) -> int:
        """Queries without an output in time."""
        return self.ends.total() - self.ends["ok"]

    def line(self) -> str:
        """Return it in words."""
        first = "no query had to be sent again" if self.first_ms is None else f"{self.first_ms:.1f} ms"
        ends = ", ".join(f"{name} {n}" for name, n in self.ends.most_common())
        return f"first answer {first}; {self.n_again} sent again; slowest {self.slowest_ms:.0f} ms; {ends}"


class TwoRouters:
    """Two routers and their workers as processes; the first may run in a namespace of its own.

    Args:
        folder: Of their list and logs.
        n_workers: Worker processes with one emulated GPU each.
        namespace: Where the first router runs; "" for here.
        speed: Of the GPUs, as a multiple of their profile's.
    """

    def __init__(self, folder: Path, n_workers: int, namespace: str = "", speed: float = 1.0) -> None:
        self.folder = folder
        self._speed = speed
        self.namespace = namespace
        first = "127.0.0.1" if not namespace else _ROUTER_AT
        hosts = (first, "127.0.0.1", "127.0.0.1")  # the third router is there only if a test starts it
        self.all_clients = [f"tcp://{host}:{ports[0]}" for host, ports in zip(hosts, _PORTS, strict=True)]
        self._workers = [f"tcp://{host}:{ports[1]}" for host, ports in zip(hosts, _PORTS, strict=True)]
        self.clients = self.all_clients[:2]
        self._n_workers = n_workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self.routers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoRouters:
        self.write_list(0, 1)
        try:
            self.routers = [self.start_router(i) for i in range(2)]
            for i in range(self._n_workers):
                ends = [self._workers[i % 2], self._workers[1 - i % 2]]
                argv = ["gpu_worker", "--connect", ",".join(ends), "--emulate", PROFILE, "--name", f"w{i}"]
                argv += ["--speed", str(self._speed)]
                self._processes.append(self._start(argv, f"w{i}"))
            self.await_shares()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.routers, *self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def write_list(self, *numbers: int) -> None:
        """Replace the list of routers, at once, as `cluster up` does."""
        body = {
            "routers": [{"client": self.all_clients[i], "worker": self._workers[i]} for i in numbers]
        }  # fmt: skip
        new = self.folder / "routers.new"
        new.write_bytes(orjson.dumps(body))
        new.replace(self.folder / "routers.json")

    def list_of(self, _i: int) -> Path:
        """Return the list of routers that a router is given."""
        return self.folder / "routers.json"

    def start_router(self, i: int) -> subprocess.Popen[bytes]:
        """Start a router."""
        argv = [
            "router", "--client-endpoint", self.all_clients[i], "--worker-endpoint", self._workers[i],
            "--routers", str(self.list_of(i)), "--security", "none",
        ]  # fmt: skip
        return self._start(argv, f"router{i}", self.namespace if i == 0 else "")

    def _start(self, argv: list[str], name: str, namespace: str = "") -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen([*inside, sys.executable, "-m", *argv], stdout=log, stderr=log)

    def await_shares(self, *numbers: int) -> None:
        """Wait until the workers are shared out evenly between these routers; the first two by default."""
        give_up_s = time.monotonic() + _WAIT_S
        endpoints = [self.all_clients[i] for i in numbers] or self.clients
        part = self._n_workers // len(endpoints)
        while True:
            shares = []
            for endpoint in endpoints:
                with contextlib.suppress(NoRouterError):
                    shares.append(ask_status(endpoint, 0.5).workers_ready)
            if len(shares) == len(endpoints) and min(shares) >= part and sum(shares) == self._n_workers:
                return
            assert time.monotonic() < give_up_s, f"the workers are at the routers so: {shares}"
            time.sleep(0.1)  # between two questions to other processes

    # --- faults ---------------------------------------------------------------------------

    def strike(self, fault: str) -> None:
        """Let something happen to the first router."""
        match fault:
            case "kill":
                self.routers[0].kill()
            case "stop":
                self.routers[0].send_signal(signal.SIGSTOP)
            case "restart":
                self.routers[0].terminate()
            case "cut":
                _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")

    def mend(self, fault: str) -> None:
        """Undo it."""
        if fault == "stop":
            self.routers[0].send_signal(signal.SIGCONT)
        elif fault == "cut":
            _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")
        else:
            self.routers[0].wait(_WAIT_S)
            self.routers[0] = self.start_router(0)


def strike_under_load(two: TwoRouters, client: Client, fault: str, rate_qps: float, slo_ms: float) -> Struck:
    """Send at a rate for four seconds, strike after one, and mend after two and a half.

    A router that has ended is started again only after that: on two cores its imports starve the others.
    """
    done_ns: dict[int, int] = {}
    futures: list[QueryFuture] = []
    struck_ns = 0
    mender: threading.Thread | None = None
    begin_s = time.monotonic()
    while (passed_s := time.monotonic() - begin_s) < 4.0:
        if passed_s >= 1.0 and not struck_ns:
            two.strike(fault)
            struck_ns = time.monotonic_ns()
        if passed_s >= 2.5 and mender is None and fault in ("stop", "cut"):
            mender = threading.Thread(target=two.mend, args=(fault,))
            mender.start()
        for _ in range(int(passed_s * rate_qps) - len(futures)):
            future = client.submit(bytes(64), slo_ms=slo_ms)
            future.add_done_callback(lambda one: done_ns.setdefault(one.query_id, time.monotonic_ns()))
            futures.append(future)
        time.sleep(0.001)  # the pace of the load
    found = Struck(None)
    for future in futures:
        try:
            reply = future.result(slo_ms / 1e3 + 10)
            found.ends["late" if reply.is_late else "ok"] += 1
            found.slowest_ms = max(found.slowest_ms, reply.latency_ms)
        except QueryError as error:
            found.ends[type(error).__name__] += 1
    if mender is None:
        two.mend(fault)
    else:
        mender.join()
    again = [one for one in futures if one.n_sends and done_ns.get(one.query_id, 0) > struck_ns]
    found.n_again = len(again)
    waits_ns = [done_ns[one.query_id] - struck_ns for one in again]
    found.first_ms = min(waits_ns) / MS if waits_ns else None
    return found


def repeat(
    fault: str, times: int, rate_qps: float, slo_ms: float, n_workers: int, speed: float = 1.0
) -> Iterator[Struck]:
    """Yield how each of several faults went."""
    with (
        tempfile.TemporaryDirectory(prefix="ss") as folder,
        TwoRouters(Path(folder), n_workers, os.environ.get(_INSIDE, ""), speed) as two,
        Client(two.clients) as client,
    ):
        for _ in range(times):
            two.await_shares()
            time.sleep(1.0)  # the client learns how many GPUs each has
            yield strike_under_load(two, client, fault, rate_qps, slo_ms)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def _in_namespaces() -> int:
    """Run this command again in a namespace, beside one for the first router; return its exit code."""
    names = [f"ssrf-{os.getpid()}-{which}" for which in ("router", "others")]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        router, others = names
        _run(
            "ip", "-n", others, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", router
        )
        for name, address in ((router, _ROUTER_AT), (others, _OTHERS_AT)):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        argv = [sys.executable, "-m", "tests.e2e.router_faults", *sys.argv[1:]]
        # `ip netns exec` of the router's namespace works from within the other one: names are files.
        inside = ["ip", "netns", "exec", others, *argv]
        return subprocess.run(inside, env={**os.environ, _INSIDE: router}, check=False).returncode
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@click.command()
@click.option("--fault", type=click.Choice(FAULTS), default="kill", show_default=True)
@click.option("--times", type=click.IntRange(1), default=20, show_default=True)
@click.option("--rate", type=float, default=3_500.0, show_default=True, help="Queries a second.")
@click.option("--slo-ms", type=float, default=500.0, show_default=True)
@click.option("--workers", type=click.IntRange(2), default=8, show_default=True)
def main(fault: str, times: int, rate: float, slo_ms: float, workers: int) -> None:
    """Strike one of two routers under load, and print what that did to the queries."""
    if fault == "cut" and _INSIDE not in os.environ:
        sys.exit(_in_namespaces())
    firsts: list[float] = []
    n = n_failed = 0
    for i, struck in enumerate(repeat(fault, times, rate, slo_ms, workers), start=1):
        click.echo(f"{i:3d}  {struck.line()}")
        firsts += [] if struck.first_ms is None else [struck.first_ms]
        n, n_failed = n + struck.ends.total(), n_failed + struck.n_failed
    p50, most = np.percentile(firsts, [50, 100]) if firsts else (float("nan"),) * 2
    click.echo(f"{fault}: first answer p50 {p50:.1f} ms, max {most:.1f} ms; {n_failed} of {n} queries failed")
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    main()
