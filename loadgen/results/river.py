"""The slack river of a run: how many queries waited, by the time that was left to them, over the run.

Each query counts in the bin in which it was due, for as long as it waited with so much time left. So a cell
is the mean number of queries in the queue with that much time to their deadline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

ROWS = 18
"""Ranges of time to the deadline: 2 ms each at the paper's SLO."""
_DIGITS = 3


@dataclass(frozen=True, slots=True, eq=False)
class SlackRiver:
    """The queue of a run.

    Attributes:
        width_ms: Of a range of time to the deadline; the first begins at 0.
        waiting: Mean number of queries that wait, shape (n_bins, `ROWS`).
    """

    width_ms: float
    waiting: Floats

    def to_dict(self) -> dict[str, Any]:
        """Return the result file's `timeline.river`."""
        return {"width_ms": self.width_ms, "waiting": np.round(self.waiting, _DIGITS).tolist()}


def river_of(
    columns: Mapping[str, npt.NDArray[Any]],
    slo_ns: int | npt.NDArray[np.int64],
    bin_of: npt.NDArray[np.int64],
    n_bins: int,
    bin_ns: int,
) -> SlackRiver:
    """Return the river of a run's columns.

    Args:
        columns: Of `loadgen.results.run.Run`.
        slo_ns: From due to deadline: one for all, or shape (n,).
        bin_of: The bin of each query, shape (n,).
        n_bins: How many there are.
        bin_ns: Width of a bin.
    """
    sent_ns, answered_ns = columns["sent_ns"], columns["answered_ns"]
    has_output = columns["status"] <= Status.LATE
    # What was refused waited until then; its way back is too short to matter here.
    left_ns = np.where(has_output, sent_ns + columns["queued_ns"], answered_ns)
    known = (sent_ns >= 0) & (left_ns >= sent_ns)
    deadline_ns = columns["due_ns"] + slo_ns
    first_ns = (deadline_ns - sent_ns)[known].astype(np.float64)
    last_ns = (deadline_ns - left_ns)[known].astype(np.float64)
    most_ns = float(np.max(slo_ns)) if known.any() else float(MS)
    width_ns = most_ns / ROWS
    waiting = np.zeros((n_bins, ROWS))
    places = bin_of[known]
    for row in range(ROWS):
        # Past its deadline a query has no time left: it counts at the bottom.
        low = -np.inf if row == 0 else row * width_ns
        spent_ns = np.minimum(first_ns, (row + 1) * width_ns) - np.maximum(last_ns, low)
        waiting[:, row] = np.bincount(places, np.maximum(0.0, spent_ns), n_bins) / bin_ns
    return SlackRiver(width_ns / MS, waiting)


def river_from(raw: object, n_bins: int) -> SlackRiver | None:
    """Read `timeline.river` of a result file; None if an older file has none.

    Raises:
        ConfigError: It is not what `SlackRiver.to_dict` writes.
    """
    if raw is None:
        return None
    try:
        assert isinstance(raw, dict)
        width_ms, waiting = float(raw["width_ms"]), np.array(raw["waiting"], np.float64)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError("timeline.river: expected width_ms and rows of numbers") from error
    if waiting.shape != (n_bins, ROWS) or not np.isfinite(waiting).all() or not width_ms > 0:
        raise ConfigError(
            f"timeline.river: expected {n_bins} rows of {ROWS} numbers and a width above 0, "
            f"got shape {waiting.shape} and {width_ms:g}"
        )
    return SlackRiver(width_ms, waiting)
