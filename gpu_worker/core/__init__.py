"""What a worker process says: slots, credit, batches held and running, epochs, heartbeats, drain. Pure.

    messages, `now_ns` -> WorkerCore -> messages       its hosts: the worker's server, the simulator, tests
    DIRECTIVE          -> Gpus       -> ended batches   for each GPU a `GpuQueue`, and what runs its batches:
                                                        a device's thread (`serve.compute`) or `PlayedGpus`

Imports `superserve.wire` and `profiles.table`. No socket, clock, thread, log or torch: a host passes it every
message with the instant at which it was read, then calls `poll`, and sends what that returns. So one class
decides what a worker says, wherever its GPUs are played.

With several routers `choice` says to which one the process belongs, and `lending` lends credits to others.

While joining it sends HELLO every 200 ms until a WELCOME. Each WELCOME with a new epoch starts over: batches
of an older epoch that have not started are dropped, and those that have are not reported, because the
router has given them to others, or is another router that numbers its batches from 1.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Generic

from gpu_worker.core.batches import EndedBatch, Refusal, end_of, refused
from gpu_worker.core.link import (
    DRAIN_TIMEOUT_NS,
    HEARTBEAT_NS,
    HELLO_EVERY_NS,
    PULL_EVERY_NS,
    SILENCE_NS,
    TRANSITIONS,
    UNHEARD_NS,
    Gauges,
    LinkEvent,
    LinkState,
)
from gpu_worker.core.queue import OWN, B, Gpus, TakenBatch
from superserve.clock import SECOND
from superserve.errors import SuperServeError, WireError
from superserve.hello import WorkerWelcome
from superserve.wire import LOWEST, Control, Done, Kind, Message, Ping, Pong, Pull, PullRow, version_refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpu_worker.core.lending import Lender


_OTHERS = (Control, Ping, Pong)
"""A router's messages other than directives."""
# An enum member costs three times as much as a global, several times in each pass of a simulated worker.
_JOINING, _SERVING, _LEAVING, _DRAINING, _STOPPED = LinkState


class RefusedError(SuperServeError):
    """The router has refused this worker."""


class WorkerCore(Generic[B]):
    """One worker process's side of the protocol.

    Args:
        gpus: What runs the batches.
        hello: The body of HELLO; `name` is the process's.
        now_ns: The present instant.
        gauges: Reads the device's gauges for a PULL; must be quick.
        jitter: Drawn for each HELLO to a silent router, about 1: a cluster's workers must not all greet
            a stalled router at the same instant.
        note: Receives messages for the log.
        warn: Receives warnings for the log.

    Attributes:
        link: The state of the link to the router.
        epoch: That of the latest WELCOME; None while it joins.
        counts: Dropped messages, by reason.
        gauges: The device's gauges in the latest PULL.
        busy_ns: When a batch last arrived or ended.
        lender: Lends credits to other routers; None if there is one.
        gpus: What runs the batches.
    """

    def __init__(
        self,
        gpus: Gpus[B],
        hello: Mapping[str, Any],
        now_ns: int,
        *,
        gauges: Callable[[], Gauges] = Gauges,
        jitter: Callable[[], float] = lambda: 1.0,
        note: Callable[[str], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.link = LinkState.JOINING
        self.epoch: int | None = None
        self.counts: Counter[str] = Counter()
        self.gauges = Gauges()
        self.busy_ns = now_ns
        self.lender: Lender[B] | None = None
        self.gpus = self._gpus = gpus
        self._hello = dict(hello)
        self._name = str(hello["name"])
        self._read_gauges = gauges
        self._jitter = jitter
        self._note = note
        self._warn = warn
        self._router = 0  # the router that gave the epoch: two routers may give the same number
        self._refused: list[EndedBatch] = []
        self._is_drain_told = False
        self._is_released = False  # its router has said BYE, and another's batches still run
        self._heard_ns = now_ns
        self._hello_due_ns = now_ns
        self._ping_due_ns = now_ns
        self._pull_due_ns = now_ns
        self._drain_until_ns = now_ns

    # --- what is due ----------------------------------------------------------------------

    def next_due_ns(self) -> int:
        """Return when `poll` has something to do, unless a message comes first."""
        if self.link is _JOINING:
            due_ns = self._hello_due_ns
        else:
            due_ns = self._ping_due_ns
            if self._pull_due_ns < due_ns:
                due_ns = self._pull_due_ns
        ends_ns = self._gpus.next_event_ns()
        return due_ns if ends_ns is None or due_ns < ends_ns else ends_ns

    def poll(self, now_ns: int, on_ended: Callable[[list[EndedBatch]], None] | None = None) -> list[Message]:
        """Return the messages to send, in order; if a send fails, call `lost` and drop the rest.

        Args:
            now_ns: The present instant.
            on_ended: Called with every batch that has ended, of any epoch.
        """
        said: list[Message] = []
        if self.link is _STOPPED:
            return said
        # Reports first: the router waits for them to give a GPU its next batch.
        self._report(said, now_ns, on_ended)
        if self.link is _JOINING or now_ns - self._heard_ns > SILENCE_NS:
            self._greet(said, now_ns)
        if self.link is _DRAINING or self.link is _LEAVING:
            self._drain(said, now_ns)
        if self.link is not _JOINING and self.link is not _STOPPED:
            if now_ns >= self._ping_due_ns:
                self._ping_due_ns = now_ns + HEARTBEAT_NS
                said.append(Ping(now_ns))
            if now_ns >= self._pull_due_ns and self.epoch is not None:
                said.append(self._pull(self.epoch, now_ns))
        return said

    def _report(
        self, said: list[Message], now_ns: int, on_ended: Callable[[list[EndedBatch]], None] | None
    ) -> None:
        """Report the batches that have ended, in one message; of older epochs only that GPUs are free."""
        found = self._gpus.finish_due(now_ns)
        if self._refused:
            found += self._refused
            self._refused = []
        if not found:
            return
        self.busy_ns = now_ns
        if on_ended is not None:
            on_ended(found)
        if self.lender is not None:
            found = self._own_ends(self.lender, found, now_ns)
        rows = [batch.row for batch in found if batch.epoch is not None and batch.epoch == self.epoch]
        if len(rows) < len(found):
            self.counts["ended under another epoch"] += len(found) - len(rows)
            self._pull_due_ns = now_ns  # their GPUs are free, and no DONE will report it
        if not rows:
            return
        if self.link is not _SERVING:
            for row in rows:
                row.credit = 0
        assert self.epoch is not None, "rows are of this epoch"
        said.append(Done(self.epoch, rows))

    def _own_ends(self, lender: Lender[B], found: list[EndedBatch], now_ns: int) -> list[EndedBatch]:
        """Return the batches of the own router, as lending leaves their reports; the others' go to them."""
        for batch in found:
            lender.looked(batch.row.slot, now_ns)
        own = []
        for batch in found:
            row = batch.row
            if batch.source != OWN:
                lender.ended(batch, now_ns)
                continue
            if lender.is_away(row.slot):
                row.credit = 0
            if not row.running_batch:
                row.running_for_ns = lender.running_for_ns(row.slot, OWN, now_ns)
            own.append(batch)
        return own

    def _pull(self, epoch: int, now_ns: int) -> Pull:
        self._pull_due_ns = now_ns + PULL_EVERY_NS
        self.gauges = self._read_gauges()
        return Pull(epoch, [self._pull_row(slot, now_ns) for slot in range(self._gpus.n_slots)])

    def _pull_row(self, slot: int, now_ns: int) -> PullRow:
        report = self._gpus.report(slot, now_ns)
        if self.lender is not None:
            report = self.lender.masked(slot, report, now_ns)
        if self.link is not _SERVING:
            report = report._replace(credit=0)
        return PullRow(slot, *report, *self.gauges)

    def pull_of(self, slot: int, now_ns: int) -> Pull | None:
        """Return a PULL of one GPU; None while no router has welcomed this process."""
        return None if self.epoch is None else Pull(self.epoch, [self._pull_row(slot, now_ns)])

    def _greet(self, said: list[Message], now_ns: int) -> None:
        if now_ns < self._hello_due_ns or self.link not in (_JOINING, _SERVING):
            return
        if self.link is _JOINING:
            self._hello_due_ns = now_ns + HELLO_EVERY_NS
        else:
            self._hello_due_ns = now_ns + int(SECOND * self._jitter())
            silent_s = (now_ns - self._heard_ns) / SECOND
            self._warn(f"router silent for {silent_s:.1f} s; sending HELLO")
        said.append(Control(Kind.HELLO, self._hello, LOWEST))

    # --- incoming messages ----------------------------------------------------------------

    def receive(self, message: Control | Ping | Pong | B, now_ns: int) -> Pong | None:
        """Handle a message of the router; return the answer to a PING.

        Raises:
            WireError: It is not for a worker, or malformed: the host counts it, and the process goes on.
            RefusedError: The router has refused this worker.
        """
        self._heard_ns = now_ns
        if self.link is _STOPPED:
            return None
        if not isinstance(message, _OTHERS):
            self._directive(message, now_ns)
        elif isinstance(message, Control):
            self._control(message, now_ns)
        elif isinstance(message, Ping):
            return Pong(message.stamp_ns, now_ns)
        elif isinstance(message, Pong) and self.lender is not None:
            self.lender.ponged(message, now_ns)
        return None

    def drop(self, reason: str, detail: str) -> None:
        """Count a dropped message; only the first for each reason is logged."""
        self.counts[reason] += 1
        if self.counts[reason] == 1:
            self._warn(f"dropped a message, {reason}: {detail}")

    def _directive(self, order: B, now_ns: int) -> None:
        # The router that sent it has given the batch to another worker, or is gone: its end is not awaited.
        if order.epoch != self.epoch:
            self.drop("of another epoch", f"batch {order.batch_id} of epoch {order.epoch}")
            return
        gpus = self._gpus
        if order.slot >= gpus.n_slots:
            raise WireError(f"directive: slot: expected 0 to {gpus.n_slots - 1}, got {order.slot}")
        self.busy_ns = now_ns
        refusal = gpus.submit(order, now_ns)
        if refusal is not None:
            self._refuse(order, refusal, now_ns)

    def _refuse(self, order: B, refusal: Refusal, now_ns: int) -> None:
        self.drop(f"refused as {refusal.status.name}", refusal.reason)
        report = self._gpus.report(order.slot, now_ns)
        outcome = refused(order, *refusal)
        # Reported with the next DONE, like a batch that ran: each batch must end exactly once.
        self._refused.append(end_of(TakenBatch(order, now_ns), outcome, report, now_ns, now_ns))

    def _control(self, message: Control, now_ns: int) -> None:
        body = message.body
        mismatch = version_refused(message)
        if mismatch is not None:
            raise RefusedError(f"the router refused this worker: {mismatch}")
        match message.kind:
            case Kind.WELCOME:
                self._welcomed(WorkerWelcome.from_body(body), now_ns)
            case Kind.REFUSED if body.get("code") == "say-hello":
                self.lost(f"refused: {body.get('reason', 'say-hello')}", now_ns)
            case Kind.REFUSED:
                raise RefusedError(f"the router refused this worker: {_why(body)}")
            case Kind.DRAIN if body.get("worker") == self._name:
                self.stop(now_ns)  # at once: the router's BYE may be the next message
            case Kind.DRAIN:
                self._note("the router drains")
            case Kind.BYE if self.link is _DRAINING and self.lender is not None and self.lender.holds_any():
                self._is_released = True  # other routers' batches end first
            case Kind.BYE if self.link in (_DRAINING, _LEAVING):
                self._over("drained", now_ns)
            case Kind.BYE:
                self.lost("the router said BYE", now_ns)
            case _:
                raise WireError(f"{message.kind.name.lower()}: not for a worker")

    def _welcomed(self, welcome: WorkerWelcome, now_ns: int) -> None:
        epoch, router = welcome.epoch, welcome.router
        if (epoch, router) != (self.epoch, self._router):
            # Routers count epochs from 1: a restarted one may give the same number again.
            n_dropped = self._gpus.forget_held()
            self._refused = []
            if self.lender is not None:
                self.lender.own_lost()
            self._note(f"welcomed under epoch {epoch}; {n_dropped} held batches dropped")
            self.epoch, self._router = epoch, router
            self._is_drain_told = False
        self._move(LinkEvent.WELCOMED)
        self._ping_due_ns = self._pull_due_ns = now_ns

    def lost(self, why: str, now_ns: int) -> None:
        """Go back to joining; the router gives batches that have not started to other workers."""
        if self.link in (LinkState.JOINING, LinkState.STOPPED):
            return
        n_dropped = self._gpus.forget_held()
        self._refused = []
        self._warn(f"{why}; {n_dropped} held batches dropped")
        self.epoch = None
        if self.lender is not None:
            self.lender.own_lost()
        self._move(LinkEvent.LOST)
        self._hello_due_ns = now_ns

    # --- leaving --------------------------------------------------------------------------

    def stop(self, now_ns: int) -> None:
        """Begin to drain, unless it already does."""
        if self.link is _DRAINING or self.link is _STOPPED:
            return
        self._move(LinkEvent.STOP)
        self._drain_until_ns = now_ns + DRAIN_TIMEOUT_NS
        self._pull_due_ns = now_ns
        self._note(f"asked to stop: {self.link.value}")

    def leave(self, now_ns: int) -> None:
        """Begin to leave for another router: take no more, run what is held, and then join again.

        Once `link` is JOINING, the host has sent BYE to this router, and sends to the other.
        """
        if self.link is not _SERVING:
            return
        self._move(LinkEvent.MOVE)
        self._drain_until_ns = now_ns + DRAIN_TIMEOUT_NS
        self._pull_due_ns = now_ns
        self._note("leaves for a router with fewer GPUs")

    @property
    def heard_ns(self) -> int:
        """When the router last sent something."""
        return self._heard_ns

    def greet(self, now_ns: int) -> None:
        """Send HELLO at once while joining: the router is another one."""
        self._hello_due_ns = self._heard_ns = now_ns

    def goodbye(self) -> Control | None:
        """Return the BYE of a worker that has stopped; None if no router knows the worker."""
        return None if self.epoch is None else Control(Kind.BYE, {"worker": self._name})

    def _drain(self, said: list[Message], now_ns: int) -> None:
        if not self._is_drain_told:
            self._is_drain_told = True
            said.append(Control(Kind.DRAIN, {"worker": self._name}))
        if self._is_released and self.lender is not None and not self.lender.holds_any():
            self._over("drained", now_ns)
        elif self._gpus.is_idle() and now_ns - self._heard_ns > UNHEARD_NS:
            self._over("nothing is held, and the router is silent", now_ns)
        elif now_ns >= self._drain_until_ns:
            self._over(f"not drained within {DRAIN_TIMEOUT_NS // SECOND} s", now_ns)

    def _over(self, why: str, now_ns: int) -> None:
        self._note(why)
        self._move(LinkEvent.OVER)
        if self.link is _JOINING:  # it has left, and what it still runs is not reported to the next router
            self._gpus.forget_held()
            self._refused = []
            self.epoch = None
            if self.lender is not None:
                self.lender.own_lost()
            self._is_drain_told = False
            self._hello_due_ns = now_ns

    def _move(self, event: LinkEvent) -> None:
        self.link = TRANSITIONS[self.link, event]


def _why(body: Mapping[str, Any]) -> str:
    """Return the reason in a REFUSED message, in one line."""
    words = [str(body[key]) for key in ("code", "reason") if key in body]
    return " ".join(": ".join(words or [str(dict(body))]).split())[:500]
