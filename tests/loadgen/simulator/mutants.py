"""Router cores that are broken on purpose, each in one line that somebody might well have written.

The chaos checker must find each of them: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import sys
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from loadgen.simulator.chaos import find_violation
from router.core import RouterCore
from router.core.edf import ANSWERED, EdfQueue
from router.core.events import Answer
from router.policies import Choice, Shed
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.table import Profile
    from router.core.edf import Cohort, Stretch
    from router.core.events import Action, Key, Ran
    from router.core.state import CoreSettings
    from router.core.workers import Batch, Peer, Worker
    from router.policies import Policy


class DropsRedispatch(RouterCore):
    """Forgets to queue again what a lost worker held: it stays in flight, in nobody's hands."""

    def _requeue(self, cohort: Cohort, i: int) -> None:
        holders = cohort.holders = cohort.holders or {}
        holders[i] = None


class AnswersTwice(RouterCore):
    """Does not look whether a query that two workers ran has its answer already."""

    def _answer_remaining(
        self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int
    ) -> None:
        for i in range(lo, hi):
            if cohort.states[i] == ANSWERED and cohort.client.key is not None:
                answer = Answer(cohort.client.key, cohort, i, i + 1, 1, Status.OK, 0, ran, at + i - lo)
                self._actions.append(answer)
        super()._answer_remaining(batch, ran, cohort, lo, hi, at, now_ns)


class DispatchesExpired(RouterCore):
    """Gives out work before it ends what has expired, on the smallest subnet where nothing fits."""

    def advance(self, now_ns: int) -> list[Action]:
        """Decide, in the wrong order."""
        self._judge_peers(now_ns)
        self._judge_overruns(now_ns)
        self._awaited = None
        if self.queue:
            self._dispatch(now_ns)
        return super().advance(now_ns)

    def _choose(self, worker: Worker, head: tuple[int, Cohort, int], now_ns: int) -> Choice | Shed | None:
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


class LeavesTheHead(RouterCore):
    """Gives a worker what came later, and leaves the earliest deadline in the queue."""

    def __init__(
        self, make_policy: Callable[[Profile], Policy], settings: CoreSettings | None = None
    ) -> None:
        super().__init__(make_policy, settings)
        self.queue = _Hasty()


class SendsOnNoCredit(RouterCore):
    """Does not deduct what it sends from what a worker said that it can take."""

    def _send(self, worker: Worker, choice: Choice, now_ns: int) -> None:
        super()._send(worker, choice, now_ns)
        worker.credit = max(1, worker.credit)
        self._offer(worker)


class TrustsOldLives(RouterCore):
    """Listens to whoever has a known name, under whatever epoch."""

    def _speaker(self, key: Key, _epoch: int, now_ns: int) -> Peer | None:
        peer = self.peers.get(key)
        if peer is not None:
            self._hear(peer, now_ns)
        return peer


class TellsLate(RouterCore):
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


class TakesTooMany(RouterCore):
    """Queues whatever comes."""

    def _admit_stretch(self, cohort: Cohort, lo: int, hi: int) -> None:
        if cohort.message.min_accuracy is None:
            self.queue.push(cohort, lo, hi)
        else:
            super()._admit_stretch(cohort, lo, hi)


MUTANTS: dict[str, tuple[type[RouterCore], str]] = {
    "re-dispatch dropped": (DropsRedispatch, "in nobody's hands"),
    "answered twice": (AnswersTwice, "was answered twice"),
    "expired work dispatched": (DispatchesExpired, "was dispatched .* ms too late"),
    "head left behind": (LeavesTheHead, "passed over the head|left behind a query"),
    "credit ignored": (SendsOnNoCredit, "a GPU was sent 3 batches"),
    "old lives trusted": (TrustsOldLives, "epoch .* is over"),
    "expiry told late": (TellsLate, "expired in the queue and was told"),
    "bound ignored": (TakesTooMany, "more queries than --max-queries"),
}
"""What each does, and what the checker says of it."""


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
