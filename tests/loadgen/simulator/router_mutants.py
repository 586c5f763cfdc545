"""Sessions, spreads and choices of a router that are broken on purpose, each in a line or two.

The checks of `loadgen.simulator.chaos.routers` must find each of them.

    python -m tests.loadgen.simulator.router_mutants      how many schedules each takes
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_worker.core.choice import RouterChoice
from gpu_worker.core.lending import Lender
from loadgen.simulator.chaos.clients import SimQuery
from loadgen.simulator.chaos.routers import run_schedule
from superserve.client.session import Session
from superserve.client.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from superserve.client.reply import Answers
    from superserve.wire import Results


class _Session(Session[SimQuery]):
    """A session, as chaos makes one."""


def _with(spread: type[Spread]) -> Any:
    """Return a session class whose routers are chosen by a broken spread."""

    class Broken(_Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.spread = spread(options["start"])

    return Broken


class ForgetsTheLost(_Session):
    """What a lost router had goes to nobody."""

    def lost(self, router: int = 0) -> None:
        """Lose a router, and look after nothing."""
        super().lost(router)
        self._is_to_home = False


class EndsWithDraining(_Session):
    """Takes a draining router's refusal for the end."""

    def _take_back(self, _ids: list[int], _router: int) -> bool:
        return False


class BelievesOneRouter(_Session):
    """Drops what any but the first router answers."""

    def answered(
        self, results: Results, now_ns: int, router: int = 0
    ) -> Iterator[tuple[Answers, list[SimQuery | None]]]:
        """Take the answers of one router."""
        if router == 0:
            yield from super().answered(results, now_ns, router)


class EndsTwice(_Session):
    """Keeps a query of which another router has a copy, for that one's answer."""

    def answered(
        self, results: Results, now_ns: int, router: int = 0
    ) -> Iterator[tuple[Answers, list[SimQuery | None]]]:
        """Take answers, and forget that they came."""
        for answers, queries in super().answered(results, now_ns, router):
            for query in queries:
                if query is not None and query.n_sends:
                    self._pending[query.query_id] = query
            yield answers, queries


class NeverDoubts(Spread):
    """Waits for a silent router for ever."""

    def beat(self, _now_ns: int, _pending: Container[int]) -> tuple[list[int], list[int]]:
        """Judge nobody."""
        return [], []


class SpendsFreely(Spread):
    """Has no bound on what is sent again in doubt."""

    def _earn(self, n: int, now_ns: int) -> None:
        super()._earn(n, now_ns)
        self._budget = 1e9


class TrustsTheBarren(Spread):
    """Waits for a router that has lost its GPUs."""

    def suspects(self) -> list[int]:
        """Return only those that are silent."""
        return [i for i in self.live() if self.routes[i].is_suspect]


class LikesTheDraining(Spread):
    """Sends to a router that refuses, as long as that answers fastest."""

    def usable(self) -> list[int]:
        """Return the peer that is there."""
        return self.live()


class LendsNothing(Lender[Any]):
    """Keeps its credits, which no promise depends on."""

    def turn(self, own: int | None, _prices: Mapping[int, float], now_ns: int) -> None:
        """Visit nobody."""
        super().turn(own, {}, now_ns)


class StaysAlone(RouterChoice):
    """Waits for the lost router."""

    def next_after_loss(self, _now_ns: int) -> int | None:
        """Know of no other."""
        return None


class GreetsTheDeadForEver(RouterChoice):
    """Waits for the WELCOME of whatever it greeted."""

    def next_after_silence(self, _now_ns: int) -> int | None:
        """Have patience."""
        return None


class RouterMutant(NamedTuple):
    """A broken part, a schedule that shows it, and what is said then."""

    parts: dict[str, Any]
    seed: int
    said: str


_PATIENT = "could wait .* ms, and ended as"

MUTANTS: dict[str, RouterMutant] = {
    "what a lost router had goes nowhere": RouterMutant({"make_session": ForgetsTheLost}, 1, _PATIENT),
    "a draining router ends queries": RouterMutant({"make_session": EndsWithDraining}, 21, _PATIENT),
    "only one router is believed": RouterMutant({"make_session": BelievesOneRouter}, 1, _PATIENT),
    "a query ends twice": RouterMutant({"make_session": EndsTwice}, 1, "ended so:"),
    "no router is ever doubted": RouterMutant({"make_session": _with(NeverDoubts)}, 34, _PATIENT),
    "doubt costs nothing": RouterMutant({"make_session": _with(SpendsFreely)}, 81, "again in doubt"),
    # Workers of others would lend it their credits, and save those queries.
    "a router without GPUs is trusted": RouterMutant(
        {"make_session": _with(TrustsTheBarren), "make_lender": LendsNothing}, 102, _PATIENT
    ),
    "work goes to routers that drain": RouterMutant({"make_session": _with(LikesTheDraining)}, 60, _PATIENT),
    "a worker stays with a lost router": RouterMutant(
        {"make_choice": StaysAlone}, 47, "belongs to 0|" + _PATIENT
    ),
    "a worker greets a dead router for ever": RouterMutant(
        {"make_choice": GreetsTheDeadForEver}, 18, "belongs to 0|" + _PATIENT
    ),
}
"""How each is built, a seed that shows it, and the checker's message about it."""


def find_all(mutants: dict[str, RouterMutant], at_most: int = 400) -> None:
    """Print how many schedules it takes to find each; exit 1 if one is not found."""
    is_found = True
    for name, mutant in mutants.items():
        outcomes = (run_schedule(seed, **mutant.parts) for seed in range(at_most))
        found = next((outcome for outcome in outcomes if outcome.violation is not None), None)
        is_found = is_found and found is not None
        said = f"NOT FOUND by {at_most}" if found is None else f"seed {found.seed}, at {found.violation}"
        print(f"mutant, {name}: {said}", flush=True)  # noqa: T201  a command of its own
    sys.exit(not is_found)


if __name__ == "__main__":
    find_all(MUTANTS)
