"""A timeline adds up to its run, bin by bin, and its file is read back as it was."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.live.records import UNANSWERED
from loadgen.live.run import count_outcomes
from loadgen.results.result import OUTCOMES
from loadgen.results.run import in_time
from loadgen.results.timeline import AIM_BINS, MIN_BIN_NS, RunTimeline, bin_ns, timeline_from, timeline_of
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.instructions import instructions
from tests.loadgen.results.columns import MS, SLO_NS, SUBNETS, UNSENT, columns_of, noise_of

ENDS = st.lists(st.sampled_from((*Status, UNANSWERED, UNSENT)), min_size=1, max_size=4)


def binned(columns: dict[str, Any], duration_ns: int, *, has_noise: bool = True) -> RunTimeline:
    """Return the timeline of columns."""
    noise = noise_of(duration_ns) if has_noise else None
    return timeline_of(columns, duration_ns=duration_ns, slo_ns=SLO_NS, subnets=SUBNETS, noise=noise)


@given(duration_ns=st.integers(1, 10**15))
def test_bins_are_round_and_neither_too_many_nor_too_narrow(duration_ns: int) -> None:
    """At most `AIM_BINS` of `MIN_BIN_NS` at least; no fewer than half as many unless that binds."""
    width_ns = bin_ns(duration_ns)
    n = -(-duration_ns // width_ns)

    assert width_ns >= MIN_BIN_NS
    assert n <= AIM_BINS
    assert n >= AIM_BINS / 2 or width_ns == MIN_BIN_NS


@given(n=st.integers(1, 400), duration_ns=st.integers(1, 50_000 * MS), ends=ENDS, seed=st.integers(0, 99))
def test_bins_sum_to_the_runs_totals(n: int, duration_ns: int, ends: list[int], seed: int) -> None:
    """Each query counts once, by the outcome that the run's own counts give it."""
    columns = columns_of(n, duration_ns=duration_ns, ends=ends, seed=seed)
    timeline = binned(columns, duration_ns)
    totals = count_outcomes(columns, SLO_NS)

    assert {name: int(timeline.of(name).sum()) for name in OUTCOMES} == {
        name: totals[name] for name in OUTCOMES
    }
    assert int(timeline.due.sum()) == n
    n_outputs = int((columns["status"] <= Status.LATE).sum())
    assert sum(int(one.queries.sum()) for one in timeline.subnets) == n_outputs
    assert timeline.tail_n[:1].sum() == n_outputs


@given(n=st.integers(1, 60), ends=ENDS, seed=st.integers(0, 99))
def test_each_bin_is_what_a_slow_count_makes_it(n: int, ends: list[int], seed: int) -> None:
    """Means and quantiles of a bin are those of the queries due in it, tried one by one."""
    duration_ns = 950 * MS
    columns = columns_of(n, duration_ns=duration_ns, ends=ends, seed=seed)
    timeline = binned(columns, duration_ns)
    edges = [*range(0, duration_ns, 100 * MS), duration_ns]
    has_output = columns["status"] <= Status.LATE
    is_ok = in_time(columns, SLO_NS)

    assert timeline.n_bins == 10
    for i, (lo, hi) in enumerate(pairwise(edges)):
        is_here = (columns["due_ns"] >= lo) & (columns["due_ns"] < hi)
        assert timeline.due[i] == is_here.sum()
        accuracies = columns["accuracy"][is_here & is_ok]
        assert timeline.mean_accuracy[i] == pytest.approx(
            accuracies.mean() if len(accuracies) else np.nan, nan_ok=True
        )
        waits = np.sort(columns["queued_ns"][is_here & has_output])
        p99 = waits[-(-len(waits) * 99 // 100) - 1] / MS if len(waits) else np.nan
        assert timeline.queue_wait_ms["p99"][i] == pytest.approx(p99, nan_ok=True)
        sizes = columns["batch_size"][is_here & has_output]
        mean = len(sizes) / (1 / sizes).sum() if len(sizes) else np.nan
        assert timeline.batch_size["mean"][i] == pytest.approx(mean, nan_ok=True)


def test_batches_count_once_however_many_queries_they_hold() -> None:
    """Nine batches of one and one of nine: the p90 is 1, the mean 1.8."""
    columns = columns_of(18, duration_ns=50 * MS)
    columns["batch_size"] = np.array([1] * 9 + [9] * 9, np.uint16)
    sizes = binned(columns, 50 * MS).batch_size

    assert (sizes["mean"][0], sizes["p10"][0], sizes["p90"][0]) == (pytest.approx(1.8), 1, 1)


@given(n=st.integers(1, 2_000), ends=ENDS)
def test_the_tail_falls_from_all_answers_to_the_slowest(n: int, ends: list[int]) -> None:
    """Latencies rise as the counts fall; the last is the maximum, alone."""
    timeline = binned(columns_of(n, duration_ns=500 * MS, ends=ends), 500 * MS)

    assert (np.diff(timeline.tail_ms) >= 0).all()
    assert (np.diff(timeline.tail_n) < 0).all()
    assert timeline.tail_n[-1:].tolist() in ([], [1])


@given(n=st.integers(1, 300), ends=ENDS, has_noise=st.booleans())
def test_a_timeline_is_read_back_as_it_was_written(n: int, ends: list[int], *, has_noise: bool) -> None:
    """Through JSON, to the digits that the file has."""
    timeline = binned(columns_of(n, duration_ns=3_000 * MS, ends=ends), 3_000 * MS, has_noise=has_noise)
    written = orjson.dumps(timeline.to_dict())

    assert orjson.dumps(timeline_from(orjson.loads(written)).to_dict()) == written


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bin_ms", "wide"),
        ("queries", {"ok": [1]}),
        ("queries", {"vanished": [0] * 10}),
        ("queries", {"ok": [-1] * 10}),
        ("mean_accuracy", None),
        ("mean_accuracy", []),
        ("batch_size", {"mean": [None] * 10}),
        ("subnets", {}),
        ("subnets", [{"name": "small", "accuracy": "70", "queries": [0] * 10}]),
        ("latency_ms", []),
        ("send_lag_ms", {"p50": ["slow"] * 10}),
        ("noise_p99_9_ms", "none"),
        ("latency_tail", {"ms": [1.0], "at_least": []}),
    ],
)
def test_a_wrong_timeline_is_an_error_that_names_the_field(field: str, value: object) -> None:
    """One that another program wrote, or a hand changed."""
    right = binned(columns_of(50, duration_ns=1_000 * MS), 1_000 * MS).to_dict()

    with pytest.raises(ConfigError, match=f"^timeline.{field}"):
        timeline_from({**right, field: value})


def test_a_timeline_takes_no_step_of_python_a_query() -> None:
    """Two million queries take 0.7 s; a loop over them in Python would take longer than all the rest."""
    duration_ns = 10_000 * MS
    few, many = (
        columns_of(n, duration_ns=duration_ns, ends=(Status.OK, Status.INFEASIBLE)) for n in (20_000, 200_000)
    )
    assert instructions(lambda: binned(many, duration_ns)) < 1.05 * instructions(
        lambda: binned(few, duration_ns)
    )
