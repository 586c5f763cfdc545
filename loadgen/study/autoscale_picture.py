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
_NONE = 1e-6
"""Where a share of 0 is drawn on a logarithmic axis."""
_N_BINS = 200
_COLOURS = dict(zip(NEEDS, RUNS, strict=False))


def draw(trace: Trace, found: Sequence[Scaled]) -> str:
    """Return an SVG: each fleet by GPU-hours and share missed, and the scaled fleet's size over the load."""
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
        place = one.gpu_hours, max(1.0 - one.attainment, _NONE)
        colour = MUTED if one.fleet.is_fixed else _COLOURS[one.fleet.need]
        axes.plot(*place, "s" if one.fleet.is_fixed else "o", color=colour, markersize=6)
        accuracy = "" if one.accuracy is None else f", {one.accuracy:.1f} %"
        axes.annotate(
            f"{one.fleet.name}{accuracy}", place, (6, 4), textcoords="offset points", color=colour, fontsize=8
        )
    axes.set_yscale("log")
    axes.set_ylim(_NONE / 2, 1.0)
    axes.margins(x=0.35)
    axes.set_xlabel("GPU-hours")
    axes.set_ylabel("share of queries that missed its SLO")
    axes.grid()


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
