"""PlanFit: spend GPU time where it buys most accuracy, while the smallest subnet can still save the rest.

Like DemandFit it prices GPU time by demand, and runs the batch whose queries are worth most after paying.
Unlike it, it looks at what that batch leaves to the others. A plan on the smallest subnet stands behind each
choice: what is queued, by when it is due, against what the GPUs can serve by then. A batch may last as long
as that plan still holds, and as long as a surge like those seen before would still be served.

    need    = (1 - wait) * rate + GPUs * greatest over t of due(t) / GPU time until t    queries a nanosecond
    budget  = GPUs / need                                                          nanoseconds a query
    price   = slope of accuracy over cost at budget                                percent a nanosecond
    longest = what the plan for the queue and the reserve for a surge leave to this batch
    batch   = argmax over (subnet, size) that end by the head's deadline and within `longest`
              of accuracy - price * latency / min(size, length)

Four rules follow from the plan:

- *The queue keeps its future.* After a batch of k the others must be able to serve the rest on the smallest
  subnet: for each deadline t, due(t) - k <= what the other GPUs serve by t + what this one serves after it.
- *A surge finds room.* GPU time that is taken, by batches that run and by the queue, leaves room for what
  came at worst within any short window of the last seconds (`router.policies.surge`); and for those who can
  wait less than others.
- *A GPU is trusted once it is measured.* Until then batches end well before the deadline
  (`WorkerView.doubt`).
- *Floors are packed.* A head whose floor lies above what the price would buy takes queries of such floors
  into its batch, and others only into places that would stay empty.

If the plan fails already, the batch is the largest of the smallest subnet that the head's slack allows; and
if even those cannot keep up, heads too late for a full batch are shed, the lowest priority class first.
docs/policies.md derives each rule and shows how much each constant matters.

Source: ours. Demand within a deadline over the time until it is the intensity of Yao, Demers and Shenker's
optimal speed scaling (FOCS '95); reserving for the worst seen is an arrival curve of network calculus.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from math import ceil, inf
from typing import TYPE_CHECKING

from router.policies import Choice, Shed, usable_slack_ns
from router.policies.due import UNIT
from router.policies.outlook import Outlook
from router.policies.pricing import limits_of, make_prices, sizes_of
from router.policies.supply import FULL
from router.policies.surge import SLOTS, WINDOWS
from superserve.build import mypyc_attr
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import QueueView, WorkerView
    from router.policies.demand import Demand
    from router.policies.due import Due

_SET_POINT = 0.36
"""Share of a patience that the queue is let grow to, at most, for the need to equal the rate. At 0.25 one GPU
loses 0.15 points to half-empty batches, at 0.42 MAF loses 0.02 and recorded traces at 95 % 0.1 to 0.2."""

_PATIENT, _PATIENT_CYCLE = 0.6, 1.5
"""Where no overload is near it may grow to that share of the patience that no surge asks for, and leaves its
head that many times a full batch. Without them rates of 90 % that jump or ramp lose 0.15 points: what
waits after a jump is drained at the highest price."""

_NEAR, _OVER = 0.7, 0.9
"""That further growth fades between these shares of what the GPUs serve at best: what waits when an overload
begins is lost. From 0.9 to 1.0 LLM conversations at 95 % load lose 0.2 to 0.4 points."""

_QUEUE = 110.0
"""Queries that it may hold in any case: enough for the next batches to be full. At 50 MAF loses 0.13
points."""

_CYCLE = 1.1
"""Beyond that it leaves its head this many times the time of the full batch that the rate allows. Without it
64 GPUs at 30 % load serve batches of 8, since none of 16 fits a head that has waited: 0.15 points less."""

_MARGIN, _MOST_SET = 1.7, 0.8
"""The queue of a patient class grows until this many times the longest batch is left, and at most to that
share: what can wait half a second need not be served at today's price. Without it an SLO of 500 ms loses 0.2
points."""

_LONGEST = 0.75
"""Prices count batches up to this share of a patience: longer ones fit only a head that has not waited. The
less is still to come, the fewer will have."""

_GRACE = 1.25
"""Prices count batches up to this many times the head's slack, so that ordinary fluctuations do not move
them."""

_LATE = 0.5
"""In overload a head with less than this share of the patience gives way while a lower class is queued."""

_OWN = 0.3
"""Of several patiences the shortest counts: a head is late below this share of it. Without it 1 query in 25
is lost where a third has 12 ms and the others 440: a full batch fits no short one, even as it comes."""

_REGRET = 1.0
"""For so many patiences after queries were let go no time is spent on accuracy: it would save others. Without
it patient queries are served on better subnets while short ones are lost, up to 10 in 100; and the LLM code
trace at 75 % load loses 27 queries in 1,000 more. At 0.5 it loses 33."""

_FEW = 0.5
"""A class of which fewer come within its patience is none of these, and asks for no reserve of its own."""

_LEAN = 0.65
"""Where few would be left to serve, a head is not shed that a batch holds at this share of a full one's pace.
With full ones only, spikes that are too large lose 4 queries in 1,000 more; at 0.5 GPUs that turn slow lose 2
in 100 more, with batches of one or two."""

_WARNED = 3.5
"""From this doubt on heads that are too late for a useful batch are let go. No GPU alone is doubted so much,
so queries are being lost (`router.policies.caution`). Without it messages that jitter by 7 of 36 ms cost 42
queries in 100 instead of 2; at 7 they cost 4."""

_FRESH = 0.33
"""Only if such a batch takes at most this share of a patience: else those that follow fare no better."""

_EMPTY = 0.3
"""Share of a full batch that each other GPU wastes before a deadline, since batches do not end with it. At
0.45 spikes lose 0.2 points and the LLM code trace 1 query in 200, at 0.15 spikes lose 4 in 1,000."""

_TURN = 0.4
"""And this share of a turnaround, since another batch behind its last would come too late. At 0 spikes of 150
whose messages jitter by 4 ms lose 1 query in 1,000, at 1 they get 0.7 points less."""

_SLOP = 0.15
"""And this share of one, with an idle gap, for what begins late behind the batch. Without it spikes of 22 and
30 on two and three GPUs lose 3 to 11 queries in 10,000; at 0.2 nothing changes."""

_WARY = 0.25
"""And this much more before a head is kept in overload because the plan would still serve all. Without it 5 %
too much load loses 1 query in 100 more, served in batches that are not full."""

_WORST = 1.6
"""A surge may be this many times the worst seen: at 1.0 spikes that grow cost 1 query in 1,000."""

_SUDDEN = 1.2
"""And this many times within a 32nd of a patience: at 1.6 Pareto batches lose 0.1 points, spikes of 300 on a
base 0.15, and no cell attains more."""

_SHARES = tuple(1.0 + window / SLOTS for window in WINDOWS[:-1])
"""Patiences from the start of each window until what comes at its end is due."""

_CUT = 0.33
"""Share of a full batch that a GPU wastes when a surge comes, in the same way."""

_LEAST = 0.1
"""Share of a patience that is never reserved: smaller values give up accuracy between spikes for nothing."""

_LONE = 1.5
"""Where fewer than a full batch a GPU comes within this many patiences, and nothing more is expected by what
has been, time is worth nothing to others. Without it 16 queries each 40 ms on one GPU lose 0.6 points."""

_FAIR = 1.5
"""One GPU takes at most this many times its share of what is not reserved, so that the next finds some."""

_FOR_EVER = 1e18
"""Nanoseconds: no limit."""

_CAUTION = 0.5
"""Share of a doubt about a GPU that also raises the price."""


@mypyc_attr(allow_interpreted_subclasses=True)
class PlanFit:
    """The batch worth most at demand's price, of those after which the smallest subnet can save the rest.

    Args:
        profile: Latencies by row and batch size.
        argument: None; it takes no argument.

    Raises:
        ConfigError: There is an argument.
    """

    name = "planfit"
    sees_demand = True

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        if argument is not None:
            raise ConfigError(f"planfit: expected no argument, got {argument!r}")
        self.sizes = sizes_of(profile)
        self.limits_ns = limits_of(profile)
        self.prices = tuple(make_prices(profile, limit_ns) for limit_ns in self.limits_ns)
        self._profile = profile
        columns = [(one.size, one.p99_ns, one.latency_ns, one.hull, one.slopes, one) for one in self.sizes]
        self._columns = tuple(
            tuple(reversed(columns[: 1 + bisect_left([one.size for one in self.sizes[:-1]], length)]))
            for length in range(profile.max_batch_size + 1)
        )
        self._grows = all(
            a_ns * other.size >= b_ns * one.size
            for one, other in pairwise(self.sizes)
            for a_ns, b_ns in zip(one.latency_ns + one.p99_ns, other.latency_ns + other.p99_ns, strict=True)
        )
        # One object for all decisions: to make another takes half a microsecond.
        self._outlook = Outlook()
        self._accuracies = tuple(subnet.accuracy for subnet in profile.subnets)
        n_sizes = profile.max_batch_size + 1
        self._most = profile.max_batch_size
        self._smallest_ns = (0, *(profile.latency_p99_ns(0, size) for size in range(1, n_sizes)))
        longest_ns = profile.latency_p99_ns(profile.n_subnets - 1, profile.max_batch_size)
        self._waits = tuple(
            min(_MOST_SET, max(_SET_POINT, 1.0 - _MARGIN * longest_ns / (0.75 * (1 << bits))))
            for bits in range(64)
        )
        costs_ns = profile.least_costs_ns()
        self._weights = tuple(cost_ns / costs_ns[0] for cost_ns in costs_ns)
        self._quickest_ns = self.sizes[0].p99_ns[0]
        self._lost_ns = -int(_FOR_EVER)
        # What the batch itself can take off the queue at most, in queries of the smallest subnet.
        self._heaviest = profile.max_batch_size * self._weights[-1] if self._grows else inf

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | Shed | None:
        """Return the batch worth most that the plan allows; None if no batch fits the head's slack."""
        slack_ns = usable_slack_ns(queue, worker, now_ns)
        plan = self._plan(queue, worker, now_ns, slack_ns)
        if plan.doubt > _WARNED:
            escape = self._escape(queue, worker, now_ns, slack_ns, plan)
            if escape is not None:
                self._lost_ns = now_ns
                return escape
        if plan.budget_ns < plan.unit_ns:
            shed = self._shed(queue, worker, now_ns, slack_ns, plan)
            if shed is not None:
                self._lost_ns = now_ns
                return shed
        floor, above = queue.head_floor, None
        if plan.tight is not None:
            limit_ns = min(plan.longest_ns, _GRACE * slack_ns)
            limit = bisect_right(self.limits_ns, limit_ns) - 1
            # A pressed batch had better be short, and after losses time saves others.
            is_dear = worker.is_pressed or now_ns - self._lost_ns < _REGRET * plan.patience_ns
            budget_ns = 0.0 if is_dear else plan.budget_ns - plan.gap_ns / plan.full
            price = self.prices[max(0, limit)].at(budget_ns)
            row, size = self._best(plan, price, slack_ns, 0, queue.length)
            if row < floor and floor:
                # The head asks for more than the price would buy: those that also do are served with it.
                above = max(0, row)
                floored = 1 if queue.due is None else max(1, queue.due.floored(above, floor))
                row, size = self._best(plan, price, slack_ns, floor, floored)
            if row >= 0:
                return Choice(row, size, above)
        # The plan fails whatever is run: as many as the head's slack allows, as quickly as possible.
        largest = self._profile.largest_batch(floor, slack_ns)
        if above is None and floor:
            above = 0
        return None if largest is None else Choice(floor, largest, above)

    def _best(self, plan: Outlook, price: float, slack_ns: int, floor: int, length: int) -> tuple[int, int]:
        """Return row and size of the batch worth most; (-1, 0) if the plan allows none.

        Args:
            plan: What the batch must leave.
            price: What a nanosecond costs, percent.
            slack_ns: Time until the head's deadline.
            floor: The smallest row allowed.
            length: How many queries there are for the batch.
        """
        accuracies, tight = self._accuracies, plan.tight
        best_row, best_size, best_worth = -1, 0, float("-inf")
        # Comparisons instead of min() and max(): a call of those costs as much as a line of this loop.
        careful_ns = slack_ns / plan.doubt
        if plan.share_ns < careful_ns:
            careful_ns = plan.share_ns
        weight = self._weights[floor]
        room_ns, unit_ns, gap_ns = plan.room_ns, plan.unit_ns * weight, plan.gap_ns
        turn_ns = plan.turn_ns
        columns = self._columns[min(length, self._most)]
        for size, p99_ns, latency_ns, hull, slopes, lookup in columns:
            least_ns = p99_ns[floor]
            if least_ns > slack_ns:
                continue
            n = size
            if length < n:
                n = length
            each = price / n
            wished = hull[bisect_right(slopes, -each)]
            if wished < floor:
                wished = floor
            is_whole = size <= length and self._grows
            takes_ns = latency_ns[wished] + gap_ns
            if takes_ns < turn_ns:
                takes_ns = turn_ns
            if is_whole and accuracies[wished] - each * takes_ns <= best_worth:
                break  # each row costs a query more in a smaller batch, so that none is worth more
            # Neither doubt nor reserve forbids the smallest row: nothing is safer.
            freed_ns = room_ns + n * unit_ns
            if freed_ns > careful_ns:
                freed_ns = careful_ns
            most_ns = int(freed_ns) if freed_ns > least_ns else least_ns
            if tight:
                # Behind a shorter batch the GPU idles for the rest of a turnaround.
                occupied_ns = max(least_ns, turn_ns)
                longest_ns = self._longest_ns(plan, tight, n * weight, occupied_ns)
                if longest_ns < most_ns:
                    if longest_ns < occupied_ns:
                        continue
                    most_ns = int(longest_ns)
            row = wished
            if p99_ns[row] > most_ns:
                row = lookup.best(each, floor, most_ns, accuracies) or floor
            takes_ns = latency_ns[row] + gap_ns
            if takes_ns < turn_ns:
                takes_ns = turn_ns
            worth = accuracies[row] - each * takes_ns
            if worth > best_worth:  # of equals the larger: it leaves fewer queries waiting
                best_row, best_size, best_worth = row, size, worth
            if row == wished and is_whole:
                break
        return best_row, best_size

    def _longest_ns(
        self, plan: Outlook, tight: list[tuple[float, float]], served: float, least_ns: float
    ) -> float:
        """Return how long a batch may take after which the smallest subnet still serves what is left in time.

        Args:
            plan: The queue and the GPUs.
            tight: Its deadlines.
            served: How many queries the batch takes off the queue, the earliest, by their weight.
            least_ns: Below this any answer means the same.
        """
        longest_ns = _FOR_EVER
        full, cycle_ns, smallest_ns = plan.full, plan.cycle_ns, self._smallest_ns
        slop_ns = plan.gap_ns + _SLOP * plan.full_ns
        # First the deadline that was the tightest for the batch before: in a jam it says all.
        i, n_tight = plan.tightest, len(tight)
        for _ in range(n_tight):
            until_ns, n = tight[i]
            left = n - served
            if left > 0.0:
                # This GPU serves them after the batch.
                batches, rest = divmod(ceil(left), full)
                most_ns = until_ns - batches * cycle_ns - smallest_ns[rest] - slop_ns
                if most_ns < longest_ns:
                    longest_ns = most_ns
                    plan.tightest = i
                    if most_ns < least_ns:
                        break
            i += 1
            if i == n_tight:
                i = 0
        return longest_ns

    def _plan(self, queue: QueueView, worker: WorkerView, now_ns: int, slack_ns: int) -> Outlook:
        plan, slowdown, demand, supply, due = (
            self._outlook, worker.slowdown, queue.demand, queue.supply, queue.due,
        )  # fmt: skip
        plan.doubt = worker.doubt
        plan.turn_ns = worker.turnaround_ns / slowdown
        plan.tightest = 0
        if demand is None or supply is None or due is None or supply.rate <= 0.0:
            self._plan_alone(plan, slack_ns, queue.length)
            return plan
        allowance_ns, free_at_ns = worker.allowance_ns, worker.free_at_ns
        patience_ns = demand.slack_ns - allowance_ns
        if patience_ns < 1.0:
            patience_ns = 1.0
        plan.patience_ns = patience_ns = patience_ns / slowdown
        limit_ns = supply.limit_ns / slowdown
        self._set_full(plan, limit_ns, supply.gap_ns / slowdown)
        unit_ns, each_ns = plan.unit_ns, plan.full_ns / plan.full
        # The supply counts this GPU too, at the pace that it has here.
        others = supply.rate * (each_ns * slowdown) - 1.0
        if others < 0.0:
            others = 0.0
        plan.others = others
        taken = supply.busy(now_ns)
        begin_ns = now_ns
        if free_at_ns > now_ns:
            taken -= (free_at_ns - now_ns) * supply.rate
            begin_ns = free_at_ns
        taken_ns = plan.taken_ns = taken * each_ns if taken > 0.0 else 0.0
        plan.begin_ns = begin_ns + allowance_ns
        n_gpus = others + 1.0
        plan.slowdown = slowdown
        # No batch takes longer than the slack; what is left takes a query and a batch more than its share.
        plan.enough_ns = slack_ns + unit_ns + plan.cycle_ns
        plan.lost_at_ns = self._quickest_ns - self._heaviest * unit_ns
        plan.lost_ns = taken_ns + others * (_EMPTY * plan.cycle_ns + _TURN * plan.turn_ns)
        spare_ns = self._spare_ns(demand, plan, now_ns)
        share_ns = plan.share_ns = _FAIR * spare_ns / n_gpus
        room_ns = spare_ns - taken_ns
        # What is due within a patience matters only where less may be left than a batch would take.
        careful_ns = slack_ns / plan.doubt
        if share_ns < careful_ns:
            careful_ns = share_ns
        harmless = (room_ns - careful_ns) / unit_ns * UNIT
        intensity, plan.tight, soon = due.ask(queue.head_deadline_ns, plan, harmless)
        plan.room_ns = room_ns - soon / UNIT * unit_ns
        if len(demand.classes) > 1:
            self._spare_for_hasty(plan, demand, due, queue.head_deadline_ns, allowance_ns, now_ns)
        need = (
            self._asked(demand, supply.rate * each_ns / unit_ns, plan, spare_ns) * slowdown
            + intensity / UNIT * n_gpus
        )
        plan.budget_ns = n_gpus / need / (1.0 + _CAUTION * (worker.doubt - 1.0)) if need > 0.0 else _FOR_EVER
        return plan

    def _plan_alone(self, plan: Outlook, slack_ns: int, length: int) -> None:
        """Plan as if this worker were alone, and nothing arrived."""
        plan.patience_ns = max(1.0, slack_ns)
        plan.longest_ns = _LONGEST * plan.patience_ns
        self._set_full(plan, FULL * plan.patience_ns, 0.0)
        plan.others = plan.taken_ns = 0.0
        is_lost = slack_ns - length * plan.unit_ns < self._quickest_ns - self._heaviest * plan.unit_ns
        plan.tight = None if is_lost else [(float(slack_ns), float(length))]
        plan.budget_ns = plan.patience_ns / length
        plan.room_ns = plan.share_ns = _FOR_EVER

    def _asked(self, demand: Demand, most_rate: float, plan: Outlook, spare_ns: float) -> float:
        """Return how many queries a nanosecond the price expects, and set what batches it counts.

        It is what comes, less the part for which the queue's own length is to ask.

        Args:
            demand: What arrives.
            most_rate: What the GPUs serve at best, queries a nanosecond.
            plan: What is known so far.
            spare_ns: GPU time that no surge asks for.
        """
        patience_ns, n_gpus = plan.patience_ns, plan.others + 1.0
        if plan.is_lone:
            plan.longest_ns = _LONGEST * patience_ns
            return 0.0
        queued, load = demand.calm_rate * plan.slowdown * patience_ns, demand.calm_rate / most_rate
        wait, ahead = _SET_POINT, demand.surge.by_pause
        if queued > 0.0:
            cycle = self._most * n_gpus / queued
            wait, fills = 1.0 - _CYCLE * cycle, _QUEUE / queued
            if fills > wait:
                wait = fills
            if wait > _SET_POINT:
                most, held = 1.0 - _PATIENT_CYCLE * cycle, _PATIENT * spare_ns / (n_gpus * patience_ns)
                if held < most:
                    most = held
                if load > _NEAR:
                    most = _SET_POINT + (most - _SET_POINT) * (_OVER - load) / (_OVER - _NEAR)
                if most < _SET_POINT or load >= _OVER:
                    most = _SET_POINT
                if wait > most:
                    wait = most
        asked, rate = 0.0, demand.rate
        for bits, one in demand.classes.items():
            share = self._waits[bits]
            asked += one.rate * (1.0 - (share if share > _SET_POINT else wait))
        if ahead >= rate:
            plan.longest_ns = _LONGEST * patience_ns
            return asked
        plan.longest_ns = (1.0 - (1.0 - _LONGEST) * ahead / rate) * patience_ns
        return asked * ahead / rate

    def _spare_ns(self, demand: Demand, plan: Outlook, now_ns: int) -> float:
        """Return the GPU time that may be taken while a surge like the worst seen can still be served."""
        surge = demand.surge
        surge.advance(now_ns)
        all_ns = (plan.others + 1.0) * plan.patience_ns
        expected = surge.expected()
        coming = _LONE * max(demand.rate, demand.calm_rate) * plan.slowdown * plan.patience_ns
        plan.is_lone = expected[2] <= 0.0 and coming < self._most * (plan.others + 1.0)
        spare_ns = _left_ns(all_ns, plan.unit_ns, expected)
        if not plan.is_lone:
            spare_ns -= (plan.others + 1.0) * _CUT * plan.cycle_ns
        least_ns = _LEAST * all_ns
        if spare_ns < least_ns:
            spare_ns = least_ns
        return spare_ns

    def _spare_for_hasty(
        self, plan: Outlook, demand: Demand, due: Due, head_deadline_ns: int, allowance_ns: float, now_ns: int
    ) -> None:
        """Lessen what may be taken by what queries need that may come now and can wait less than others."""
        n_gpus, unit_ns = plan.others + 1.0, plan.unit_ns
        for one in demand.classes.values():
            own_ns = max(1.0, (one.own_ns - allowance_ns) / plan.slowdown)
            if one.surge.most < _FEW or own_ns >= plan.patience_ns:
                continue
            one.surge.advance(now_ns)
            all_ns = n_gpus * own_ns
            spare_ns = _left_ns(all_ns, unit_ns, one.surge.expected()) - n_gpus * _CUT * plan.cycle_ns
            if spare_ns < _LEAST * all_ns:
                spare_ns = _LEAST * all_ns
            share_ns = spare_ns * (_FAIR / n_gpus if n_gpus > _FAIR else 1.0)
            if share_ns < plan.share_ns:
                plan.share_ns = share_ns
            soon = due.until(head_deadline_ns, int(plan.begin_ns + own_ns * plan.slowdown))
            room_ns = spare_ns - plan.taken_ns - soon / UNIT * unit_ns
            if room_ns < plan.room_ns:
                plan.room_ns = room_ns

    def _set_full(self, plan: Outlook, limit_ns: float, gap_ns: float) -> None:
        """Set what a full batch is: the smallest subnet's largest within a limit, or one query."""
        if limit_ns != plan.limit_ns:
            plan.limit_ns = limit_ns
            plan.full = self._profile.largest_batch(0, int(limit_ns)) or self.sizes[0].size
            plan.full_ns = self._smallest_ns[plan.full]
        plan.gap_ns = gap_ns
        plan.cycle_ns = plan.full_ns + gap_ns
        plan.unit_ns = plan.cycle_ns / plan.full

    def _shed(
        self, queue: QueueView, worker: WorkerView, now_ns: int, slack_ns: int, plan: Outlook
    ) -> Shed | None:
        """Return what to refuse, if the head is too late for a full batch, and even those do not keep up."""
        demand = queue.demand
        if demand is None or slack_ns >= max(plan.full_ns, _LATE * plan.patience_ns):
            return None
        if len(demand.classes) > 1 and not self._has_waited(demand, worker, slack_ns):
            return None
        # Lower classes give way while the head still has time; once it is late, that no longer helps it.
        is_late = slack_ns < (_LATE * plan.patience_ns if queue.outranks else plan.full_ns)
        waiting = plan.full * (plan.others + 1.0)
        if not is_late or queue.length <= waiting or self._saves(queue, slack_ns, plan):
            return None
        end_ns = max(now_ns, worker.free_at_ns) + worker.allowance_ns
        before_ns = end_ns + int(plan.full_ns * worker.slowdown)
        if queue.due is not None and not queue.outranks:
            left = queue.due.total - queue.due.until(queue.head_deadline_ns, before_ns)
            if left < waiting * UNIT:
                # The GPUs would soon have nothing to do: what a smaller batch can still hold is not refused.
                lean_ns = self._lean_ns(plan)
                if slack_ns >= lean_ns or left < plan.full * UNIT:
                    return None  # or nothing is behind it that its time would serve
                before_ns = end_ns + int(lean_ns * worker.slowdown)
        # A quarter of the excess at a time, then the core asks again: few steps, however long the queue.
        n = max(plan.full, int(queue.length - waiting) // 4)
        return Shed(max(before_ns, queue.head_deadline_ns + 1), n)

    def _has_waited(self, demand: Demand, worker: WorkerView, slack_ns: int) -> bool:
        """Return whether a head with so much slack has waited, whatever its patience; if unknown, it has."""
        own_ns = self._shortest_ns(demand, worker)
        return own_ns <= 0.0 or slack_ns < _OWN * own_ns

    def _shortest_ns(self, demand: Demand, worker: WorkerView) -> float:
        """Return how long the least patient queries can wait and run, about; 0 if that is not known."""
        shortest_ns = min(
            [one.slack_ns for one in demand.classes.values() if one.rate * one.slack_ns >= _FEW], default=0.0
        )
        return max(0.0, (shortest_ns - worker.allowance_ns) / worker.slowdown)

    def _escape(
        self, queue: QueueView, worker: WorkerView, now_ns: int, slack_ns: int, plan: Outlook
    ) -> Shed | None:
        """Return what to refuse if the heads are too late for a useful batch, and what follows them is not.

        The trap of small batches: heads short of slack fit only batches of one or two, which are so slow that
        those behind grow as late. Losing them once frees all others. Only where queries are lost in any case,
        and where one that has just come has time for more than that.
        """
        lean_ns, demand = self._lean_ns(plan), queue.demand
        if slack_ns >= lean_ns or lean_ns > _FRESH * plan.patience_ns or queue.outranks:
            return None
        if queue.due is None or demand is None:
            return None
        if len(demand.classes) > 1 and lean_ns > _FRESH * self._shortest_ns(demand, worker):
            return None
        before_ns = max(now_ns, worker.free_at_ns) + worker.allowance_ns + int(lean_ns * worker.slowdown)
        left = queue.due.total - queue.due.until(queue.head_deadline_ns, before_ns)
        if left < plan.full * UNIT or before_ns <= queue.head_deadline_ns:
            return None
        return Shed(before_ns, 1)

    def _lean_ns(self, plan: Outlook) -> int:
        """Return what the smallest batch takes that is nearly as quick a query as a full one."""
        most_ns = plan.unit_ns / _LEAN
        return next(
            (one.p99_ns[0] for one in self.sizes if one.p99_ns[0] + plan.gap_ns <= most_ns * one.size),
            plan.full_ns,
        )

    def _saves(self, queue: QueueView, slack_ns: int, plan: Outlook) -> bool:
        """Return whether the smallest subnet would still serve all that is queued.

        What is due within a few milliseconds asks for as much as an overload, and may be three queries.
        """
        floor = queue.head_floor
        size = self._profile.largest_batch(floor, slack_ns)
        if size is None or plan.tight is None:
            return False
        n = min(size, queue.length)
        takes_ns = self._profile.latency_p99_ns(floor, n)
        served = n * self._weights[floor] - _WARY * plan.others * plan.full
        return takes_ns <= self._longest_ns(plan, plan.tight, served, takes_ns)


def _left_ns(all_ns: float, unit_ns: float, expected: tuple[float, float, float]) -> float:
    """Return what is left of the GPU time within a patience if what may come within each window comes."""
    first, second, third = expected
    # Unrolled, and compared one by one: a loop with min() takes a microsecond.
    spare_ns = _SHARES[0] * all_ns - _SUDDEN * unit_ns * first
    left_ns = _SHARES[1] * all_ns - _WORST * unit_ns * second
    if left_ns < spare_ns:
        spare_ns = left_ns
    left_ns = _SHARES[2] * all_ns - _WORST * unit_ns * third
    if left_ns < spare_ns:
        spare_ns = left_ns
    return spare_ns
