"""A histogram's quantiles are within their bound of the exact ones, and merging is addition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadgen.results.histogram import LONGEST_NS, RELATIVE_ERROR, Histogram
from loadgen.results.result import quantile_ns, quantiles_ms

DURATIONS = st.lists(st.one_of(st.integers(0, 2_000), st.integers(0, LONGEST_NS)), max_size=300)
PERMILLES = (1, 500, 900, 990, 999, 1000)


def histogram_of(ns: list[int]) -> Histogram:
    """Return one that has counted these."""
    found = Histogram()
    found.add(np.array(ns, np.int64))
    return found


@given(ns=DURATIONS, permille=st.sampled_from(PERMILLES))
def test_a_quantile_is_the_exact_one_or_at_most_the_bound_above_it(ns: list[int], permille: int) -> None:
    """For durations of any length, short and long ones together."""
    exact = quantile_ns(np.array(ns, np.int64), permille)
    found = histogram_of(ns).quantile_ns(permille)

    if exact is None:
        assert found is None
    else:
        assert found is not None
        assert exact <= found <= exact * (1 + RELATIVE_ERROR)


@given(parts=st.lists(DURATIONS, max_size=4))
def test_merged_parts_are_the_whole(parts: list[list[int]]) -> None:
    """Every quantile, the count and the maximum, exactly: senders and hosts may be merged in any order."""
    merged = Histogram()
    for part in reversed(parts):
        merged.merge(histogram_of(part))
    whole = histogram_of([one for part in parts for one in part])

    assert (merged.n, merged.max_ns) == (whole.n, whole.max_ns)
    assert [merged.quantile_ns(p) for p in PERMILLES] == [whole.quantile_ns(p) for p in PERMILLES]


@given(ns=DURATIONS)
def test_the_maximum_is_exact(ns: list[int]) -> None:
    """The longest stall is reported exactly."""
    assert histogram_of(ns).quantile_ns(1000) == (max(ns) if ns else None)


def test_ten_million_durations_stay_within_the_bound() -> None:
    """Log-normal latencies around 10 ms: each reported quantile, beyond the number that is kept exact."""
    ns = (np.random.default_rng(3).lognormal(16, 1, 10_000_000)).astype(np.int64)
    exact, found = quantiles_ms(ns), quantiles_ms(ns, max_exact=1_000_000)

    assert found["max"] == exact["max"]
    for name, value in exact.items():
        told = found[name]
        assert value is not None
        assert told is not None
        assert value <= told <= value * (1 + RELATIVE_ERROR)
