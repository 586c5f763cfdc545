"""Lenders and fleets that are broken on purpose, each in a line or two.

The checks of `loadgen.simulator.chaos.routers` must find each of them.

    python -m tests.loadgen.simulator.lending_mutants      how many schedules each takes
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_worker.core.lending import CreditState, Lender
from router.core import RouterCore
from router.core.fleet import Fleet
from superserve.wire import Ping, Pull
from tests.loadgen.simulator.router_mutants import RouterMutant, find_all

if TYPE_CHECKING:
    from router.core.events import Pulled
    from router.core.workers import Worker


class _Lender(Lender[Any]):
    """A lender of simulated batches."""


class LendsAtOnce(_Lender):
    """Does not wait for its router to know that a credit is recalled."""

    def _offer(self, slot: int, credit: Any, now_ns: int) -> None:
        super()._offer(slot, credit, now_ns)
        self._recalled(slot, credit, now_ns)


class KeepsSayingCredit(_Lender):
    """Reports to its own router as if nothing were lent."""

    def is_away(self, _slot: int) -> bool:
        """Know of nothing that is lent."""
        return False


class WithdrawsAtOnce(_Lender):
    """Does not wait for the visited router to know that a credit is withdrawn."""

    def _judge(self, slot: int, credit: Any, now_ns: int) -> None:
        super()._judge(slot, credit, now_ns)
        if credit.state is CreditState.WITHDRAWING:
            self._give_back(slot, credit, now_ns)


class PingsFirst(_Lender):
    """Sends the PING before the PULL that it is to vouch for, in a pass of its own."""

    def poll(self, now_ns: int) -> list[tuple[int, Any]]:
        """Return PINGs first."""
        said = super().poll(now_ns)
        pings = [one for one in said if isinstance(one[1], Ping) and one[1].stamp_ns < 0]
        self._late, late = [one for one in said if isinstance(one[1], Pull)], getattr(self, "_late", [])
        others = [one for one in said if one not in pings and not isinstance(one[1], Pull)]
        return [*late, *pings, *others]


class ReturnsTooSoon(_Lender):
    """Gives a credit back, and offers two, while a lent batch still waits."""

    def masked(self, slot: int, report: Any, now_ns: int) -> Any:
        """Offer as if nothing of others were here."""
        report = super().masked(slot, report, now_ns)
        return report._replace(credit=min(2, report.credit + self._credits[slot].n_visiting))


class NeverReturns(_Lender):
    """Keeps a credit that a batch was sent for, and its own router waits for it."""

    def _give_back(self, slot: int, credit: Any, now_ns: int) -> None:
        if credit.state is not CreditState.USED:
            super()._give_back(slot, credit, now_ns)


class AddsCredit(Fleet):
    """Gives guests a credit more than they offer."""

    def pulled(self, event: Pulled, now_ns: int) -> None:
        """Take a PULL for more than it says."""
        peer = self.peers.get(event.peer)
        if peer is not None and peer.is_guest:
            for row in event.message.rows:
                row.credit += 1
        super().pulled(event, now_ns)


class Miscounts(Fleet):
    """Counts a guest's GPU again with each batch."""

    def _count(self, worker: Worker) -> None:
        if worker.peer.is_guest and worker.outstanding:
            worker.is_counted = False
        super()._count(worker)


def _fleet(fleet: type[Fleet]) -> Any:
    return partial(RouterCore, fleet=fleet)


_TWO = "have a credit of"

MUTANTS: dict[str, RouterMutant] = {
    "a credit is lent before its router knows": RouterMutant({"make_lender": LendsAtOnce}, 5, _TWO),
    "reports ignore what is lent": RouterMutant({"make_lender": KeepsSayingCredit}, 3, _TWO),
    "a credit is withdrawn before the other knows": RouterMutant({"make_lender": WithdrawsAtOnce}, 3, _TWO),
    "a PING vouches for a PULL that comes later": RouterMutant({"make_lender": PingsFirst}, 6, _TWO),
    "a credit too many is offered": RouterMutant({"make_lender": ReturnsTooSoon}, 5, _TWO),
    "a used credit never returns": RouterMutant({"make_lender": NeverReturns}, 5, "to nobody|could wait"),
    "a guest gets more than its credit": RouterMutant({"make_core": _fleet(AddsCredit)}, 3, _TWO),
    "a guest's GPU counts twice": RouterMutant({"make_core": _fleet(Miscounts)}, 5, "GPUs are present"),
}
"""How each is built, a seed that shows it, and the checker's message about it."""

if __name__ == "__main__":
    find_all(MUTANTS)
