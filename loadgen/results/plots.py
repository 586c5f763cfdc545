"""The panels of a run's page.

All but one are over time, on one time axis. matplotlib is imported when a figure is drawn, so that `loadgen`
runs without it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.results.canvas import HEIGHT, Canvas, Panel
from loadgen.results.lanes import lanes_from
from loadgen.results.result import LATENCY_QUANTILES, OUTCOMES
from loadgen.results.style import AREA, ENDS, GRID, INK, MUTED, RC, RUNS, figure, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.patches import PathPatch

    from loadgen.results.result import RunResult
    from loadgen.results.timeline import Counts, Floats, RunTimeline

MAX_RUNS = 6
"""More lines than this cannot be told apart."""

FEW = 2
"""With more runs than this only the main lines are drawn, without bands and medians."""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A run in the form of the panels; `place` gives its colour."""

    label: str
    result: RunResult
    timeline: RunTimeline
    place: int = 0

    @property
    def colour(self) -> str:
        """Return the colour of its lines."""
        return RUNS[self.place]

    @property
    def edges_s(self) -> Floats:
        """Return where bins begin and end, shape (n_bins + 1,)."""
        edges_s = np.arange(self.timeline.n_bins + 1, dtype=np.float64) * (self.timeline.bin_ms / 1e3)
        edges_s[-1] = self.result.duration_s
        return edges_s

    def rate(self, counts: Counts) -> Floats:
        """Return counts of bins as rates, queries a second."""
        rates: Floats = counts / np.diff(self.edges_s)
        return rates


def rate(runs: Sequence[Shown]) -> Panel:
    """Draw offered and answered-in-time rates."""
    canvas = Canvas("rate", _end_s(runs))
    axes = canvas.time_axes()
    for i, run in enumerate(runs):
        offered = run.rate(run.timeline.due)
        if i == 0:
            axes.stairs(offered, run.edges_s, fill=True, color=AREA, gid="offered")
            canvas.label(_last(offered), "offered", MUTED)
        elif not np.array_equal(run.timeline.due, runs[0].timeline.due):
            axes.stairs(offered, run.edges_s, color=MUTED, linewidth=0.8, gid=f"offered-{i}")
    for i, run in reversed(list(enumerate(runs))):
        in_time = run.rate(run.timeline.of("ok"))
        axes.stairs(in_time, run.edges_s, color=run.colour, linewidth=1.5, baseline=None, gid=f"in-time-{i}")
        canvas.label(_last(in_time), "in time" if len(runs) == 1 else run.label, run.colour)
    axes.set_ylim(bottom=0)
    note = "Grey: queries due. Line: those of them answered in time. What lies between them missed its SLO."
    return canvas.panel("Rate, queries a second", note)


def attainment(runs: Sequence[Shown]) -> Panel:
    """Draw the share of queries answered in time, and each run's total."""
    canvas = Canvas("attainment", _end_s(runs))
    axes = canvas.time_axes()
    shares = [100 * run.timeline.of("ok") / _nan_for_0(run.timeline.due) for run in runs]
    for i, run in reversed(list(enumerate(runs))):
        _steps(axes, run, shares[i], f"attainment-{i}")
        total = 100 * (run.result.slo_attainment or 0.0)
        axes.axhline(total, color=run.colour, linewidth=1, dashes=(1, 2))
        canvas.label(total, f"{percent(total)} {'in all' if len(runs) == 1 else run.label}", run.colour)
    low = min((float(np.nanmin(share)) for share in shares if np.isfinite(share).any()), default=0.0)
    floor = 90 if low >= 90 else 50 if low >= 50 else 0
    axes.set_ylim(floor, 100 + (100 - floor) * 0.04)
    start = f" The axis begins at {floor} %." if floor else ""
    return canvas.panel(
        "SLO attainment, %", f"Of the queries due in each moment. Dotted: the whole run.{start}"
    )


def accuracy(runs: Sequence[Shown]) -> Panel:
    """Draw the mean profiled accuracy of what was answered in time."""
    title = "Accuracy, %"
    answered = [run for run in runs if run.result.mean_accuracy is not None]
    if not answered:
        return Panel(
            "accuracy", title, empty="No query was answered in time, so there is no accuracy to show."
        )
    canvas = Canvas("accuracy", _end_s(runs))
    axes = canvas.time_axes()
    for run in reversed(answered):
        _steps(axes, run, run.timeline.mean_accuracy, f"accuracy-{run.place}")
        mean = run.result.mean_accuracy or 0.0
        axes.axhline(mean, color=run.colour, linewidth=1, dashes=(1, 2))
        canvas.label(mean, f"{mean:.2f} {'in all' if len(runs) == 1 else run.label}", run.colour)
    known = [one.accuracy for run in runs for one in run.timeline.subnets]
    low, high = (min(known), max(known)) if known else axes.get_ylim()
    room = max(0.5, 0.06 * (high - low))
    axes.set_ylim(low - room, high + room)
    none = [run.label for run in runs if run not in answered]
    missing = f" {', '.join(none)}: nothing was answered in time." if none else ""
    note = f"Mean profiled accuracy of the answers in time. Dotted: the whole run.{missing}"
    return canvas.panel(title, note)


def batch_size(runs: Sequence[Shown]) -> Panel:
    """Draw the mean size of batches, and the band that most of them lie in."""
    title = "Batch size, queries"
    answered = [run for run in runs if run.result.batch_size_mean is not None]
    if not answered:
        return Panel("batch", title, empty="No query came back with an output, so no batch is known.")
    canvas = Canvas("batch", _end_s(runs))
    axes = canvas.time_axes()
    for run in reversed(answered):
        sizes = run.timeline.batch_size
        if len(runs) <= FEW:
            axes.stairs(
                sizes["p90"], run.edges_s, baseline=sizes["p10"], fill=True, color=run.colour, alpha=0.2,
                linewidth=0, gid=f"batch-band-{run.place}",
            )  # fmt: skip
        _steps(axes, run, sizes["mean"], f"batch-{run.place}")
        canvas.label(_last(sizes["mean"]), "mean" if len(runs) == 1 else run.label, run.colour)
    axes.set_ylim(bottom=0)
    band = " Band: from the 10th to the 90th percentile." if len(runs) <= FEW else ""
    return canvas.panel(title, f"Line: the mean over batches.{band}")


def subnets(runs: Sequence[Shown]) -> Panel:
    """Draw which subnets answered: shares of the queries due, one row of axes for each run."""
    title = "Subnet that answered, share of the queries due"
    if not any(run.timeline.subnets and run.timeline.tail_n.size for run in runs):
        return Panel("subnets", title, empty="No query came back with an output, so no subnet is known.")
    colours = subnet_colours(runs)
    canvas = Canvas("subnets", _end_s(runs), len(runs))
    for row, run in enumerate(runs):
        axes = canvas.time_axes(row)
        due = _nan_for_0(run.timeline.due)
        axes.stairs(
            np.where(np.isnan(due), np.nan, 100.0),
            run.edges_s,
            fill=True,
            color=GRID,
            gid=f"none-{run.place}",
        )
        below = np.where(np.isnan(due), np.nan, 0.0)
        served = [one for one in run.timeline.subnets if one.queries.any()]
        for i, one in enumerate(served):
            top = below + 100 * one.queries / due
            axes.stairs(
                top, run.edges_s, baseline=below, fill=True, color=colours[one.name], linewidth=0,
                gid=f"subnet-{run.place}-{i}",
            )  # fmt: skip
            below = top
        axes.set_ylim(0, 100)
        key = [(f"{one.accuracy:.2f} %", colours[one.name]) for one in reversed(served)]
        if float(np.nansum(100 - below)) > 0.5:
            key.insert(0, ("no output", GRID))
        canvas.key(key, row, heading="" if len(runs) == 1 else run.label)
    note = (
        "From the smallest subnet below to the largest on top, named by its accuracy. Grey: no output came."
    )
    return canvas.panel(title, note)


def latency(runs: Sequence[Shown]) -> Panel:
    """Draw p50 and p99 of latency against the SLO: the distance below it is the slack left."""
    title = "Latency, ms"
    if not any(run.timeline.tail_n.size for run in runs):
        return Panel(
            "latency", title, empty="No query came back with an output, so there is no latency to show."
        )
    canvas = Canvas("latency", _end_s(runs))
    axes = canvas.time_axes()
    _p50_and_p99(canvas, axes, runs, lambda run: run.timeline.latency_ms, "latency")
    _slo_lines(canvas, axes, runs)
    worst = max(_top(run.timeline.latency_ms["p99"]) for run in runs)
    scale = _latency_scale(axes, worst, runs)
    return canvas.panel(title, f"{_which(runs)} Slack is what is left below the SLO.{scale}")


def queue_wait(runs: Sequence[Shown]) -> Panel:
    """Draw p50 and p99 of the time in the router's queue."""
    title = "Wait in the queue, ms"
    if not any(run.timeline.tail_n.size for run in runs):
        return Panel(
            "queue", title, empty="No query came back with an output; what the others waited is not kept."
        )
    canvas = Canvas("queue", _end_s(runs))
    axes = canvas.time_axes()
    _p50_and_p99(canvas, axes, runs, lambda run: run.timeline.queue_wait_ms, "queue")
    axes.set_ylim(bottom=0)
    return canvas.panel(title, f"{_which(runs)} Of the queries that came back with an output.")


_SHADES = (0.12, 0.28, 0.48, 0.72, 1.0)
"""Opacities of the river, for quarters of a decade: a few queries that wait must be seen beside a burst."""


def river(runs: Sequence[Shown]) -> Panel:
    """Draw the queue by time to the deadline, one row of axes for each run."""
    title = "Slack river: queries that wait, by ms to their deadline"
    known = [run for run in runs if run.timeline.river is not None]
    most = max([float(run.timeline.river.waiting.max()) for run in known if run.timeline.river], default=0.0)
    if not known or most <= 0:
        return Panel("river", title, empty="No query waited, or the file is older and does not say.")
    canvas = Canvas("river", _end_s(runs), len(known))
    for row, run in enumerate(known):
        axes = canvas.time_axes(row)
        found = run.timeline.river
        assert found is not None, "only these are drawn"
        level = np.ceil(len(_SHADES) * np.sqrt(found.waiting / most)).astype(int)
        for shade, alpha in enumerate(_SHADES, start=1):
            cells = _cells(level == shade, run.edges_s, found.width_ms)
            if cells is not None:
                axes.add_patch(_patch(cells, run.colour, alpha, f"river-{run.place}-{shade}"))
        axes.set_ylim(0, found.width_ms * found.waiting.shape[1])
        canvas.key([(f"{most:.3g} on average", run.colour)], row, heading="" if len(runs) == 1 else run.label)
    note = "Dark: many wait with so much time left. A burst sinks towards 0 unless accuracy gives way."
    return canvas.panel(title, note)


def gpu_lanes(runs: Sequence[Shown]) -> Panel:
    """Draw what each GPU ran in the worst two seconds, one row of axes for each run."""
    title = "GPUs in the worst two seconds"
    known = [(run, lanes_from(run.result.lanes)) for run in runs if run.result.lanes is not None]
    if not any(lanes.batches for _, lanes in known):
        why = (
            "Not kept: a live run asks its router for them, unless there are several; a simulation has none."
        )
        return Panel("gpus", title, empty=why)
    canvas = Canvas("gpus", None, len(known))
    for row, (run, lanes) in enumerate(known):
        axes = canvas.axes(row)
        colours = accuracy_colours([accuracy for _, accuracy in lanes.subnets])
        served = sorted({one[3] for one in lanes.batches})
        for subnet in served:
            boxes = [
                (max(0.0, start), min(lanes.duration_ms, start + took), gpu + 0.1, gpu + 0.9)
                for gpu, start, took, row_of, _ in lanes.batches
                if row_of == subnet
            ]
            axes.add_patch(_patch(boxes, colours[subnet], 1.0, f"gpus-{run.place}-{subnet}"))
        axes.set_xlim(0, lanes.duration_ms)
        axes.set_ylim(len(lanes.gpus), 0)
        axes.set_yticks([gpu + 0.5 for gpu in range(len(lanes.gpus))], [name[-7:] for name in lanes.gpus])
        ticks = [0, lanes.duration_ms / 2, lanes.duration_ms]
        axes.set_xticks(ticks, [f"{at / 1e3:g} s" for at in ticks])
        key = [(f"{lanes.subnets[subnet][1]:.2f} %", colours[subnet]) for subnet in reversed(served)]
        canvas.key(key, row, heading="" if len(runs) == 1 else run.label)
    missed = ", ".join(f"{lanes.missed:,}" for _, lanes in known)
    note = f"A box is a batch, its colour the subnet's accuracy; gaps are idle. Missed then: {missed}."
    return canvas.panel(title, note)


def _cells(
    chosen: npt.NDArray[np.bool_], edges_s: Floats, width: float
) -> list[tuple[float, float, float, float]] | None:
    """Return the chosen cells as left, right, bottom, top: those side by side as one."""
    found = []
    for row in range(chosen.shape[1]):
        column = np.concatenate(([False], chosen[:, row], [False])).astype(np.int8)
        starts, ends = np.flatnonzero(np.diff(column) == 1), np.flatnonzero(np.diff(column) == -1)
        for start, end in zip(starts, ends, strict=True):
            found.append((float(edges_s[start]), float(edges_s[end]), row * width, (row + 1) * width))
    return found or None


def _patch(cells: list[tuple[float, float, float, float]], colour: str, alpha: float, gid: str) -> PathPatch:
    """Return many rectangles as one path: a page has thousands of them."""
    from matplotlib.patches import PathPatch  # noqa: PLC0415  an optional extra
    from matplotlib.path import Path as Outline  # noqa: PLC0415

    corners, codes = [], []
    for left, right, bottom, top in cells:
        corners += [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
        codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    return PathPatch(Outline(corners, codes), facecolor=colour, alpha=alpha, linewidth=0, gid=gid)


def distribution(runs: Sequence[Shown]) -> Panel:
    """Draw latency by percentile on a complementary log scale, so that the p99.9 can be read."""
    title = "Latency distribution, ms by percentile"
    answered = [run for run in runs if run.timeline.tail_n.size]
    if not answered:
        return Panel(
            "distribution", title, empty="No query came back with an output, so there is no latency to show."
        )
    canvas = Canvas("distribution", None, height=HEIGHT + 40)
    axes = canvas.axes()
    for run in reversed(answered):
        ms, at_least = run.timeline.tail_ms, run.timeline.tail_n
        n, total = int(at_least[0]), run.result.queries["total"]
        axes.plot(np.log10(n / at_least), ms, color=run.colour, linewidth=1.8,
                  gid=f"distribution-{run.place}")  # fmt: skip
        if total > n:
            axes.plot(np.log10(total / (at_least + total - n)), ms, color=run.colour, linewidth=1.2,
                      dashes=(1, 2), gid=f"distribution-all-{run.place}")  # fmt: skip
        _mark_quantiles(canvas, axes, run, n, named=len(runs) == 1)
        if len(runs) > 1:
            canvas.label(float(ms[-1]), run.label, run.colour)
    end = max(1.0, *(math.log10(run.timeline.tail_n[0]) for run in answered))
    shares = [0.0, 50.0, *(100 - 10.0**-power for power in range(-1, 8))]
    places = [(-math.log10(1 - share / 100), f"{share:.10g} %") for share in shares]
    ticks = [(x, text) for x, text in places if x <= end + 0.02]
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.grid(visible=True, axis="x")
    axes.set_xlim(0, end * 1.02)
    _slo_lines(canvas, axes, runs)
    scale = _latency_scale(axes, max(float(run.timeline.tail_ms[-1]) for run in answered), runs)
    has_missing = any(run.result.queries["total"] > run.timeline.tail_n[0] for run in answered)
    dotted = " Dotted: of all queries, where one without an output is slower than any." if has_missing else ""
    return canvas.panel(title, f"Of the queries that came back with an output.{dotted}{scale}")


def send_lag(runs: Sequence[Shown]) -> Panel:
    """Draw the sender's lateness beside what the noise probe saw, and the limit that validity sets."""
    title = "Lateness of the load generator itself, ms"
    if not any(np.isfinite(run.timeline.send_lag_ms["p99"]).any() for run in runs):
        return Panel("lag", title, empty="No query was sent, so there is no lag to show.")
    canvas = Canvas("lag", _end_s(runs))
    axes = canvas.time_axes()
    for run in reversed(runs):
        noise = _positive(run.timeline.noise_ms["p99"])
        axes.stairs(noise, run.edges_s, color=MUTED, linewidth=0.8, baseline=None, gid=f"noise-{run.place}")
    for run in reversed(runs):
        lag = _positive(run.timeline.send_lag_ms["p99"])
        _steps(axes, run, lag, f"lag-{run.place}")
        canvas.label(_last(lag), "sent" if len(runs) == 1 else run.label, run.colour)
    noise = _positive(runs[0].timeline.noise_ms["p99"])
    canvas.label(_last(noise), "probe", MUTED)
    limit = min(run.result.slo_ms for run in runs) / 20
    axes.axhline(limit, color=INK, linewidth=1, dashes=(5, 3))
    canvas.label(limit, "5 % of SLO", INK)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-3), max(high, 2 * limit))
    _plain_log_ticks(axes)
    note = "How late queries were sent, p99; grey: a probe beside them that only sleeps, p99. Log scale."
    return canvas.panel(title, note)


def ends(runs: Sequence[Shown]) -> Panel:
    """Draw by cause the queries that were not answered in time, one row of axes for each run."""
    title = "Queries not answered in time, a second, by cause"
    wrong = [run for run in runs if run.result.queries["ok"] < run.result.queries["total"]]
    if not wrong:
        return Panel("ends", title, empty="None: every query was answered in time.")
    canvas = Canvas("ends", _end_s(runs), len(wrong))
    for row, run in enumerate(wrong):
        axes = canvas.time_axes(row)
        below = np.zeros(run.timeline.n_bins)
        key: list[tuple[str, str]] = []
        for name in OUTCOMES[1:]:
            counts = run.timeline.of(name)
            if not counts.any():
                continue
            top = below + run.rate(counts)
            axes.stairs(top, run.edges_s, baseline=below, fill=True, color=ENDS[name], linewidth=0,
                        gid=f"end-{run.place}-{name}")  # fmt: skip
            below = top
            key.insert(0, (f"{name.replace('_', ' ')} {run.result.queries[name]:,}", ENDS[name]))
        axes.set_ylim(bottom=0)
        canvas.key(key, row, heading="" if len(runs) == 1 else run.label)
    fine = [run.label for run in runs if run not in wrong]
    note = (
        f"Every query of {', '.join(fine)} was answered in time." if fine else "Beside each cause: how many."
    )
    return canvas.panel(title, note)


PANELS: tuple[Callable[[Sequence[Shown]], Panel], ...] = (
    rate, attainment, river, accuracy, subnets, ends, batch_size, latency, queue_wait, gpu_lanes, send_lag,
    distribution,
)  # fmt: skip
"""In the page's order, two side by side; all but the lanes and the last are over time."""


def draw(runs: Sequence[Shown]) -> list[Panel]:
    """Return every panel of the page."""
    import matplotlib as mpl  # noqa: PLC0415  an optional extra, and slow to import

    with mpl.rc_context(RC), warnings.catch_warnings():
        # For names in letters that matplotlib's font lacks: the page's own fonts have them.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        return [make(runs) for make in PANELS]


def subnet_colours(runs: Sequence[Shown]) -> dict[str, str]:
    """Return a colour for each subnet, by the rank of its accuracy."""
    accuracies = {one.name: one.accuracy for run in runs for one in run.timeline.subnets}
    return dict(zip(accuracies, accuracy_colours(list(accuracies.values())), strict=True))


def accuracy_colours(accuracies: Sequence[float]) -> list[str]:
    """Return a colour for each accuracy, by its rank."""
    import matplotlib as mpl  # noqa: PLC0415  an optional extra
    from matplotlib.colors import to_hex  # noqa: PLC0415

    ranks = {one: i for i, one in enumerate(sorted(set(accuracies)))}
    colours = mpl.colormaps["viridis"](np.linspace(0.2, 0.95, max(2, len(ranks))))
    return [to_hex(colours[ranks[one]]) for one in accuracies]


def _end_s(runs: Iterable[Shown]) -> float:
    return max(run.result.duration_s for run in runs)


def _steps(axes: Axes, run: Shown, values: Floats, gid: str) -> None:
    """Draw a series as steps; a bin without a value leaves a gap, a single one between gaps still shows."""
    axes.stairs(values, run.edges_s, color=run.colour, linewidth=1.8, baseline=None, gid=gid)


def _p50_and_p99(
    canvas: Canvas, axes: Axes, runs: Sequence[Shown], series: Callable[[Shown], Any], name: str
) -> None:
    for run in reversed(runs):
        p50, p99 = series(run)["p50"], series(run)["p99"]
        if len(runs) <= FEW:
            axes.stairs(p50, run.edges_s, color=run.colour, linewidth=0.8, baseline=None,
                        gid=f"{name}-p50-{run.place}")  # fmt: skip
        _steps(axes, run, p99, f"{name}-p99-{run.place}")
        canvas.label(_last(p99), "p99" if len(runs) == 1 else run.label, run.colour)
        if len(runs) == 1:
            canvas.label(_last(p50), "p50", run.colour)


def _which(runs: Sequence[Shown]) -> str:
    return "Thick: p99. Thin: p50." if len(runs) <= FEW else "p99."


def _slo_lines(canvas: Canvas, axes: Axes, runs: Sequence[Shown]) -> None:
    for slo_ms in sorted({run.result.slo_ms for run in runs}):
        axes.axhline(slo_ms, color=INK, linewidth=1, dashes=(5, 3))
        canvas.label(slo_ms, f"SLO {slo_ms:g} ms", INK)


def _latency_scale(axes: Axes, worst_ms: float, runs: Sequence[Shown]) -> str:
    """Choose a scale on which both the SLO and the maximum can be read; return a note if it is not linear."""
    slo_ms = max(run.result.slo_ms for run in runs)
    if worst_ms <= 4 * slo_ms:
        axes.set_ylim(0, 1.08 * max(slo_ms, worst_ms))
        return ""
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    return " Log scale."


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415  an optional extra

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _mark_quantiles(canvas: Canvas, axes: Axes, run: Shown, n: int, *, named: bool) -> None:
    """Mark the result's quantiles on the curve; those at the same point share a label."""
    texts: dict[float, str] = {}
    for name in LATENCY_QUANTILES:
        ms = run.result.latency_ms[name]
        if ms is None:
            continue
        at_least = int(
            run.timeline.tail_n[
                np.searchsorted(run.timeline.tail_ms, ms - 1e-4).clip(max=len(run.timeline.tail_n) - 1)
            ]
        )
        axes.plot(
            [math.log10(n / at_least)],
            [ms],
            "o",
            markersize=4,
            color=run.colour,
            gid=f"mark-{run.place}-{name}",
        )
        texts[ms] = name.replace("_", ".")  # of two equal ones the higher
    if named:
        for ms, name in texts.items():
            canvas.label(ms, f"{name} {figure(ms)} ms", run.colour)


def _last(values: Floats) -> float:
    """Return about where a line ends: the median of its last values; NaN if it has none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite[-8:])) if len(finite) else math.nan


def _top(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else 0.0


def _positive(values: Floats) -> Floats:
    """Return the values for a log scale: at least a microsecond."""
    return np.maximum(values, 1e-3)


def _nan_for_0(counts: Counts) -> Floats:
    return np.where(counts > 0, counts, np.nan)
