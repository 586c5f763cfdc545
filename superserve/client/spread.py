"""Spread: which of several equal routers a client's next message goes to, and which of them is gone. Pure.

A client counts what each router owes it: by Little's law the queries without an answer, divided by the
router's GPUs, are what the next one has to wait for, in GPU time. No router needs to report a wait for
that, and no figure is older than the client's last message.

Silence proves nothing by itself: an idle router has nothing to say. So a router that owes answers is asked
with a PING once it has been silent for `BEAT_NS`. It is *suspect* when it has not answered for a few times
the longest round trip that was measured lately, and *dead* after `DEAD_NS`, like a worker that misses six
heartbeats. A broken connection is a death that needs no waiting.

What a suspect router owes may be sent to another as well, within a budget: `SHARE` of the queries sent
lately, so that a stall that comes to nothing does not double the load of the others. So may all that a
router owes which has lost its GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.clock import MS
from superserve.wire import MAX_QUERIES

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

BEAT_NS = 25 * MS
"""Silence after which a router that owes answers is asked whether it is there."""

PATIENCE_NS = (40 * MS, 300 * MS)
"""Least and most time that an asked router has before it is suspect. In between, four times the longest
round trip measured lately: a busy Python process on a loaded machine may sleep through tens of ms."""

DEAD_NS = 600 * MS
"""How long an asked router may stay silent until it is dead: six heartbeats of 100 ms."""

COPY_EVERY_NS = 10 * MS
"""Least time between two looks at what a router in doubt has: each walks through all of it."""

SHARE = 0.1
"""Queries sent to another router on mere suspicion, as a share of those sent."""

_KEPT_NS = 2_000 * MS
"""The budget is that share of what was sent within about this time; what was not used is lost after it."""

_LEAST_BUDGET = 16.0
"""The budget's least bound: a client that sends a query now and then may repeat it."""

_GOLDEN = 0.6180339887498949

_SPARE = 4_096
"""Ids of answered queries that a route may hold beyond twice what it owes."""


class Route:
    """What a client knows of one router.

    Attributes:
        epoch: The router's life; None while it is not there.
        gpus: GPUs that get work there, as its last WELCOME said; None if it did not.
        is_draining: It takes no new queries.
        is_suspect: It owes answers and does not answer a PING.
        heard_ns: When its last message came.
        asked_ns: When the PING was sent that it has not answered; None if there is none.
        n_out: Queries without an answer that it has.
    """

    __slots__ = (
        "asked_ns", "busy_ns", "copied_ns", "epoch", "gpus", "heard_ns", "is_draining", "is_suspect",
        "n_kept", "n_out", "sent", "worst_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.gpus: int | None = None
        self.is_draining = False
        self.is_suspect = False
        self.heard_ns = 0
        self.busy_ns = 0
        self.asked_ns: int | None = None
        self.worst_ns = PATIENCE_NS[0] // 4
        self.n_out = 0
        self.sent: list[Sequence[int]] = []
        self.n_kept = 0
        self.copied_ns = -COPY_EVERY_NS

    @property
    def patience_ns(self) -> int:
        """How long it may take to answer a PING."""
        least_ns, most_ns = PATIENCE_NS
        return min(most_ns, max(least_ns, 4 * self.worst_ns))

    def forget(self) -> None:
        """Drop what was said to it: it is gone, or another router now."""
        self.is_draining = self.is_suspect = False
        self.asked_ns = None
        self.n_out = self.n_kept = 0
        self.sent = []

    def hear(self, heard_ns: int) -> None:
        """Note when it was last heard."""
        self.heard_ns = heard_ns
        asked_ns = self.asked_ns
        if asked_ns is not None and heard_ns >= asked_ns:
            # The longest of the last ones, more or less: an eighth is forgotten with each.
            self.worst_ns = max(heard_ns - asked_ns, self.worst_ns - self.worst_ns // 8)
            self.asked_ns = None
            self.is_suspect = False


class Spread:
    """The routers of one client.

    Args:
        start: 0 to 1; where the sequence begins that draws the routers to compare: clients should differ.

    Attributes:
        routes: The routers; each keeps its number.
        n_doubted: Queries sent to a second router on mere suspicion so far.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.routes = [Route()]
        self.n_doubted = 0
        self._drawn = start
        self._budget = _LEAST_BUDGET
        self._budget_ns = 0
        self._rate = 0.0

    @property
    def is_many(self) -> bool:
        """Whether there is more than one router to know of."""
        return len(self.routes) > 1

    def add(self) -> None:
        """Know of one more router."""
        self.routes.append(Route())

    def live(self) -> list[int]:
        """Return the routers that are there."""
        return [i for i, route in enumerate(self.routes) if route.epoch is not None]

    def usable(self) -> list[int]:
        """Return the routers that new work should go to; those in doubt if there are no others."""
        live = [(i, self.routes[i]) for i in self.live()]
        well = [(i, route) for i, route in live if not route.is_draining]
        for some in (
            [i for i, route in well if not route.is_suspect and route.gpus != 0],
            [i for i, route in well if not route.is_suspect],
            [i for i, _ in well],
        ):
            if some:
                return some
        return [i for i, _ in live]

    def choose(self, n: int) -> int | None:
        """Return the router for a message of `n` queries, the better of two by expected wait, or None.

        Two that are drawn are enough to keep many clients from all turning to the same one.
        """
        routes = self.routes
        if len(routes) == 1:
            return None if routes[0].epoch is None else 0
        some = self.usable()
        if len(some) <= 1:
            return some[0] if some else None
        n_others = len(some) - 1
        at = int(self._draw() * len(some))
        one, other = some[at], some[(at + 1 + int(self._draw() * n_others)) % len(some)]
        return one if self._wait(one, n) <= self._wait(other, n) else other

    def _draw(self) -> float:
        """Return the next number of a sequence that fills 0 to 1 evenly: nothing here is random."""
        self._drawn = (self._drawn + _GOLDEN) % 1.0
        return self._drawn

    def _wait(self, i: int, n: int) -> float:
        route = self.routes[i]
        return (route.n_out + n) / (route.gpus or 1)

    # --- what is where --------------------------------------------------------------------

    def sent(self, i: int, ids: Sequence[int], now_ns: int) -> None:
        """Record that these queries were sent to a router."""
        route = self.routes[i]
        if route.n_out <= 0:
            route.n_out = 0
            route.busy_ns = now_ns
        route.n_out += len(ids)
        route.sent.append(ids)
        route.n_kept += len(ids)
        self._earn(len(ids), now_ns)

    def answered(self, i: int, n: int) -> None:
        """Record that a router answered `n` queries."""
        route = self.routes[i]
        route.n_out = max(0, route.n_out - n)

    def is_bloated(self, i: int) -> bool:
        """Return whether a router's list of ids should be pruned."""
        route = self.routes[i]
        return route.n_kept > 2 * route.n_out + _SPARE

    def prune(self, i: int, pending: Container[int]) -> None:
        """Keep only ids that have no answer yet, and count them again."""
        route = self.routes[i]
        kept = [[one for one in ids if one in pending] for ids in route.sent]
        route.sent = [ids for ids in kept if ids]
        route.n_out = route.n_kept = sum([len(ids) for ids in route.sent])

    def on_live(self) -> set[int]:
        """Return the ids that some router that is there may have."""
        found: set[int] = set()
        for i in self.live():
            for ids in self.routes[i].sent:
                found.update(ids)
        return found

    # --- who is gone ----------------------------------------------------------------------

    def beat(self, now_ns: int, pending: Container[int]) -> tuple[list[int], list[int]]:
        """Judge the routers that owe answers, if there is another to turn to.

        Args:
            now_ns: The instant.
            pending: The queries without an answer: some ended without the router's answer.

        Returns:
            The routers to send a PING, and those that are dead: their epoch is for the caller to end.
        """
        asked: list[int] = []
        dead: list[int] = []
        live = self.live()
        if len(live) < 2:
            for i in live:  # nothing else to turn to: what it owes may as well wait for it
                self.routes[i].is_suspect = False
            return asked, dead
        for i in live:
            route = self.routes[i]
            asked_ns = route.asked_ns
            if route.n_out <= 0:
                continue
            if asked_ns is None:
                if now_ns >= max(route.heard_ns, route.busy_ns) + BEAT_NS:
                    self.prune(i, pending)
                    if route.n_out:
                        route.asked_ns = now_ns
                        asked.append(i)
            elif now_ns >= asked_ns + DEAD_NS:
                dead.append(i)
            elif now_ns >= asked_ns + route.patience_ns:
                route.is_suspect = True
        return asked, dead

    def next_beat_ns(self) -> int | None:
        """Return when `beat` has something to do; None if no router owes anything."""
        live = self.live()
        if len(live) < 2:
            return None
        found: int | None = None
        for i in live:
            route = self.routes[i]
            if route.n_out <= 0:
                continue
            asked_ns = route.asked_ns
            if asked_ns is None:
                at_ns = max(route.heard_ns, route.busy_ns) + BEAT_NS
            elif route.is_suspect:
                at_ns = asked_ns + DEAD_NS
            else:
                at_ns = asked_ns + route.patience_ns
            if found is None or at_ns < found:
                found = at_ns
        return found

    def suspects(self) -> list[int]:
        """Return the routers whose queries may be sent to another as well: suspect, or without a GPU."""
        return [i for i in self.live() if self.routes[i].is_suspect or self.routes[i].gpus == 0]

    def copies(self, i: int, is_wanted: Callable[[int], bool], now_ns: int) -> list[int]:
        """Return queries of a router in doubt to send to another too, unless one that serves has them.

        Those of a suspect router within the budget. One without a GPU serves none, so they double no load.
        """
        route = self.routes[i]
        n = len(route.sent) * MAX_QUERIES if route.gpus == 0 else int(self._budget)
        if n <= 0 or route.n_out <= 0 or now_ns < route.copied_ns + COPY_EVERY_NS:
            return []
        usable = self.usable()
        if i in usable:
            return []
        route.copied_ns = now_ns
        served = {one for j in usable for ids in self.routes[j].sent for one in ids}
        found: list[int] = []
        for ids in route.sent:
            found += [one for one in ids if one not in served and is_wanted(one)]
            if len(found) >= n:
                break
        del found[n:]
        if route.gpus != 0:
            self._budget -= len(found)
            self.n_doubted += len(found)
        return found

    # --- what doubt may cost --------------------------------------------------------------

    def _earn(self, n: int, now_ns: int) -> None:
        """Add to the budget; it holds no more than the share of what was sent in the last two seconds."""
        passed = min(1.0, (now_ns - self._budget_ns) / _KEPT_NS)
        self._budget_ns = now_ns
        self._rate = self._rate * (1.0 - passed) + n  # queries in the last `_KEPT_NS`, smoothed
        self._budget = min(max(_LEAST_BUDGET, SHARE * self._rate), self._budget + SHARE * n)
