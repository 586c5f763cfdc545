"""What it costs the router to be watched: its CPU a query and p99 with readers or tracing, against none.

    python -m tests.cluster.web.readers_cost --rounds 12                 # some five minutes
    python -m tests.cluster.web.readers_cost --rounds 3 --no-browser

Each round serves the same queries five times, in an order that changes from round to round: `alone`;
`watched`, with a live page, ten readers of its stream and a browser; `traced`, with `cluster trace` sending
one query in 100, and all that missed, to a collector; and both again aimed at a `sink`, a stand-in that
answers what this router has answered before. Those cost this router nothing, so what they do to its figures
is the machine that all share. A run that the machine disturbed is made again. The ratios of a round's
figures, watched or traced to the same aimed at a sink, are paired; printed are their median and an interval
that covers the true median in 95 of 100 cases (order statistics, binomial). Exits 1 if a whole interval lies
above the limit.

Router, GPUs and sender have half of the cores, those who watch the other half. Readers, browser and collector
stand for other machines, so they run at the lowest priority besides. Use a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import click
import psutil  # type: ignore[import-untyped]  # it ships no types

from loadgen.live.run import Emulation, RunSettings, emulated, run_trace
from loadgen.traces.trace import load_trace
from superserve.clock import MS
from superserve.roles.processes import ProcessGroup
from tests.cluster.web.sink import recorded, sink
from tests.loadgen.study.spans.test_otel import collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.queues import SimpleQueue

    from loadgen.live.run import Cluster
    from loadgen.traces.trace import Trace

ALONE, WATCHED, TRACED = "alone", "watched", "traced"
WATCHED_SINK, TRACED_SINK = "watched, a sink", "traced, a sink"
LIMIT = 1.02
_ATTEMPTS = 4
_READY_S = 60.0
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run has cost: the router's CPU a query, us; p99, ms; the watcher's own CPU a query, us."""

    cpu_us: float
    p99_ms: float
    own_us: float


# --- those who watch, as from another machine -------------------------------------------------


def _halves() -> tuple[set[int], set[int]]:
    """Return the cores of the router and of those who watch; the same for both where there is one."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    return set(cores[:half]), set(cores[half:] or cores)


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Start what the block starts on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _far(task: Callable[..., None], *values: object) -> Callable[[], None]:
    """Start a process at the lowest priority; return what ends it."""
    process = _SPAWN.Process(target=_at_rest, args=(task, *values), daemon=True)
    process.start()

    def end() -> None:
        process.terminate()
        process.join()

    return end


def _at_rest(task: Callable[..., None], *values: object) -> None:
    os.nice(19)
    task(*values)


def _read(address: str, n: int, told: SimpleQueue[int]) -> None:
    """Read the page's stream n times over."""

    def follow() -> None:
        with urllib.request.urlopen(f"{address}stream", timeout=_READY_S) as stream:
            stream.readline()
            told.put(1)
            for _ in stream:
                pass

    for _ in range(n):
        threading.Thread(target=follow, daemon=True).start()
    threading.Event().wait()


def _browse(address: str, told: SimpleQueue[int]) -> None:
    """Look at the page in a browser."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  only here

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(address)
        told.put(1)
        while True:
            page.wait_for_timeout(1_000)


def _collect(told: SimpleQueue[str]) -> None:
    """Be a collector."""
    with collector() as (url, spans):
        told.put(url)
        while True:
            time.sleep(1.0)
            spans.clear()


@contextlib.contextmanager
def watched(endpoint: str, cores: set[int], readers: int, *, has_browser: bool) -> Iterator[int]:
    """Have the page of a router, readers and a browser for a block; give the page's process."""
    told: SimpleQueue[int] = _SPAWN.SimpleQueue()
    with ProcessGroup() as group, contextlib.ExitStack() as stack:
        argv = ["-m", "cluster", "web", "--connect", endpoint, "--port", "0"]
        with _on(cores):
            web = group.start("web", argv)
            group.wait_ready(_READY_S)
            stack.callback(_far(_read, web.ready["address"], readers, told))
            if has_browser:
                stack.callback(_far(_browse, web.ready["address"], told))
        for _ in range(readers + has_browser):
            told.get()
        yield web.pid


@contextlib.contextmanager
def traced(endpoint: str, cores: set[int]) -> Iterator[int]:
    """Trace one query in 100 of a router to a collector for a block; give the tracer's process."""
    told: SimpleQueue[str] = _SPAWN.SimpleQueue()
    with contextlib.ExitStack() as stack:
        with _on(cores):
            stack.callback(_far(_collect, told))
            argv = ["-m", "cluster", "trace", "--connect", endpoint, "--otlp", told.get()]
            process = psutil.Popen([sys.executable, *argv], stdout=-1, text=True)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        assert "spans of" in process.stdout.readline()
        yield process.pid


# --- measuring --------------------------------------------------------------------------------


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def served(cluster: Cluster, trace: Trace, watcher: int | None) -> Figures:
    """Serve a trace, and return what it has cost; again, if the machine disturbed the run."""
    assert cluster.router is not None, "this cluster is private"
    router = cluster.router.pid
    for _ in range(_ATTEMPTS):
        before_s, own_s = _cpu_s(router), _cpu_s(watcher) if watcher else 0.0
        run = run_trace(trace, RunSettings(100 * MS), cluster.client_endpoint)
        cpu_s, watched_s = _cpu_s(router) - before_s, (_cpu_s(watcher) if watcher else 0.0) - own_s
        if run.result.valid and not run.result.disturbed:
            break
    p99_ms = run.result.latency_ms["p99"]
    assert p99_ms is not None, "queries were answered"
    return Figures(1e6 * cpu_s / trace.n, p99_ms, 1e6 * watched_s / trace.n)


def interval_of(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest symmetric pair of order statistics that covers the median in 95 % of cases.

    With fewer than six values none does: the least and the most then cover what they can.
    """
    ordered, n = sorted(ratios), len(ratios)
    outside, k = 1, 0  # of 2**n: the median lies below the k-th least with this weight
    while k + 1 < n // 2 and 2 * (outside + comb(n, k + 1)) <= 0.05 * 2**n:
        k += 1
        outside += comb(n, k)
    return ordered[k], ordered[n - 1 - k]


def _line(what: str, figure: str, ratios: Sequence[float]) -> tuple[str, bool]:
    low, high = interval_of(ratios)
    verdict = "within" if high <= LIMIT else "above" if low > LIMIT else "open"
    text = (
        f"{what:<25} {figure:<11} median {statistics.median(ratios):.4f}  "
        f"[{low:.4f}, {high:.4f}]  {verdict} {LIMIT:.2f}"
    )
    return text, low > LIMIT


@click.command()
@click.option("--rounds", type=click.IntRange(2), default=12, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=4.0, show_default=True, help="Of each run.")
@click.option("--rate", type=click.FloatRange(1), default=800.0, show_default=True, help="Queries a second.")
@click.option("--readers", type=click.IntRange(0), default=10, show_default=True)
@click.option("--browser/--no-browser", default=True, show_default=True)
def main(rounds: int, seconds: float, rate: float, readers: int, *, browser: bool) -> None:
    """Measure, and print ratios to a router that nobody watches."""
    near, far = _halves()
    with contextlib.ExitStack() as stack:
        with _on(near):
            cluster = stack.enter_context(emulated(Emulation("cnn-8gpu-modelled", 8, "planfit")))
        # Longer than any arm looks.
        warm = load_trace(f"poisson:rate={rate}", rate_qps=None, duration_s=3 * seconds, seed=0)
        with recorded(cluster.client_endpoint) as answers:
            served(cluster, warm, None)
        with _on(far):
            aside = stack.enter_context(sink(answers))
        arms: dict[str, Callable[[], contextlib.AbstractContextManager[int | None]]] = {
            ALONE: contextlib.nullcontext,
            WATCHED_SINK: lambda: watched(aside, far, readers, has_browser=browser),
            WATCHED: lambda: watched(cluster.client_endpoint, far, readers, has_browser=browser),
            TRACED_SINK: lambda: traced(aside, far),
            TRACED: lambda: traced(cluster.client_endpoint, far),
        }
        found: dict[str, list[Figures]] = {name: [] for name in arms}
        for number in range(rounds):
            trace = load_trace(f"poisson:rate={rate}", rate_qps=None, duration_s=seconds, seed=number + 1)
            order = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
            for name in order if number % 2 else order[::-1]:
                with arms[name]() as watcher:
                    found[name].append(served(cluster, trace, watcher))
            last = "; ".join(
                f"{name} {found[name][-1].cpu_us:.1f} us, {found[name][-1].p99_ms:.2f} ms" for name in arms
            )
            click.echo(f"round {number + 1}: CPU a query and p99 {last}", err=True)
    is_above = False
    for name, base in (
        (WATCHED_SINK, ALONE), (WATCHED, WATCHED_SINK), (TRACED_SINK, ALONE), (TRACED, TRACED_SINK)
    ):  # fmt: skip
        pairs = list(zip(found[name], found[base], strict=True))
        for figure, ratios in (
            ("CPU a query", [one.cpu_us / before.cpu_us for one, before in pairs]),
            ("p99", [one.p99_ms / before.p99_ms for one, before in pairs]),
        ):
            text, above = _line(f"{name} / {base}", figure, ratios)
            is_above |= above and base != ALONE
            click.echo(text)
    for name in (WATCHED, TRACED):
        own = statistics.median(one.own_us for one in found[name])
        base_us = statistics.median(one.cpu_us for one in found[ALONE])
        click.echo(f"{name:<8} its own process takes {own:.1f} us a query; the router alone {base_us:.1f} us")
    sys.exit(1 if is_above else 0)


if __name__ == "__main__":
    main()
