"""The demo's load: too much for the largest subnet, with headroom for the smallest, whatever the machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.demo.load import burst_spec, capacity_qps, sized_load
from loadgen.traces.specs import parse_spec
from profiles.measuring.measure import Measurement
from profiles.table import Profile, SubnetProfile
from superserve.clock import MS


def measured(largest_ms: float, ratio: float) -> Measurement:
    """Return a measurement of two subnets; the smallest is quicker by a ratio, batches of 8 and 32."""
    subnets = tuple(
        SubnetProfile(
            name,
            None,
            accuracy,
            1.0,
            (round(ms * MS), round(4 * ms * MS)),
            (round(2 * ms * MS), round(8 * ms * MS)),
        )
        for name, accuracy, ms in (("small", 80.0, largest_ms / ratio), ("large", 96.0, largest_ms))
    )
    profile = Profile("x", "digits", "cpu", "measured", "", {}, "2026-01-01", (8, 32), subnets)
    return Measurement(profile, {"large": {"min_ms": [largest_ms, 4 * largest_ms]}}, ())


def test_capacity_is_that_of_the_best_batch_size() -> None:
    """16 in 8 ms are 2,000 a second, more than one in 1 ms."""
    assert capacity_qps((1, 16), (1_000_000, 8_000_000)) == pytest.approx(2_000)


@given(capacity=st.floats(10, 100_000))
def test_the_burst_overloads_the_subnet_it_is_made_for(capacity: float) -> None:
    """Its mean rate is above the capacity, whatever that is."""
    spec = parse_spec(burst_spec(capacity), rate_qps=None)

    assert spec.mean_qps(10.0) > 1.1 * capacity


@given(largest_ms=st.floats(2, 200), ratio=st.floats(6, 20))
@settings(max_examples=25, deadline=None)
def test_the_load_is_sized_by_what_was_measured(largest_ms: float, ratio: float) -> None:
    """More than the largest subnet does even with what may wait at the end, and half of the smallest's."""
    load = sized_load(measured(largest_ms, ratio), seconds=10.0)

    assert load.trace.n > load.largest_qps * (10 + load.slo_ms / 1e3)
    assert load.slo_ms >= max(150, 10 * 4 * largest_ms)
    if load.trace.peak_qps(0.1) > 0.5 * load.smallest_qps:
        assert "cv2=1" in load.trace.provenance  # as even as it gets


def test_an_slo_that_is_asked_for_is_kept() -> None:
    """It is not derived from the profile then."""
    assert sized_load(measured(100, 8), seconds=1.0, slo_ms=70.0).slo_ns == 70 * MS
