"""`cluster top`: STATUS of a router as a page of 80 columns, and what changed since the previous one.

Everything here is a function of two STATUSes: rates are differences of their counters, divided by the
time between them. With only one, the router's own last ten seconds are shown.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from superserve.status import READY, RecentWindow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from superserve.status import GpuStatus, RouterStatus

WIDTH = 80
_MAX_NAME, _MAX_HOST = 12, 10
_UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Sample:
    """A STATUS, and when it arrived.

    Attributes:
        status: As the router sent it.
        at_ns: On this process's clock.
    """

    status: RouterStatus
    at_ns: int

    def follows(self, other: Sample | None) -> bool:
        """Return whether `other` is an earlier sample of the same run of the router."""
        return (
            other is not None
            and other.status.router.epoch == self.status.router.epoch
            and other.at_ns < self.at_ns
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One GPU, ready to be shown; None if one sample does not show it.

    Attributes:
        state: Of the GPU, or of its process if that is not well.
        busy: Share of the time that it executed batches.
    """

    name: str
    host: str
    state: str
    subnet: str
    batches_s: float | None
    queries_s: float | None
    busy: float | None
    slowdown: float
    credit: int
    transport_ms: float


def rows_of(now: Sample, before: Sample | None) -> list[Row]:
    """Return the GPUs in order of name and slot."""
    earlier: dict[tuple[str, int], GpuStatus] = {}
    seconds = 0.0
    if before is not None and now.follows(before):
        earlier = {(gpu.name, gpu.slot): gpu for gpu in before.status.workers}
        seconds = (now.at_ns - before.at_ns) / 1e9
    gpus = sorted(now.status.workers, key=lambda gpu: (gpu.name, gpu.slot))
    has_many = {gpu.name for gpu in gpus if gpu.slot > 0}
    return [
        _row(gpu, earlier.get((gpu.name, gpu.slot)), seconds, is_one_of_many=gpu.name in has_many)
        for gpu in gpus
    ]


def _row(gpu: GpuStatus, was: GpuStatus | None, seconds: float, *, is_one_of_many: bool) -> Row:
    def rate(now: float, then: float | None) -> float | None:
        # A worker that joined again counts from 0.
        return None if then is None or now < then else (now - then) / seconds

    busy = rate(gpu.busy_s, None if was is None else was.busy_s)
    if busy is not None:
        busy = min(1.0, busy)  # a batch counts when it ends, and may have begun before
    name = f"{gpu.name}:{gpu.slot}" if is_one_of_many else gpu.name
    return Row(
        name, gpu.host, gpu.condition, gpu.last_subnet or _UNKNOWN,
        rate(gpu.batches, None if was is None else was.batches),
        rate(gpu.queries, None if was is None else was.queries), busy,
        gpu.slowdown, gpu.credit, gpu.transport_ms,
    )  # fmt: skip


# --- the header -------------------------------------------------------------------------------


def header(now: Sample, before: Sample | None) -> list[str]:
    """Return lines about the router: arrivals, how queries end, the queue, and the GPUs needed."""
    status = now.status
    last, cpu_s = status.recent.short, None
    if before is not None and now.follows(before):
        last, cpu_s = _since(now, before), status.router.cpu_s - before.status.router.cpu_s
    minute, queue, router = status.recent.long, status.queue, status.router
    seconds = last.seconds
    rate_qps = last.received / seconds if seconds > 0 else 0.0
    done_qps = last.answered.total / seconds if seconds > 0 else 0.0
    head_ms = queue.head_slack_ms
    needed, workers = status.workers_needed, status.workers
    draining = ", draining" if router.draining else ""
    head = _UNKNOWN if head_ms is None else f"{head_ms:.1f} ms"
    of_last, of_minute = f"{seconds:.0f} s", f"{minute.seconds:.0f} s"
    cpu = _share(cpu_s, seconds)
    lines = [
        ("policy", f"{router.policy}{draining}", "  clients", str(status.clients), "  router CPU", cpu),
        ("in", f"{rate_qps:,.0f} q/s", "  ended", f"{done_qps:,.0f} q/s", "  queue", f"{queue.length:,}",
         "  head slack", head),
        ("attainment", _attainment(last), "over", of_last + ",", _attainment(minute), "over", of_minute,
         "  accuracy", _accuracy(last)),
        ("GPUs", str(status.workers_ready), "ready of", str(len(workers)),
         "  needed", f"{needed.as_served:.1f}", "as served,", f"{needed.at_least:.1f}", "at least"),
    ]  # fmt: skip
    return [*(" ".join(words) for words in lines), *_misses(last)]


def _since(now: Sample, before: Sample) -> RecentWindow:
    """Return what happened between two samples."""
    new, old = now.status.queries, before.status.queries
    return RecentWindow(
        seconds=(now.at_ns - before.at_ns) / 1e9,
        received=new.received - old.received,
        answered=new.answered.since(old.answered),
        ok_accuracy=new.ok_accuracy - old.ok_accuracy,
        busy_s=new.busy_s - old.busy_s,
        executed=new.executed - old.executed,
    )


def _attainment(window: RecentWindow) -> str:
    n = window.answered.wanted
    if not n:
        return _UNKNOWN
    # Truncated, not rounded: 1.0000 must mean that no query missed.
    return f"{window.answered.ok * 10_000 // n / 10_000:.4f}"


def _accuracy(window: RecentWindow) -> str:
    n = window.answered.ok
    return f"{window.ok_accuracy / n:.2f} %" if n else _UNKNOWN


def _misses(window: RecentWindow) -> list[str]:
    missed = [f"{status} {n:,}" for status, n in window.answered.items() if n and status != "ok"]
    return ["not ok: " + ", ".join(missed)] if missed else []


# --- the page ---------------------------------------------------------------------------------


def page(now: Sample, before: Sample | None, *, max_rows: int | None = None) -> RenderableType:
    """Return the whole page.

    Args:
        now: The latest sample.
        before: The one before it, if there is one: rates are since then.
        max_rows: Most GPUs shown; those that are not well come first, and the rest are counted.
    """
    rows = rows_of(now, before)
    shown, left_out = rows, 0
    if max_rows is not None and len(rows) > max_rows:
        shown = sorted(rows, key=lambda row: row.state == READY)[: max(1, max_rows - 1)]
        left_out = len(rows) - len(shown)
    parts: list[RenderableType] = [Text(line, no_wrap=True) for line in header(now, before)]
    parts += [Text(), _table(shown)]
    if left_out:
        n_unwell = sum(row.state != READY for row in rows)
        parts.append(Text(f"... and {left_out} more; of {len(rows)} GPUs, {n_unwell} are not ready"))
    return Group(*parts)


def _table(rows: Sequence[Row]) -> Table:
    # 12 + 10 + 8 + 11 + 4 + 5 + 4 + 4 + 2 + 4 = 64 columns, and 9 gaps of one.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    table.add_column("worker", no_wrap=True, max_width=_MAX_NAME)
    table.add_column("host", no_wrap=True, max_width=_MAX_HOST)
    table.add_column("state", no_wrap=True, max_width=8)
    table.add_column("subnet", no_wrap=True, max_width=11)
    for column in ("b/s", "q/s", "busy", "slow", "cr", "way ms"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(
            Text(row.name), Text(row.host), Text(row.state, style=_style(row.state)), Text(row.subnet),
            _rate(row.batches_s), _rate(row.queries_s), _share(row.busy, 1.0),
            f"{row.slowdown:.2f}", str(row.credit), f"{row.transport_ms:.2f}",
        )  # fmt: skip
    return table


def _style(state: str) -> str:
    return {READY: "green", "draining": "yellow"}.get(state, "bold red")


def _rate(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.0f}"


def _share(part: float | None, whole: float) -> str:
    return _UNKNOWN if part is None or whole <= 0 else f"{part / whole:.0%}"


def plain(what: RenderableType, width: int = WIDTH) -> str:
    """Return a page as text without colours, with no line longer than `width`."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(what)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
