"""The autoscaler's decision: within bounds, up at once, down late, and never to and fro."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.report.scaler import AS_SERVED, AT_LEAST, Scaler, ScalerSettings, need_of
from superserve.errors import ConfigError
from superserve.status import GpusNeeded

LOADS = st.lists(st.tuples(st.floats(0.1, 40.0), st.floats(0.0, 50.0)), min_size=1, max_size=80)
"""Steps: seconds since the one before, and GPUs needed from then on."""


@st.composite
def settings(draw: st.DrawFn) -> ScalerSettings:
    """Return any settings of a small fleet."""
    floor = draw(st.integers(1, 5))
    return ScalerSettings(
        floor=floor, ceiling=floor + draw(st.integers(0, 40)), gpus_per_worker=draw(st.integers(1, 8)),
        margin=draw(st.floats(0.0, 1.0)), up_cool_s=draw(st.floats(0.0, 60.0)),
        down_cool_s=draw(st.floats(0.0, 60.0)), down_after_s=draw(st.floats(0.0, 120.0)),
    )  # fmt: skip


@given(own=settings(), loads=LOADS, n=st.integers(0, 60))
def test_a_fleet_follows_its_load_within_its_bounds(
    own: ScalerSettings, loads: list[tuple[float, float]], n: int
) -> None:
    """Of every decision: bounds hold; up only to what is needed; down never below what was, for long."""
    scaler, now_s, changed_s = Scaler(own), 0.0, -math.inf
    past: list[tuple[float, float]] = []
    for step_s, needed in loads:
        now_s += step_s
        past.append((now_s, needed))
        target = scaler.decide(now_s, needed, n)

        assert own.floor <= target <= own.ceiling
        if own.floor <= n <= own.ceiling:  # else a bound may count at once
            if target > n:
                assert target <= math.ceil(needed / own.gpus_per_worker)
                assert now_s - changed_s >= own.up_cool_s
            if target < n:
                recent = max(need for at_s, need in past if at_s >= now_s - own.down_after_s)
                assert target >= min(math.ceil(recent / own.gpus_per_worker), n)
                assert now_s - past[0][0] >= own.down_after_s
                assert now_s - changed_s >= own.down_cool_s
        if target != n:
            changed_s = now_s
        n = target


@given(own=settings(), needed=st.floats(0.0, 50.0), n=st.integers(1, 60))
def test_a_steady_load_settles(own: ScalerSettings, needed: float, n: int) -> None:
    """A need that never changes is followed once, and then nothing changes any more."""
    scaler = Scaler(own)
    step_s = 1.0 + max(own.up_cool_s, own.down_cool_s, own.down_after_s)
    sizes = []
    for i in range(6):
        n = scaler.decide(i * step_s, needed, n)
        sizes.append(n)

    assert len(set(sizes[2:])) == 1
    enough = math.ceil(needed / own.gpus_per_worker)
    assert sizes[-1] >= min(max(enough, own.floor), own.ceiling)


def test_a_burst_is_answered_at_once_and_remembered() -> None:
    """Up at the first look; down only once the burst has left the window."""
    scaler = Scaler(ScalerSettings(floor=1, ceiling=8, margin=0.0, down_after_s=60.0, down_cool_s=0.0))

    assert scaler.decide(0.0, 0.4, 1) == 1
    assert scaler.decide(5.0, 4.2, 1) == 5
    assert scaler.decide(30.0, 0.4, 5) == 5
    assert scaler.decide(64.0, 0.4, 5) == 5
    assert scaler.decide(66.0, 0.4, 5) == 1


def test_bounds_count_in_a_cool_down_too() -> None:
    """A fleet below its floor grows at once: a worker may have been lost."""
    scaler = Scaler(ScalerSettings(floor=2, ceiling=3, up_cool_s=100.0))

    assert scaler.decide(0.0, 9.0, 2) == 3
    assert scaler.decide(1.0, 9.0, 1) == 2
    assert scaler.decide(2.0, 9.0, 7) == 3


def test_a_need_is_one_of_two() -> None:
    """Those of STATUS."""
    assert need_of(GpusNeeded(2.5, 1.5), AS_SERVED) == 2.5
    assert need_of(GpusNeeded(2.5, 1.5), AT_LEAST) == 1.5


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"floor": 0}, "a floor of 1 or more"),
        ({"floor": 3, "ceiling": 2}, "got 3 and 2"),
        ({"gpus_per_worker": 0}, "gpus_per_worker: expected 1 or more, got 0"),
        ({"margin": -0.1}, "margin: expected 0 or more, got -0.1"),
        ({"down_after_s": math.nan}, "down_after_s: expected 0 or more, got nan"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, float], words: str) -> None:
    """By field, with what was expected."""
    with pytest.raises(ConfigError, match=words):
        ScalerSettings(**wrong)  # type: ignore[arg-type]  # wrong by design
