"""Router cores that are broken on purpose, each in one line that somebody might well have written.

The chaos checker must find each of them: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from loadgen.chaos import find_violation
from router.core import RouterCore
from router.edf import ANSWERED
from router.events import Answer
from router.policy import Choice, Shed
from superserve.wire import Status

if TYPE_CHECKING:
    from router.edf import Cohort
    from router.events import Action, Ran
    from router.workers import Batch, Worker


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


MUTANTS: dict[str, tuple[type[RouterCore], str]] = {
    "re-dispatch dropped": (DropsRedispatch, "in nobody's hands"),
    "answered twice": (AnswersTwice, "was answered twice"),
    "expired work dispatched": (DispatchesExpired, "was dispatched .* ms too late"),
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
