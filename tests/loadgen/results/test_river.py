"""The slack river counts how long queries waited, by the time that was left to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.results.river import ROWS, SlackRiver, river_from, river_of
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.loadgen.results.columns import MS, SLO_NS, columns_of

BIN_NS = 100 * MS


def of(columns: dict[str, Any], n_bins: int = 5) -> SlackRiver:
    """Return the river of columns."""
    return river_of(columns, SLO_NS, columns["due_ns"] // BIN_NS, n_bins, BIN_NS)


@settings(max_examples=20)
@given(n=st.integers(0, 200), seed=st.integers(0, 99))
def test_it_adds_up_to_the_time_that_queries_waited(n: int, seed: int) -> None:
    """Summed over the ranges, a bin has all the time that its queries waited; none is counted twice."""
    columns = columns_of(n, duration_ns=500 * MS, ends=(Status.OK, Status.LATE), seed=seed)
    river = of(columns)

    waited = np.bincount(columns["due_ns"] // BIN_NS, columns["queued_ns"].astype(float), 5) / BIN_NS
    assert river.waiting.sum(axis=1) == pytest.approx(waited)
    assert (river.waiting >= 0).all()


def test_a_query_counts_where_its_slack_was() -> None:
    """One query, sent when due, that waits for 10 of its 36 ms: in the five uppermost ranges of 2 ms."""
    columns = {
        "due_ns": np.array([120 * MS]), "sent_ns": np.array([120 * MS]), "answered_ns": np.array([150 * MS]),
        "queued_ns": np.array([10 * MS]), "status": np.array([Status.OK], np.uint8),
    }  # fmt: skip
    river = of(columns)

    assert river.width_ms == 2.0
    expected = np.zeros((5, ROWS))
    expected[1, ROWS - 5 :] = 2 / 100
    assert river.waiting == pytest.approx(expected)


def test_a_refused_query_waits_until_its_answer_and_past_its_deadline() -> None:
    """Without an output it waited until the refusal; what passed after the deadline is at the bottom."""
    columns = {
        "due_ns": np.array([0]), "sent_ns": np.array([0]), "answered_ns": np.array([40 * MS]),
        "queued_ns": np.array([0]), "status": np.array([Status.EXPIRED], np.uint8),
    }  # fmt: skip
    river = of(columns)

    assert river.waiting[0].sum() == pytest.approx(0.4)
    assert river.waiting[0, 0] == pytest.approx(0.06)


def test_it_is_read_back_as_written() -> None:
    """From a file; an older file has none; another shape is refused."""
    river = of(columns_of(50, duration_ns=500 * MS))

    again = river_from(river.to_dict(), 5)
    assert again is not None
    assert again.waiting == pytest.approx(river.waiting, abs=1e-3)
    assert river_from(None, 5) is None
    with pytest.raises(ConfigError, match="expected 4 rows of 18 numbers"):
        river_from(river.to_dict(), 4)
    with pytest.raises(ConfigError, match=r"timeline\.river: expected width_ms"):
        river_from({"waiting": []}, 5)
