"""What single calls cost: a policy's decision, and an actuation. Without a process or a socket."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.supernet.actuation import actuate
from loadgen.results.result import quantile_ns
from profiles.table import Profile, SubnetProfile, load_profile
from router.policies import QueueView, WorkerView
from router.policies.demand import Demand
from router.policies.registry import make_policy
from superserve.clock import MS

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

_CALLS = 1_000  # between two readings of the clock, so that reading it costs nothing


def decision_us(policy: str, profile: Profile, *, n_rounds: int = 200, seed: int = 0) -> float:
    """Return the median over rounds of how long a policy's decision takes, in microseconds.

    The demand is that of 6,400 queries a second, each with 36 ms, on eight GPUs.
    """
    rng = random.Random(seed)
    choose = make_policy(policy, profile).choose
    worker = WorkerView(free_at_ns=0, allowance_ns=MS // 2, slowdown=1.0)
    demand = Demand(rate=6.4e-6, slack_ns=36 * MS, capacity=8 / profile.unit_cost_ns)
    queues = [
        QueueView(rng.randrange(40 * MS), rng.randrange(profile.n_subnets), rng.randrange(1, 100), demand)
        for _ in range(_CALLS)
    ]
    taken_ns = []
    for _ in range(n_rounds):
        began_ns = time.perf_counter_ns()
        for queue in queues:
            choose(queue, worker, 0)
        taken_ns.append(time.perf_counter_ns() - began_ns)
    median_ns = quantile_ns(np.array(taken_ns, np.int64), 500)
    assert median_ns is not None, "one round at least"
    return median_ns / _CALLS / 1_000


def decisions_us(profile: Profile) -> tuple[float, dict[str, Any]]:
    """Return how long a decision of DemandFit takes, and also SlackFit's, and both with 1,000 subnets."""
    wide = wide_profile(1_000)
    conditions = {
        "policy": "demandfit", "subnets": profile.n_subnets,
        "with_1000_subnets_us": decision_us("demandfit", wide, n_rounds=50),
        "slackfit_us": decision_us("slackfit", profile),
        "slackfit_with_1000_subnets_us": decision_us("slackfit", wide, n_rounds=50),
    }  # fmt: skip
    return decision_us("demandfit", profile), conditions


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


def actuation_ns(supernet: Supernet, *, n: int = 100_000, seed: int = 0) -> tuple[int, int]:
    """Return the p50 and p99 of one `actuate` to a random row, including the cost of the clock."""
    rng = random.Random(seed)
    rows = [rng.randrange(len(supernet.subnets)) for _ in range(n)]
    taken_ns = np.empty(n, np.int64)
    for i, row in enumerate(rows):
        began_ns = time.perf_counter_ns()
        actuate(supernet, row)
        taken_ns[i] = time.perf_counter_ns() - began_ns
    p50_ns, p99_ns = quantile_ns(taken_ns, 500), quantile_ns(taken_ns, 990)
    assert p50_ns is not None, "one call at least"
    assert p99_ns is not None, "one call at least"
    return p50_ns, p99_ns
