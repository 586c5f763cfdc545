"""The arithmetic of slack: when a batch can begin, how long it takes alone, and the way there and back.

    now        begin                        end              leaves the router       deadline
     |-- there --|------ executing ----------|------- back -------|-- to the client --|

A worker's *transport* is both ways and all buffers on them, as measured. Half its median counts as the
way there, the rest as the way back. Each formula is here, and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.estimates import Punctuality

if TYPE_CHECKING:
    from router.core.events import CoreSettings
    from router.core.ledger import ClientState
    from router.core.workers import Peer, Worker


_SPARED = 3
"""The worst way may take one part in this many of the slack beyond the usual way. Without a limit, 100 ms in
which messages took 20 ms more cost eight GPUs at 6,400 q/s 45 queries in 100 of the next seconds, and none of
four policies more than those of that moment with it."""


class Slack:
    """The formulas, with the core's constants.

    Args:
        settings: The core's constants.

    Attributes:
        punctuality: How late the router comes to its decisions. It tells how far ahead to decide.
    """

    __slots__ = ("_grace_ns", "_least_margin_ns", "_margin_ns", "_overrun_factor", "punctuality")

    def __init__(self, settings: CoreSettings) -> None:
        self.punctuality = Punctuality(settings.least_ahead_ns, settings.dispatch_ahead_ns)
        self._least_margin_ns = min(settings.least_margin_ns, settings.margin_ns)
        self._margin_ns = settings.margin_ns
        self._overrun_factor = settings.overrun_factor
        self._grace_ns = settings.overrun_grace_ns

    def retune(self, settings: CoreSettings) -> None:
        """Take another margin."""
        self._least_margin_ns = min(settings.least_margin_ns, settings.margin_ns)
        self._margin_ns = settings.margin_ns

    # --- when -------------------------------------------------------------------------------

    def free_ns(self, worker: Worker, now_ns: int) -> int:
        """Return the instant from which a worker has nothing to run: now, unless it is busy."""
        return max(now_ns, worker.free_at_ns)

    def begin_ns(self, worker: Worker, now_ns: int) -> int:
        """Return the instant at which a batch sent now can begin: it has arrived and the worker is free."""
        there_ns = now_ns + self.there_ns(worker)
        return max(there_ns, worker.free_at_ns)

    def decide_ns(self, worker: Worker) -> int:
        """Return the instant from which a worker gets its next batch: shortly before it is free."""
        return worker.free_at_ns - (self.punctuality.ahead_ns + worker.transport.median_ns)

    # --- the way there and back -------------------------------------------------------------

    def there_ns(self, worker: Worker) -> int:
        """Return how long a directive usually takes to a worker."""
        # Half the round trip: clocks of two hosts are never compared, so the ways cannot be told apart.
        return worker.transport.median_ns // 2

    def back_ns(self, worker: Worker) -> int:
        """Return how long a report may take back to the router: nearly the worst seen, plus a margin.

        The margin is what the worst way of the last ten seconds took beyond that, within bounds: nothing
        that an estimate of so few ways leaves out.
        """
        nearly_ns, worst_ns = worker.transport.bound_ns(), worker.peer.worst_way_ns
        margin_ns = worst_ns - nearly_ns
        if margin_ns > self._margin_ns:
            margin_ns = self._margin_ns
        elif margin_ns < self._least_margin_ns:
            margin_ns = self._least_margin_ns
        return nearly_ns - self.there_ns(worker) + margin_ns

    def way_back_ns(self, worker: Worker, client: ClientState) -> int:
        """Return how long the way back to the client may take: nearly the worst seen on both parts."""
        transport = worker.transport
        one_way_differs_ns = (transport.bound_ns() - transport.median_ns) // 2
        return self.back_ns(worker) + client.return_bound_ns(one_way_differs_ns)

    def careful_way_back_ns(self, worker: Worker, client: ClientState, usual_ns: int, whole_ns: int) -> int:
        """Return the way back to allow for at first: nearly the worst, within what an answer can spare.

        A stall of a machine or a network makes the worst way longer than the whole slack of a query. To
        decide by that is to refuse everything, and what is refused measures no way: it would stay so. So the
        worst counts for at most a share of what the usual way leaves.

        Args:
            worker: Who would run the batch.
            client: Who waits for the answer.
            usual_ns: What that way usually takes.
            whole_ns: The query's slack when it arrived.
        """
        spared_ns = (whole_ns - usual_ns) // _SPARED if whole_ns > usual_ns else 0
        return min(self.way_back_ns(worker, client), usual_ns + spared_ns)

    def usual_way_back_ns(self, worker: Worker, client: ClientState) -> int:
        """Return how long the way back to the client usually takes, without a margin."""
        return worker.transport.median_ns - self.there_ns(worker) + client.return_ns

    def leave_ns(self, deadline_ns: int, client: ClientState) -> int:
        """Return when an answer must leave the router to be usually on time."""
        return deadline_ns - client.return_ns

    # --- how long ---------------------------------------------------------------------------

    def alone_ns(self, worker: Worker, row: int) -> int:
        """Return how long a batch of one may take on a profile row: its p99, times this GPU's slowdown."""
        return int(worker.profile.latency_p99_ns(row, 1) * worker.corrected(row))

    def alone_and_back_ns(self, worker: Worker, row: int) -> int:
        """Return how long a batch of one on a row and its way back to the router may take."""
        return self.alone_ns(worker, row) + self.back_ns(worker)

    def quickest_ns(self, peer: Peer) -> int:
        """Return the quickest answer of any GPU of a process: its smallest subnet alone, and the transport.

        With the usual transport, not the worst: queries refused for this have no second chance.
        """
        return min([self.alone_ns(worker, 0) for worker in peer.workers]) + peer.transport.median_ns

    def overrun_ns(self, worker: Worker, row: int, n: int) -> int:
        """Return how long a batch of n may run before its worker counts as overrun."""
        # A GPU that measured faster than its profile still gets the profile's time.
        p99_ns = int(worker.profile.latency_p99_ns(row, n) * max(1.0, worker.corrected(row)))
        return self._overrun_factor * p99_ns + worker.transport.bound_ns() + self._grace_ns
