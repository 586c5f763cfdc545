"""What the GPUs can serve, against sums over each of them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from profiles.table import load_profile
from router.policies.supply import GpuPace, Supply
from superserve.clock import MS

CNN = load_profile("cnn-8gpu-modelled")
N_GPUS = 4
LIMIT_NS = 18.0 * MS
FULL = 16 / CNN.latency_p99_ns(0, 16)
"""Queries a nanosecond of a GPU as profiled: a full batch of the smallest subnet takes 7.6 ms."""


class Model(RuleBasedStateMachine):
    """GPUs begin and end batches, overrun, hang and change their pace, beside what each is known to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 1_000_000 * MS
        self.supply = Supply()
        self.supply.limit_ns = LIMIT_NS
        self.paces = [GpuPace() for _ in range(N_GPUS)]
        for pace in self.paces:
            pace.set(CNN, 1.0, LIMIT_NS)
        self.supply.restate(self.paces)
        self.ends: list[tuple[int, int] | None] = [None] * N_GPUS  # until when, at which pace

    @rule(gpu=st.integers(0, N_GPUS - 1), takes_ns=st.integers(-5 * MS, 40 * MS) | st.just(10**13))
    def begin(self, gpu: int, takes_ns: int) -> None:
        """A batch is sent, or its end is expected at another instant; an overdue one ended in the past."""
        until_ns = self.now_ns + takes_ns
        self.supply.note(self.paces[gpu], until_ns)
        self.ends[gpu] = (until_ns, self.paces[gpu].per_ns)

    @rule(gpu=st.integers(0, N_GPUS - 1))
    def end(self, gpu: int) -> None:
        """Nothing is left to run, or the GPU hangs and is given nothing more."""
        self.supply.note(self.paces[gpu], None)
        self.ends[gpu] = None

    @rule(gpu=st.integers(0, N_GPUS - 1), slowdown=st.sampled_from([0.5, 1.0, 1.3, 2.0, 14.0]))
    def slow_down(self, gpu: int, slowdown: float) -> None:
        """A GPU is found to be slower or quicker; what it runs counts at the pace that was noted."""
        self.supply.reset(self.paces[gpu], CNN, slowdown)

    @rule(gpu=st.integers(0, N_GPUS - 1))
    def stop(self, gpu: int) -> None:
        """It is given no more work; all are summed up again, as once a heartbeat."""
        self.paces[gpu].stop()
        self.supply.restate(self.paces)

    @rule(ns=st.integers(0, 3 * MS) | st.integers(0, 100 * MS))
    def wait(self, ns: int) -> None:
        """Time passes."""
        self.now_ns += ns

    @rule()
    def ask(self) -> None:
        """A policy asks what is taken: the sum over GPUs of the time left times the pace."""
        naive = sum(max(0, until - self.now_ns) * per_ns for until, per_ns in filter(None, self.ends))
        assert self.supply.busy(self.now_ns) == pytest.approx(naive / (1 << 40), rel=1e-12, abs=1e-9)

    @invariant()
    def rate_is_the_sum(self) -> None:
        """Of queries a nanosecond, and of places."""
        per_ns = sum(pace.per_ns for pace in self.paces)
        assert self.supply.rate == pytest.approx(per_ns / (1 << 40), rel=1e-9, abs=1e-15)
        assert self.supply.places == sum(pace.place for pace in self.paces)


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSupply = Model.TestCase


@pytest.mark.parametrize(("slowdown", "place"), [(1.0, 16), (2.0, 16), (3.0, 8), (12.0, 1), (13.0, 0)])
def test_a_pace_is_that_of_the_largest_batch_within_the_limit(slowdown: float, place: int) -> None:
    """18 ms hold 16 queries at twice the profile's 7.57 ms, 8 at 3 times 4.31 ms, none at 13 times 1.47."""
    pace = GpuPace()
    pace.set(CNN, slowdown, LIMIT_NS)
    assert pace.place == place
    per_ns = 0.0 if not place else place / (CNN.latency_p99_ns(0, place) * slowdown)
    assert pace.per_ns / (1 << 40) == pytest.approx(per_ns, rel=1e-5)


def test_a_gpu_that_hangs_counts_for_nothing_from_its_end_on() -> None:
    """Its batch took as long as was expected of it, and not a second more and more from then on."""
    supply, hung, sound = Supply(), GpuPace(), GpuPace()
    supply.limit_ns = LIMIT_NS
    for pace in (hung, sound):
        pace.set(CNN, 1.0, LIMIT_NS)
    supply.restate([hung, sound])
    supply.note(hung, 10 * MS)
    supply.note(sound, 20 * MS)

    assert supply.busy(5 * MS) == pytest.approx((5 + 15) * MS * FULL, rel=1e-6)
    assert supply.busy(12 * MS) == pytest.approx(8 * MS * FULL, rel=1e-6)
    assert supply.busy(3_600_000 * MS) == 0.0
    supply.note(hung, 3_600_001 * MS)  # it lives
    assert supply.busy(3_600_000 * MS) == pytest.approx(MS * FULL, rel=1e-6)


def test_noise_is_not_worth_another_pace() -> None:
    """4 % more or less; 6 % are, and so is the first measurement of a GPU without a pace."""
    pace = GpuPace()
    assert pace.is_stale(1.0)
    pace.set(CNN, 1.0, LIMIT_NS)
    assert not pace.is_stale(1.04)
    assert not pace.is_stale(0.96)
    assert pace.is_stale(1.07)
    assert pace.is_stale(0.93)


def test_what_is_noted_is_forgotten_though_no_policy_asks() -> None:
    """A policy that never reads it costs no more memory with each batch."""
    supply, paces = Supply(), [GpuPace() for _ in range(3)]
    supply.limit_ns = LIMIT_NS
    for pace in paces:
        pace.set(CNN, 1.0, LIMIT_NS)
    for i in range(5_000):
        supply.note(paces[i % 3], i * MS + 10_000 * MS)
    assert len(supply._ends) < 200
    assert supply.busy(14_990 * MS) == pytest.approx((7 + 8 + 9) * MS * FULL, rel=1e-6)


def test_a_gap_is_the_mean_of_what_reports_say() -> None:
    """Reports that were under way for longer or shorter cancel out; a stall counts as one batch."""
    supply = Supply()
    assert supply.gap_ns == 0.0
    for way_ms in (-3, 1, 5, 1) * 300:
        supply.idled(way_ms * MS, 8 * MS)
    assert supply.gap_ns == pytest.approx(1 * MS, rel=0.1)
    before_ns = supply.gap_ns
    supply.idled(10_000 * MS, 8 * MS)
    assert supply.gap_ns < before_ns + 0.05 * MS
    # Reports that come early on average are no gap.
    for _ in range(2_000):
        supply.idled(-MS, 8 * MS)
    assert supply.gap_ns == 0.0


def test_a_first_gap_counts_for_little() -> None:
    """It may be a whole way off: 17 batches are to agree before half of it is believed."""
    supply = Supply()
    supply.idled(4 * MS, 8 * MS)
    assert 0 < supply.gap_ns < 0.3 * MS
    for _ in range(16):
        supply.idled(4 * MS, 8 * MS)
    assert supply.gap_ns == pytest.approx(2 * MS, rel=0.1)
