"""Arrival processes are ascending, repeatable, and near the parameters that they are given."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.traces import arrivals
from loadgen.traces.arrivals import arrivals_cv2
from superserve.clock import SECOND
from superserve.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable


SEEDS = st.integers(0, 2**70)
RATES = st.floats(0.1, 5_000)
DURATIONS = st.floats(1e-9, 3)
CV2S = st.sampled_from([0.0, 0.3, 1.0, 2.0, 8.0, 160.0])
SHAPE = np.array([0.0, 1.0, 5.0, 0.5], dtype=np.float64)

PROCESSES: dict[str, Callable[[float, float, float, int], npt.NDArray[np.int64]]] = {
    "constant": lambda rate, _, s, __: arrivals.constant(rate_qps=rate, duration_s=s),
    "poisson": lambda rate, _, s, seed: arrivals.poisson(rate_qps=rate, duration_s=s, seed=seed),
    "gamma": lambda rate, cv2, s, seed: arrivals.gamma(rate_qps=rate, cv2=cv2, duration_s=s, seed=seed),
    "bursty": lambda rate, cv2, s, seed: arrivals.bursty(
        base_qps=rate, variant_qps=2 * rate, cv2=cv2, duration_s=s, seed=seed
    ),
    "rising": lambda rate, cv2, s, seed: arrivals.accelerating(
        from_qps=rate, to_qps=3 * rate, tau_qps_per_s=1000, cv2=cv2, duration_s=s, seed=seed
    ),
    "falling": lambda rate, cv2, s, seed: arrivals.accelerating(
        from_qps=rate, to_qps=rate / 3, tau_qps_per_s=1000, cv2=cv2, duration_s=s, seed=seed
    ),
    "spikes": lambda rate, cv2, s, seed: arrivals.spikes(
        size=rate / 9, every_s=0.1, width_s=min(0.1, cv2 / 100), base_qps=rate, duration_s=s, seed=seed
    ),
    "on_off": lambda rate, cv2, s, seed: arrivals.on_off(
        high_qps=3 * rate, low_qps=rate / 7, on_s=0.03, off_s=0.07, cv2=cv2, duration_s=s, seed=seed
    ),
    "off": lambda rate, cv2, s, seed: arrivals.on_off(
        high_qps=rate, low_qps=0, on_s=0.03, off_s=0.07, cv2=cv2, duration_s=s, seed=seed
    ),
    "ramp_crash": lambda rate, cv2, s, seed: arrivals.ramp_crash(
        from_qps=rate / 3, to_qps=rate, ramp_s=0.07, rest_s=0.03, cv2=cv2, duration_s=s, seed=seed
    ),
    "decay": lambda rate, cv2, s, seed: arrivals.ramp_crash(
        from_qps=rate, to_qps=rate / 9, ramp_s=0.1, rest_s=0, cv2=cv2, duration_s=s, seed=seed
    ),
    "pareto_batches": lambda rate, _, s, seed: arrivals.pareto_batches(
        rate_qps=rate, alpha=1.2, most=50, duration_s=s, seed=seed
    ),
    "from_shape": lambda rate, _, s, seed: arrivals.from_shape(SHAPE, rate_qps=rate, duration_s=s, seed=seed),
    "maf_like": lambda rate, _, s, seed: arrivals.maf_like(rate_qps=rate, duration_s=s, seed=seed),
}


# The synthetic day takes a tenth of a second to draw, and its arrivals are those of from_shape.
@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "maf_like"])
@settings(deadline=None, max_examples=30)
@given(rate=RATES, cv2=CV2S, duration_s=DURATIONS, seed=SEEDS)
def test_arrivals_ascend_within_the_duration(
    process: str, rate: float, cv2: float, duration_s: float, seed: int
) -> None:
    """Every process gives ascending int64 instants in [0, duration), twice the same for one seed."""
    due_ns = PROCESSES[process](rate, cv2, duration_s, seed)

    assert due_ns.dtype == np.int64
    assert (np.diff(due_ns) >= 0).all()
    assert due_ns.size == 0 or (due_ns[0] >= 0 and due_ns[-1] < round(duration_s * SECOND))
    np.testing.assert_array_equal(PROCESSES[process](rate, cv2, duration_s, seed), due_ns)


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "constant"])
def test_another_seed_gives_other_arrivals(process: str) -> None:
    """All processes but the constant one depend on the seed."""
    one, other = (PROCESSES[process](1000, 2, 2, seed) for seed in (1, 2))

    assert not np.array_equal(one, other)


@settings(deadline=None)
@given(rate=st.integers(1, 3000), duration_s=st.integers(1, 5))
def test_a_constant_process_has_exactly_rate_times_duration_queries(rate: int, duration_s: int) -> None:
    """Queries are due at 0, 1/rate, 2/rate and so on, and the count is exact."""
    due_ns = arrivals.constant(rate_qps=rate, duration_s=duration_s)

    assert due_ns.tolist() == [i * SECOND // rate for i in range(rate * duration_s)]


@pytest.mark.parametrize("cv2", [0.25, 1.0, 2.0, 4.0, 8.0])
def test_a_gamma_process_has_its_rate_and_cv2(cv2: float) -> None:
    """Over 200,000 queries the mean and the CV² of the gaps come out near the parameters."""
    due_ns = arrivals.gamma(rate_qps=10_000, cv2=cv2, duration_s=20, seed=7)

    assert due_ns.size == pytest.approx(200_000, rel=0.03)
    assert arrivals_cv2(due_ns) == pytest.approx(cv2, rel=0.05)


def test_poisson_is_the_gamma_process_of_cv2_1() -> None:
    """Its counts in equal windows have a variance near their mean."""
    due_ns = arrivals.poisson(rate_qps=5000, duration_s=40, seed=3)
    counts = np.bincount(due_ns // (SECOND // 50))

    assert counts.mean() == pytest.approx(100, rel=0.02)
    assert counts.var() == pytest.approx(100, rel=0.15)
    np.testing.assert_array_equal(arrivals.gamma(rate_qps=5000, cv2=1, duration_s=40, seed=3), due_ns)


@settings(deadline=None, max_examples=30)
@given(cv2=CV2S, seed=SEEDS, shorter_s=st.floats(0.001, 2))
def test_a_longer_gamma_process_begins_with_the_shorter_one(cv2: float, seed: int, shorter_s: float) -> None:
    """A longer duration appends queries and moves none."""
    shorter = arrivals.gamma(rate_qps=2000, cv2=cv2, duration_s=shorter_s, seed=seed)
    longer = arrivals.gamma(rate_qps=2000, cv2=cv2, duration_s=2.5, seed=seed)

    np.testing.assert_array_equal(longer[: shorter.size], shorter)


def test_a_process_does_not_depend_on_the_pieces_it_is_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps drawn a few at a time give the same arrivals as all at once."""
    draw = partial(arrivals.gamma, rate_qps=3000, cv2=8, duration_s=2, seed=5)
    whole = draw()
    monkeypatch.setattr(arrivals, "_CHUNK", 7)

    np.testing.assert_array_equal(draw(), whole)


def test_a_bursty_process_is_its_constant_base_and_its_gamma_variant() -> None:
    """The merged stream holds each query of both streams, and has a rate of their sum."""
    merged = arrivals.bursty(base_qps=1500, variant_qps=5550, cv2=8, duration_s=20, seed=1)
    base = arrivals.constant(rate_qps=1500, duration_s=20)
    variant = arrivals.gamma(rate_qps=5550, cv2=8, duration_s=20, seed=1)

    np.testing.assert_array_equal(merged, np.sort(np.concatenate((base, variant))))
    assert merged.size / 20 == pytest.approx(7050, rel=0.03)


@pytest.mark.parametrize(("from_qps", "to_qps"), [(2500, 7800), (7800, 2500)])
def test_an_accelerating_process_ramps_and_then_stays(from_qps: float, to_qps: float) -> None:
    """Each second of the ramp has the rate of its middle; after it the rate is the last."""
    due_ns = arrivals.accelerating(
        from_qps=from_qps, to_qps=to_qps, tau_qps_per_s=500, cv2=1, duration_s=15, seed=2
    )
    counts = np.bincount(due_ns // SECOND, minlength=15)
    slope = math.copysign(500, to_qps - from_qps)

    for second in range(10):  # the ramp takes 10.6 s
        assert counts[second] == pytest.approx(from_qps + slope * (second + 0.5), rel=0.08)
    for second in range(11, 15):
        assert counts[second] == pytest.approx(to_qps, rel=0.08)


@settings(deadline=None)
@given(
    from_qps=st.floats(10, 5000),
    to_qps=st.floats(10, 5000),
    tau=st.floats(1, 1e5),
    duration_s=st.floats(0.1, 3),
)
def test_without_randomness_acceleration_gives_the_count_expected(
    from_qps: float, to_qps: float, tau: float, duration_s: float
) -> None:
    """At CV² 0 the number of queries is the integral of the rate, to within one."""
    ramp = {"from_qps": from_qps, "to_qps": to_qps, "tau_qps_per_s": tau, "duration_s": duration_s}
    due_ns = arrivals.accelerating(**ramp, cv2=0, seed=0)

    assert abs(due_ns.size - arrivals.accelerating_count(**ramp)) <= 1


def test_an_accelerating_process_keeps_its_cv2_around_the_moving_mean() -> None:
    """Gaps times the rate of their instant have the CV² asked for."""
    due_ns = arrivals.accelerating(
        from_qps=2500, to_qps=7500, tau_qps_per_s=250, cv2=8, duration_s=20, seed=4
    )
    t = due_ns / SECOND
    passed = 2500 * t + 250 * t**2 / 2

    assert np.diff(passed).var() == pytest.approx(8, rel=0.1)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20), seed=SEEDS)
def test_from_counts_puts_exactly_so_many_in_each_bin(counts: list[int], seed: int) -> None:
    """No bin gains or loses a query."""
    bin_s = 0.25
    due_ns = arrivals.from_counts(np.array(counts, dtype=np.int64), duration_s=bin_s * len(counts), seed=seed)

    assert np.bincount(due_ns // (SECOND // 4), minlength=len(counts)).tolist() == counts


def test_positions_inside_a_bin_are_uniform() -> None:
    """Each tenth of a bin of 100,000 queries holds about a tenth of them."""
    due_ns = arrivals.from_counts(np.array([100_000], dtype=np.int64), duration_s=1, seed=9)

    assert np.bincount(due_ns // (SECOND // 10)) == pytest.approx(np.full(10, 10_000), rel=0.05)


def test_from_shape_has_an_exact_total_in_the_proportions_of_its_shape() -> None:
    """The total is rate times duration; bins share it like the shape; an empty bin stays empty."""
    due_ns = arrivals.from_shape(SHAPE, rate_qps=1000, duration_s=100, seed=6)
    counts = np.bincount(due_ns // (25 * SECOND), minlength=4)

    assert due_ns.size == 100_000
    assert counts[0] == 0
    assert counts / 100_000 == pytest.approx(SHAPE / SHAPE.sum(), rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_the_synthetic_day_varies_like_the_real_one(seed: int) -> None:
    """Its minutes have a coefficient of variation near 0.1 and a peak of 1.1 to 2 times the mean."""
    shape = arrivals.maf_like_shape(seed=seed)

    assert shape.shape == (1440,)
    assert shape.mean() == pytest.approx(1)
    assert 0.05 < shape.std() < 0.2
    assert 1.1 < shape.max() < 2
    assert shape.min() > 0.5


def test_maf_like_has_an_exact_total() -> None:
    """The mean rate is the one asked for, and one seed gives one trace."""
    due_ns = arrivals.maf_like(rate_qps=640, duration_s=12, seed=0)

    assert due_ns.size == 7680
    assert (np.diff(due_ns) >= 0).all()
    np.testing.assert_array_equal(arrivals.maf_like(rate_qps=640, duration_s=12, seed=0), due_ns)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "spikes"])
def test_a_rate_or_duration_that_is_no_positive_number_is_an_error(process: str, bad: float) -> None:
    """Zero, negative, NaN and infinite rates and durations are refused by every process."""
    with pytest.raises(TraceError, match="_qps"):
        PROCESSES[process](bad, 1, 1, 0)
    with pytest.raises(TraceError, match="duration_s: expected"):
        PROCESSES[process](10, 1, bad, 0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("process", ["gamma", "bursty", "rising"])
def test_a_cv2_that_is_negative_or_no_number_is_an_error(process: str, bad: float) -> None:
    """The error names cv2."""
    with pytest.raises(TraceError, match="cv2: expected"):
        PROCESSES[process](10, bad, 1, 0)


@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "spikes"])
def test_more_queries_than_fit_are_refused_before_they_are_drawn(process: str) -> None:
    """A mistyped rate is an error, and no attempt to fill the memory."""
    with pytest.raises(TraceError, match="expected at most 100000000 queries"):
        PROCESSES[process](3e8, 1, 1000, 0)


def test_a_duration_below_a_nanosecond_is_an_error() -> None:
    """Time is counted in nanoseconds."""
    with pytest.raises(TraceError, match="at least 1 ns"):
        arrivals.to_ns("duration_s", 1e-12)


@settings(deadline=None)
@given(size=st.integers(1, 500), every_ms=st.integers(1, 300), n=st.integers(1, 20), seed=SEEDS)
def test_spikes_of_a_whole_size_are_exact(size: int, every_ms: int, n: int, seed: int) -> None:
    """At half of the interval and then at each whole one, `size` queries at once: whatever the seed."""
    due_ns = arrivals.spikes(
        size=size, every_s=every_ms / 1e3, width_s=0, base_qps=0, duration_s=n * every_ms / 1e3, seed=seed
    )

    instants, counts = np.unique(due_ns, return_counts=True)
    assert counts.tolist() == [size] * n
    np.testing.assert_allclose(instants, (np.arange(n) + 0.5) * every_ms * 1e6, atol=1)


@settings(deadline=None)
@given(size=st.integers(1, 500), width=st.floats(0.01, 0.5), seed=SEEDS)
def test_a_spike_keeps_its_width_and_its_count(size: int, width: float, seed: int) -> None:
    """Of 10 spikes all queries lie within their own; none is lost where the last one ends in time."""
    due_ns = arrivals.spikes(size=size, every_s=1, width_s=width, base_qps=0, duration_s=10, seed=seed)

    spike, into = np.divmod(due_ns - SECOND // 2, SECOND)
    assert np.bincount(spike, minlength=10).tolist() == [size] * 10
    assert into.max() <= width * SECOND


@pytest.mark.parametrize(
    ("process", "mean_qps"),
    [
        # A renewal process begins as if a query had just come: (cv2 - 1) / 2 more, of thousands.
        (lambda s, seed: arrivals.spikes(
            size=1.5, every_s=0.01, width_s=0.004, base_qps=100, duration_s=s, seed=seed), 250),
        (lambda s, seed: arrivals.on_off(
            high_qps=3000, low_qps=200, on_s=0.1, off_s=0.3, cv2=2, duration_s=s, seed=seed), 900),
        (lambda s, seed: arrivals.on_off(
            high_qps=3000, low_qps=0, on_s=0.1, off_s=0.3, cv2=1, duration_s=s, seed=seed), 750),
        (lambda s, seed: arrivals.ramp_crash(
            from_qps=200, to_qps=1800, ramp_s=0.3, rest_s=0.1, cv2=2, duration_s=s, seed=seed), 800),
        (lambda s, seed: arrivals.pareto_batches(
            rate_qps=800, alpha=1.5, most=40, duration_s=s, seed=seed), 800),
    ],
)  # fmt: skip
def test_patterns_have_their_mean_rate(
    process: Callable[[float, int], npt.NDArray[np.int64]], mean_qps: float
) -> None:
    """Over ten seeds of 8 s the count is that of the rate, within 3 %."""
    counts = [process(8, seed).size for seed in range(10)]

    assert np.mean(counts) == pytest.approx(8 * mean_qps, rel=0.03)


def test_on_and_off_are_where_they_should_be() -> None:
    """Rates by phase: 2,000 queries a second while on, 100 while off, and silence at a rate of 0."""
    for low in (100.0, 0.0):
        due_ns = arrivals.on_off(
            high_qps=2000, low_qps=low, on_s=0.25, off_s=0.75, cv2=1, duration_s=40, seed=3
        )
        is_on = due_ns % SECOND < SECOND // 4
        assert is_on.sum() == pytest.approx(20_000, rel=0.05)
        assert (~is_on).sum() == pytest.approx(40 * 0.75 * low, rel=0.1)


def test_a_ramp_rises_and_crashes() -> None:
    """By tenths of a cycle the counts are those of the ramp's rate, and of the rest after it."""
    due_ns = arrivals.ramp_crash(
        from_qps=200, to_qps=1800, ramp_s=0.8, rest_s=0.2, cv2=1, duration_s=100, seed=5
    )
    counts, _ = np.histogram(due_ns % SECOND, bins=10, range=(0, SECOND))
    expected = [*(10 * (200 + 200 * (i + 0.5)) for i in range(8)), 2000, 2000]

    np.testing.assert_allclose(counts, expected, rtol=0.08)


def test_pareto_batches_have_their_tail() -> None:
    """A share k^-alpha of the batches has k queries or more, none more than the most."""
    due_ns = arrivals.pareto_batches(rate_qps=50_000, alpha=1.2, most=60, duration_s=8, seed=2)
    _, sizes = np.unique(due_ns, return_counts=True)

    assert sizes.max() == 60
    for k in (2, 5, 20, 60):
        assert (sizes >= k).mean() == pytest.approx(k**-1.2, rel=0.1)


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda: arrivals.spikes(
            size=5, every_s=0.1, width_s=0.2, base_qps=0, duration_s=1, seed=0), "width"),
        (lambda: arrivals.spikes(
            size=5, every_s=0.1, width_s=0, base_qps=-1, duration_s=1, seed=0), "base_qps"),
        (lambda: arrivals.spikes(
            size=0, every_s=0.1, width_s=0, base_qps=0, duration_s=1, seed=0), "size"),
        (lambda: arrivals.spikes(
            size=5, every_s=0, width_s=0, base_qps=0, duration_s=1, seed=0), "every"),
        (lambda: arrivals.spikes(
            size=5, every_s=1, width_s=0, base_qps=0, duration_s=math.nan, seed=0), "duration_s"),
        (lambda: arrivals.spikes(
            size=1e6, every_s=1e-6, width_s=0, base_qps=0, duration_s=1, seed=0), "at most 100000000"),
        (lambda: arrivals.on_off(
            high_qps=5, low_qps=-1, on_s=1, off_s=1, cv2=1, duration_s=1, seed=0), "low_qps"),
        (lambda: arrivals.ramp_crash(
            from_qps=5, to_qps=9, ramp_s=1, rest_s=-1, cv2=1, duration_s=1, seed=0), "rest"),
        (lambda: arrivals.pareto_batches(
            rate_qps=5, alpha=1, most=2.5, duration_s=1, seed=0), "most: expected a whole number"),
    ],
)  # fmt: skip
def test_bad_patterns_are_refused(process: Callable[[], object], message: str) -> None:
    """The error names the argument."""
    with pytest.raises(TraceError, match=message):
        process()
