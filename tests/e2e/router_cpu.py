"""Processor time a query by number of routers: the same load and workers, behind one router, two and more.

    python -m tests.e2e.router_cpu --routers 1,2,4 --rate 2000

Run it on a quiet machine. It prints, for each number, the processor time of all routers and of all workers a
query, and by how much that of the routers is more than with the first number: several routers handle more
messages, with less in each.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import orjson

from superserve.client.client import Client
from superserve.errors import ConfigError, NoRouterError, QueryError
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.client.futures import QueryFuture

PROFILE = "cnn-8gpu-modelled"
_WAIT_S = 120.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Cost(NamedTuple):
    """What a load cost.

    Attributes:
        router_us: Processor time of all routers a query, microseconds.
        worker_us: That of all workers.
        n_ok: Queries that got an output.
        n: Queries in all.
    """

    router_us: float
    worker_us: float
    n_ok: int
    n: int


def free_ports(n: int) -> list[int]:
    """Return ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def cpu_s(processes: list[subprocess.Popen[bytes]]) -> float:
    """Return the processor time of processes so far, seconds, with all their threads."""
    total = 0
    for process in processes:
        # After the name in parentheses: utime and stime are the 12th and 13th fields.
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * _TICK_S


@contextlib.contextmanager
def serving(
    n_routers: int, n_workers: int, folder: Path
) -> Iterator[tuple[list[str], list[subprocess.Popen[bytes]], list[subprocess.Popen[bytes]]]]:
    """Run routers, and workers with one emulated GPU each; yield endpoints, routers and workers."""
    ports = free_ports(2 * n_routers)
    ends = [f"tcp://127.0.0.1:{port}" for port in ports]
    clients, workers = ends[:n_routers], ends[n_routers:]
    listed = [{"client": a, "worker": b} for a, b in zip(clients, workers, strict=True)]
    path = folder / "routers.json"
    path.write_bytes(orjson.dumps({"routers": listed}))
    processes: list[subprocess.Popen[bytes]] = []

    def start(*argv: str) -> None:
        with (folder / f"{len(processes)}.log").open("wb") as log:
            processes.append(subprocess.Popen([sys.executable, "-m", *argv], stdout=log, stderr=log))

    try:
        several = ("--routers", str(path)) if n_routers > 1 else ()
        for client, worker in zip(clients, workers, strict=True):
            ends_of = ("--client-endpoint", client, "--worker-endpoint", worker)
            start("router", *ends_of, "--security", "none", *several)
        for i in range(n_workers):
            at = i % n_routers
            start("gpu_worker", "--connect", ",".join(workers[at:] + workers[:at]), "--emulate", PROFILE)
        _await(clients, n_workers)
        yield clients, processes[:n_routers], processes[n_routers:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _await(endpoints: list[str], n_workers: int) -> None:
    give_up_s = time.monotonic() + _WAIT_S
    while True:
        shares = []
        for endpoint in endpoints:
            with contextlib.suppress(NoRouterError):
                shares.append(ask_status(endpoint, 0.5).workers_ready)
        if sum(shares) == n_workers and min(shares) >= n_workers // len(endpoints):
            return
        if time.monotonic() > give_up_s:
            raise ConfigError(f"{n_workers} workers are at the routers so after {_WAIT_S:.0f} s: {shares}")
        time.sleep(0.1)  # between two questions to other processes


def measure(n_routers: int, n_workers: int, rate_qps: float, seconds: float, slo_ms: float) -> Cost:
    """Return what a steady load costs behind some routers."""
    with (
        tempfile.TemporaryDirectory(prefix="ss") as folder,
        serving(n_routers, n_workers, Path(folder)) as (endpoints, routers, workers),
        Client(endpoints) as client,
    ):
        client.submit(bytes(64), slo_ms=5_000).result(10)
        before = cpu_s(routers), cpu_s(workers)
        futures: list[QueryFuture] = []
        begin_s = time.monotonic()
        while (passed_s := time.monotonic() - begin_s) < seconds:
            futures += [
                client.submit(bytes(64), slo_ms=slo_ms)
                for _ in range(int(passed_s * rate_qps) - len(futures))
            ]
            time.sleep(0.001)  # the pace of the load
        n_ok = 0
        for future in futures:
            with contextlib.suppress(QueryError):
                future.result(slo_ms / 1e3 + 10)
                n_ok += 1
        n = len(futures)
        after = cpu_s(routers), cpu_s(workers)
        return Cost(1e6 * (after[0] - before[0]) / n, 1e6 * (after[1] - before[1]) / n, n_ok, n)


@click.command()
@click.option("--routers", "counts", default="1,2,4", show_default=True, help="How many, each in turn.")
@click.option("--workers", default=4, show_default=True, help="Worker processes with one emulated GPU.")
@click.option("--rate", default=2_000.0, show_default=True, help="Queries a second.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--slo-ms", default=100.0, show_default=True)
def main(counts: str, workers: int, rate: float, seconds: float, slo_ms: float) -> None:
    """Print the processor time a query by number of routers."""
    first: Cost | None = None
    for count in counts.split(","):
        cost = measure(int(count), workers, rate, seconds, slo_ms)
        first = first or cost
        more = 100 * (cost.router_us / first.router_us - 1)
        click.echo(
            f"{int(count):2d} routers: {cost.router_us:.1f} us of routers a query ({more:+.1f} %), "
            f"{cost.worker_us:.1f} us of workers; {cost.n_ok:,} of {cost.n:,} ok"
        )


if __name__ == "__main__":
    main(prog_name="python -m tests.e2e.router_cpu")
