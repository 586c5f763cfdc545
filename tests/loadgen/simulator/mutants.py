"""Parts of router cores that are broken on purpose, each in one line that might well have been written.

The chaos checker must find each of them: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import sys
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from loadgen.simulator.chaos import ScheduleOutcome, run_schedule
from router.core import RouterCore
from router.core.admission import Admission
from router.core.dispatch import Dispatcher
from router.core.edf import ANSWERED, EdfQueue
from router.core.events import Answer
from router.core.fleet import Fleet
from router.core.ledger import Ledger
from router.policies import Choice, Shed
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.core.dispatch import Head
    from router.core.edf import Cohort, Stretch
    from router.core.events import Key, Ran
    from router.core.model import Model
    from router.core.workers import Batch, Peer, Worker


def find_violation(make_core: Callable[..., RouterCore], *, at_most: int) -> ScheduleOutcome | None:
    """Return the first schedule, from seed 0, on which a core breaks a promise; None if none shows it."""
    found = map(partial(run_schedule, make_core=make_core), range(at_most))
    return next((outcome for outcome in found if outcome.violation is not None), None)


class DropsRedispatch(Ledger):
    """Forgets to queue again what a lost worker held: it stays in flight, but in no worker's batch."""

    def _requeue(self, cohort: Cohort, i: int) -> None:
        holders = cohort.holders = cohort.holders or {}
        holders[i] = None


class AnswersTwice(Ledger):
    """Does not look whether a query that two workers ran has its answer already."""

    def _answer_remaining(
        self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int
    ) -> None:
        for i in range(lo, hi):
            if cohort.states[i] == ANSWERED and cohort.client.key is not None:
                answer = Answer(cohort.client.key, cohort, i, i + 1, 1, Status.OK, 0, ran, at + i - lo)
                self.actions.append(answer)
        super()._answer_remaining(batch, ran, cohort, lo, hi, at, now_ns)


class DispatchesExpired(Dispatcher):
    """Gives out work before it ends what has expired, on the smallest subnet where nothing fits."""

    def decide(self, now_ns: int) -> None:
        """Decide, in the wrong order."""
        self._awaited = None
        if self._model.queue:
            self._dispatch(now_ns)
        super().decide(now_ns)

    def _choose(self, worker: Worker, head: Head, now_ns: int) -> Choice | Shed | None:
        floor = 0 if head[1].floors is None else head[1].floors[head[2]]
        return super()._choose(worker, head, now_ns) or Choice(floor, 1)


class _Hasty(EdfQueue):
    """Takes what is behind the first run of the heap, where there is something."""

    __slots__ = ()

    def take(self, k: int, subnet: int, until_ns: int | None = None) -> tuple[list[Stretch], int]:
        """Remove queries, but not the earliest."""
        if self.head() is None or len(self._heap) == 1:
            return super().take(k, subnet, until_ns)
        first = heappop(self._heap)
        taken, n = super().take(k, subnet, until_ns)
        heappush(self._heap, first)
        return (taken, n) if n else super().take(k, subnet, until_ns)


class LeavesTheHead(Ledger):
    """Gives a worker what came later, and leaves the earliest deadline in the queue."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        model.queue = _Hasty()


class SendsOnNoCredit(Fleet):
    """Does not deduct what it sends from the worker's credit."""

    def assign(self, batch: Batch) -> None:
        """Note a batch, and offer its worker all the same."""
        super().assign(batch)
        batch.worker.credit = max(1, batch.worker.credit)
        self._offer(batch.worker)


class TrustsOldLives(Fleet):
    """Listens to whatever has a known name, under whatever epoch."""

    def _speaker(self, key: Key, _epoch: int, now_ns: int) -> Peer | None:
        peer = self.peers.get(key)
        if peer is not None:
            self._hear(peer, now_ns)
        return peer


class TellsLate(Dispatcher):
    """Looks for what has expired ten times a second."""

    looked_ns = 0

    def _refuse_doomed(self, now_ns: int) -> None:
        if now_ns - self.looked_ns >= 100 * MS:
            self.looked_ns = now_ns
            super()._refuse_doomed(now_ns)

    def next_wake_ns(self) -> int | None:
        """Return a wake that is ahead."""
        wake_ns = super().next_wake_ns()
        return None if wake_ns is None else max(wake_ns, self.looked_ns + 100 * MS)


class TakesTooMany(Admission):
    """Queues whatever comes."""

    def _admit_stretch(self, cohort: Cohort, lo: int, hi: int) -> None:
        if cohort.message.min_accuracy is None:
            self._model.queue.push(cohort, lo, hi)
        else:
            super()._admit_stretch(cohort, lo, hi)


MUTANTS: dict[str, tuple[Callable[..., RouterCore], str]] = {
    "re-dispatch dropped": (partial(RouterCore, ledger=DropsRedispatch), "in no worker's batch"),
    "answered twice": (partial(RouterCore, ledger=AnswersTwice), "was answered twice"),
    "expired work dispatched": (
        partial(RouterCore, dispatcher=DispatchesExpired),
        "was dispatched .* ms too late",
    ),
    "head left behind": (
        partial(RouterCore, ledger=LeavesTheHead),
        "passed over the head|left behind a query",
    ),
    "credit ignored": (partial(RouterCore, fleet=SendsOnNoCredit), "a GPU was sent 3 batches"),
    "old lives trusted": (partial(RouterCore, fleet=TrustsOldLives), "epoch .* is over"),
    "expiry told late": (partial(RouterCore, dispatcher=TellsLate), "expired in the queue, answered"),
    "bound ignored": (partial(RouterCore, admission=TakesTooMany), "more queries than --max-queries"),
}
"""How each core is built, and the checker's message about it."""


def main() -> None:
    """Print how many schedules it takes to find each; exit 1 if one is not found in a thousand."""
    is_found = True
    for name, (mutant, _) in MUTANTS.items():
        found = find_violation(mutant, at_most=1_000)
        is_found = is_found and found is not None
        said = "NOT FOUND by 1,000 schedules" if found is None else f"{found.seed + 1}, at {found.violation}"
        print(f"mutant, {name}: found by schedule {said}")  # noqa: T201  a command of its own
    sys.exit(not is_found)


if __name__ == "__main__":
    main()
