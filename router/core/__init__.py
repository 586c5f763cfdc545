"""RouterCore: events in, actions out. No socket, clock, log, thread or hidden randomness.

A host calls `handle` with each event and the instant at which it was handled. Once it has drained
its sockets it calls `advance`, which expires, judges and dispatches, and returns the actions to
carry out. The live router, the simulator and the replay of a recorded log are such hosts. The
same calls always return the same actions.

Its parts, each of which imports only those above it:

    events                    what goes in and out; the numbers
    edf, lanes, estimates     the queue; quantiles of what was measured
    workers                   processes and GPUs: states, credit, slowdown; a batch in flight
    model                     what belongs to a model: queue, demand, profiles and policies
    ledger                    every query from its arrival to its end: counts, batches, answers
    slack                     the formulas: when a batch can begin, what it takes, the way back
    admission     (ledger)    clients, and which of their queries may wait
    fleet         (ledger)    workers join, report, fall silent and overrun
    price         (fleet)     what GPU time is worth here, for workers that may lend theirs
    dispatch      (both)      what is refused at the head, and which batch goes to which worker

Clients' events go to admission, workers' to the fleet; `advance` lets the fleet judge and then the
dispatcher decide. All their results go through the ledger, which ends each query exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from router.core.admission import Admission
from router.core.dispatch import Dispatcher
from router.core.events import (
    Action,
    CancelAsked,
    ClientJoined,
    ClientLeft,
    CoreSettings,
    DrainRouter,
    DrainWorker,
    Event,
    Finished,
    Pulled,
    QueriesArrived,
    Retuned,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.fleet import Fleet
from router.core.ledger import Ledger
from router.core.model import Model
from router.core.price import Price
from router.core.slack import Slack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from profiles.table import Profile
    from router.core.edf import EdfQueue
    from router.core.events import Key
    from router.core.ledger import ClientState
    from router.core.workers import Peer, Worker
    from router.policies import Policy


class RouterCore:
    """Passes events to its parts, lets them decide, and returns the actions to carry out.

    Args:
        make_policy: Builds the policy for a worker's profile; called once per distinct profile.
        settings: The numbers.
        ledger: Builds this part; tests pass broken ones instead.
        admission: Builds this part.
        fleet: Builds this part.
        dispatcher: Builds this part.
    """

    def __init__(
        self,
        make_policy: Callable[[Profile], Policy],
        settings: CoreSettings | None = None,
        *,
        ledger: type[Ledger] = Ledger,
        admission: type[Admission] = Admission,
        fleet: type[Fleet] = Fleet,
        dispatcher: type[Dispatcher] = Dispatcher,
    ) -> None:
        self.settings = settings or CoreSettings()
        self.model = Model(make_policy)
        self.ledger = ledger(self.model)
        self.slack = Slack(self.settings)
        self.admission = admission(self.ledger, self.settings)
        self.fleet = fleet(self.ledger, self.slack, self.settings)
        self.dispatcher = dispatcher(self.ledger, self.fleet, self.slack)
        self.price = Price(self.ledger, self.fleet)
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            ClientJoined: self.admission.client_joined,
            ClientLeft: self.admission.client_left,
            QueriesArrived: self.admission.queries_arrived,
            CancelAsked: self.admission.cancel_asked,
            DrainRouter: self.admission.drain,
            WorkerJoined: self._worker_joined,
            WorkerHeard: self.fleet.heard,
            Pulled: self.fleet.pulled,
            Finished: self.fleet.finished,
            WorkerLeft: self.fleet.left,
            DrainWorker: self.fleet.drain,
            Retuned: self._retuned,
        }

    def handle(self, event: Event, now_ns: int) -> None:
        """Take one event. Nothing is decided until `advance`."""
        self._handlers[type(event)](event, now_ns)

    def advance(self, now_ns: int) -> list[Action]:
        """Expire, judge and dispatch as of `now_ns`; return all actions to carry out."""
        self.fleet.judge(now_ns)
        self.dispatcher.decide(now_ns)
        return self.ledger.take_actions()

    def next_wake_ns(self) -> int | None:
        """Return the instant at which `advance` has something to do, even without an event."""
        judge_ns = self.fleet.next_wake_ns()
        decide_ns = self.dispatcher.next_wake_ns()
        if judge_ns is None or decide_ns is None:
            return decide_ns if judge_ns is None else judge_ns
        return min(judge_ns, decide_ns)

    def check(self) -> None:
        """Assert conservation and the bounds of every credit; cheap enough for every step of a test."""
        self.ledger.check()
        self.fleet.check()

    def _worker_joined(self, event: WorkerJoined, now_ns: int) -> None:
        is_first = self.model.reference is None
        self.fleet.joined(event, now_ns)
        if is_first:
            # Floors become rows of a profile, and lanes need floors: neither was possible before.
            self.admission.floor_waiting()
            self.model.show_demand()
            self.fleet.refresh()  # sets the capacity of the demand that was just made

    def _retuned(self, event: Retuned, _now_ns: int) -> None:
        """Take other settings; ConfigError, and nothing has changed, if its policy cannot be built."""
        self.model.retune(event.make_policy)
        self.settings = event.settings
        self.admission.retune(event.settings)
        self.slack.retune(event.settings)
        self.fleet.retuned()
        self.dispatcher.retuned()

    # --- what hosts and reports read --------------------------------------------------------

    @property
    def queue(self) -> EdfQueue:
        """The queries that wait."""
        return self.ledger.queue

    @property
    def received(self) -> int:
        """Queries that arrived."""
        return self.ledger.received

    @property
    def in_flight(self) -> int:
        """Queries that are in dispatched batches."""
        return self.ledger.in_flight

    @property
    def answered(self) -> list[int]:
        """Queries that ended, by `Status`."""
        return self.ledger.answered

    @property
    def n_answered(self) -> int:
        """Queries that got their terminal answer."""
        return self.ledger.n_answered

    @property
    def n_batches(self) -> int:
        """Batches dispatched so far."""
        return self.ledger.n_batches

    @property
    def n_redispatched(self) -> int:
        """Queries queued a second time."""
        return self.ledger.n_redispatched

    @property
    def held_bytes(self) -> int:
        """Payload bytes held."""
        return self.ledger.held_bytes

    @property
    def payload_bytes_in(self) -> int:
        """Payload bytes of all messages that arrived."""
        return self.ledger.payload_bytes_in

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs that workers sent."""
        return self.ledger.output_bytes

    @property
    def ok_accuracy(self) -> float:
        """Percent, summed over the queries that ended OK."""
        return self.ledger.ok_accuracy

    @property
    def busy_ns(self) -> int:
        """Time that GPUs executed batches."""
        return self.ledger.busy_ns

    @property
    def n_executed(self) -> int:
        """Queries in those batches."""
        return self.ledger.n_executed

    @property
    def n_lost_peers(self) -> int:
        """Worker processes that were lost."""
        return self.fleet.n_lost_peers

    @property
    def n_wrong_choices(self) -> int:
        """Answers of policies that could not be carried out."""
        return self.dispatcher.n_wrong

    @property
    def n_stale(self) -> int:
        """Reports of workers that were ignored as stale."""
        return self.fleet.n_stale

    @property
    def peers(self) -> dict[Key, Peer]:
        """The worker processes, by connection."""
        return self.fleet.peers

    @property
    def clients(self) -> dict[Key, ClientState]:
        """The clients, by connection."""
        return self.admission.clients

    @property
    def draining(self) -> bool:
        """Whether new queries are refused."""
        return self.admission.draining

    def workers(self) -> Iterator[Worker]:
        """Yield every GPU of every known worker process, guests included."""
        return self.fleet.workers()

    def residents(self) -> Iterator[Worker]:
        """Yield every GPU that belongs to this router."""
        for peer in list(self.fleet.peers.values()):
            if not peer.is_guest:
                yield from list(peer.workers)

    @property
    def n_borrowed(self) -> int:
        """Batches that ran on GPUs of other routers."""
        return self.fleet.n_borrowed
