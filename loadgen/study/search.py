"""The highest rate at which a trace is still answered in time: probes, live or simulated, and the answer.

A rate holds if at least the requested attainment was reached. Attainment counts from the instants at which
queries were due, so a sender's lag can only make a rate fail; a run that holds in spite of it counts, even
if it would be invalid as a measurement of latency. Rates are found by doubling, halving and bisection
(`loadgen.study.rate_search`). Three things could make the answer something else than the cluster's limit:

    noise   a probe that fails while this machine wakes its sleepers late is repeated; if the noise stays,
            the answer says that the limit may be higher
    sender  if the load of a failed probe was not really offered, the answer says whose limit it is
    luck    the highest rate that held must hold again, with other arrivals of the same trace; otherwise
            the rates just below are tried
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_worker.serve.eventlog import check_logs
from loadgen.live.run import Emulation, RunSettings, emulated, run_trace
from loadgen.results.calm import await_calm
from loadgen.simulator.simulate import simulate
from loadgen.study.rate_search import Probe, confirmed, highest_rate, undisturbed
from loadgen.traces.specs import Spec
from loadgen.traces.trace import trace_of
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpu_worker.serve.eventlog import EventLogReport
    from loadgen.results.result import RunResult
    from loadgen.study.rate_search import Bounds
    from loadgen.traces.trace import Source, Trace
    from profiles.table import Profile

    Offer = Callable[[Trace, int], tuple[RunResult, int]]
    """Offers a trace, with a seed; returns the figures, and the p99.9 of the machine's noise in ns."""

MAX_REPEATS = 2
"""Most repeats of a probe that fails in noise."""
_N_STEPS = 6
_GRACE_NS = 1_000 * MS
_WARM_UP_S = 1.0


@dataclass(frozen=True, slots=True)
class Search:
    """What to search for.

    Attributes:
        source: What `loadgen.traces.trace.open_source` found under `spec`.
        attainment: The share of queries that must be answered in time.
        slo_ns: From due to deadline.
        bounds: Where to look.
        duration_s: Of each probe; None plays a recorded trace as a whole, faster for a higher rate.
        seed: Of the arrivals; the confirming probes have the next one.
    """

    source: Source
    spec: str
    attainment: float
    slo_ns: int
    bounds: Bounds
    duration_s: float | None = None
    seed: int = 0

    @property
    def noisy_ns(self) -> int:
        """Return the p99.9 of noise above which a failure proves nothing: 4 of 36 ms, as in `make bench`."""
        return self.slo_ns // 9

    def trace_at(self, rate_qps: float, seed: int) -> Trace:
        """Return the trace at a rate."""
        return trace_of(self.source, self.spec, rate_qps=rate_qps, duration_s=self.duration_s, seed=seed)


@dataclass(frozen=True, slots=True)
class Tried:
    """A probe, and the figures of its run."""

    probe: Probe
    result: RunResult

    def to_line(self, search: Search) -> str:
        """Return it as a line."""
        probe, result = self.probe, self.result
        notes = ""
        if not probe.holds:
            notes += "" if result.valid else f"  NOT OFFERED: {'; '.join(result.invalid_because)}"
            notes += "  (noisy)" if probe.noise_ns > search.noisy_ns else ""
        accuracy = "-" if result.mean_accuracy is None else f"{result.mean_accuracy:.3f} %"
        p99_ms = result.latency_ms["p99"]
        p99 = "-" if p99_ms is None else f"{p99_ms:.2f} ms"
        return (
            f"  {probe.rate_qps:>9,.0f} q/s for {result.duration_s:.3g} s"
            f"  {'holds' if probe.holds else 'fails'}  attainment {probe.share:.5f}"
            f"  accuracy {accuracy}  p99 {p99}"
            f"  send lag p99.9 {probe.lag_ns / MS:.2f} ms  noise p99.9 {probe.noise_ns / MS:.2f} ms{notes}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "rate_qps": self.probe.rate_qps,
            "holds": self.probe.holds,
            "slo_attainment": self.probe.share,
            "mean_accuracy": self.result.mean_accuracy,
            "duration_s": self.result.duration_s,
            "queries": dict(self.result.queries),
            "latency_ms": dict(self.result.latency_ms),
            "send_lag_p99_9_ms": self.probe.lag_ns / MS,
            "noise_p99_9_ms": self.probe.noise_ns / MS,
            "valid": self.result.valid,
            "invalid_because": list(self.result.invalid_because),
        }


@dataclass(frozen=True, slots=True)
class RateAnswer:
    """What a search found.

    Attributes:
        rate_qps: The highest rate that held, and held again; None if none did.
        fails_qps: The least rate above it that failed; None if none did.
        is_disturbed: That failure was in noise, each time: the limit may be higher.
        is_by_sender: There the load was not really offered: the limit is the load generator's.
        tried: Every probe, in order.
    """

    rate_qps: float | None
    fails_qps: float | None
    is_disturbed: bool
    is_by_sender: bool
    tried: tuple[Tried, ...]

    def to_lines(self, search: Search) -> list[str]:
        """Return the answer in words."""
        asked = f"attainment {search.attainment:g} at {search.slo_ns / MS:g} ms"
        if self.rate_qps is None:
            lines = [f"  no rate holds    {asked}; see the probes"]
        else:
            lines = [f"  highest rate     {self.rate_qps:,.0f} q/s with {asked}, held twice"]
        if self.fails_qps is None:
            lines.append("  least that fails none was found: the limit is higher than what was tried")
        else:
            lines.append(f"  least that fails {self.fails_qps:,.0f} q/s")
        if self.is_disturbed:
            lines.append(
                f"  DISTURBED        it failed in noise {MAX_REPEATS + 1} times: the limit may lie higher"
            )
        if self.is_by_sender:
            lines.append("  BY THE SENDER    that load was not offered in time: try more --senders")
        return lines

    def to_dict(self, search: Search) -> dict[str, Any]:
        """Return what `--json` writes, less the environment."""
        return {
            "schema": 1,
            "trace": search.spec,
            "attainment": search.attainment,
            "slo_ms": search.slo_ns / MS,
            "rate_qps": self.rate_qps,
            "fails_qps": self.fails_qps,
            "disturbed": self.is_disturbed,
            "limited_by_sender": self.is_by_sender,
            "probes": [one.to_dict() for one in self.tried],
        }


@dataclass(slots=True)
class _Prober:
    """Makes the probes of one search, and keeps them."""

    search: Search
    offer: Offer
    say: Callable[[str], object]
    tried: list[Tried] = field(default_factory=list)

    def probe(self, rate_qps: float, seed: int) -> Probe:
        result, noise_ns = self.offer(self.search.trace_at(rate_qps, seed), seed)
        share = result.queries["ok"] / result.queries["total"]
        lag_ms = result.send_lag_ms["p99_9"] or 0.0
        holds = share >= self.search.attainment
        probe = Probe(rate_qps, share, holds, noise_ns, int(lag_ms * MS), result.queries["unsent"])
        self.tried.append(Tried(probe, result))
        self.say(self.tried[-1].to_line(self.search))
        return probe

    def holds(self, rate_qps: float) -> bool:
        search = self.search
        return undisturbed(
            lambda rate: self.probe(rate, search.seed), rate_qps, noisy_ns=search.noisy_ns,
            max_repeats=MAX_REPEATS,
        ).holds  # fmt: skip

    def confirm(self, rate_qps: float) -> float | None:
        """Return the highest rate, from this one down, that also holds with other arrivals."""
        search = self.search
        self.say("  once more, with other arrivals:")
        return confirmed(
            lambda rate: self.probe(rate, search.seed + 1), rate_qps, noisy_ns=search.noisy_ns,
            steps=[(1 + search.bounds.tolerance) ** -k for k in range(_N_STEPS)], max_repeats=MAX_REPEATS,
        ).held_qps  # fmt: skip


def find_rate(search: Search, offer: Offer, say: Callable[[str], object]) -> RateAnswer:
    """Return the highest rate that holds; `say` receives a line for each probe."""
    prober = _Prober(search, offer, say)
    found = highest_rate(prober.holds, search.bounds)
    rate_qps = None if found is None else prober.confirm(found)
    last = {one.probe.rate_qps: one for one in prober.tried}
    failed = [one for one in last.values() if not one.probe.holds and one.probe.rate_qps > (rate_qps or 0.0)]
    least = min(failed, key=lambda one: one.probe.rate_qps, default=None)
    return RateAnswer(
        rate_qps,
        None if least is None else least.probe.rate_qps,
        is_disturbed=least is not None and least.probe.noise_ns > search.noisy_ns,
        is_by_sender=least is not None and not least.result.valid,
        tried=tuple(prober.tried),
    )


def simulated_offer(cluster: Sequence[Profile], policy: str, slo_ns: int) -> Offer:
    """Return a function that offers a trace to a simulated cluster, which has no noise."""

    def offer(trace: Trace, seed: int) -> tuple[RunResult, int]:
        return simulate(trace, cluster, policy=policy, slo_ns=slo_ns, seed=seed).result, 0

    return offer


def live_offer(endpoint: str, settings: RunSettings, noisy_ns: int) -> Offer:
    """Return a function that offers a trace to a running cluster, once this machine is quiet."""

    def offer(trace: Trace, seed: int) -> tuple[RunResult, int]:
        await_calm(noisy_ns // 4)
        run = run_trace(trace, replace(settings, seed=seed, grace_ns=_GRACE_NS), endpoint)
        return run.result, run.noise_p99_9_ns or 0

    return offer


def warm_up(search: Search, offer: Offer) -> None:
    """Offer a little that does not count: a router that has just started has not measured transports yet."""
    duration_s = None if search.duration_s is None else min(search.duration_s, _WARM_UP_S)
    if isinstance(search.source, Spec):
        offer(
            replace(search, duration_s=duration_s).trace_at(search.bounds.start_qps, search.seed), search.seed
        )


@contextlib.contextmanager
def private_cluster(emulation: Emulation, reports: list[EventLogReport]) -> Iterator[str]:
    """Run emulated GPUs for a search; then add the check of their event logs to `reports`."""
    with tempfile.TemporaryDirectory(prefix="superserve-") as name:
        with emulated(replace(emulation, folder=Path(name))) as cluster:
            yield cluster.client_endpoint
        reports.append(check_logs(cluster.event_logs))
