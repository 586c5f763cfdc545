"""Metrics: the names that a process exports, and histograms that are cheap to fill.

A hot loop adds to plain integers. The HTTP request pays for the text: see `superserve.roles.pages`.
Only processes with metrics turned on import prometheus-client.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from superserve.roles.pages import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from prometheus_client.metrics_core import Metric as Family

LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.036, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
"""Upper edges from 1 ms to 10 s: at most a factor of 2.5 apart, closest around usual SLOs."""

SIZE_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper edges for the queries in a batch."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric.

    Attributes:
        name: As scraped, without the `_total` of a counter.
        kind: "counter", "gauge", "histogram", "summary" or "info".
        help: One sentence.
        labels: Names of its labels.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()

    def exported(self) -> tuple[str, ...]:
        """Return the names that a query language uses."""
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "summary": ("_sum", "_count"),
            "info": ("_info",),
        }
        return tuple(self.name + suffix for suffix in suffixes.get(self.kind, ("",)))


class MetricHistogram:
    """Counts by bucket, and the sum; for one writer.

    Args:
        bounds: Upper edges, ascending, in the unit of the values; a last bucket takes the rest.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    @classmethod
    def of_latencies_ns(cls) -> Self:
        """Return a histogram with `LATENCY_BOUNDS_S` that takes nanoseconds."""
        return cls(bound * 1e9 for bound in LATENCY_BOUNDS_S)

    def add(self, value: float, n: int = 1) -> None:
        """Count `value` n times."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def copy(self) -> HistogramBuckets:
        """Return the counts as they are now."""
        return HistogramBuckets(self.bounds, tuple(self.counts), self.total)


class HistogramBuckets(NamedTuple):
    """A histogram's contents at one instant; `counts` has one more entry than `bounds`."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Families:
    """Collects samples for a table of metrics, in the client library's types.

    Args:
        metrics: Every metric that may be added; each becomes a family, with or without samples.
    """

    def __init__(self, metrics: Iterable[Metric]) -> None:
        from prometheus_client import metrics_core as core  # noqa: PLC0415  clients do without

        kinds: dict[str, Callable[..., Any]] = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
            "summary": core.SummaryMetricFamily,
            "info": core.InfoMetricFamily,
        }
        self._families: dict[str, Any] = {
            metric.name: kinds[metric.kind](metric.name, metric.help, labels=metric.labels)
            for metric in metrics
        }

    def add(self, name: str, value: Any, *labels: str) -> None:
        """Add the sample of a counter, a gauge, or an info's dictionary."""
        self._families[name].add_metric(labels, value)

    def summary(self, name: str, count: int, total: float) -> None:
        """Add a summary: how many there were, and their sum."""
        self._families[name].add_metric((), count, total)

    def buckets(self, name: str, held: HistogramBuckets, unit: float = 1.0) -> None:
        """Add a histogram, its edges divided by `unit`."""
        rows, so_far = [], 0
        for bound, n in zip((*held.bounds, float("inf")), held.counts, strict=True):
            so_far += n
            rows.append(("+Inf" if bound == float("inf") else repr(round(bound / unit, 9)), so_far))
        self._families[name].add_metric((), rows, held.total / unit)

    def all(self) -> list[Family]:
        """Return every family, in the table's order."""
        return list(self._families.values())


def exposition(families: Iterable[Family]) -> Page:
    """Return the page with families in Prometheus's format."""
    from prometheus_client import CollectorRegistry  # noqa: PLC0415  clients do without
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(families)))
    return Page(200, generate_latest(registry), CONTENT_TYPE_LATEST)


class _Given:
    """A collector of families that were already collected."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> list[Family]:
        return self._families

    def describe(self) -> list[Family]:
        return []
