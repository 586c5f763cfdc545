"""A run while it runs: the figures of each second and of all so far, and a way to end it early.

A sender writes the outcomes of its queries, in the order of due instants, to a file of `LIVE_ROW`s: those
whose deadline is `LATE_NS` past, so that written rows do not change any more, except for answers that are
even later. `Seconds` reads these files and reports each second once all senders have passed it.

A query counts in the second in which it was due. p99 is over answers with an output, as in the result; a
query without an answer yet counts as slower than all of them. The p99 of one second is exact, that of all so
far comes from a histogram, at most 0.8 % above the exact one.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.live.records import LIVE_ROW, UNANSWERED
from loadgen.results.histogram import Histogram
from loadgen.results.result import quantile_ns
from superserve.clock import MS, SECOND
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    import numpy.typing as npt

_COLUMNS = (
    ("rate_qps", 9, 0),
    ("slo_attainment", 10, 5),
    ("mean_accuracy", 10, 2),
    ("latency_p99_ms", 8, 2),
    ("send_lag_p99_ms", 8, 2),
)
_TITLES = " ".join(
    f"{title:>{width}}"
    for title, (_, width, _) in zip(
        ("q/s", "attainment", "accuracy %", "p99 ms", "lag p99"), _COLUMNS, strict=True
    )
)
HEADER = f"         s {_TITLES}  | {_TITLES}  so far"
"""The heading of the seconds' lines."""
_P99 = 990


@dataclass(frozen=True, slots=True)
class SecondFigures:
    """The outcomes of the queries due in a period.

    Attributes:
        span_s: Its length.
        due: Queries due in it.
        sent: How many of them were sent.
        ok: How many were answered in time.
        unanswered: How many were sent and have no answer yet.
        accuracy_sum: Profiled accuracy, summed over those answered in time, percent.
        latency_p99_ns: From due to answered; None if there is no output, or the p99 has no answer yet.
        lag_p99_ns: Of the sender's own lateness; None if nothing was sent.
    """

    span_s: float
    due: int
    sent: int
    ok: int
    unanswered: int
    accuracy_sum: float
    latency_p99_ns: int | None
    lag_p99_ns: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON, with the names of the run result file where it has them."""
        return {
            "due": self.due,
            "sent": self.sent,
            "ok": self.ok,
            "unanswered": self.unanswered,
            "rate_qps": self.sent / self.span_s,
            "slo_attainment": self.ok / self.due if self.due else None,
            "mean_accuracy": self.accuracy_sum / self.ok if self.ok else None,
            "latency_p99_ms": None if self.latency_p99_ns is None else self.latency_p99_ns / MS,
            "send_lag_p99_ms": None if self.lag_p99_ns is None else self.lag_p99_ns / MS,
        }

    def to_text(self) -> str:
        """Return them in columns, under `HEADER`."""
        found = self.to_dict()
        texts = [
            f"{'-':>{width}}" if found[name] is None else f"{found[name]:{width},.{digits}f}"
            for name, width, digits in _COLUMNS
        ]
        return " ".join(texts)


@dataclass(frozen=True, slots=True)
class Second:
    """A second of a run, of which the last may be shorter, and the run up to its end."""

    end_s: float
    this: SecondFigures
    so_far: SecondFigures

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON line."""
        return {
            "kind": "second",
            "end_s": self.end_s,
            "second": self.this.to_dict(),
            "so_far": self.so_far.to_dict(),
        }

    def to_line(self) -> str:
        """Return it as a line."""
        return f"  {self.end_s:8.1f} {self.this.to_text()}  | {self.so_far.to_text()}"


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Endings:
    """The signals that may end a command early: Ctrl-C, and SIGTERM and SIGHUP, which act like it.

    A signal interrupts; within `gently` only the second one does, and after `finish` none.

    Attributes:
        stop: Once set, nothing more is sent; the run is reported up to there.
        signals: The numbers of the signals that came.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.signals: list[int] = []
        self._is_gentle = self._is_finishing = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the number of the first signal, as in shells; of SIGINT if none came."""
        return 128 + (self.signals[0] if self.signals else signal.SIGINT)

    def begin(self) -> None:
        """Handle the signals from now on; in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it, and that must stay
                    self._before[number] = signal.signal(number, self._handle)

    def end(self) -> None:
        """Restore the handlers from before `begin`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """Make the first signal set `stop`, and the next one interrupt."""
        is_alone = not self._before  # no command has begun
        if is_alone:
            self.begin()
        self._is_gentle = True
        try:
            yield
        finally:
            self._is_gentle = False
            if is_alone:
                self.end()

    def finish(self) -> None:
        """Ignore interrupts from now on: there is a result to show and write."""
        self._is_finishing = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(number)
        if self._is_finishing:
            return
        if not self._is_gentle or self.stop.is_set():
            raise KeyboardInterrupt
        self.stop.set()


@dataclass(frozen=True, slots=True)
class Watch:
    """Follows a run: `on_second` receives each second, and `endings` may end it early."""

    on_second: Callable[[Second], None]
    endings: Endings = field(default_factory=Endings)

    @property
    def stop(self) -> threading.Event:
        """Once set, nothing more is sent."""
        return self.endings.stop


class _Feed:
    """The rows that one sender has written and no second has used yet."""

    def __init__(self, path: Path, due_ns: npt.NDArray[np.int64]) -> None:
        self.until_ns = 0
        self._path = path
        self._due_ns = due_ns
        self._rows = np.empty(0, LIVE_ROW)
        self._n_taken = self._n_read = 0

    def read(self, n: int, until_ns: int) -> None:
        """Read up to row `n`; these include every query due before `until_ns`."""
        self.until_ns = until_ns
        if n > self._n_read:
            offset = self._n_read * LIVE_ROW.itemsize
            more = np.fromfile(self._path, LIVE_ROW, n - self._n_read, offset=offset)
            assert len(more) == n - self._n_read, "a sender writes before it tells"
            self._rows = np.concatenate((self._rows, more))
            self._n_read = n

    def take(self, end_ns: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """Return the due instants and rows of queries due before `end_ns` that were not taken yet."""
        low = self._n_taken
        high = low + int(np.searchsorted(self._due_ns[low : self._n_read], end_ns))
        rows, self._rows = self._rows[: high - low], self._rows[high - low :]
        self._n_taken = high
        return self._due_ns[low:high], rows


class Seconds:
    """Combines the senders' rows, and reports each second that all senders have passed."""

    def __init__(
        self,
        feeds: dict[str, tuple[Path, npt.NDArray[np.int64]]],
        *,
        start_ns: int,
        duration_ns: int,
        slo_ns: int,
        on_second: Callable[[Second], None],
    ) -> None:
        self.duration_ns = duration_ns
        self._feeds = {name: _Feed(path, due_ns) for name, (path, due_ns) in feeds.items()}
        self._start_ns = start_ns
        self._slo_ns = slo_ns
        self._on_second = on_second
        self._told_ns = 0
        self._due = self._sent = self._ok = self._unanswered = 0
        self._accuracy_sum = 0.0
        self._latency, self._lag = Histogram(), Histogram()

    def read(self, name: str, n: int, until_ns: int) -> None:
        """Record that a sender has written `n` rows, including every query due before `until_ns`."""
        self._feeds[name].read(n, until_ns)
        passed_ns = min(feed.until_ns for feed in self._feeds.values())
        while self._told_ns < self.duration_ns:
            end_ns = min(self._told_ns + SECOND, self.duration_ns)
            if end_ns > passed_ns:
                break
            self._tell(end_ns)

    def _tell(self, end_ns: int) -> None:
        taken = [feed.take(end_ns) for feed in self._feeds.values()]
        due_ns = np.concatenate([due for due, _ in taken]) + self._start_ns
        rows = np.concatenate([one for _, one in taken])
        span_s = (end_ns - self._told_ns) / SECOND
        self._told_ns = end_ns
        was_sent = rows["sent_ns"] >= 0
        has_output = rows["status"] <= Status.LATE
        latency_ns = (rows["answered_ns"] - due_ns)[has_output]
        lag_ns = (rows["sent_ns"] - due_ns)[was_sent]
        is_ok = has_output & (rows["answered_ns"] - due_ns <= self._slo_ns)
        unanswered = int((was_sent & (rows["status"] == UNANSWERED)).sum())
        never = np.full(unanswered, np.iinfo(np.int64).max)
        p99_ns = quantile_ns(np.concatenate((latency_ns, never)), _P99)
        this = SecondFigures(
            span_s, len(rows), int(was_sent.sum()), int(is_ok.sum()), unanswered,
            float(rows["accuracy"][is_ok].sum(dtype=np.float64)),
            None if p99_ns == np.iinfo(np.int64).max else p99_ns, quantile_ns(lag_ns, _P99),
        )  # fmt: skip
        self._latency.add(latency_ns)
        self._lag.add(lag_ns)
        self._on_second(Second(end_ns / SECOND, this, self._added(this)))

    def _added(self, this: SecondFigures) -> SecondFigures:
        """Add a second to the earlier ones, and return the figures of all."""
        self._due += this.due
        self._sent += this.sent
        self._ok += this.ok
        self._unanswered += this.unanswered
        self._accuracy_sum += this.accuracy_sum
        return SecondFigures(
            self._told_ns / SECOND, self._due, self._sent, self._ok, self._unanswered, self._accuracy_sum,
            self._latency.quantile_ns(_P99, n_slower=self._unanswered), self._lag.quantile_ns(_P99),
        )  # fmt: skip
