"""`make bench`: measure the figures that have a budget, each beside a reference of the same run.

    python -m loadgen.bench [--only NAME]... [--seconds N] [--out out/bench] [--record COMMIT]

Everything runs on this machine, so absolute figures are this machine's, at this hour; only ratios
are comparable. The reference of the rates is a bare pyzmq ROUTER that echoes, with the same senders,
schedule and criterion: 99.9 % answered within the SLO of their due instant.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadgen.bench import figures
from loadgen.bench.rows import calls as bench_calls
from loadgen.bench.rows import simulator as bench_simulator
from loadgen.bench.rows.churn import churn
from loadgen.bench.rows.gateway import GatewayCost
from loadgen.bench.rows.generator import generator_qps
from loadgen.bench.rows.messages import Callers
from loadgen.bench.rows.path import PathShape, path_cost
from loadgen.bench.rows.payloads import payload_costs
from loadgen.bench.rows.row import BenchRow, SkippedError, machine
from loadgen.bench.senders.offer import Offered, offer_singly
from loadgen.live.records import SenderPlan
from loadgen.live.run import Emulation, RunSettings, emulated, run_emulated, run_trace
from loadgen.results.calm import await_calm
from loadgen.results.result import quantile_ns
from loadgen.results.run import in_time
from loadgen.study.rate_search import Bounds, Probe, confirmed, highest_rate, undisturbed
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.files import write_whole
from superserve.roles.command import plain_errors
from superserve.roles.processes import ProcessGroup
from superserve.shared.offers import is_allowed
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from loadgen.bench.rows.subnetact import SubnetAct
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace

PROFILE = "cnn-8gpu-modelled"
POLICY = "slackfit"
RATE_POLICY = "mincost"
"""For the rates: the quickest subnet, so that the path is measured. SlackFit fills the slack by design,
and then any stall of a shared machine costs attainment, at any rate."""
SLO_NS = 36 * MS
ENOUGH = 0.999
"""Attainment at which a rate holds."""
IMAGE_BYTES = 150_528
"""224 x 224 x 3: an image."""
COST_QUERIES, COST_GPUS = 6_000, 16
"""What the cost of payloads is measured with, in a closed loop."""
N_SENDERS = 2
"""Sender processes with one query in each message or submit, also for the echo."""
QPS_PER_GPU = 1_200
"""Emulated GPUs are added with the rate; one does 2,177 q/s of the quickest subnet in full batches.
Closer to that, a stall leaves a backlog that drains slowly, and GPUs are not what is measured."""
NOISY_NS = 4 * MS
"""A probe that fails while the noise probe's p99.9 is above this is repeated once."""
REPEAT_PROBES_S, REPEAT_LONG_S = 40.0, 75.0
"""After this long a search repeats no short probe, or no long run: on a noisy machine it must end too."""
_ECHO = "pyzmq ROUTER echo"
_BUDGET = "budget"


@contextlib.contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Run the bare echo; yields its endpoint and its process id."""
    with ProcessGroup() as group:
        server = group.start("echo", ["-m", "loadgen.bench.senders.echo"])
        group.wait_ready(20.0)
        yield server.ready["endpoint"], server.pid


class Bench:
    """Measures rows; what several of them need is measured once.

    Args:
        seconds: Length of a probe. A confirming run takes four times as long.
        say: Receives what is being done.

    Attributes:
        callers: The rows of many small callers.
        gateway: The rows of the gateway.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self.seconds = seconds
        self._say = say
        self._tried: list[Probe] = []
        self.callers = Callers(seconds, say)
        self.gateway = GatewayCost(seconds, say)

    # --- rates --------------------------------------------------------------------------

    @functools.cached_property
    def echo_qps(self) -> BenchRow:
        """The reference itself: the highest rate of the bare echo."""
        with echo_server() as (endpoint, _):
            plan = SenderPlan(endpoint, SLO_NS, target="echo")
            found = self._search(lambda rate, s: self._offer(plan, rate, s), start_qps=24_000)
        conditions = self._rate_conditions(found, senders=N_SENDERS, submit="one query a message")
        return _rate_row("echo_qps", found, "itself", found, conditions)

    def end_to_end_qps(self) -> BenchRow:
        """The highest rate of one query a submit, through `AsyncClient` in a few processes."""
        found = self._search(partial(self._offer_client, "async-client"), start_qps=30_000)
        conditions = self._rate_conditions(
            found, senders=N_SENDERS, submit="AsyncClient.submit, one query a call", **_emulation()
        )
        return self._beside_echo("end_to_end_qps", found, conditions)

    def end_to_end_threads_qps(self) -> BenchRow:
        """The same through `Client`, whose I/O thread shares the interpreter with the submitting thread."""
        found = self._search(partial(self._offer_client, "client"), start_qps=20_000)
        conditions = self._rate_conditions(
            found, senders=N_SENDERS, submit="Client.submit, one query a call", **_emulation()
        )
        return self._beside_echo("end_to_end_threads_qps", found, conditions)

    def end_to_end_bulk_qps(self) -> BenchRow:
        """The highest rate through the load generator's bulk submit."""
        found = self._search(self._offer_bulk, start_qps=40_000)
        conditions = self._rate_conditions(
            found, senders=1, submit="in bulk: what is due at a wake-up is one message", **_emulation()
        )
        return self._beside_echo("end_to_end_bulk_qps", found, conditions)

    def payload_150kb_ratio(self) -> BenchRow:
        """The rate of the whole path with payloads of 150 kB, over that of the echo with the same."""
        with echo_server() as (endpoint, _):
            plan = SenderPlan(endpoint, SLO_NS, IMAGE_BYTES, target="echo")
            echo = self._search(lambda rate, s: self._offer(plan, rate, s, n_senders=1), start_qps=1_000)
        echo_tried = self._rate_conditions(echo)
        found = self._search(
            lambda rate, s: self._offer_bulk(rate, s, payload_bytes=IMAGE_BYTES), start_qps=1_000
        )
        conditions = self._rate_conditions(
            found, senders=1, echo=echo_tried, rate_qps=found.held_qps, echo_qps=echo.held_qps,
            **_emulation(),
        ) | {"payload_bytes": IMAGE_BYTES, "shared_memory": is_allowed(None)}  # fmt: skip
        clusters = partial(emulated, Emulation(PROFILE, COST_GPUS, RATE_POLICY))
        costs = payload_costs(echo_server, clusters, IMAGE_BYTES, int(COST_QUERIES * min(1.0, self.seconds)))
        conditions["cpu_us_per_query"] = costs
        self._say("  CPU us a query: " + ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items()))
        is_known = found.held_qps is not None and bool(echo.held_qps)
        value = found.rate_qps / echo.rate_qps if is_known else None
        noise_ms = max(found.noise_ns, echo.noise_ns) / MS
        return BenchRow(
            "payload_150kb_ratio", value, "x", f"{_ECHO}, same payload", 1.0, conditions, noise_ms
        )

    def _beside_echo(self, name: str, found: Probe, conditions: dict[str, Any]) -> BenchRow:
        return _rate_row(name, found, _ECHO, self.echo_qps.value, conditions)

    def _search(self, offer: Callable[[float, float], Probe], *, start_qps: float) -> Probe:
        """Find the highest rate with short probes, and confirm it with long ones."""
        self._tried = []
        began_s = time.monotonic()

        def until(end_s: float) -> Callable[[], bool]:
            return lambda: time.monotonic() - began_s < end_s

        def probe(rate_qps: float, seconds: float) -> Probe:
            await_calm(NOISY_NS // 4)
            found = offer(rate_qps, seconds)
            self._tried.append(found)
            verdict = "holds" if found.holds else "fails"
            self._say(
                f"  {rate_qps:>9,.0f} q/s for {seconds:g} s {verdict}: {found.share:.5f} in time, "
                f"p99.9 of noise {found.noise_ns / MS:.1f} ms, of send lag {found.lag_ns / MS:.1f} ms"
            )
            return found

        def holds(rate_qps: float) -> bool:
            found = undisturbed(
                lambda rate: probe(rate, self.seconds),
                rate_qps,
                noisy_ns=NOISY_NS,
                may_repeat=until(REPEAT_PROBES_S),
            )
            return found.holds

        rate_qps = highest_rate(holds, Bounds(start_qps))
        if rate_qps is None:
            return self._tried[-1]
        return confirmed(
            lambda rate: probe(rate, 4 * self.seconds),
            rate_qps,
            noisy_ns=NOISY_NS,
            may_repeat=until(REPEAT_LONG_S),
        )

    def _offer(self, plan: SenderPlan, rate_qps: float, seconds: float, n_senders: int = N_SENDERS) -> Probe:
        trace, warm_ns = _poisson(rate_qps, seconds)
        offered = offer_singly(plan, trace, n_senders=n_senders)
        is_soon = (offered.answered_ns >= 0) & (offered.answered_ns - offered.due_ns <= plan.slo_ns)
        counted = trace.due_ns >= warm_ns
        return _judged(
            rate_qps, is_soon[counted], (offered.sent_ns - offered.due_ns)[counted], offered.noise_ns
        )

    def _offer_client(self, target: str, rate_qps: float, seconds: float) -> Probe:
        with emulated(Emulation(PROFILE, n_gpus(rate_qps), RATE_POLICY)) as cluster:
            plan = SenderPlan(cluster.client_endpoint, SLO_NS, target=target)
            return self._offer(plan, rate_qps, seconds)

    def _offer_bulk(self, rate_qps: float, seconds: float, payload_bytes: int = 64) -> Probe:
        trace, warm_ns = _poisson(rate_qps, seconds)
        settings = RunSettings(SLO_NS, grace_ns=500 * MS, payload_bytes=payload_bytes)
        with emulated(Emulation(PROFILE, n_gpus(rate_qps), RATE_POLICY)) as cluster:
            run = run_trace(trace, settings, cluster.client_endpoint)
        lag_ns = run.columns["sent_ns"] - run.columns["due_ns"]
        counted = trace.due_ns >= warm_ns
        is_soon = in_time(run.columns, SLO_NS)[counted]
        return _judged(rate_qps, is_soon, lag_ns[counted], run.noise_p99_9_ns or 0)

    def _rate_conditions(self, found: Probe, **more: Any) -> dict[str, Any]:
        return {
            "criterion": f"{ENOUGH:.1%} answered within {SLO_NS / MS:g} ms of their due instant",
            "arrivals": "poisson, open loop",
            "payload_bytes": 64,
            "probe_s": self.seconds,
            "confirming_run_s": 4 * self.seconds,
            "warm_up_not_counted_s": _warm_s(self.seconds),
            "attainment": found.share,
            # Not the figure: what held for a few seconds may not hold for long.
            "highest_in_a_probe_qps": max((one.rate_qps for one in self._tried if one.holds), default=None),
            "probes": [
                {
                    "rate_qps": round(one.rate_qps),
                    "attainment": one.share,
                    "unsent": one.n_unsent,
                    "noise_p99_9_ms": one.noise_ns / MS,
                    "send_lag_p99_9_ms": one.lag_ns / MS,
                }
                for one in self._tried
            ],
            **more,
        }

    # --- cost and latency ---------------------------------------------------------------

    def router_cpu_us_per_query(self) -> BenchRow:
        """The router's CPU time for each query, compared with the echo's at the same rate."""
        rate_qps = 10_000.0
        trace, _ = _poisson(rate_qps, 2 * self.seconds)
        emulation = Emulation(PROFILE, n_gpus(rate_qps), POLICY)
        run, _ = run_emulated(trace, RunSettings(SLO_NS, grace_ns=500 * MS), emulation)
        echo = self._echo_at(trace)
        conditions = {**_at_rate(trace, run), **_emulation(), "gpus": emulation.n_gpus, "policy": POLICY}
        return BenchRow(
            "router_cpu_us_per_query", 1e6 * run.router_cpu_s / trace.n, "us", _ECHO,
            1e6 * echo.server_cpu_s / trace.n, conditions, _ms(run.noise_p99_9_ns),
        )  # fmt: skip

    def added_latency_p50_ms(self) -> BenchRow:
        """The median latency that the path adds at low load."""
        return self._added_latency("added_latency_p50_ms", 500)

    def added_latency_p99_ms(self) -> BenchRow:
        """The p99 of the latency that the path adds at low load."""
        return self._added_latency("added_latency_p99_ms", 990)

    @functools.cached_property
    def _low_load(self) -> tuple[Trace, Run, Offered]:
        trace, _ = _poisson(200.0, 4 * self.seconds)
        run, _ = run_emulated(trace, RunSettings(SLO_NS), Emulation(PROFILE, 8, POLICY))
        return trace, run, self._echo_at(trace)

    def _added_latency(self, name: str, permille: int) -> BenchRow:
        trace, run, echo = self._low_load
        columns = run.columns
        has_output = columns["status"] <= Status.LATE
        latency_ns = columns["answered_ns"] - columns["due_ns"] - columns["executing_ns"]
        conditions = {
            **_at_rate(trace, run), "gpus": 8, **_emulation(),
            "latency": "from due to answered, less the time executing",
        }  # fmt: skip
        return BenchRow(
            name, _ms(quantile_ns(latency_ns[has_output], permille)), "ms", _ECHO,
            _ms(quantile_ns(echo.latency_ns, permille)), conditions, _ms(run.noise_p99_9_ns),
        )  # fmt: skip

    def _echo_at(self, trace: Trace) -> Offered:
        """Offer a trace to the bare echo from one sender, which sleeps until the exact instant."""
        with echo_server() as (endpoint, pid):
            plan = SenderPlan(endpoint, SLO_NS, target="echo", least_sleep_ns=0)
            return offer_singly(plan, trace, n_senders=1, server_pid=pid)

    def gpu_idle_pct(self) -> BenchRow:
        """The share of time between batches, if the queue is never empty.

        An event log does not show whether queries waited. So more is offered than the GPUs can run,
        with an SLO so long that all of it waits; the least wait is recorded.
        """
        policy, slo_ns = "fixed:cnn-78.25", 60_000 * MS
        trace, warm_ns = _poisson(8_800.0, 2 * self.seconds)
        run, report = run_emulated(trace, RunSettings(slo_ns), Emulation(PROFILE, 8, policy))
        waited_ns = run.columns["queued_ns"][trace.due_ns >= warm_ns]
        conditions = {
            **_at_rate(trace, run), "gpus": 8, **_emulation(), "policy": policy, "slo_ms": slo_ns / MS,
            "idle_gap_p50_ms": _ms(report.idle_p50_ns), "idle_gap_p99_ms": _ms(report.idle_p99_ns),
            "batches": report.n_batches, "violations": report.n_violations,
            "least_wait_after_warm_up_ms": _ms(int(waited_ns.min())),
        }  # fmt: skip
        idle = None if report.busy_share is None else 100 * (1 - report.busy_share)
        return BenchRow("gpu_idle_pct", idle, "%", _BUDGET, 3.0, conditions, _ms(run.noise_p99_9_ns))

    def router_path_us(self) -> BenchRow:
        """What a query costs in the router without sockets, and how that grows with the cluster."""
        profile = load_profile(PROFILE)
        base = PathShape(profile)
        usual = path_cost(base, 40_000)

        def grown(**to: Any) -> dict[str, Any]:
            cost = path_cost(replace(base, **to), 20_000)
            return {
                "total_us": cost.total_us, "decide_us": cost.stages_us["decide"],
                "mean_batch_size": cost.mean_batch_size, "worst_pass_us": cost.worst_advance_us,
            }  # fmt: skip

        conditions = {
            "usual": "10,000 q/s, 5 queries a message, 1 client, 16 GPUs in processes of 8, slackfit",
            "stages_us": usual.stages_us, "mean_batch_size": usual.mean_batch_size,
            "by_gpus": {n: grown(n_gpus=n) for n in (16, 64, 256, 1024)},
            "by_subnets": {n: grown(profile=bench_calls.wide_profile(n)) for n in (6, 50, 200, 1_000)},
            "by_queries_waiting": {n: grown(n_waiting=n) for n in (10, 1_000, 100_000, 1_000_000)},
            "by_clients_one_query_a_message": {
                n: grown(n_clients=n, queries_per_message=1) for n in (1, 10, 100, 1_000)
            },
        }  # fmt: skip
        return BenchRow("router_path_us", usual.total_us, "us", _BUDGET, 20.0, conditions)

    def router_churn_mb(self) -> BenchRow:
        """How much the router's memory grows during the second half of a million queries of 1,000 clients."""
        with emulated(Emulation(PROFILE, 32, RATE_POLICY)) as cluster:
            assert cluster.router is not None, "a private cluster has a router of its own"
            seen = churn(cluster.client_endpoint, cluster.router.pid, n_clients=1_000, n_each=1_000)
        conditions = {
            "clients": 1_000, "at_once": 4, "queries_each": 1_000, "queries_answered": seen.n_queries,
            "rss_mb_at_each_tenth": list(seen.rss_mb), "clients_left": seen.clients_left,
        }  # fmt: skip
        return BenchRow(
            "router_churn_mb", seen.growth_mb, "MB", "resident memory", seen.rss_mb[-1], conditions
        )

    # --- single calls -------------------------------------------------------------------

    def policy_decision_us(self) -> BenchRow:
        """What one decision of DemandFit, the most expensive policy, takes; also SlackFit's."""
        value, conditions = bench_calls.decisions_us(load_profile(PROFILE))
        return BenchRow("policy_decision_us", value, "us", _BUDGET, 20.0, conditions)

    def simulator_x_realtime(self) -> BenchRow:
        """How much faster than real time the simulator is, on one processor, at 7,000 q/s and 8 GPUs."""
        found = bench_simulator.fastest(seconds=8 * self.seconds)
        conditions = asdict(found) | {"rate_qps": bench_simulator.RATE_QPS, "gpus": bench_simulator.N_GPUS}
        must_x = bench_simulator.MUST_X
        return BenchRow("simulator_x_realtime", found.x_realtime, "x", _BUDGET, must_x, conditions)

    def actuation_us(self) -> BenchRow:
        """What one actuation takes, between random subnets of OFA-ResNet50."""
        return _subnetact().actuation()

    def actuated_over_extracted(self) -> BenchRow:
        """A batch on a subnet in place over the same on the extracted subnet, by views, batch 1."""
        return _subnetact().actuated_over_extracted()

    def memory_ratio(self) -> BenchRow:
        """Six extracted subnets over the supernet that hosts 32."""
        return _subnetact().memory_ratio()


def _on_gpu(measure: str) -> Callable[[Bench], BenchRow]:
    """Return the function that measures a row of `OnGpu`, or raises the reason why it cannot."""

    def row(_bench: Bench) -> BenchRow:
        try:
            import torch  # noqa: PLC0415  emulated GPUs do without
        except ModuleNotFoundError as error:
            raise SkippedError(f"{error.name} is not installed") from error
        if not torch.cuda.is_available():
            raise SkippedError(f"no CUDA device: torch {torch.__version__} sees none")
        from loadgen.bench.rows.gpu import OnGpu  # noqa: PLC0415  it needs torch

        found: BenchRow = getattr(OnGpu(), measure)()
        return found

    return row


def _subnetact() -> SubnetAct:
    try:
        from loadgen.bench.rows.subnetact import SubnetAct  # noqa: PLC0415  it needs torch
    except ModuleNotFoundError as error:
        raise SkippedError(f"{error.name} is not installed") from error
    return SubnetAct()


ROWS: dict[str, Callable[[Bench], BenchRow]] = {
    "policy_decision_us": Bench.policy_decision_us,
    "router_path_us": Bench.router_path_us,
    "simulator_x_realtime": Bench.simulator_x_realtime,
    "actuation_us": Bench.actuation_us,
    "actuated_over_extracted": Bench.actuated_over_extracted,
    "memory_ratio": Bench.memory_ratio,
    "gpu_actuation_us": _on_gpu("actuation"),
    "gpu_graph_us": _on_gpu("graph_speedup"),
    "gpu_actuated_over_extracted": _on_gpu("actuated_over_extracted"),
    "gpu_memory_ratio": _on_gpu("memory_ratio"),
    "added_latency_p50_ms": Bench.added_latency_p50_ms,
    "added_latency_p99_ms": Bench.added_latency_p99_ms,
    "router_cpu_us_per_query": Bench.router_cpu_us_per_query,
    "generator_qps": lambda bench: generator_qps(bench.seconds),
    "gpu_idle_pct": Bench.gpu_idle_pct,
    "echo_qps": lambda bench: bench.echo_qps,
    "end_to_end_qps": Bench.end_to_end_qps,
    "end_to_end_threads_qps": Bench.end_to_end_threads_qps,
    "end_to_end_bulk_qps": Bench.end_to_end_bulk_qps,
    "message_per_query_qps": lambda bench: bench.callers.message_per_query_qps(),
    "message_per_query_us": lambda bench: bench.callers.message_per_query_us(),
    "callers_over_mosec": lambda bench: bench.callers.callers_over_mosec(),
    "packed_over_mosec": lambda bench: bench.callers.packed_over_mosec(),
    "gateway_us": lambda bench: bench.gateway.gateway_us(),
    "gateway_150kb_us": lambda bench: bench.gateway.gateway_150kb_us(),
    "crowd_us": lambda bench: bench.callers.crowd_us(),
    "payload_150kb_ratio": Bench.payload_150kb_ratio,
    "router_churn_mb": Bench.router_churn_mb,
}
"""Every row, in the order measured."""


def n_gpus(rate_qps: float) -> int:
    """Return how many emulated GPUs a rate gets."""
    return max(2, math.ceil(rate_qps / QPS_PER_GPU))


def _poisson(rate_qps: float, seconds: float) -> tuple[Trace, int]:
    """Return arrivals that warm up and then count for `seconds`, and the instant from which they count."""
    warm_s = _warm_s(seconds)
    return load_trace(f"poisson:rate={rate_qps:.6g}", duration_s=warm_s + seconds), int(warm_s * 1e9)


def _warm_s(seconds: float) -> float:
    return min(1.0, 0.4 * seconds)


def _judged(
    rate_qps: float, is_soon: npt.NDArray[np.bool_], lag_ns: npt.NDArray[np.int64], noise_ns: int
) -> Probe:
    """Return the verdict on a run; a negative lag belongs to a query that was not sent."""
    share = float(is_soon.mean()) if len(is_soon) else 0.0
    was_sent = lag_ns >= 0
    lag = quantile_ns(lag_ns[was_sent], 999) or 0
    return Probe(rate_qps, share, share >= ENOUGH, noise_ns, lag, int((~was_sent).sum()))


def _emulation() -> dict[str, Any]:
    return {
        "profile": PROFILE, "policy": RATE_POLICY, "qps_per_gpu": f"{QPS_PER_GPU}, 2 GPUs at least",
        "worker_processes": 1,
    }  # fmt: skip


def _at_rate(trace: Trace, run: Run) -> dict[str, Any]:
    return {
        "rate_qps": trace.mean_qps, "arrivals": "poisson, open loop", "seconds": trace.duration_ns / 1e9,
        "slo_ms": run.result.slo_ms, "attainment": run.result.slo_attainment, "senders": 1,
        "mean_batch_size": run.result.batch_size_mean, "disturbed": run.result.disturbed,
        "invalid_because": list(run.result.invalid_because),
    }  # fmt: skip


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / MS


def _rate_row(
    name: str, found: Probe, reference: str, beside: Probe | float | None, conditions: dict[str, Any]
) -> BenchRow:
    """Return a rate's row; a rate that no long run confirmed does not count."""
    value = found.rate_qps if found.holds else None
    reference_value = value if isinstance(beside, Probe) else beside
    return BenchRow(name, value, "q/s", reference, reference_value, conditions, found.noise_ns / MS)


def write(row: BenchRow, folder: Path) -> None:
    """Write the row's file."""
    folder.mkdir(parents=True, exist_ok=True)
    option = (
        orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    )
    write_whole(folder / f"{row.name}.json", orjson.dumps(row.to_dict(), option=option))


def table(rows: list[BenchRow]) -> list[str]:
    """Return the lines of the final table."""
    lines = [f"{'figure':<26}{'value':>12} {'unit':<5}{'reference':>12}  {'ratio':>8}  {'noise p99.9':>11}"]
    for row in rows:
        noise = "-" if row.noise_p99_9_ms is None else f"{row.noise_p99_9_ms:.1f} ms"
        lines.append(
            f"{row.name:<26}{_number(row.value):>12} {row.unit:<5}{_number(row.reference_value):>12}  "
            f"{_number(row.ratio):>8}  {noise:>11}  {row.reference}"
        )
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def measure(
    names: tuple[str, ...], seconds: float, folder: Path, say: Callable[[str], None]
) -> list[BenchRow]:
    """Measure the rows of these names, and write each as it is found; return those that were not skipped.

    Raises:
        SuperServeError: A process did not start, or died.
    """
    bench = Bench(seconds, say)
    rows = []
    for name in names:
        say(name)
        try:
            row = ROWS[name](bench)
        except SkippedError as reason:
            say(f"  skipped: {reason}")
            continue
        write(row, folder)
        rows.append(row)
    return rows


@click.command()
@click.option("--only", multiple=True, type=click.Choice(tuple(ROWS)), help="Measure this one; repeatable.")
@click.option(
    "--seconds", type=click.FloatRange(0.2, 60), default=2.5, show_default=True, help="Length of a probe."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/bench"), show_default=True
)
@click.option(
    "--record", metavar="COMMIT", help="Enter the figures as those of this commit, to be compared with later."
)
@plain_errors()
def cli(only: tuple[str, ...], seconds: float, out: Path, record: str | None) -> None:
    """Measure, write OUT/NAME.json for each figure, and print a table and what has moved."""
    committed = figures.load()  # first: if it is malformed, nothing need be measured
    began_s = time.monotonic()
    rows = measure(only or tuple(ROWS), seconds, out, click.echo)
    click.echo()
    for line in [*table(rows), *figures.compared(rows, committed, figures.kind())]:
        click.echo(line)
    if record is not None:
        figures.record(rows, record)
    click.echo(f"{machine()}; {time.monotonic() - began_s:.0f} s; written to {out}")
