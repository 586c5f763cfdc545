"""Caution: what raises it, how it fades, and that it frees a cluster from the trap of small batches."""

from __future__ import annotations

import pytest

from loadgen.simulator.faults import jitter_faults
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from router.policies.caution import Caution, doubt_of_ways
from superserve.clock import MS
from superserve.wire import Status

WINDOW_NS = 20 * MS
SERVABLE = 100.0


class Losing:
    """A caution and the counts that it sees; each step is a window later."""

    def __init__(self) -> None:
        self.caution = Caution()
        self.answered = [0] * len(Status)
        self.now_ns = 0
        self.step()

    def step(self, ok: int = 0, lost: int = 0, queued: int = 0, status: Status = Status.LATE) -> float:
        """End some queries, and return the factor a window later."""
        self.answered[Status.OK] += ok
        self.answered[status] += lost
        self.caution.look(self.answered, queued, SERVABLE, self.now_ns)
        self.now_ns += WINDOW_NS
        return self.caution.look(self.answered, 0, SERVABLE, self.now_ns)


def test_without_losses_there_is_none() -> None:
    """However many are served, and however long nothing comes."""
    losing = Losing()

    assert [losing.step(ok=n) for n in (0, 1_000, 0)] == [1.0] * 3


@pytest.mark.parametrize("status", [Status.LATE, Status.EXPIRED, Status.INFEASIBLE, Status.OVERLOADED])
def test_lossy_windows_double_it_up_to_a_limit(status: Status) -> None:
    """Whatever the queries were lost to."""
    losing = Losing()

    assert [losing.step(ok=90, lost=10, status=status) for _ in range(5)] == [2.0, 4.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.FAILED, Status.WORKER_LOST, Status.INVALID])
def test_other_ends_say_nothing_of_time(status: Status) -> None:
    """A client that cancels, a model that fails, and a worker that dies are no reason for haste."""
    assert Losing().step(ok=50, lost=50, status=status) == 1.0


@pytest.mark.parametrize(("ok", "lost", "factor"), [(9, 1, 1.0), (8, 2, 2.0), (198, 2, 1.0), (196, 2, 2.0)])
def test_a_query_or_a_hundredth_is_not_lossy(ok: int, lost: int, factor: float) -> None:
    """Two at least, and more than one in a hundred."""
    assert Losing().step(ok=ok, lost=lost) == factor


@pytest.mark.parametrize(("queued", "factor"), [(60, 2.0), (61, 1.0)])
def test_a_jam_explains_its_losses(queued: int, factor: float) -> None:
    """More waits than can be served: caution would not help. The next window is judged by itself."""
    losing = Losing()

    assert losing.step(ok=50, lost=50, queued=queued) == factor
    assert losing.step(ok=50, lost=50) == 2 * factor


def test_it_fades_and_ends() -> None:
    """By a factor e in half a second, and it is none in the end."""
    losing = Losing()
    losing.step(ok=1, lost=9)
    factors = [losing.step(ok=10) for _ in range(300)]

    assert factors == sorted(factors, reverse=True)
    assert factors[24] == pytest.approx(1 + 1 / 2.71828, rel=0.001)
    assert factors[-1] == 1.0


def test_a_long_silence_fades_it_as_much_as_many_decisions() -> None:
    """Nothing is decided while nothing comes."""
    losing = Losing()
    losing.step(ok=1, lost=9)
    losing.now_ns += 480 * MS

    assert losing.step() == pytest.approx(1 + 1 / 2.71828, rel=0.001)


def test_the_sooner_it_is_needed_again_the_longer_it_stays() -> None:
    """A relapse halves the fade's speed; after a long calm it is as fast as at first."""

    def windows_until_none() -> int:
        n = 0
        losing.step(ok=1, lost=9)
        while losing.step(ok=10) > 1.0:
            n += 1
        return n

    losing = Losing()
    first, second, third = (windows_until_none() for _ in range(3))
    assert second == pytest.approx(2 * first, abs=2)
    assert third == pytest.approx(4 * first, abs=4)
    losing.now_ns += 1_000_000 * MS

    assert windows_until_none() == pytest.approx(first, abs=1)


@pytest.mark.parametrize(
    ("differ_ns", "patience_ns", "doubt"),
    [(0, 100, 1.0), (20, 100, 1.0), (30, 100, 2.2), (50, 100, 4.6), (5, 0, 1.0), (5, -1, 1.0)],
)
def test_ways_that_differ_by_much_of_a_patience_are_doubt(
    differ_ns: int, patience_ns: int, doubt: float
) -> None:
    """A fifth is none; without any patience it does not matter."""
    assert doubt_of_ways(differ_ns, patience_ns) == pytest.approx(doubt)


@pytest.mark.parametrize(("jitter_ms", "least"), [(5, 0.9999), (7, 0.96)])
def test_messages_that_jitter_beyond_the_plan_cost_few_queries(jitter_ms: int, least: float) -> None:
    """Of those that all fit on the smallest subnet. Without doubt and caution 3 to 60 in 100 are lost."""
    trace = load_trace("poisson:rate=6400", duration_s=3.0, seed=1)
    gpus = [load_profile("cnn-8gpu-modelled")] * 8
    faults = jitter_faults(jitter_ms * MS, n_processes=1, n_clients=1)

    run = simulate(
        trace, gpus, policy="planfit", slo_ns=36 * MS, settings=SimSettings(), faults=faults, seed=1
    )  # fmt: skip

    assert (run.result.slo_attainment or 0.0) >= least
