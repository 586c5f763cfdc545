"""The tables that the demo prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadgen.demo.answers import enough
from loadgen.demo.load import capacity_qps
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.demo.answers import DemoComparison, Score
    from loadgen.results.result import RunResult
    from profiles.table import SubnetProfile


def profile_lines(subnets: Sequence[SubnetProfile], batch_sizes: Sequence[int]) -> list[str]:
    """Return the measured profile as a small table."""
    first, last = batch_sizes[0], batch_sizes[-1]
    lines = [f"  {'subnet':<22}{'accuracy':>10}{f'batch {first}':>12}{f'batch {last}':>12}{'at best':>14}"]
    for one in subnets:
        qps = capacity_qps(batch_sizes, one.latency_ns)
        lines.append(
            f"  {one.name:<22}{one.accuracy:>8.2f} %{one.latency_ns[0] / MS:>9.2f} ms"
            f"{one.latency_ns[-1] / MS:>9.2f} ms{qps:>10,.0f} q/s"
        )
    return lines


def side_by_side(results: Sequence[RunResult]) -> list[str]:
    """Return one table of runs of the same trace, a column each."""
    rows = [("policy", *(result.policy for result in results))]
    rows.append(("SLO attainment", *(_figure(result.slo_attainment, ".4f") for result in results)))
    rows.append(("mean accuracy", *(_figure(result.mean_accuracy, ".2f", " %") for result in results)))
    rows.append(("goodput", *(f"{result.goodput_qps:,.0f} q/s" for result in results)))
    for name in ("p50", "p99"):
        cells = (_figure(result.latency_ms[name], ".1f", " ms") for result in results)
        rows.append((f"latency {name}", *cells))
    rows.append(("batch size, mean", *(_figure(result.batch_size_mean, ".1f") for result in results)))
    for name in results[0].subnet_share:
        cells = (f"{result.subnet_share.get(name, 0.0):.1%}" for result in results)
        rows.append((f"  {name}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(results) + 1)]
    return [
        f"  {row[0]:<24}"
        + "".join(f"{cell:>{width + 4}}" for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    ]


def score_lines(scores: Sequence[Score]) -> list[str]:
    """Return the table of labels scored by subnet."""
    lines = [f"  {'subnet':<22}{'answers':>9}{'right':>10}{'profile':>10}{'difference':>12}"]
    for one in scores:
        if one.measured is None:
            lines.append(f"  {one.name:<22}{0:>9}  served no query")
            continue
        low, high = one.interval()
        words = "within" if not one.is_off else "OFF"
        if not one.is_judged:
            words = f"too few to judge (needs {enough(one.profiled):,}): {low:.1f} to {high:.1f} %"
        lines.append(
            f"  {one.name:<22}{one.n:>9,}{one.measured:>8.2f} %{one.profiled:>8.2f} %"
            f"{one.measured - one.profiled:>+12.2f}  {words}"
        )
    return lines


def comparison_lines(comparisons: Sequence[DemoComparison]) -> list[str]:
    """Return the table of answers that were computed again."""
    return [
        f"  {one.name:<22}{one.n_same:>4} of {one.n} are its own, {one.n_telling:>4} of them no other's"
        for one in comparisons
    ]


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
