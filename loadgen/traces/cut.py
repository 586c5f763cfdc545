"""A trace cut out of a larger one and brought to a length or a rate; and the description of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadgen.traces import azure
from loadgen.traces.arrivals import check_positive, to_ns
from loadgen.traces.specs import Spec
from loadgen.traces.trace import Trace, open_source, trace_of
from superserve.clock import SECOND
from superserve.errors import TraceError

if TYPE_CHECKING:
    import numpy.typing as npt

    from loadgen.traces.azure_functions import Functions
    from loadgen.traces.trace import Source

_MINUTE_S = 60.0
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a source to use, and how fast to play it. `None` leaves it unchanged.

    Attributes:
        window: `START:END`, END not included, either may be left out: minutes as numbered in a Functions
            2019 file's header, for others seconds after the start.
        functions: Of an Azure Functions file, as `loadgen.traces.azure_functions` reads them.
        squeeze_to_s: Play all of it in this many seconds.
        speed_up: Or play all of it this many times as fast.
        rate_qps: Or, its mean rate. A spec's rates are multiplied before anything else. For a
            Functions 2019 file it may be combined with either of the others, because positions within a
            minute are drawn anyway: the number of queries then follows from the rate.
        duration_s: How long to draw a spec for.
        seed: Of everything random.
    """

    window: str | None = None
    functions: str | None = None
    squeeze_to_s: float | None = None
    speed_up: float | None = None
    rate_qps: float | None = None
    duration_s: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """A trace and its origin.

    Attributes:
        kind: The kind of source, in words.
        functions: The functions in the trace, for an Azure Functions file; otherwise None.
    """

    trace: Trace
    kind: str
    functions: Functions | None


def make_trace(spec: str, cut: Cut) -> Made:
    """Return the part of `spec` that `cut` takes, at its rate. Shapes are kept: see `Trace.fitted`.

    Raises:
        TraceError: The source is invalid, or does not contain the requested part.
    """
    if cut.squeeze_to_s is not None and cut.speed_up is not None:
        raise TraceError("squeeze_to_s and speed_up: expected one of them, got both")
    if cut.speed_up is not None:
        check_positive("speed_up", cut.speed_up, at_most=1e9)
    if cut.squeeze_to_s is not None:
        to_ns("squeeze_to_s", cut.squeeze_to_s)
    source = open_source(spec, rate_qps=cut.rate_qps, functions=cut.functions)
    if cut.duration_s is not None and not isinstance(source, Spec):
        raise TraceError(f"trace {spec!r}: duration_s: only a spec is drawn for a duration; see squeeze_to_s")
    trace = (
        _minutes(source, spec, cut) if isinstance(source, azure.MinuteCounts) else _rows(source, spec, cut)
    )
    functions = source.functions if isinstance(source, azure.MinuteCounts | azure.Invocations) else None
    return Made(trace, kind_of(source), functions)


def kind_of(source: Source) -> str:
    """Return the kind of source, in words."""
    if isinstance(source, Spec):
        return f"spec: {source}"
    if isinstance(source, Trace):
        return "saved trace"
    if isinstance(source, azure.MinuteCounts):
        return f"Azure Functions 2019: counts of minutes {source.first_minute} to {source.last_minute}"
    return f"{source.origin.partition(' (')[0]}: recorded arrivals"


def _minutes(source: azure.MinuteCounts, spec: str, cut: Cut) -> Trace:
    """Return a window of minutes, each drawn into its part of the cut's duration."""
    if cut.window is not None:
        start, end = parse_window(cut.window)
        first = source.first_minute if start is None else _whole(start, cut.window)
        n = None if end is None else _whole(end, cut.window) - first
        source = source.window(first, n, source=spec)
    duration_s = cut.squeeze_to_s
    if cut.speed_up is not None:
        duration_s = source.counts.size * _MINUTE_S / cut.speed_up
    return trace_of(source, spec, rate_qps=cut.rate_qps, duration_s=duration_s, seed=cut.seed)


def _rows(source: Spec | azure.Invocations | Trace, spec: str, cut: Cut) -> Trace:
    """Return a window of seconds, with each gap in it multiplied by one factor."""
    drawn_qps = cut.rate_qps if isinstance(source, Spec) else None
    trace = trace_of(source, spec, rate_qps=drawn_qps, duration_s=cut.duration_s, seed=cut.seed)
    if cut.window is not None:
        start, end = parse_window(cut.window)
        trace = trace.windowed(start or 0.0, end)
    squeezed_s = cut.squeeze_to_s
    if cut.speed_up is not None:
        squeezed_s = trace.duration_ns / SECOND / cut.speed_up
    if drawn_qps is None and cut.rate_qps is not None:
        if squeezed_s is not None:
            raise TraceError(
                f"trace {spec!r}: rate_qps, squeeze_to_s and speed_up: expected one of them, for its"
                f" {trace.n} queries are all kept"
            )
        return trace.scaled(rate_qps=cut.rate_qps)
    return trace if squeezed_s is None else trace.fitted(squeezed_s)


def parse_window(text: str) -> tuple[float | None, float | None]:
    """Return the two ends of `START:END`; None for one that is left out.

    Raises:
        TraceError: The text is malformed.
    """
    start, colon, end = text.partition(":")
    try:
        found = tuple(float(part) if part.strip() else None for part in (start, end))
    except ValueError:
        found = ()
    if not colon or not found or any(part is not None and not 0 <= part < 1e9 for part in found):
        raise TraceError(f"window: expected START:END, such as 60:120 or 60:, got {text!r:.60}")
    return found[0], found[1]


def _whole(value: float, window: str) -> int:
    if not value.is_integer():
        raise TraceError(f"window: expected whole minutes of a Functions 2019 file, got {window!r}")
    return int(value)


def describe(made: Made) -> list[str]:
    """Return the lines that `loadgen trace info` prints for a trace.

    Burstiness is shown twice: as CV² of the gaps, 1 for a Poisson process, which shows bursts shorter than a
    gap; and as variance over mean of the counts by second, also 1, which shows bursts that last for seconds.
    """
    trace = made.trace
    cv2 = "-" if trace.cv2 is None else f"{trace.cv2:.4g}"
    lines = [
        f"  kind             {made.kind}",
        f"  queries          {trace.n:,}",
        f"  span             {trace.duration_ns / SECOND:,.6g} s",
        f"  mean             {trace.mean_qps:,.4g} q/s",
        f"  peak             {trace.peak_qps():,.4g} q/s in the fullest second, wherever it starts",
        f"  CV² of gaps      {cv2} (1 is Poisson)",
        f"  by second        {_by_second(counts_by_second(trace))}",
    ]
    if made.functions is not None:
        totals = made.functions.totals
        busiest = int(totals.argmax())
        lines.append(
            f"  functions        {made.functions.n:,}; busiest {made.functions.names[busiest]}, "
            f"{totals[busiest] / totals.sum():.1%} of their invocations in the file"
        )
    return [*lines, f"  rate over time   {sparkline(trace)}", f"  from             {trace.provenance}"]


def counts_by_second(trace: Trace) -> npt.NDArray[np.int64]:
    """Return the queries due in each whole second, shape (n_seconds,).

    A remainder at the end of less than a second does not count, unless it is all there is.
    """
    n = max(1, trace.duration_ns // SECOND)
    return np.bincount(trace.due_ns // SECOND, minlength=n)[:n]


def _by_second(counts: npt.NDArray[np.int64]) -> str:
    """Return how uneven the counts are, in words."""
    if not counts.any():
        return "none in a whole second"
    p50, p99 = np.percentile(counts, (50, 99), method="inverted_cdf")
    return (
        f"variance / mean {counts.var() / counts.mean():,.4g} (1 is Poisson); "
        f"p50 {p50:,.0f}, p99 {p99:,.0f}, max {counts.max():,} at {counts.argmax():,} s; "
        f"{np.mean(counts == 0):.1%} empty"
    )


def sparkline(trace: Trace, width: int = 64) -> str:
    """Return the rate in `width` equal parts of the trace, as bars; the highest fills its cell.

    A part without queries is blank, and only such a part is.
    """
    counts = np.bincount(trace.due_ns * width // trace.duration_ns, minlength=width)
    heights = np.ceil(counts * (len(_BARS) - 1) / counts.max()).astype(np.int64)
    return "".join(_BARS[height] for height in heights)
