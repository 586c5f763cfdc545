"""The picture of an advice: attainment and accuracy over the number of GPUs, a line for each policy."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from loadgen.results.style import MUTED, RC, RUNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from loadgen.study.advise.sizing import SizingAnswer

_SIZE_IN = (8.0, 3.4)
_LEAST_MISSED = 1e-5
"""Where the axis of misses ends: a logarithm has no 0."""


_TICKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def draw(answers: Sequence[SizingAnswer], attainment: float) -> str:
    """Return an SVG."""
    import matplotlib as mpl  # noqa: PLC0415  matplotlib's import is slow, and only pictures need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({**RC, "font.size": 9.0}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        left, right = figure.subplots(1, 2)
        for answer, colour in zip(answers, RUNS, strict=False):
            _lines(left, right, answer, colour)
        left.axhline(max(_LEAST_MISSED, 1 - attainment), color=MUTED, linewidth=1, dashes=(3, 2))
        left.set_yscale("log")
        left.set_ylim(_LEAST_MISSED / 2, 1.5)
        left.set_yticks(_TICKS, [f"{100 * one:g} %" for one in _TICKS])
        left.set_ylabel("queries that miss; dashed: allowed")
        right.set_ylabel("accuracy of what is in time, %")
        for axes in (left, right):
            axes.set_xlabel("GPUs")
            axes.grid()
            axes.xaxis.get_major_locator().set_params(integer=True)
        right.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _lines(left: Axes, right: Axes, answer: SizingAnswer, colour: str) -> None:
    gpus = [run.gpus for run in answer.runs]
    missed = [max(_LEAST_MISSED, 1 - run.attainment) for run in answer.runs]
    left.plot(gpus, missed, "o-", color=colour, markersize=3.5, linewidth=1.3)
    known = [(run.gpus, run.accuracy) for run in answer.runs if run.accuracy is not None]
    if known:
        right.plot(
            *zip(*known, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.3, label=answer.policy
        )
    least = answer.least
    if least is not None:
        mark: Any = {"color": colour, "markersize": 8, "fillstyle": "none"}
        left.plot(least.gpus, max(_LEAST_MISSED, 1 - least.attainment), "o", **mark)
        right.plot(least.gpus, least.accuracy or 0.0, "o", **mark)
