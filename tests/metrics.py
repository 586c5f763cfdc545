"""Exported names as a query language sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from superserve.roles.exposition import Metric

_SUFFIXES = {
    "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count"),
    "info": ("_info",),
}  # fmt: skip


def exported(metric: Metric) -> tuple[str, ...]:
    """Return the names of a metric's series."""
    return tuple(metric.name + suffix for suffix in _SUFFIXES.get(metric.kind, ("",)))
