"""Dispatch: what is refused at the head of the queue, and which batch goes to which worker."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from router.core.events import Complaint
from router.core.lanes import LaneQueue
from router.core.workers import Batch, PeerState, Worker, WorkerState
from router.policies import Choice, QueueView, Shed, WorkerView, usable_slack_ns
from router.policies.caution import doubt_of_ways
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from router.core.edf import Cohort, Stretch
    from router.core.fleet import Fleet
    from router.core.ledger import Ledger
    from router.core.slack import Slack

Head = tuple[int, "Cohort", int]
"""The earliest query: its deadline, its cohort and its index there."""

_MAX_RIVALS = 8
"""Most workers asked about one head, after the first was too slow for it: a bound on one decision."""


class Dispatcher:
    """Decides what expires, what is refused, and which batch goes to which worker.

    Args:
        ledger: Where queries are dispatched and refused.
        fleet: The workers.
        slack: The formulas.

    Attributes:
        n_wrong: Answers of policies that cannot be carried out.
    """

    __slots__ = (
        "_awaited", "_awaited_until_ns", "_fleet", "_ledger", "_model", "_named", "_queue_view", "_slack",
        "_soonest_ns", "_worker_view", "n_wrong",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, fleet: Fleet, slack: Slack) -> None:
        self._ledger = ledger
        self._model = ledger.model
        self._fleet = fleet
        self._slack = slack
        self._awaited: Worker | None = None
        self._awaited_until_ns = 0
        self._soonest_ns: dict[int, int] = {}
        self.n_wrong = 0
        self._named: set[str] = set()  # policies that a complaint has named
        # Reused for each decision, so that none allocates.
        self._queue_view = QueueView(0, 0, 0)
        self._worker_view = WorkerView(0, 0, 1.0)

    def retuned(self) -> None:
        """Forget what the earlier policy saw and waited for: another one decides from now on."""
        self._awaited = None
        self._queue_view = QueueView(0, 0, 0)

    def decide(self, now_ns: int) -> None:
        """Refuse what cannot be served, and give work to the workers that are about to be free."""
        self._slack.punctuality.came(now_ns)
        self._refuse_doomed(now_ns)
        self._awaited = None
        if self._model.queue:
            self._dispatch(now_ns)
            self._slack.punctuality.expect(self._due_ns(now_ns))

    def next_wake_ns(self) -> int | None:
        """Return the instant at which `decide` has something to do, even without an event."""
        head = self._model.queue.head()
        if head is None:
            return None
        wake_ns = head[0] - self._fleet.quickest_ns + 1  # from then on nothing can serve it in time
        worker = self._awaited
        if worker is None:
            worker = self._fleet.first_free()
        # From then on the awaited worker is too late for the head as well: decide again.
        elif self._awaited_until_ns < wake_ns:
            wake_ns = self._awaited_until_ns
        if worker is not None and worker.may_take:
            wake_ns = min(wake_ns, self._slack.decide_ns(worker))
        return wake_ns

    def _due_ns(self, now_ns: int) -> int | None:
        """Return when the next worker is due for a batch, if nothing else is to come before."""
        if not self._model.queue or self._awaited is not None:
            return None
        worker = self._fleet.first_free()
        if worker is None or not worker.may_take:
            return None
        due_ns = self._slack.decide_ns(worker)
        return due_ns if due_ns > now_ns else None

    def _refuse_doomed(self, now_ns: int) -> None:
        """End the queries that no subnet can serve in time any more, even alone and at once."""
        queue, ledger, quickest_ns = self._model.queue, self._ledger, self._fleet.quickest_ns
        head = queue.head()
        if head is None or head[0] >= now_ns + quickest_ns:
            return
        for cohort, lo, hi in queue.take_before(now_ns + quickest_ns):
            expired = bisect_left(cohort.deadlines_ns, now_ns, lo, hi)
            if cohort.arrived_ns == now_ns:
                expired = lo  # its deadline passed before it arrived, not in the queue: INFEASIBLE
            if expired > lo:
                waited = "" if self._fleet.peers else "; no worker is connected"
                reason = f"the deadline passed in the queue{waited}"
                ledger.refuse(cohort, lo, expired, Status.EXPIRED, reason, now_ns)
            if hi > expired:
                slack_ms = (cohort.deadlines_ns[expired] - now_ns) / MS
                reason = f"slack {slack_ms:.2f} ms; the quickest answer takes {quickest_ns / MS:.2f} ms"
                ledger.refuse(cohort, expired, hi, Status.INFEASIBLE, reason, now_ns)

    # --- which worker gets the head -----------------------------------------------------------

    def _dispatch(self, now_ns: int) -> None:
        """Give work to workers that are about to be free, the earliest-free first."""
        model, fleet, slack = self._model, self._fleet, self._slack
        self._soonest_ns.clear()
        while model.queue and self._awaited is None:
            worker = fleet.first_free()
            if worker is None or slack.decide_ns(worker) > now_ns:
                break
            head = model.queue.head()
            assert head is not None, "a queue with a length has a head"
            self._serve(head, worker, now_ns)

    def _serve(self, head: Head, first: Worker, now_ns: int) -> None:
        """Give the head to the first free worker; if that is too slow, to another, or wait for one."""
        slack = self._slack
        worker, passed = first, []
        while True:
            choice = self._choose(worker, head, now_ns)
            if isinstance(choice, Shed):
                self._shed(choice, now_ns)
                return
            if choice is not None:
                self._send(worker, choice, now_ns)
                return
            passed.append(worker)
            rival = self._rival(head, passed, now_ns)
            if rival is None:
                self._refuse_head(first, head, now_ns)
                return
            if not rival.may_take or slack.decide_ns(rival) > now_ns:
                # The whole queue waits with the head: a later query on the free worker would break EDF order.
                self._awaited = rival
                self._awaited_until_ns = (
                    self._leave_ns(head) - slack.alone_and_back_ns(rival, _floor(head)) + 1
                )
                return
            worker = rival

    def _rival(self, head: Head, passed: list[Worker], now_ns: int) -> Worker | None:
        """Return the earliest-free worker not asked yet that could meet the head's deadline, even if busy."""
        fleet, slack = self._fleet, self._slack
        if not fleet.is_uneven or len(passed) > _MAX_RIVALS:
            return None  # in an even cluster the others are free later and no faster
        floor, limit_ns = _floor(head), self._leave_ns(head)
        if self._soonest_ns.get(floor, limit_ns) > limit_ns:
            return None  # a scan in this pass found none, for a head with as much time
        best, soonest_ns = None, limit_ns + 1
        for worker in fleet.workers():
            if not worker.is_counted:
                continue  # its credit is with another router
            if worker.machine.state is WorkerState.READY and worker.peer.machine.state is PeerState.LIVE:
                end_ns = slack.free_ns(worker, now_ns) + slack.alone_and_back_ns(worker, floor)
                soonest_ns = min(soonest_ns, end_ns)
                earlier = best is None or worker.free_at_ns < best.free_at_ns
                if end_ns <= limit_ns and earlier and worker not in passed:
                    best = worker
        self._soonest_ns[floor] = soonest_ns
        return best

    def _leave_ns(self, head: Head) -> int:
        """Return when the head's answer must leave the router."""
        return self._slack.leave_ns(head[0], head[1].client)

    # --- asking the policy --------------------------------------------------------------------

    def _choose(self, worker: Worker, head: Head, now_ns: int) -> Choice | Shed | None:
        """Ask the policy, and apply this worker's corrections to its answer."""
        deadline_ns, cohort, _ = head
        model, slack, doubt = self._model, self._slack, worker.doubt()
        queue, view = self._queue_view, self._worker_view
        queue.head_deadline_ns = deadline_ns
        queue.head_floor = _floor(head)
        queue.length = len(model.queue)
        client = cohort.client
        usual_ns = slack.usual_way_back_ns(worker, client)
        careful_ns = slack.careful_way_back_ns(worker, client, usual_ns, deadline_ns - cohort.arrived_ns)
        if model.demand is not None:
            model.demand.settle(now_ns)
            queue.demand = model.demand
            assert isinstance(model.queue, LaneQueue), "with demand the queue is in lanes"
            queue.outranks = model.queue.outranks()
            queue.due = model.queue.due
            queue.supply = self._fleet.supply
            patience_ns = model.demand.slack_ns - careful_ns
            self._fleet.fit_supply(patience_ns, now_ns)
            servable = self._fleet.supply.rate * patience_ns
            doubt *= doubt_of_ways(careful_ns - usual_ns, patience_ns)
            doubt *= model.caution.look(self._ledger.answered, queue.length, servable, now_ns)
        view.doubt = doubt
        view.free_at_ns = slack.begin_ns(worker, now_ns)
        view.allowance_ns = careful_ns
        view.turnaround_ns = worker.transport.median_ns
        view.is_pressed = False
        choice = self._corrected_choice(worker, now_ns)
        if choice is None:
            # Nothing leaves room for the worst transport: try the usual one, which is better than to refuse.
            view.allowance_ns = usual_ns
            view.is_pressed = True
            choice = self._corrected_choice(worker, now_ns)
        return choice

    def _corrected_choice(self, worker: Worker, now_ns: int) -> Choice | Shed | None:
        queue, view = self._queue_view, self._worker_view
        view.slowdown = worker.slowdown if abs(worker.slowdown - 1.0) > 0.05 else 1.0
        # The policy sees one slowdown, but subnets differ. If the chosen subnet is slower here and the batch
        # does not fit, ask again with its ratio. Three times at most: a decision must end.
        for _ in range(3):
            answer: object
            try:
                answer = worker.policy.choose(queue, view, now_ns)
            except Exception as error:  # noqa: BLE001  # other packages' code: the router must serve on
                answer = error
            choice = self._sound(answer, worker, now_ns)
            if (
                not isinstance(choice, Choice)
                or (corrected := worker.corrected(choice.subnet)) <= view.slowdown
            ):
                return choice
            slack_ns = usable_slack_ns(queue, view, now_ns) * view.slowdown
            if worker.profile.latency_p99_ns(choice.subnet, choice.batch_size) * corrected <= slack_ns:
                return choice
            view.slowdown = corrected
        return choice

    def _sound(self, choice: object, worker: Worker, now_ns: int) -> Choice | Shed | None:
        """Return a policy's answer; in place of one that cannot be carried out, one that can.

        Policies come from other packages too, and the router serves on whatever they return or raise.
        """
        if choice is None:
            return None
        queue, profile = self._queue_view, worker.profile
        answered: Any = choice  # its fields may be anything, whatever their annotations say
        if type(choice) is Choice:
            row, size, above = answered.subnet, answered.batch_size, answered.first_above
            # By type: a numpy integer would go into a message, and True is no row.
            if (
                type(row) is type(size) is int
                and queue.head_floor <= row < len(profile.subnets)
                and 0 < size <= profile.batch_sizes[-1]
                and (above is None or type(above) is int)
            ):
                return choice
        elif type(choice) is Shed:
            before_ns, n = answered.before_ns, answered.n
            is_sound = type(before_ns) is type(n) is int and before_ns > queue.head_deadline_ns and n > 0
            if is_sound and self._model.demand is not None:
                return choice
        self.n_wrong += 1
        self._complain(choice, worker)
        largest = profile.largest_batch(queue.head_floor, usable_slack_ns(queue, self._worker_view, now_ns))
        return None if largest is None else Choice(queue.head_floor, largest)

    def _complain(self, wrong: object, worker: Worker) -> None:
        """Name a policy whose answer is wrong, once."""
        name, floor, profile = worker.policy.name, self._queue_view.head_floor, worker.profile
        if name in self._named:
            return
        self._named.add(name)
        shed = ", a Shed after the head's deadline" if self._model.demand is not None else ""
        self._ledger.actions.append(
            Complaint(
                f"policy {name!r}: expected a Choice of a row from {floor} (the head's floor) to "
                f"{profile.n_subnets - 1} and of 1 to {profile.max_batch_size} queries{shed}, or None; "
                f"{_said(wrong)}. Served on {profile.subnets[floor].name} instead; further ones "
                f"are only counted"
            )
        )

    def _shed(self, shed: Shed, now_ns: int) -> None:
        """Refuse what the policy sheds."""
        queue = self._model.queue
        assert isinstance(queue, LaneQueue), "only a policy that sees demand may shed"
        stretches = queue.shed(shed.before_ns, shed.n)
        assert stretches, "what a policy sheds is in the queue: its head's class, or one below"
        for cohort, lo, hi in stretches:
            slack_ms = (cohort.deadlines_ns[lo] - now_ns) / MS
            reason = f"slack {slack_ms:.2f} ms: more queries wait than the smallest subnet serves in time"
            self._ledger.refuse(cohort, lo, hi, Status.OVERLOADED, reason, now_ns)

    # --- how the head ends --------------------------------------------------------------------

    def _refuse_head(self, worker: Worker, head: Head, now_ns: int) -> None:
        """Refuse the head, and all queries that even the smallest subnet alone would answer too late.

        Many at once: in overload a refusal must cost less than an answer.
        """
        queue = self._model.queue
        view = self._worker_view  # as the policy last saw it
        client_ns: int = head[1].client.return_ns
        # Without the way to the head's client: below, each query's own client counts.
        limit_ns = view.free_at_ns + view.allowance_ns - client_ns + self._slack.alone_ns(worker, 0)
        if head[0] >= limit_ns + client_ns:
            taken, _ = queue.take(1, worker.profile.n_subnets)
            self._refuse_infeasible(worker, *taken[0], now_ns)
            return
        for cohort, lo, hi in queue.take_before(limit_ns + client_ns):
            cut = bisect_left(cohort.deadlines_ns, limit_ns + cohort.client.return_ns, lo, hi)
            if cut > lo:
                self._refuse_infeasible(worker, cohort, lo, cut, now_ns)
            if cut < hi:  # its client is nearer than the head's: an answer may still be in time
                queue.push(cohort, cut, hi)

    def _refuse_infeasible(self, worker: Worker, cohort: Cohort, lo: int, hi: int, now_ns: int) -> None:
        slack = self._slack
        floor = 0 if cohort.floors is None else cohort.floors[lo]
        slack_ms = (cohort.deadlines_ns[lo] - slack.free_ns(worker, now_ns)) / MS
        alone_ms = slack.alone_ns(worker, floor) / MS
        way_ms = slack.way_back_ns(worker, cohort.client) / MS
        name = worker.profile.subnets[floor].name
        reason = f"slack {slack_ms:.2f} ms once a worker is free; {name} alone takes {alone_ms:.2f} ms"
        self._ledger.refuse(
            cohort, lo, hi, Status.INFEASIBLE, f"{reason} and the way {way_ms:.2f} ms", now_ns
        )

    def _send(self, worker: Worker, choice: Choice, now_ns: int) -> None:
        subnet, ledger, slack = choice.subnet, self._ledger, self._slack
        queue = self._model.queue
        if choice.first_above is None or not isinstance(queue, LaneQueue):
            stretches, n = queue.take(choice.batch_size, subnet)
        else:
            stretches, n = queue.take_packed(choice.batch_size, subnet, choice.first_above)
        assert n > 0, f"policy {worker.policy.name} chose subnet {subnet} below the head's floor"
        if len(stretches) > 2 and any(s[0].client is not stretches[0][0].client for s in stretches):
            # With a client's queries adjacent in the batch, they are answered as one group.
            stretches.sort(key=_client_serial)
        batch = Batch(
            batch_id=ledger.n_batches + 1,
            worker=worker,
            subnet=subnet,
            n=n,
            stretches=stretches,
            dispatched_ns=now_ns,
            begin_ns=slack.begin_ns(worker, now_ns),
            profiled_ns=worker.profile.latency_ns(subnet, n),
            limit_ns=slack.overrun_ns(worker, subnet, n),
        )
        ledger.dispatch(batch)
        self._fleet.assign(batch)


def _said(wrong: object) -> str:
    """Return what a policy answered, or raised and where."""
    if not isinstance(wrong, Exception):
        return f"got {repr(wrong)[:200]}"
    place, trace = "", wrong.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"it raised {repr(wrong)[:200]} at {place}"


def _client_serial(stretch: Stretch) -> int:
    serial: int = stretch[0].client.serial
    return serial


def _floor(head: Head) -> int:
    _, cohort, i = head
    return 0 if cohort.floors is None else cohort.floors[i]
