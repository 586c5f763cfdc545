"""What single calls cost: a policy's decision, and an actuation. Without a process or a socket."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.supernet.actuation import actuate
from loadgen.options import DEFAULT_POLICY
from loadgen.results.result import quantile_ns
from profiles.table import Profile, SubnetProfile, load_profile
from router.policies import QueueView, WorkerView
from router.policies.demand import Demand
from router.policies.due import Due, weights_of
from router.policies.registry import make_policy
from router.policies.supply import FULL, GpuPace, Supply
from superserve.clock import MS

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

_ACTUATIONS = 100_000
_CALLS = 1_000  # between two readings of the clock, so that reading it costs nothing


def decision_us(policy: str, profile: Profile, *, n_rounds: int = 200) -> float:
    """Return the median over rounds of how long a policy's decision takes, in microseconds.

    The demand is that of 6,400 queries a second, each with 36 ms, on eight GPUs that are half busy; the queue
    holds 1 to 100 queries.
    """
    rng = random.Random(0)
    choose = make_policy(policy, profile).choose
    worker = WorkerView(free_at_ns=0, allowance_ns=MS // 2, slowdown=1.0)
    queues = _queues(rng, profile)
    taken_ns = []
    for _ in range(n_rounds):
        began_ns = time.perf_counter_ns()
        for queue in queues:
            choose(queue, worker, 0)
        taken_ns.append(time.perf_counter_ns() - began_ns)
    median_ns = quantile_ns(np.array(taken_ns, np.int64), 500)
    assert median_ns is not None, "one round at least"
    return median_ns / _CALLS / 1_000


def _queues(rng: random.Random, profile: Profile) -> list[QueueView]:
    """Return queues of one moment, with all that a policy may see of them."""
    demand = Demand(rate=6.4e-6, slack_ns=36 * MS, capacity=8 / profile.unit_cost_ns)
    demand.arrived([36 * MS] * 100, 0)
    supply = Supply()
    supply.limit_ns = FULL * 36 * MS
    paces = [GpuPace() for _ in range(8)]
    for i, pace in enumerate(paces):
        pace.set(profile, 1.0, supply.limit_ns)
        supply.note(pace, 10 * MS if i < 4 else None)
    supply.restate(paces)
    weights = weights_of(profile.least_costs_ns())
    queues = []
    for _ in range(_CALLS):
        length = rng.randrange(1, 100)
        deadlines_ns = sorted(rng.randrange(20 * MS, 36 * MS) for _ in range(length))
        floors = [rng.randrange(profile.n_subnets)] + [0] * (length - 1)
        due = Due(weights)
        due.add(_Queued(deadlines_ns, floors), 0, length)
        queues.append(QueueView(deadlines_ns[0], floors[0], length, demand, False, due, supply))
    return queues


@dataclass(slots=True)
class _Queued:
    """What `Due` counts."""

    deadlines_ns: list[int]
    floors: list[int] | None


def decisions_us(profile: Profile) -> tuple[float, dict[str, Any]]:
    """Return how long a decision of the default policy takes, and those of others, with 1,000 subnets too."""
    wide = wide_profile(1_000)
    conditions = {
        "policy": DEFAULT_POLICY, "subnets": profile.n_subnets,
        "with_1000_subnets_us": decision_us(DEFAULT_POLICY, wide, n_rounds=50),
        "demandfit_us": decision_us("demandfit", profile),
        "demandfit_with_1000_subnets_us": decision_us("demandfit", wide, n_rounds=50),
        "slackfit_us": decision_us("slackfit", profile),
        "slackfit_with_1000_subnets_us": decision_us("slackfit", wide, n_rounds=50),
    }  # fmt: skip
    return decision_us(DEFAULT_POLICY, profile), conditions


def wide_profile(n_subnets: int) -> Profile:
    """Return a profile of `n_subnets` subnets, between the fastest and the slowest of the modelled one."""
    model = load_profile("cnn-8gpu-modelled")
    fast, slow = model.subnets[0], model.subnets[-1]
    subnets = []
    for i in range(n_subnets):
        part = i / max(1, n_subnets - 1)
        latency_ns = tuple(
            round(a + part * (b - a)) for a, b in zip(fast.latency_ns, slow.latency_ns, strict=True)
        )
        subnets.append(
            SubnetProfile(
                name=f"wide-{i}",
                control=None,
                accuracy=fast.accuracy + part * (slow.accuracy - fast.accuracy),
                gflops=None,
                latency_ns=latency_ns,
                latency_p99_ns=latency_ns,
            )
        )
    return Profile(
        name=f"wide-{n_subnets}",
        supernet=model.supernet,
        device=model.device,
        source="modelled",
        provenance="interpolated for a benchmark",
        versions={},
        date=model.date,
        batch_sizes=model.batch_sizes,
        subnets=tuple(subnets),
    )


def actuation_ns(supernet: Supernet) -> tuple[int, int]:
    """Return the p50 and p99 of one `actuate` to a random row, including the cost of the clock."""
    rng = random.Random(0)
    rows = [rng.randrange(len(supernet.subnets)) for _ in range(_ACTUATIONS)]
    taken_ns = np.empty(_ACTUATIONS, np.int64)
    for i, row in enumerate(rows):
        began_ns = time.perf_counter_ns()
        actuate(supernet, row)
        taken_ns[i] = time.perf_counter_ns() - began_ns
    p50_ns, p99_ns = quantile_ns(taken_ns, 500), quantile_ns(taken_ns, 990)
    assert p50_ns is not None, "one call at least"
    assert p99_ns is not None, "one call at least"
    return p50_ns, p99_ns
