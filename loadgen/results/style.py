"""Colours and type of every picture, and figures in words.

matplotlib is imported when a figure is drawn, so that `loadgen` runs without it.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from superserve.errors import ConfigError

# In SVG each of these becomes var(--name), so that one drawing serves light and dark pages.
INK, MUTED, GRID, AREA = "#1b1f24", "#5f6873", "#e3e6ea", "#cdd5de"
RUNS = ("#0067b1", "#d1570c", "#00805c", "#9b4f96", "#a87801", "#40606e")
COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", AREA: "area"} | {
    colour: f"run{i}" for i, colour in enumerate(RUNS)
}
ENDS = {
    "late": "#e69f00", "expired": "#d55e00", "infeasible": "#9467bd", "overloaded": "#0072b2",
    "failed": "#c2185b", "worker_lost": "#8c564b", "invalid": "#bcbd22", "cancelled": "#17becf",
    "draining": "#5c7f5a", "unanswered": "#7f7f7f", "unsent": "#a8324a",
}  # fmt: skip
"""Colours of the outcomes other than OK, the same on light and dark pages."""

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "superserve",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 12.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


def check_installed() -> None:
    """Raise ConfigError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the report page needs matplotlib: pip install 'superserve[report]'")


def percent(share: float) -> str:
    """Return a percentage with enough digits to distinguish it from 100: 99.9987 %."""
    missing = 100 - share
    if missing <= 0:
        return "100 %"
    return f"{share:.{min(8, max(2, 1 - math.floor(math.log10(missing))))}f} %"


def figure(value: float) -> str:
    """Return a number with three significant digits, or all before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
