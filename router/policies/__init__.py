"""What a policy is: given the head of the queue and a worker, choose a subnet and a batch size.

A policy of your own is a class with a `name`, a constructor and `choose`:

    from router.policies import Choice, usable_slack_ns

    class Careful:
        '''The most accurate subnet that answers the head alone in half of its slack.'''

        name = "careful"

        def __init__(self, profile, argument=None):
            self._rows = [row.latency_p99_ns[0] for row in profile.subnets]

        def choose(self, queue, worker, now_ns):
            half_ns = usable_slack_ns(queue, worker, now_ns) / 2
            fitting = [row for row, p99_ns in enumerate(self._rows) if p99_ns <= half_ns]
            if not fitting or fitting[-1] < queue.head_floor:
                return None
            return Choice(subnet=fitting[-1], batch_size=1)

Save it as `my_policy.py` and serve with `cluster up --policy my_policy:Careful`; `router.policies.registry`
describes entry points. `Policy` is the contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from router.policies.demand import Demand
    from router.policies.due import Due
    from router.policies.supply import Supply


@dataclass(frozen=True, slots=True)
class Choice:
    """One batch to run: which subnet, and at most how many queries.

    Attributes:
        subnet: Row of the profile; 0 is the smallest and least accurate.
        batch_size: How many queries to pack at most; at least 1.
        first_above: Queries whose floor lies above this row, but not above `subnet`, are packed first, and
            others only into places that are left; None packs by deadline alone. Has an effect only for a
            policy that sees demand.
    """

    subnet: int
    batch_size: int
    first_above: int | None = None


@dataclass(frozen=True, slots=True)
class Shed:
    """Refuse some queries now, because the time they would cost serves more of the others; then ask again.

    Only queries of the lowest priority class queued are refused. If the head is of that class: every
    query of the class that is due before `before_ns`. Otherwise its `n` earliest, in the head's favour.

    Attributes:
        before_ns: An instant after the head's deadline.
        n: How many queries of a class below the head's; at least 1.
    """

    before_ns: int
    n: int


@dataclass(slots=True)
class QueueView:
    """What a policy sees of the queue. The core may overwrite it before each decision: do not keep it.

    Attributes:
        head_deadline_ns: The earliest deadline queued, an instant on the router's clock.
        head_floor: The smallest profile row whose accuracy satisfies the head query; 0 if any does.
        length: Queries queued; at least 1.
        demand: What arrives and what can serve it; None unless the policy asks for it.
        outranks: Whether queries of a lower priority class than the head's are queued; False unless the
            policy asks for demand.
        due: How much of the queue is due by when; None unless the policy asks for demand.
        supply: What the GPUs can serve at best, and how much of their time is taken; None unless the policy
            asks for demand.
    """

    head_deadline_ns: int
    head_floor: int
    length: int
    demand: Demand | None = None
    outranks: bool = False
    due: Due | None = None
    supply: Supply | None = None


@dataclass(slots=True)
class WorkerView:
    """What a policy sees of the worker that is to run the batch.

    Attributes:
        free_at_ns: The instant at which it can begin; may lie in the past when it is idle.
        allowance_ns: Measured time for a batch to reach the worker and its answer to come back.
        slowdown: Measured over profiled latency of this worker, smoothed; 1.0 means as profiled.
        doubt: How many times longer than that a batch may still take, because few have been measured, or
            because queries are lost and the queue does not explain it; 1.0 without either.
        turnaround_ns: The way of a batch's report and that of the next batch. A worker holds one batch beside
            the one that runs, so behind a batch shorter than this it has nothing to do for the rest of it.
        is_pressed: Whether nothing fits the slack that nearly the worst way leaves, so that the allowance is
            now the usual way's: each nanosecond that the batch takes makes it likelier to be late.
    """

    free_at_ns: int
    allowance_ns: int
    slowdown: float
    doubt: float = 1.0
    turnaround_ns: int = 0
    is_pressed: bool = False


def usable_slack_ns(queue: QueueView, worker: WorkerView, now_ns: int) -> int:
    """Return how long a batch on `worker` may take, in profiled time, and still meet the head's deadline.

    That is deadline - (the instant it can begin) - transport, divided by the worker's
    slowdown; negative when even a batch of zero length would be late.
    """
    begin_ns = max(now_ns, worker.free_at_ns)
    slack_ns = queue.head_deadline_ns - begin_ns - worker.allowance_ns
    # As profiled: integers stay exact, and an edge exactly as long as the slack still fits.
    return slack_ns if worker.slowdown == 1.0 else int(slack_ns / worker.slowdown)


class Policy(Protocol):
    """Chooses the next batch of one worker. Pure: no clock, no log, no hidden state.

    The router builds a policy once per profile, offline, by `factory(profile, argument)`;
    `argument` is what follows the colon in `--policy name:argument`, or None.

    A policy with `sees_demand = True` also receives `QueueView.demand`, `due` and `supply`. For it the queue
    keeps priority classes and floors apart, and a batch skips queries whose floor lies above its subnet
    instead of ending before the first of them. Only such a policy may shed.
    """

    name: str

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | Shed | None:
        """Return what to run next, or None if nothing fits the head's slack. Takes less than 20 us.

        On None the core answers the head INFEASIBLE if no subnet could meet its
        deadline even alone and at once; otherwise it asks again at the next event.
        """
        ...
