"""One figure of a page: rows of axes with equal margins, labels to their right; then SVG.

The SVG takes its colours and fonts from the page. All axes over time share one time axis: events at the same
horizontal position happened together.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadgen.results.style import COLOURS, INK, MUTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

WIDTH, LEFT, RIGHT, TOP, BOTTOM, GAP = 640, 48, 150, 8, 24, 26
"""Of a panel, in its own units: about a pixel each. The right margin is for labels."""

HEIGHT, _ROW_HEIGHT = 138, 100  # of the part within the axes: of a single row, and of one among several
_LINE, _LEAST_LINE = 15.0, 12.5  # between two labels: usually, and if a key would not fit otherwise
_MAX_LABEL = 22  # characters that fit in the right margin


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of the page: `svg`, or the reason why there is none.

    Attributes:
        key: Names it in the page; a letter, then letters and hyphens.
        title: What it shows, with the unit.
        note: How to read it: one or two sentences.
        svg: The drawing; empty if there is nothing to draw.
        empty: Why there is nothing to draw.
    """

    key: str
    title: str
    note: str = ""
    svg: str = ""
    empty: str = ""


class Canvas:
    """One figure: rows of axes with the page's margins, labels to their right; then SVG.

    Args:
        key: The panel's.
        end_s: Where the time axis ends; None for another axis.
        n_rows: Axes, one below the other.
        height: Of each of them.
    """

    def __init__(self, key: str, end_s: float | None, n_rows: int = 1, height: int = HEIGHT) -> None:
        from matplotlib.figure import Figure  # noqa: PLC0415  an optional extra

        self._key = key
        self._end_s = end_s
        self._n_rows = n_rows
        self._height = height if n_rows == 1 else _ROW_HEIGHT
        self._total = TOP + n_rows * self._height + (n_rows - 1) * GAP + BOTTOM
        self._figure = Figure(figsize=(WIDTH / 72, self._total / 72), dpi=72)  # one unit is one point
        self._labels: list[tuple[float, str, str]] = []

    def axes(self, row: int = 0) -> Axes:
        """Return the axes of a row, without a time axis."""
        bottom = BOTTOM + (self._n_rows - 1 - row) * (self._height + GAP)
        axes = self._figure.add_axes(
            (LEFT / WIDTH, bottom / self._total, (WIDTH - LEFT - RIGHT) / WIDTH, self._height / self._total)
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", length=3)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        return axes

    def time_axes(self, row: int = 0) -> Axes:
        """Return the axes of a row; the lowest row names the ticks of its time axis."""
        assert self._end_s is not None, "this canvas has no time axis"
        axes = self.axes(row)
        axes.set_xlim(0, self._end_s)
        ticks = time_ticks(self._end_s)
        axes.set_xticks([x for x, _ in ticks], [text if row == self._n_rows - 1 else "" for _, text in ticks])
        return axes

    def label(self, y: float, text: str, colour: str) -> None:
        """Put `text` to the right of the first row, as near to `y` as other labels allow."""
        if math.isfinite(y):
            self._labels.append((y, text, colour))

    def key(self, entries: Sequence[tuple[str, str]], row: int, heading: str) -> None:
        """Put a key of colours to the right of a row, top down, like the stack."""
        top = TOP + row * (self._height + GAP)
        if heading:
            self._text(top + _LINE / 2, heading, INK, weight="bold")
            top += round(_LINE)
        room = self._height + GAP - (_LINE if heading else 0)
        kept = thinned(entries, int(room // _LEAST_LINE))
        line = min(_LINE, room / max(1, len(kept)))
        for i, (text, colour) in enumerate(kept):
            y = top + (i + 0.5) * line
            self._swatch(y, colour)
            self._text(y, text, MUTED, indent=16)

    def panel(self, title: str, note: str) -> Panel:
        """Write the labels and return the panel."""
        self._write_labels()
        buffer = io.StringIO()
        self._figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return Panel(self._key, title, note, page_svg(buffer.getvalue(), self._key, title))

    def _write_labels(self) -> None:
        if not self._labels:
            return
        axes = self._figure.axes[0]
        low, high = TOP + _LINE / 2, TOP + self._height - 4
        heights = axes.transData.transform([(0, y) for y, _, _ in self._labels])[:, 1]
        wanted = [float(min(max(self._total - y, low), high)) for y in heights]
        for (_, text, colour), y in zip(self._labels, spread(wanted, _LINE, low, high), strict=True):
            self._text(y, text, colour)

    def _text(self, y: float, text: str, colour: str, *, indent: int = 0, weight: str = "normal") -> None:
        room = _MAX_LABEL - indent // 8
        text = text if len(text) <= room else text[: room - 1] + "…"
        x = (WIDTH - RIGHT + 8 + indent) / WIDTH
        self._figure.text(x, 1 - y / self._total, text, color=colour, va="center", weight=weight)

    def _swatch(self, y: float, colour: str) -> None:
        from matplotlib.patches import Rectangle  # noqa: PLC0415  an optional extra

        corner = ((WIDTH - RIGHT + 8) / WIDTH, 1 - (y + 5) / self._total)
        self._figure.add_artist(Rectangle(corner, 10 / WIDTH, 10 / self._total, color=colour, linewidth=0))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return heights near the wanted ones, `gap` apart if there is room from `low` to `high`, in order."""
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    placed = np.array(wanted, dtype=np.float64)[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed[-1:] = np.minimum(placed[-1:], high)
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    result = np.empty(len(placed))
    result[order] = placed
    return [float(y) for y in result]


def thinned(entries: Sequence[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """Return at most n entries, evenly picked, including the first and the last."""
    if len(entries) <= n:
        return list(entries)
    return [entries[i] for i in np.linspace(0, len(entries) - 1, max(2, n)).round().astype(int)]


def time_ticks(end_s: float) -> list[tuple[float, str]]:
    """Return about six instants from 0 to `end_s`, and their names with a unit."""
    unit_s, unit = (3600.0, "h") if end_s > 4 * 3600 else (60.0, "min") if end_s > 600 else (1.0, "s")
    span = end_s / unit_s
    power = 10.0 ** math.floor(math.log10(span / 8))
    step = next(nice * power for nice in (1, 2, 5, 10) if span / (nice * power) <= 8)
    return [(i * step * unit_s, f"{i * step:,.10g} {unit}") for i in range(int(span / step + 1e-9) + 1)]


_HEAD = re.compile(r"^.*?<svg[^>]*>", re.DOTALL)
_LEFT_OUT = re.compile(r"\s*<(metadata|style)\b.*?</\1>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_ID = re.compile(r'(\bid="|url\(#|href="#)')
_FONT = re.compile(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*")


def page_svg(svg: str, key: str, title: str) -> str:
    """Fit a figure into an HTML page; its text stays text.

    Ids begin with `key`, so that figures do not refer to each other; colours and fonts are the
    page's; numbers have two decimals; metadata and its addresses are removed.
    """
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"

    def fit(found: re.Match[str]) -> str:
        tag = _NUMBER.sub(_two_decimals, found[0])
        tag = _FONT.sub(r"font: \1\2px var(--font)", _ID.sub(rf"\g<1>{key}-", tag))
        for colour, name in COLOURS.items():
            tag = tag.replace(colour, f"var(--{name})")
        return tag

    body = _TAG.sub(fit, _LEFT_OUT.sub("", _HEAD.sub("", svg, count=1)))
    return f'<svg viewBox="{_NUMBER.sub(_two_decimals, box[1])}" role="img" aria-label="{title}">{body}'


def _two_decimals(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
