"""The picture of a study of fleets: what each costs and misses, and how the scaled one followed the load."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from loadgen.results.style import INK, MUTED, RC, RUNS
from router.report.scaler import NEEDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from loadgen.study.autoscale import Scaled
    from loadgen.traces.trace import Trace

_SIZE_IN = (8.0, 3.6)
_N_BINS = 200
_COLOURS = dict(zip(NEEDS, RUNS, strict=False))


def draw(trace: Trace, found: Sequence[Scaled]) -> str:
    """Return an SVG: each fleet by GPU-hours and accuracy, and the scaled fleet's size over the load."""
    import matplotlib as mpl  # noqa: PLC0415  matplotlib's import is slow, and only pictures need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({**RC, "font.size": 9.0}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _costs(left, found)
        _sizes(right, trace, [one for one in found if not one.fleet.is_fixed])
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _costs(axes: Axes, found: Sequence[Scaled]) -> None:
    for one in found:
        place = one.gpu_hours, one.accuracy or 0.0
        colour = MUTED if one.fleet.is_fixed else _COLOURS[one.fleet.need]
        axes.plot(*place, "s" if one.fleet.is_fixed else "o", color=colour, markersize=6)
        # A scaled fleet is less accurate than a fixed one of its price, whose label is above.
        below = not one.fleet.is_fixed
        axes.annotate(
            f"{one.fleet.name}: {percent_missed(one.attainment)}", place, (7, -10 if below else 5),
            textcoords="offset points", color=colour, fontsize=8,
        )  # fmt: skip
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(0, max(one.gpu_hours for one in found) * 1.9)  # room for the last label
    axes.set_xlabel("GPU-hours; share of queries that missed its SLO")
    axes.set_ylabel("mean accuracy, %")
    axes.grid()


def percent_missed(attainment: float) -> str:
    """Return the share that missed, in words: "0.21 % missed"."""
    missed = 100 * (1 - attainment)
    return "none missed" if missed == 0 else f"{missed:.2g} % missed"


def _sizes(axes: Axes, trace: Trace, scaled: Sequence[Scaled]) -> None:
    end_s = trace.duration_ns / 1e9
    counts, edges_s = np.histogram(trace.due_ns / 1e9, bins=_N_BINS, range=(0.0, end_s))
    axes.fill_between(
        edges_s[:-1] / 60, counts / (end_s / _N_BINS), step="post", color=MUTED, alpha=0.3, lw=0
    )
    axes.set_xlabel("minutes")
    axes.set_ylabel("queries a second")
    workers = axes.twinx()
    for one in scaled:
        at_s, n = zip(*one.sizes, (end_s, one.sizes[-1][1]), strict=True)
        workers.step([at / 60 for at in at_s], n, where="post", color=_COLOURS[one.fleet.need], lw=1.5)
    workers.set_ylim(0, None)
    workers.set_ylabel("workers of the scaled fleets", color=INK)
