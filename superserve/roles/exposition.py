"""Metrics over HTTP: what a process exports by name, histograms that cost little, and the server's thread.

A hot loop adds to plain integers. Whoever asks over HTTP pays for the text, in a thread of
its own. prometheus-client is imported by those who turn metrics on, and by nobody else.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

from superserve.errors import ConfigError, SuperServeError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

    from prometheus_client.metrics_core import Metric as Family

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_REQUESTS = 8
"""Requests answered at a time; a further connection is closed at once."""

_REQUEST_TIMEOUT_S = 5.0  # a peer that connects and says nothing is let go after this
_TEXT = "text/plain; charset=utf-8"

LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.036, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
"""Upper edges from 1 ms to 10 s: at most a factor of 2.5 apart, closest where SLOs lie."""

SIZE_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Upper edges for the queries of a batch."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported name.

    Attributes:
        name: As scraped, less the `_total` of a counter.
        kind: "counter", "gauge", "histogram", "summary" or "info".
        help: One sentence.
        labels: Names of its labels.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()

    def exported(self) -> tuple[str, ...]:
        """Return the names that a query language sees."""
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
            "summary": ("_sum", "_count"),
            "info": ("_info",),
        }
        return tuple(self.name + suffix for suffix in suffixes.get(self.kind, ("",)))


class MetricHistogram:
    """Counts by bucket, and their sum; for one writer.

    Args:
        bounds: Upper edges, ascending, in the unit of what is added; a last bucket takes the rest.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    @classmethod
    def of_latencies_ns(cls) -> Self:
        """Return one of `LATENCY_BOUNDS_S` that is given nanoseconds."""
        return cls(bound * 1e9 for bound in LATENCY_BOUNDS_S)

    def add(self, value: float, n: int = 1) -> None:
        """Count `value` n times."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def copy(self) -> HistogramBuckets:
        """Return what it holds now."""
        return HistogramBuckets(self.bounds, tuple(self.counts), self.total)


class HistogramBuckets(NamedTuple):
    """What a histogram held at one instant; `counts` has one more entry than `bounds`."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Families:
    """Collects samples for a table of metrics, in the client library's own form.

    Args:
        metrics: Every name that may be given; each becomes a family, with samples or without.
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
        """Give the sample of a counter, a gauge, or an info's dictionary."""
        self._families[name].add_metric(labels, value)

    def summary(self, name: str, count: int, total: float) -> None:
        """Give how many there were, and their sum."""
        self._families[name].add_metric((), count, total)

    def buckets(self, name: str, held: HistogramBuckets, unit: float = 1.0) -> None:
        """Give a histogram, its edges divided by `unit`."""
        rows, so_far = [], 0
        for bound, n in zip((*held.bounds, float("inf")), held.counts, strict=True):
            so_far += n
            rows.append(("+Inf" if bound == float("inf") else repr(round(bound / unit, 9)), so_far))
        self._families[name].add_metric((), rows, held.total / unit)

    def all(self) -> list[Family]:
        """Return every family, in the table's order."""
        return list(self._families.values())


class Page(NamedTuple):
    """An answer to a GET."""

    status: int
    body: bytes
    content_type: str = _TEXT


def exposition(families: Iterable[Family]) -> Page:
    """Return families as Prometheus reads them."""
    from prometheus_client import CollectorRegistry  # noqa: PLC0415  clients do without
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(families)))
    return Page(200, generate_latest(registry), CONTENT_TYPE_LATEST)


class _Given:
    """A collector of what was collected."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> list[Family]:
        return self._families

    def describe(self) -> list[Family]:
        return []


class UnavailableError(SuperServeError):
    """A page cannot be given now: 503, with these words."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the pages there are."""

    server: _Server
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        pages = self.server.pages
        give = pages.get(self.path.partition("?")[0])
        if give is None:
            page = Page(404, f"expected one of {', '.join(pages)}\n".encode())
        else:
            try:
                page = give()
            except UnavailableError as error:
                page = Page(503, f"{error}\n".encode())
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if has_body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        log.debug(format, *args)


class _Server(ThreadingHTTPServer):
    """A thread a request, a bounded number of them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Callable[[], Page]]) -> None:
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, _Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], peer: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, peer)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  the base class's
        log.info("a request from %s was not answered", client_address, exc_info=True)


@contextmanager
def serve_pages(
    pages: Mapping[str, Callable[[], Page]], *, address: str = LOOPBACK, port: int = 0
) -> Iterator[str]:
    """Serve pages from a thread of its own while the block runs; give HOST:PORT, as bound.

    Args:
        pages: By path; each is asked for in a thread of the request, and may raise `UnavailableError`.
        address: Where to listen.
        port: 0 lets the system pick.

    Raises:
        ConfigError: The address is not of this machine, or the port is taken.
    """
    try:
        server = _Server((address, port), pages)
    except OSError as error:
        raise ConfigError(f"metrics at {address}:{port}: {error.strerror or error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    host, bound = server.server_address[:2]
    log.info("metrics at http://%s:%d/metrics", host, bound)
    try:
        yield f"{host!s}:{bound}"
    finally:  # requests that are being answered end with the process
        server.shutdown()
        server.server_close()
        thread.join()
