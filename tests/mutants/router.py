"""Mutants of the router's core."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ROUTER = "router/core"

_ANSWERS = ("tests/router/core/test_answers.py",)
_BOUNDS = ("tests/router/core/test_bounds.py",)
_CLIENTS = ("tests/router/core/test_clients.py",)
_CORE = (
    "tests/router/core/test_core.py",
    "tests/router/core/test_admission.py",
    "tests/router/core/test_dispatch.py",
)
_FAULTS = ("tests/router/core/test_fleet.py",)
_AGAIN = ("tests/router/core/test_sent_again.py",)
_SILENCE = ("tests/router/core/test_silence.py",)
_SLOW = ("tests/router/core/test_corrections.py",)
_WHICH = ("tests/router/core/test_which_worker.py",)
_UNITS = ("tests/router/core/test_workers.py",)
_QUANTILES = ("tests/router/core/test_estimates.py",)
_ESTIMATES = (*_QUANTILES, "tests/router/core/test_slack.py", *_UNITS)
_QUEUES = (
    "tests/router/core/test_holes.py",
    "tests/router/core/test_edf.py",
    "tests/router/core/test_lanes.py",
)

CORE = (
    # --- how queries end ---------------------------------------------------------------------
    Mutant(
        "a late answer is called OK",
        _ROUTER,
        "if statuses is None and cohort.deadlines_ns[lo] >= arrives_ns:",
        "if statuses is None:",
        _ANSWERS,
    ),
    Mutant(
        "an answer at the deadline is late",
        _ROUTER,
        "late = bisect_left(cohort.deadlines_ns, arrives_ns, lo, hi)",
        "late = bisect_left(cohort.deadlines_ns, arrives_ns + 1, lo, hi)",
        _ANSWERS,
    ),
    Mutant(
        "the way back to the client does not count",
        _ROUTER,
        "arrives_ns = now_ns + cohort.client.return_ns",
        "arrives_ns = now_ns",
        _ANSWERS,
    ),
    Mutant(
        "one late query makes its batch late",
        _ROUTER,
        "late = bisect_left(cohort.deadlines_ns, arrives_ns, lo, hi)",
        "late = hi",
        _ANSWERS,
    ),
    Mutant(
        "a late query with its own status is OK",
        _ROUTER,
        "return Status.LATE if late and status is Status.OK else status",
        "return status",
        _ANSWERS,
    ),
    Mutant(
        "a late failure is called LATE",
        _ROUTER,
        "Status.LATE if late and status is Status.OK else",
        "Status.LATE if late else",
        _ANSWERS,
    ),
    Mutant(
        "late queries count as accuracy served",
        _ROUTER,
        "if status is Status.OK:",
        "if status in (Status.OK, Status.LATE):",
        _ANSWERS,
    ),
    Mutant(
        "outputs of a batch are shifted by one",
        _ROUTER,
        "self._end(ran, cohort, late, hi, Status.OK, at + late - lo, queued_ns)",
        "self._end(ran, cohort, late, hi, Status.OK, at, queued_ns)",
        _ANSWERS,
    ),
    Mutant(
        "places count from the message's start",
        _ROUTER,
        "self._end(ran, cohort, i, i + 1, status, at + i - lo, queued_ns)",
        "self._end(ran, cohort, i, i + 1, status, at + i, queued_ns)",
        _ANSWERS,
    ),
    Mutant(
        "the second answer wins as well",
        _ROUTER,
        "            if cohort.states[i] != ANSWERED:\n",
        "            if True:\n",
        _FAULTS,
    ),
    Mutant(
        "bytes of answered queries stay held",
        _ROUTER,
        "self.held_bytes -= cohort.n_bytes",
        "self.held_bytes -= 0",
        _AGAIN,
    ),
    Mutant(
        "a client that left is answered",
        _ROUTER,
        "        if key is None:\n            return\n",
        "        if key is None and lo < 0:\n            return\n",
        _ANSWERS,
    ),
    Mutant(
        "the worker's way is not measured",
        _ROUTER,
        "worker.peer.sample_way(transport_ns, now_ns)",
        "worker.peer.sample_way(0, now_ns)",
        _SLOW,
    ),
    Mutant(
        "a margin knows no least",
        _ROUTER,
        "elif margin_ns < self._least_margin_ns:",
        "elif margin_ns < -self._least_margin_ns:",
        _ESTIMATES,
    ),
    Mutant(
        "a margin knows no most",
        _ROUTER,
        "if margin_ns > self._margin_ns:",
        "if margin_ns > 2 * self._margin_ns:",
        _ESTIMATES,
    ),
    Mutant(
        "the worst way counts from the first measurement",
        _ROUTER,
        "worst_ns if len(self.transport) >= _MANY_WAYS else _UNKNOWN_NS",
        "worst_ns",
        _ESTIMATES,
    ),
    Mutant(
        "the least way counts as the worst",
        _ROUTER,
        "-self._negated_ways.add(-way_ns, now_ns)",
        "self._negated_ways.add(way_ns, now_ns)",
        _ESTIMATES,
    ),
    Mutant(
        "a decision before its time counts as late",
        _ROUTER,
        "if due_ns is not None and now_ns >= due_ns:",
        "if due_ns is not None:",
        _ESTIMATES,
    ),
    Mutant(
        "a decision counts as late twice",
        _ROUTER,
        "            self._due_ns = None\n            self._late.add",
        "            self._late.add",
        _ESTIMATES,
    ),
    Mutant(
        "the router decides as far ahead as ever",
        _ROUTER,
        "max(self._least_ns, min(self._most_ns, ahead_ns))",
        "self._most_ns",
        _ESTIMATES,
    ),
    # --- what is taken in --------------------------------------------------------------------
    Mutant(
        "what was answered is not taken again",
        _ROUTER,
        "np.frombuffer(other.states, np.uint8) != ANSWERED",
        "np.frombuffer(other.states, np.uint8) < 99",
        _AGAIN,
    ),
    Mutant(
        "what is in flight is taken again",
        _ROUTER,
        "np.frombuffer(other.states, np.uint8) != ANSWERED",
        "np.frombuffer(other.states, np.uint8) == QUEUED",
        _AGAIN,
    ),
    Mutant(
        "only the last message's queries are known", _ROUTER, "known |= np.isin", "known = np.isin", _AGAIN
    ),
    Mutant(
        "known queries are taken again",
        _ROUTER,
        "for i in np.flatnonzero(known).tolist():",
        "for i in []:",
        _AGAIN,
    ),
    Mutant(
        "an old connection still stands for its session",
        _ROUTER,
        "self.clients.pop(client.key, None)\n",
        "pass\n",
        _AGAIN,
    ),
    Mutant(
        "in flight does not count against the bound", _ROUTER, ".in_flight))", ".in_flight * 0))", _BOUNDS
    ),
    Mutant(
        "the byte bound is looked at too late",
        _ROUTER,
        "held_bytes + n_bytes > settings.max_bytes:",
        "held_bytes > settings.max_bytes:",
        _CORE,
    ),
    Mutant("a floor is rounded above what was asked", _ROUTER, " - _F32_ERROR)", ")", _CORE),
    Mutant(
        "payloads of any size are taken",
        _ROUTER,
        "if expected is not None and expected != got:",
        "if expected is not None and expected < 0:",
        _CORE,
    ),
    Mutant(
        "a draining router takes queries", _ROUTER, "self.draining = True", "self.draining = False", _CORE
    ),
    Mutant(
        "a client's way is sampled with every message",
        _ROUTER,
        "if now_ns - self.sampled_ns < _SAMPLE_EVERY_NS:",
        "if now_ns < self.sampled_ns:",
        _CLIENTS,
    ),
    Mutant(
        "a thousand small clients are given the worst of few samples",
        _ROUTER,
        "if len(transits) >= _ENOUGH_SAMPLES:",
        "if len(transits) >= 0:",
        _CLIENTS,
    ),
    # --- which worker, what batch, when ------------------------------------------------------
    Mutant(
        "no second try with the usual way",
        _ROUTER,
        "if choice is None:\n            # Nothing leaves room",
        ("if choice is None and now_ns < 0:\n            # Nothing leaves room"),
        _SLOW,
    ),
    Mutant(
        "the expected end is not corrected",
        _ROUTER,
        "return int(batch.profiled_ns * self.correction.of_subnet(batch.subnet))",
        "return batch.profiled_ns",
        _SLOW,
    ),
    Mutant(
        "a choice that a slow subnet cannot keep is kept",
        _ROUTER,
        "for _ in range(3):",
        "for _ in range(1):",
        _SLOW,
    ),
    Mutant("a slow GPU overruns as soon as a sound one", _ROUTER, "* max(1.0, ", "* min(1.0, ", _SLOW),
    Mutant(
        "decisions are taken ten times as early",
        _ROUTER,
        ".ahead_ns + worker.transport.median_ns",
        ".ahead_ns * 10 + worker.transport.median_ns",
        _CORE,
    ),
    Mutant("credit is not deducted", _ROUTER, "worker.credit -= 1", "worker.credit -= 0", _BOUNDS),
    Mutant(
        "no head is given to another worker",
        _ROUTER,
        "or len(passed) > _MAX_RIVALS:",
        "or len(passed) > 0:",
        _CORE,
    ),
    Mutant(
        "a head does not wait for the worker that can serve it",
        _ROUTER,
        "if not rival.may_take or slack.decide_ns(rival) > now_ns:",
        "if not rival.may_take:",
        _WHICH,
    ),
    Mutant(
        "what is doomed is refused one by one",
        _ROUTER,
        "if head[0] >= limit_ns + client_ns:",
        "if True:",
        _CORE,
    ),
    Mutant(
        "a deadline that passed in the queue is infeasible",
        _ROUTER,
        "expired = bisect_left(cohort.deadlines_ns, now_ns, lo, hi)",
        "expired = lo",
        _CORE,
    ),
    Mutant(
        "the router does not wake for a deadline",
        _ROUTER,
        "wake_ns = head[0] - self._fleet.quickest_ns + 1",
        "wake_ns = head[0] + 50 * MS",
        _CORE,
    ),
    Mutant(
        "work goes to the worker that is free last",
        _ROUTER,
        "_, _, version, worker = free[0]",
        "_, _, version, worker = free[-1]",
        _WHICH,
    ),
    Mutant(
        "a refusal blames the wrong subnet",
        _ROUTER,
        "floor = 0 if cohort.floors is None else cohort.floors[lo]",
        "floor = 0",
        _SLOW,
    ),
    Mutant(
        "the batch is larger than what was chosen",
        _ROUTER,
        "queue.take(choice.batch_size, ",
        "queue.take(choice.batch_size + 1, ",
        _CORE,
    ),
    # --- workers that fall silent, overrun or die --------------------------------------------
    Mutant(
        "a stall of the router is not forgiven",
        _ROUTER,
        "min(now_ns, peer.heard_ns + self._stall_ns)",
        "min(now_ns, peer.heard_ns)",
        _SILENCE,
    ),
    Mutant(
        "a stall excuses silence for ever",
        _ROUTER,
        "self._stall_ns = max(0, since_ns - 2 * settings.heartbeat_ns)",
        "self._stall_ns = since_ns",
        _SILENCE,
    ),
    Mutant(
        "a suspect is never dead",
        _ROUTER,
        "if quiet_ns >= settings.dead_after * settings.heartbeat_ns:",
        "if quiet_ns >= 99 * settings.dead_after * settings.heartbeat_ns:",
        _SILENCE,
    ),
    Mutant(
        "only one pass of peers is judged",
        _ROUTER,
        "self._to_judge = list(reversed(self.peers.values()))",
        "self._to_judge = list(reversed(self.peers.values()))[:_JUDGED_AT_ONCE]",
        _SILENCE,
    ),
    Mutant(
        "a suspect is given work",
        _ROUTER,
        "and self.peer.machine.state is _LIVE",
        "and self.peer.machine.state is not PeerState.DEAD",
        _FAULTS,
    ),
    Mutant(
        "an epoch that is over is listened to",
        _ROUTER,
        "if peer is None or peer.epoch != epoch:",
        "if peer is None:",
        _FAULTS,
    ),
    Mutant(
        "a lost batch is queued again for ever",
        _ROUTER,
        "if losses[i] == 1 and has_slack",
        "if has_slack",
        _FAULTS,
    ),
    Mutant(
        "a lost batch without slack is queued again",
        _ROUTER,
        "if losses[i] == 1 and has_slack and",
        "if losses[i] == 1 and",
        _FAULTS,
    ),
    Mutant(
        "queries of a client that left run again",
        _ROUTER,
        "has_slack and cohort.client.key is not None:",
        "has_slack:",
        _FAULTS,
    ),
    Mutant(
        "an overrun batch is not rescued",
        _ROUTER,
        "for held in worker.outstanding.values():",
        "for held in ():",
        _FAULTS,
    ),
    Mutant("a batch that waits behind another overruns", _ROUTER, "or first != batch", "or 0 > batch", _SLOW),
    Mutant(
        "a GPU that hangs is never given up",
        _ROUTER,
        "if batch.overran:\n",
        "if batch.overran and now_ns < 0:\n",
        _FAULTS,
    ),
    Mutant(
        "a draining worker is never released",
        _ROUTER,
        "WorkerState.DRAINING and not w.outstanding for w",
        "WorkerState.DRAINING and w.outstanding for w",
        _FAULTS,
    ),
    Mutant(
        "every report is a measurement of a sound batch",
        _ROUTER,
        "if row.statuses is None:",
        "if True:",
        _SLOW,
    ),
    # --- what is learnt ----------------------------------------------------------------------
    Mutant(
        "batches under way do not count against the credit",
        _ROUTER,
        "self.credit = max(0, credit - unseen)",
        "self.credit = max(0, credit)",
        _UNITS,
    ),
    Mutant(
        "one measurement is believed at once", _ROUTER, "step ** max(_GAIN, _FIRST_GAIN / n)", "step", _UNITS
    ),
    Mutant(
        "a stall of the first batch is kept as long as a slow GPU",
        _ROUTER,
        "_EASE if self._is_known else _FIRST_EASE",
        "_EASE",
        _SLOW,
    ),
    Mutant(
        "every batch counts like the first two",
        _ROUTER,
        "step = min(step, _FAR)",
        "step = min(step, _FIRST_FAR)",
        _UNITS,
    ),
    Mutant(
        "noise is a slowdown",
        _ROUTER,
        "return ratio if abs(ratio - 1.0) > ",
        "return ratio if abs(ratio + 1.0) > ",
        _UNITS,
    ),
    Mutant(
        "an idle worker keeps its bad name",
        _ROUTER,
        "                worker.ease()\n",
        "                pass\n",
        _UNITS,
    ),
    Mutant(
        "a busy worker forgets what it learnt",
        _ROUTER,
        "if not worker.outstanding and now_ns - worker.answered_ns >= idle_ns:",
        "if now_ns - worker.answered_ns >= 0:",
        _SLOW,
    ),
    Mutant(
        "one stall fills the window",
        _ROUTER,
        "if now_ns - self.sampled_ns >= _SAMPLE_EVERY_NS:",
        "if now_ns >= self.sampled_ns:",
        _UNITS,
    ),
    Mutant(
        "a far value counts in full",
        _ROUTER,
        "recent.append(most_ns if is_far else value_ns)",
        "recent.append(value_ns)",
        _QUANTILES,
    ),
    Mutant(
        "the worst that was seen is the median",
        _ROUTER,
        "self._bound_ns = self._sorted[n * 99 // 100]",
        "self._bound_ns = self._sorted[n >> 1]",
        _QUANTILES,
    ),
    Mutant(
        "an old base is kept for ever",
        _ROUTER,
        "while minima[0][0] < now_ns - self._window_ns:",
        "while minima[0][0] < now_ns - 99 * self._window_ns:",
        _QUANTILES,
    ),
    # --- the queue ---------------------------------------------------------------------------
    Mutant(
        "of equal deadlines the later comes first",
        _ROUTER,
        "cut = bisect_right if seq < rival_seq else bisect_left",
        "cut = bisect_left if seq < rival_seq else bisect_right",
        _QUEUES,
    ),
    Mutant(
        "a batch passes over a floor",
        _ROUTER,
        "if floors[i] > subnet:",
        "if floors[i] > subnet + 1:",
        _QUEUES,
    ),
    Mutant(
        "answered queries are taken",
        _ROUTER,
        "end = cohort.states.find(ANSWERED, lo, end) if ANSWERED in cohort.states[lo:end] else end",
        "pass",
        _QUEUES,
    ),
    Mutant(
        "what is due at the limit is taken before it",
        _ROUTER,
        "end = bisect_left(cohort.deadlines_ns, limit_ns, lo, hi)",
        "end = bisect_right(cohort.deadlines_ns, limit_ns, lo, hi)",
        _QUEUES,
    ),
    Mutant(
        "the highest class gives way",
        _ROUTER,
        "return lane[0], min(one[0] for _, one in heads)",
        "return lane[0], max(one[0] for _, one in heads)",
        _QUEUES,
    ),
    Mutant(
        "a lane is served on a subnet below its floor",
        _ROUTER,
        "if lane[1] <= subnet]\n        return",
        "if lane[1] <= subnet + 1]\n        return",
        _QUEUES,
    ),
)
