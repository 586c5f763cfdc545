"""Which of several routers a worker process belongs to. Pure: briefs and instants in, decisions out.

    start      ask every router, and join the one with the fewest GPUs
    lost       join another at once, by the last briefs: nobody is asked first, because a GPU waits
    every 1 s  ask again; leave for a router that has fewer GPUs by more than this process has

With "by more than this process has" a move always makes the two more alike, so no process moves to and
fro. Instants differ by chance from process to process, so that they do not all move at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_worker.core.link import LinkState
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.core import WorkerCore
    from gpu_worker.core.queue import B
    from superserve.hello import RouterBrief

ASK_EVERY_NS = 1_000 * MS
"""Time between two rounds of questions; each costs a router some 50 us for each process."""

CHOOSE_NS = 250 * MS
"""How long a process that starts waits for the answers of all routers, and a greeted router for its WELCOME,
until others are tried."""

DEAD_NS = 600 * MS
"""A router that answers no PING for six heartbeats is lost, if there is another."""

PROMPT_NS = 50 * MS
"""A move is decided only on answers that took no longer than this."""

RETRY_NS = 200 * MS
"""Time between two rounds of questions while no router is known to live."""

FRESH_NS = 3_000 * MS
"""An answer that is older than this says nothing."""


class _Known:
    """What is known of one router."""

    __slots__ = ("brief", "told_ns")

    def __init__(self) -> None:
        self.brief: RouterBrief | None = None
        self.told_ns = 0


class RouterChoice:
    """The routers that a worker process knows, and the one that it belongs to or greets.

    Args:
        endpoints: The routers; of two that are alike, the earlier is joined.
        n_gpus: GPUs of this process.
        now_ns: The present instant.
        jitter: Drawn for each round of questions, about 1.

    Attributes:
        endpoints: All that are known; a router keeps its number.
        own: The number of the router that it belongs to or greets; None until one is chosen.
        leaving_to: The router that it leaves its own for; None if it does not.
    """

    def __init__(
        self, endpoints: Sequence[str], n_gpus: int, now_ns: int, jitter: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.endpoints = list(endpoints)
        self.own: int | None = 0 if len(self.endpoints) == 1 else None
        self.leaving_to: int | None = None
        self._known = [_Known() for _ in self.endpoints]
        self._n_gpus = n_gpus
        self._jitter = jitter
        self._began_ns = now_ns
        self._ask_ns = self._asked_ns = now_ns
        self._greeted_ns = now_ns

    @property
    def is_many(self) -> bool:
        """Whether there is more than one router."""
        return len(self.endpoints) > 1

    def learn(self, endpoints: Sequence[str]) -> list[int]:
        """Take a list of routers from one of them; return the numbers of those that are new."""
        first = len(self.endpoints)
        for endpoint in endpoints:
            if endpoint not in self.endpoints:
                self.endpoints.append(endpoint)
                self._known.append(_Known())
        return list(range(first, len(self.endpoints)))

    def told(self, i: int, brief: RouterBrief, now_ns: int) -> None:
        """Take a router's answer."""
        known = self._known[i]
        known.brief, known.told_ns = brief, now_ns

    def forget(self, i: int) -> None:
        """There is no connection to a router: what it answered says nothing now."""
        self._known[i].brief = None

    def questions(self, now_ns: int) -> list[int]:
        """Return the routers to ask now."""
        if not self.is_many or now_ns < self._ask_ns:
            return []
        self._asked_ns = now_ns
        self._ask_ns = now_ns + int(ASK_EVERY_NS * self._jitter())
        return list(range(len(self.endpoints)))

    def next_due_ns(self) -> int | None:
        """Return when there is something to do; None with one router."""
        if not self.is_many:
            return None
        if self.own is None:
            return min(self._ask_ns, self._began_ns + CHOOSE_NS)
        return self._ask_ns

    def prices(self, now_ns: int) -> dict[int, float]:
        """Return what others say that GPU time is worth to them: those that can be lent to."""
        if self.own is None:
            return {}
        mine = self._known[self.own].brief
        found: dict[int, float] = {}
        for i in range(len(self.endpoints)):
            brief = self._fresh(i, now_ns)
            if i == self.own or brief is None or brief.price is None or brief.is_draining:
                continue
            if mine is None or brief.router != mine.router:  # the same router may have two names
                found[i] = brief.price
        return found

    # --- decisions ------------------------------------------------------------------------

    def turn(self, core: WorkerCore[B], now_ns: int, *, is_connected: bool) -> int | None:
        """Return the router to greet now, which is the own one from now on; None to go on as it is.

        Args:
            core: The process's; it learns that it has lost its router, or is to leave it.
            now_ns: The present instant.
            is_connected: Whether there is a connection to the own router.
        """
        if self.own is None:
            return self.first(now_ns)
        link = core.link
        if link is LinkState.JOINING:
            to, self.leaving_to = self.leaving_to, None
            if to is None:
                return self.next_after_silence(now_ns)
            self._take(to, now_ns)
            return to
        if link is LinkState.SERVING or link is LinkState.LEAVING:
            is_silent = now_ns - core.heard_ns > DEAD_NS
            if is_silent or not is_connected:
                other = self.next_after_loss(now_ns)
                if other is not None:
                    core.lost("the router is silent" if is_silent else "the connection broke", now_ns)
                return other
            if link is LinkState.SERVING:
                self.leaving_to = self.better(now_ns)
                if self.leaving_to is not None:
                    core.leave(now_ns)
        return None

    def first(self, now_ns: int) -> int | None:
        """Choose the first router, once all have answered or time is up; return it if it is chosen now."""
        if self.own is not None:
            return None
        is_late = now_ns >= self._began_ns + CHOOSE_NS
        if not is_late and any(known.brief is None for known in self._known):
            return None
        best = self._best(now_ns, None)
        self.own = 0 if best is None else best
        self._greeted_ns = now_ns
        return self.own

    def next_after_loss(self, now_ns: int) -> int | None:
        """The own router is lost: return another that lives, now the own one; None if none is known to."""
        if self.own is None:
            return None
        best = self._best(now_ns, self.own)
        self._known[self.own].brief = None
        if best is not None:
            self._take(best, now_ns)
        else:
            self._ask_ns = min(self._ask_ns, self._asked_ns + RETRY_NS)
        return best

    def next_after_silence(self, now_ns: int) -> int | None:
        """The greeted router sends no WELCOME: return another to greet after a while; None for patience."""
        if self.own is None or now_ns < self._greeted_ns + CHOOSE_NS:
            return None
        return self.next_after_loss(now_ns)

    def better(self, now_ns: int) -> int | None:
        """Return a router that needs this process more than its own does; None if there is none.

        For a process that serves. Its own router's draining is no reason: it needs its GPUs to end.
        """
        if self.own is None:
            return None
        mine = self._fresh(self.own, now_ns)
        best = self._best(now_ns, self.own)
        if mine is None or best is None:
            return None
        # Prompt answers of this round only. A router that has ended gave its answer to an earlier one; and
        # one that goes on after a stop answers all processes at the same instant: all would move to it.
        for i in (self.own, best):
            if not 0 <= self._known[i].told_ns - self._asked_ns <= PROMPT_NS:
                return None
        other = self._fresh(best, now_ns)
        if other is None or mine.is_draining or mine.gpus - other.gpus <= self._n_gpus:
            return None
        # Decided on: both answers are used up, so that the next decision has newer ones.
        self._known[self.own].brief = self._known[best].brief = None
        return best

    def _take(self, i: int, now_ns: int) -> None:
        self.own = i
        self.leaving_to = None
        self._greeted_ns = now_ns
        # Soon, not at the next round: others may have moved to the same router at once.
        self._ask_ns = now_ns + int(ASK_EVERY_NS * self._jitter())

    def _fresh(self, i: int, now_ns: int) -> RouterBrief | None:
        known = self._known[i]
        return known.brief if now_ns - known.told_ns <= FRESH_NS else None

    def _best(self, now_ns: int, besides: int | None) -> int | None:
        """Return the router with the fewest GPUs that does not drain, by fresh answers."""
        mine = None if besides is None else self._fresh(besides, now_ns)
        found: int | None = None
        least = 0
        for i in range(len(self.endpoints)):
            brief = self._fresh(i, now_ns)
            if i == besides or brief is None or brief.is_draining:
                continue
            if mine is not None and brief.router == mine.router:
                continue  # the own router, listed under another name
            if found is None or brief.gpus < least:
                found, least = i, brief.gpus
        return found
