"""What a router remembers of a run, fetched before it goes: for a trace, and for the page's lanes of GPUs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from loadgen.study.explain.flight import Flight, ask_flight
from loadgen.study.spans.perfetto import write_trace
from superserve.clock import MS, SECOND
from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LANES_NS = 2 * SECOND
MOST_BATCHES, MOST_GPUS = 4_000, 16


class RunMemory:
    """Fetches a router's record at the end of a run.

    Args:
        keys: As for `Client`.
        is_needed: Whether anything will use it.
    """

    def __init__(self, keys: str, *, is_needed: bool) -> None:
        self.flight: Flight | None = None
        self._keys = keys
        self._why = ""
        self.on_end: Callable[[str], None] | None = self.fetch if is_needed else None

    def fetch(self, endpoint: str) -> None:
        """Ask the router at an endpoint; if it gives no record, the run counts all the same."""
        try:
            self.flight = ask_flight(endpoint, self._keys)
        except SuperServeError as error:
            self._why = str(error)

    def lanes(self) -> dict[str, Any] | None:
        """Return the run's worst two seconds, GPU by GPU, for the result file; None without a record."""
        return None if self.flight is None or not self.flight.batches else lanes_of(self.flight)

    def write_trace(self, path: Path, say: Callable[[str], object]) -> None:
        """Write the record as a Chrome trace, and say where, or why not."""
        if self.flight is None:
            say(f"  no trace         {self._why}")
            return
        write_trace(path, self.flight)
        n = len(self.flight.queries)
        say(f"  {path}: {n:,} queries of the router's record; open it at ui.perfetto.dev")


def lanes_of(flight: Flight) -> dict[str, Any]:
    """Return the batches of the two seconds in which most queries missed, or of the last two if none did.

    Instants are milliseconds from there; GPUs beyond `MOST_GPUS` and batches beyond `MOST_BATCHES` are left
    out.
    """
    half = LANES_NS // 2
    missed = Counter(query.missed.at_ns // half for query in flight.missed() if query.missed)
    ends_ns = max(report.at_ns for report in flight.reports.values()) if flight.reports else 0
    if missed:
        worst = max(missed, key=lambda one: (missed[one], -one))
        from_ns = worst * half - half // 2
    else:
        from_ns = ends_ns - LANES_NS
    batches = []
    for batch_id, sent in flight.batches.items():
        report = flight.reports.get(batch_id)
        if report is None or sent.gpu >= MOST_GPUS:
            continue
        start_ns = sent.dispatched_ns + report.to_start_ns
        if start_ns + report.executing_ns > from_ns and start_ns < from_ns + LANES_NS:
            at_ms, took_ms = (start_ns - from_ns) / MS, report.executing_ns / MS
            batches.append([sent.gpu, round(at_ms, 2), round(took_ms, 2), sent.subnet, sent.n])
    subnets = flight.profiles[0].subnets if flight.profiles else ()
    return {
        "duration_ms": LANES_NS / MS,
        "missed": sum(n for at, n in missed.items() if from_ns <= at * half < from_ns + LANES_NS),
        "gpus": [flight.gpu_name(gpu) for gpu in range(min(MOST_GPUS, len(flight.gpus)))],
        "subnets": [[one.name, one.accuracy] for one in subnets],
        "batches": batches[:MOST_BATCHES],
    }
