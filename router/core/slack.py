"""The arithmetic of slack: when a batch can begin, what it takes alone, and the way there and back.

    now        begin                        end              leaves the router       deadline
     |-- there --|------ executing ----------|------- back -------|-- to the client --|

A worker's *transport* is both ways and all buffers between, as measured. Half its median counts as the
way there, and the rest of it as the way back. Each formula stands here, and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.core.ledger import ClientState
    from router.core.settings import CoreSettings
    from router.core.workers import Peer, Worker


class Slack:
    """The formulas, with the core's numbers in them. It keeps nothing else and changes nothing.

    Args:
        settings: The core's numbers.
    """

    __slots__ = ("_ahead_ns", "_grace_ns", "_margin_ns", "_overrun_factor")

    def __init__(self, settings: CoreSettings) -> None:
        self._ahead_ns = settings.dispatch_ahead_ns
        self._margin_ns = settings.margin_ns
        self._overrun_factor = settings.overrun_factor
        self._grace_ns = settings.overrun_grace_ns

    # --- when -------------------------------------------------------------------------------

    def free_ns(self, worker: Worker, now_ns: int) -> int:
        """Return the instant from which a worker has nothing to run: now, unless it is busy."""
        # Not max(): a call of it costs as much as this whole method.
        return max(now_ns, worker.free_at_ns)

    def begin_ns(self, worker: Worker, now_ns: int) -> int:
        """Return the instant at which a batch sent now can begin: the worker is free, and the batch there."""
        there_ns = now_ns + self.there_ns(worker)
        return max(there_ns, worker.free_at_ns)

    def decide_ns(self, worker: Worker) -> int:
        """Return the instant from which a worker is given its next batch: so long before it is free."""
        return worker.free_at_ns - (self._ahead_ns + worker.transport.median_ns)

    # --- the way ----------------------------------------------------------------------------

    def there_ns(self, worker: Worker) -> int:
        """Return what a directive usually takes to a worker."""
        return worker.transport.median_ns // 2

    def back_ns(self, worker: Worker) -> int:
        """Return what a report may take back to the router: nearly the worst seen, and the margin."""
        return worker.transport.bound_ns() - self.there_ns(worker) + self._margin_ns

    def way_back_ns(self, worker: Worker, client: ClientState) -> int:
        """Return what the way back to the client may take: nearly the worst seen of both parts."""
        return self.back_ns(worker) + client.return_bound_ns()

    def usual_way_back_ns(self, worker: Worker, client: ClientState) -> int:
        """Return what the way back to the client usually takes, without a margin."""
        return worker.transport.median_ns - self.there_ns(worker) + client.return_ns

    def leave_ns(self, deadline_ns: int, client: ClientState) -> int:
        """Return when an answer must leave the router to be usually in time."""
        return deadline_ns - client.return_ns

    # --- how long ---------------------------------------------------------------------------

    def alone_ns(self, worker: Worker, row: int) -> int:
        """Return what a batch of one may take on a row of the profile: its p99, as slow as this GPU is."""
        return int(worker.profile.latency_p99_ns(row, 1) * worker.corrected(row))

    def alone_and_back_ns(self, worker: Worker, row: int) -> int:
        """Return what a batch of one on a row and its way back to the router may take."""
        return self.alone_ns(worker, row) + self.back_ns(worker)

    def quickest_ns(self, peer: Peer) -> int:
        """Return the quickest answer that any GPU of a process gives: its smallest subnet alone, and the way.

        The usual way in both directions, not nearly the worst: what is refused for this is refused for good.
        """
        return min([self.alone_ns(worker, 0) for worker in peer.workers]) + peer.transport.median_ns

    def overrun_ns(self, worker: Worker, row: int, n: int) -> int:
        """Return how long a batch of n may run before its worker counts as overrun."""
        # A GPU measured as quicker than its profile is still given the profile's time.
        p99_ns = int(worker.profile.latency_p99_ns(row, n) * max(1.0, worker.corrected(row)))
        return self._overrun_factor * p99_ns + worker.transport.bound_ns() + self._grace_ns
