"""Mutants of the router's policies, and of the demand that they are shown."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_POLICIES = "router/policies/__init__.py"
_ROUTER = "router/core"
_POLICY = "router/policies"
_DEMANDFIT = "router/policies/demandfit.py"
_PLANFIT = "router/policies/planfit.py"

_PRICES = ("tests/router/policies/test_demandfit.py",)
_WORTH = ("tests/router/policies/test_worth.py",)
_CAPACITY = ("tests/router/core/test_capacity.py",)
_RATES = ("tests/router/policies/test_demand.py",)
_BUCKETS = ("tests/router/policies/test_slackfit.py",)
_DUE = ("tests/router/policies/test_due.py",)
_LANES = ("tests/router/core/test_lanes.py",)
_SURGES = ("tests/router/policies/test_surge.py",)
_HASTY = ("tests/router/policies/test_hasty.py",)
_PACES = ("tests/router/policies/test_supply.py",)
_FLEET = ("tests/router/core/test_supply.py",)
_PLANS = ("tests/router/policies/test_planfit.py",)
_WRONG = ("tests/router/core/test_wrong_choices.py",)
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
    # --- what plans are made from ------------------------------------------------------------
    Mutant(
        "what is due far ahead is not counted",
        "router/policies/due.py",
        "        if left:\n            self._add_far(",
        "        if left < 0:\n            self._add_far(",
        _DUE,
    ),
    Mutant(
        "far buckets begin too early",
        "router/policies/due.py",
        "end >> (_COARSE - _FINE), left)",
        "(end >> (_COARSE - _FINE)) - 1, left)",
        _DUE,
    ),
    Mutant(
        "the head is due in the middle of its bucket",
        "router/policies/due.py",
        " if found else head_ns,",
        ",",
        _DUE,
    ),
    Mutant(
        "a floor weighs nothing more",
        "router/policies/due.py",
        "sign * weights[floor if floor < len(weights) else -1]",
        "sign * UNIT",
        _DUE,
    ),
    Mutant(
        "floors that are taken stay counted",
        "router/policies/due.py",
        "of_floor.get(floor, 0) + sign",
        "of_floor.get(floor, 0) + abs(sign)",
        _DUE,
    ),
    Mutant(
        "a message is due as its first query is",
        "router/policies/due.py",
        "if first_ns >> _FINE == max(stretch) >> _FINE:",
        "if True:",
        _DUE,
    ),
    Mutant(
        "the far part is left out where the near one asks for less",
        "router/policies/due.py",
        "if near <= intensity * time_ns and near * time.unit_ns < _LESS * room_ns:",
        "if True:",
        _DUE,
    ),
    Mutant(
        "reading ends at the first deadline that leaves time",
        "router/policies/due.py",
        "elif until_ns > exact_ns and total <= intensity * time_ns and total * each_ns <= room_ns:",
        "elif until_ns > exact_ns and total * each_ns <= room_ns:",
        _DUE,
    ),
    Mutant(
        "reading does not end where nothing can change",
        "router/policies/due.py",
        "if near <= intensity * time_ns and near * time.unit_ns < _LESS * room_ns:",
        "if False:",
        _DUE,
    ),
    Mutant(
        "a deadline far ahead that leaves more is forgotten",
        "router/policies/due.py",
        "        if after:",
        "        if after and not tight:",
        _DUE,
    ),
    Mutant(
        "what is due within a patience lacks what is far ahead",
        "router/policies/due.py",
        "        if end >= far + _FAR:\n            return self.total\n",
        "",
        _DUE,
    ),
    Mutant(
        "a queue that one batch can mend counts as lost",
        "router/policies/due.py",
        "if until_ns - left * unit_ns < lost_at_ns and intensity * unit_ns > UNIT:",
        "if intensity * unit_ns > UNIT:",
        _DUE,
    ),
    Mutant(
        "of the largest batch alone the worth is asked",
        _PLANFIT,
        "            if row == wished and is_whole:",
        "            if is_whole:",
        _PLANS,
    ),
    Mutant(
        "a smaller batch is never worth more",
        _PLANFIT,
        "is_whole = size <= length and self._grows",
        "is_whole = size <= length",
        _PLANS,
    ),
    Mutant(
        "a decision reckons all GPUs for each client",
        "router/core/fleet.py",
        "if supply.limit_ns > 0.0 and (self._n_gpus > _JUDGED_AT_ONCE or now_ns < self._fit_at_ns):",
        "if False:",
        _FLEET,
    ),
    Mutant(
        "many GPUs keep the first patience",
        "router/core/fleet.py",
        "                self._limit_ns = self._wanted_ns\n",
        "                pass\n",
        _FLEET,
    ),
    Mutant(
        "what is taken stays due",
        "router/core/lanes.py",
        "            self._length -= n\n            self._deduct(taken)",
        "            self._length -= n",
        _LANES,
    ),
    Mutant(
        "what is shed stays due",
        "router/core/lanes.py",
        "        self._deduct(taken)\n        return taken\n\n    def _take",
        "        return taken\n\n    def _take",
        _LANES,
    ),
    Mutant(
        "what is cancelled stays due",
        "router/core/lanes.py",
        "        self.due.remove(cohort, lo, hi)\n        for lane, start, end",
        "        for lane, start, end",
        _LANES,
    ),
    Mutant(
        "a packed batch takes floors above its subnet",
        "router/core/lanes.py",
        "if lane[1] <= subnet]\n        taken, n",
        "]\n        taken, n",
        _LANES,
    ),
    Mutant(
        "a packed batch goes by deadline alone",
        "router/core/lanes.py",
        "[lane for lane in allowed if lane[1] > first_above]",
        "allowed",
        _LANES,
    ),
    Mutant(
        "a spike on the edge of two slots counts half",
        "router/policies/surge.py",
        "sums[i] -= counts[-2 - window]",
        "sums[i] -= counts[-1 - window]",
        _SURGES,
    ),
    Mutant(
        "surges are never forgotten",
        "router/policies/surge.py",
        "keep = max(0.0, 1.0 - n_slots * slot_ns / FORGET_NS)",
        "keep = 1.0",
        _SURGES,
    ),
    Mutant(
        "short queries among patient ones have no reserve of their own",
        "router/policies/planfit.py",
        "if len(demand.classes) > 1:\n            self._spare_for_hasty",
        "if len(demand.classes) > 9:\n            self._spare_for_hasty",
        _HASTY,
    ),
    Mutant(
        "what is due soon does not count against that reserve",
        "router/policies/planfit.py",
        "room_ns = spare_ns - plan.taken_ns - soon / UNIT * unit_ns\n            if",
        "room_ns = spare_ns - plan.taken_ns\n            if",
        _HASTY,
    ),
    Mutant(
        "a message of two classes counts for none",
        "router/policies/demand.py",
        "if len(self.classes) > 1:",
        "if len(self.classes) > 2:",
        _HASTY,
    ),
    Mutant(
        "a window that has had its most expects it again",
        "router/policies/surge.py",
        "least = mosts[3] - sums[3]",
        "least = mosts[3]",
        _SURGES,
    ),
    Mutant(
        "less is expected than nothing",
        "router/policies/surge.py",
        "return (first, second, third) if first >= 0.0 else (0.0, max(0.0, second), max(0.0, third))",
        "return (first, second, third)",
        _SURGES,
    ),
    Mutant(
        "after a gap the windows still hold what came before",
        "router/policies/surge.py",
        "            self._sums = [0] * len(WINDOWS)\n            self._ends_ns",
        "            self._ends_ns",
        _SURGES,
    ),
    Mutant(
        "a GPU that hangs has less and less of what it takes",
        "router/policies/supply.py",
        "while ends and ends[0][0] <= now_ns:",
        "while False:",
        _PACES,
    ),
    Mutant(
        "what a GPU ran before is counted with what it runs",
        "router/policies/supply.py",
        "        self._busy_paces -= per_ns\n        self._busy_until -= until\n        if",
        "        if",
        _PACES,
    ),
    Mutant(
        "a GPU too slow for any batch counts as one query at a time",
        "router/policies/supply.py",
        "            self.per_ns = self.place = 0\n            return\n        self.place = size",
        "            size = 1\n        self.place = size",
        _PACES,
    ),
    Mutant(
        "a slow GPU counts by its profile",
        "router/policies/supply.py",
        "(profile.latency_p99_ns(0, size) * slowdown))",
        "profile.latency_p99_ns(0, size))",
        _PACES,
    ),
    Mutant(
        "entries that no policy reads are kept for ever",
        "router/policies/supply.py",
        "if len(self._ends) > self._ends_at_most:",
        "if False:",
        _PACES,
    ),
    Mutant(
        "a GPU found to be slow waits for the heartbeat",
        "router/core/fleet.py",
        "and worker.pace.is_stale(worker.slowdown)",
        "and False",
        _FLEET,
    ),
    Mutant(
        "a GPU that drains counts again when its batch ends",
        "router/core/fleet.py",
        "and worker.is_counted  # one that drains or is lent counts for nothing",
        "and True",
        _FLEET,
    ),
    Mutant(
        "a GPU that drains keeps its pace",
        "router/core/fleet.py",
        "                worker.pace.stop()",
        "                pass",
        _FLEET,
    ),
    Mutant(
        "a batch leaves nothing to the queue behind it",
        _PLANFIT,
        "                if longest_ns < most_ns:\n                    if longest_ns < occupied_ns:",
        "                if False:\n                    if longest_ns < occupied_ns:",
        _PLANS,
    ),
    Mutant(
        "what a batch serves is not taken off the plan", _PLANFIT, "left = n - served", "left = n", _PLANS
    ),
    Mutant(
        "the other GPUs serve nothing",
        "router/policies/due.py",
        "        room_ns = others * until_ns - lost_ns\n        if",
        "        room_ns = 0.0\n        if",
        _PLANS,
    ),
    Mutant(
        "the other GPUs are never busy",
        _PLANFIT,
        "plan.taken_ns = taken * each_ns if taken > 0.0 else 0.0",
        "plan.taken_ns = 0.0",
        _PLANS,
    ),
    Mutant(
        "no room is kept for a surge",
        _PLANFIT,
        "left_ns = _SHARES[1] * all_ns - _WORST * unit_ns * second",
        "left_ns = spare_ns",
        _PLANS,
    ),
    Mutant(
        "what came at once may grow as what comes in a while",
        _PLANFIT,
        "_SUDDEN * unit_ns * first",
        "_WORST * unit_ns * first",
        _PLANS,
    ),
    Mutant(
        "in overload a plan that just holds is trusted",
        _PLANFIT,
        " - _WARY * plan.others * plan.full",
        "",
        _PLANS,
    ),
    Mutant(
        "a GPU is trusted before it is measured",
        _PLANFIT,
        "# Comparisons instead of min() and max(): a call of those costs as much as a line of this loop.\n"
        "        careful_ns = slack_ns / plan.doubt",
        "careful_ns = slack_ns",
        _PLANS,
    ),
    Mutant(
        "doubt refuses the smallest subnet too",
        _PLANFIT,
        "            if least_ns > slack_ns:",
        "            if least_ns > careful_ns:",
        _PLANS,
    ),
    Mutant(
        "a floored head takes the next queries, floored or not",
        _PLANFIT,
        "above = max(0, row)",
        "above = None",
        _PLANS,
    ),
    Mutant(
        "a few late queries are an overload", _PLANFIT, " or self._saves(queue, slack_ns, plan):", ":", _PLANS
    ),
    Mutant(
        "a spike that is too large is shed as a rate that is",
        _PLANFIT,
        "            if left < waiting * UNIT:",
        "            if left < 0:",
        _PLANS,
    ),
    Mutant(
        "a rate that is too high is shed as a spike is",
        _PLANFIT,
        "            if left < waiting * UNIT:",
        "            if True:",
        _PLANS,
    ),
    Mutant("overload is not seen", _PLANFIT, "if plan.budget_ns < plan.unit_ns:", "if False:", _PLANS),
    Mutant(
        "the queue has no part in the price of a plan", _PLANFIT, "+ intensity / UNIT * n_gpus", "", _PLANS
    ),
    Mutant(
        "a row below the head's floor is served",
        "router/core/dispatch.py",
        "and queue.head_floor <= row < len(profile.subnets)",
        "and 0 <= row < len(profile.subnets)",
        _WRONG,
    ),
    Mutant(
        "a batch larger than the profile knows is sent",
        "router/core/dispatch.py",
        "and 0 < size <= profile.batch_sizes[-1]",
        "and 0 < size",
        _WRONG,
    ),
    Mutant(
        "a wrong answer is logged each time",
        "router/core/dispatch.py",
        "        self._named.add(name)\n",
        "",
        _WRONG,
    ),
    Mutant(
        "wrong answers are not counted", "router/core/dispatch.py", "        self.n_wrong += 1\n", "", _WRONG
    ),
    Mutant(
        "a policy that raises ends the router",
        "router/core/dispatch.py",
        "except Exception as error:  # noqa",
        "except ArithmeticError as error:  # noqa",
        _WRONG,
    ),
    Mutant(
        "a policy that cannot be built ends the router",
        "router/policies/registry.py",
        "except Exception as error:\n        # A worker",
        "except KeyError as error:\n        # A worker",
        ("tests/router/policies/test_registry.py",),
    ),
    Mutant(
        "a policy without demand may shed",
        "router/core/dispatch.py",
        "if is_sound and self._model.demand is not None:",
        "if is_sound:",
        _WRONG,
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
