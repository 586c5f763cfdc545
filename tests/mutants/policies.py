"""Mutants of the router's policies, and of the demand that they are shown."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_POLICIES = "router/policies/__init__.py"
_ROUTER = "router/core"
_POLICY = "router/policies"
_DEMANDFIT = "router/policies/demandfit.py"

_PRICES = ("tests/router/policies/test_demandfit.py",)
_WORTH = ("tests/router/policies/test_worth.py",)
_CAPACITY = ("tests/router/core/test_capacity.py",)
_RATES = ("tests/router/policies/test_demand.py",)
_BUCKETS = ("tests/router/policies/test_slackfit.py",)
_OTHERS = ("tests/router/policies/test_baselines.py",)

POLICIES = (
    # --- SlackFit ----------------------------------------------------------------------------
    Mutant(
        "an edge as long as the slack does not fit",
        _POLICY,
        "if ahead_ns < 0:",
        "if ahead_ns <= 0:",
        _BUCKETS,
    ),
    Mutant(
        "SlackFit's largest batch comes last",
        _POLICY,
        "profile.most_accurate(batch_size, budget_ns)",
        "floor",
        _BUCKETS,
    ),
    Mutant(
        "every floor has the buckets of the lowest",
        _POLICY,
        "self.buckets[queue.head_floor].at",
        "self.buckets[0].at",
        _BUCKETS,
    ),
    # --- what all policies share -------------------------------------------------------------
    Mutant(
        "a worker that is busy begins now",
        _POLICIES,
        "begin_ns = max(now_ns, worker.free_at_ns)",
        "begin_ns = now_ns",
        _BUCKETS,
    ),
    Mutant(
        "a slow worker has all of the slack",
        _POLICY,
        "else int(slack_ns / worker.slowdown)",
        "else slack_ns",
        _BUCKETS,
    ),
    # --- DemandFit ---------------------------------------------------------------------------
    Mutant(
        "the queue has no part in the price",
        _POLICY,
        "+ queue.length / patience_ns",
        "+ 0 / patience_ns",
        _PRICES,
    ),
    Mutant(
        "time is cheap at its least budget",
        _POLICY,
        "[_STEEPEST * prices[0], *prices, 0.0]",
        "[prices[0], *prices, 0.0]",
        _WORTH,
    ),
    Mutant(
        "a batch is paid for by its size, not by what waits",
        _POLICY,
        "each = price / min(size.size, length)",
        "each = price / size.size",
        _WORTH,
    ),
    Mutant(
        "late heads are shed without overload",
        _POLICY,
        "if not is_late or budget_ns >= full.latency_ns[0] / full.size or",
        "if not is_late or",
        _PRICES,
    ),
    Mutant(
        "late heads are never shed",
        _DEMANDFIT,
        "return Shed(max(before_ns, queue.head_deadline_ns + 1), n)",
        "return None",
        _PRICES,
    ),
    Mutant(
        "lower classes do not give way",
        _POLICY,
        "_LATE * patience_ns if queue.outranks else full.p99_ns[0]",
        "full.p99_ns[0]",
        _PRICES,
    ),
    Mutant(
        "patience counts the way twice",
        _DEMANDFIT,
        "max(1.0, demand.slack_ns - worker.allowance_ns)",
        "max(1.0, demand.slack_ns - 9 * worker.allowance_ns)",
        _PRICES,
    ),
    Mutant(
        "a slow worker sheds by its profile",
        _POLICY,
        "int(full.p99_ns[0] * worker.slowdown)",
        "int(full.p99_ns[0])",
        _WORTH,
    ),
    Mutant(
        "a slow worker has all of the patience",
        _POLICY,
        "return patience_ns / worker.slowdown, demand",
        "return patience_ns, demand",
        _WORTH,
    ),
    Mutant(
        "of equal batches the smaller is run",
        _DEMANDFIT,
        "if worth >= best_worth:",
        "if worth > best_worth:",
        _WORTH,
    ),
    Mutant(
        "the slack alone limits what sets the price",
        _POLICY,
        "min((1.0 - _SET_POINT) * patience_ns, _GRACE * slack_ns)",
        "_GRACE * slack_ns",
        _WORTH,
    ),
    # --- demand ------------------------------------------------------------------------------
    Mutant(
        "the rate does not fade",
        _POLICY,
        "self.rate = self.rate * keep + gain * self._n",
        "self.rate = self.rate + gain * self._n",
        _RATES,
    ),
    Mutant(
        "patience is a mean over messages",
        _POLICY,
        "self._hastes += len(slacks_ns) / max(MS, first_ns)",
        "self._hastes += 1 / max(MS, first_ns)",
        _RATES,
    ),
    Mutant(
        "a worker that drains counts as capacity",
        _ROUTER,
        "if w.machine.state is WorkerState.READY]",
        "]",
        _CAPACITY,
    ),
    # --- baselines ---------------------------------------------------------------------------
    Mutant(
        "MaxAcc serves below the floor",
        _POLICY,
        "if subnet is None or subnet < queue.head_floor:",
        "if subnet is None:",
        _OTHERS,
    ),
    Mutant(
        "Clipper+ does not raise its subnet to the floor",
        _POLICY,
        "subnet = max(self.subnet, queue.head_floor)",
        "subnet = self.subnet",
        _OTHERS,
    ),
    Mutant(
        "MaxBatch takes the smallest subnet",
        _POLICY,
        "subnet = self._profile.most_accurate(batch_size, slack_ns)",
        "subnet = queue.head_floor",
        _OTHERS,
    ),
)
