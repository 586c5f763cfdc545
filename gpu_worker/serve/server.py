"""The worker's server: pull, run, report. One thread owns the socket and never computes.

    JOINING  -welcomed-> SERVING -lost-> JOINING        lost: refused, silent or unreachable
       +------+--stop----> DRAINING -over-> STOPPED     over: the router's BYE, or time is up

Joining, it says HELLO every 200 ms until it is welcomed. Each WELCOME with a new epoch
begins anew: batches of an older epoch that have not started are dropped, and nothing is
reported of those that have, for the router has given them to others, or is another one
and numbers its batches from 1.

Garbage collection is off while it serves: nothing on the way of a query makes cycles.
What failures leave behind is collected after 5 idle seconds, at most once a minute.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import os
import random
import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq

from gpu_worker.serve.batches import EndedBatch, Gpus, QueueState, finished, refused
from superserve.clock import MS, SECOND
from superserve.errors import SuperServeError, WireError
from superserve.hello import WorkerWelcome
from superserve.net import sockets
from superserve.wire import (
    LOWEST,
    Buffer,
    Control,
    Directive,
    Done,
    Kind,
    Ping,
    Pong,
    Pull,
    PullRow,
    Status,
    decode,
    encode_control,
    encode_done,
    encode_ping,
    encode_pong,
    encode_pull,
    version_refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from gpu_worker.serve.metrics import WorkerMetrics
    from profiles.table import Profile
    from superserve.clock import Clock
    from superserve.hello import WorkerHello
    from superserve.net.handshake import Handshake

_LOG = logging.getLogger(__name__)

HELLO_EVERY_NS = 200 * MS
"""Time between two HELLOs while no WELCOME has come."""

SILENCE_NS = 2 * SECOND
"""A router not heard for so long may have restarted: say HELLO again, every second or so."""

HEARTBEAT_NS = 100 * MS
"""Time between two PINGs, by which the router knows that this process lives."""

PULL_EVERY_NS = 500 * MS
"""Time between two PULLs that carry gauges; every DONE tells the queue's state besides."""

DRAIN_TIMEOUT_NS = 4 * SECOND
"""How long a drain may take: less than the 5 s after which `processes` kills a role."""

_UNHEARD_NS = 600 * MS  # six heartbeats: nobody is there to say BYE
_IDLE_BEFORE_COLLECT_NS = 5 * SECOND
_COLLECT_EVERY_NS = 60 * SECOND
_BYE_LINGER_MS = 200


class RefusedError(SuperServeError):
    """The router will not have this worker."""


class LinkState(enum.Enum):
    """How this worker stands with the router."""

    JOINING = "joining"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class LinkEvent(enum.Enum):
    """What changes a link."""

    WELCOMED = "welcomed"
    LOST = "lost"  # refused with say-hello, told BYE, or the connection is gone
    STOP = "stop"  # SIGTERM, SIGINT, or a DRAIN that names this worker
    OVER = "over"  # the router's BYE, nobody there, or time is up


TRANSITIONS: dict[tuple[LinkState, LinkEvent], LinkState] = {
    (LinkState.JOINING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.JOINING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.JOINING, LinkEvent.STOP): LinkState.STOPPED,  # nobody has given it work
    (LinkState.SERVING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.SERVING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.SERVING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.WELCOMED): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.LOST): LinkState.STOPPED,  # whatever is left is another's now
    (LinkState.DRAINING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.OVER): LinkState.STOPPED,
}
"""A pair that is not here cannot happen, whatever peers send."""


class Gauges(NamedTuple):
    """What a PULL says of the device; NaN where unknown."""

    memory_bytes: int = 0
    utilisation: float = float("nan")
    temperature_c: float = float("nan")


class Waker:
    """A pipe by which signals and the compute thread wake the server; use it as a context manager."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pipe; GPUs that may wake it have ended, or are a daemon's."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._write_fd)

    def wake(self) -> None:
        """Wake the server, from any thread."""
        with contextlib.suppress(OSError):  # full: about to wake anyway; closed: nobody is there
            os.write(self._write_fd, b"\0")

    def drain(self) -> None:
        """Forget the wake-ups so far."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 4096)) == 4096:
                pass

    def on_signals(self, stop: Callable[[], None]) -> None:
        """Have SIGTERM and SIGINT call `stop` and wake the server; main thread only."""
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop())


class WorkerServer:
    """Serves one process's GPUs to one router.

    Args:
        socket: A DEALER, connected; closed by the caller.
        gpus: What runs the batches.
        profile: The profile that all of them share.
        hello: What it says first.
        clock: The process's clock.
        waker: Woken by signals and by GPUs that report from another thread.
        gauges: Reads the device's gauges; quick.
        handshake: The socket's: tells why no router answers, and tries again; closed by the caller.
        on_ready: Called once, after the first WELCOME.
        metrics: Is told what has ended; None where nobody asks.

    Attributes:
        counts: Of what was dropped, by reason.
        gauges: What the latest PULL said of the device.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        gpus: Gpus,
        profile: Profile,
        hello: WorkerHello,
        *,
        clock: Clock,
        waker: Waker,
        gauges: Callable[[], Gauges] = Gauges,
        handshake: Handshake | None = None,
        on_ready: Callable[[], None] = lambda: None,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._socket = socket
        self._gpus = gpus
        self._profile = profile
        self._hello = hello
        self._name = hello.name
        self._clock = clock
        self._waker = waker
        self._read_gauges = gauges
        self.gauges = Gauges()
        self._metrics = metrics
        self._handshake = handshake
        self._on_ready = on_ready
        self._is_announced = False
        self._link = LinkState.JOINING
        self._epoch: int | None = None
        self._stop_asked = False
        self._is_drain_told = False
        self._is_connected = False
        self._refused: list[EndedBatch] = []
        now_ns = clock.now_ns()
        self._heard_ns = now_ns
        self._busy_ns = now_ns
        self._collected_ns = now_ns
        self._hello_due_ns = now_ns
        self._ping_due_ns = now_ns
        self._pull_due_ns = now_ns
        self._drain_until_ns = now_ns
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Directive: self._directive,
            Ping: self._ping,
            Pong: lambda _message, _now_ns: None,
            Control: self._control,
        }

    @property
    def link(self) -> LinkState:
        """How it stands with the router."""
        return self._link

    # --- the loop -------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask it to drain and return from `run`; may be called by a signal handler."""
        self._stop_asked = True

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            RefusedError: The router will not have this worker.
        """
        gc.freeze()
        gc.disable()
        waiter = sockets.Waiter([self._socket], [self._waker.fd])
        many = self._gpus.n_slots > 1  # one GPU alone shall never wait for its server
        while self._link is not LinkState.STOPPED:
            waiter.wait(self._timeout_ns())
            self._waker.drain()
            began_ns = self._clock.now_ns()
            self.step()
            if many:
                sockets.rest(began_ns)
        if self._epoch is not None:
            self._send(encode_control(Control(Kind.BYE, {"worker": self._name})))
            self._socket.set(zmq.LINGER, _BYE_LINGER_MS)
        _LOG.info("stopped; dropped: %s", dict(self.counts) or "nothing")

    def step(self) -> None:
        """Receive everything, report what has ended, and keep the heart beating."""
        self._receive_all()
        now_ns = self._clock.now_ns()
        self._report(now_ns)
        if self._stop_asked:
            self._begin_drain(now_ns)
        self._beat(now_ns)
        self._collect(now_ns)

    def _timeout_ns(self) -> int:
        """Return how long nothing is to be done unless something comes."""
        due_ns = self._hello_due_ns
        if self._link is not LinkState.JOINING:
            due_ns = min(self._ping_due_ns, self._pull_due_ns)
        ends_ns = self._gpus.next_event_ns()
        if ends_ns is not None:
            due_ns = min(due_ns, ends_ns)
        return due_ns - self._clock.now_ns()

    def _send(self, frames: Sequence[Buffer]) -> bool:
        return sockets.send(self._socket, frames)

    def _tell(self, frames: Sequence[Buffer], what: str) -> None:
        """Send to the router that gave us this epoch; if it cannot be reached, it is lost."""
        if not self._send(frames):
            self.counts[f"{what} unsent"] += 1
            self._lose("the router cannot be reached")

    def _move(self, event: LinkEvent) -> None:
        self._link = TRANSITIONS[self._link, event]

    # --- joining --------------------------------------------------------------------------

    def _beat(self, now_ns: int) -> None:
        """Send what is due: HELLO, PING, PULL; end a drain."""
        if self._link is LinkState.JOINING or now_ns - self._heard_ns > SILENCE_NS:
            self._say_hello(now_ns)
        if self._link is LinkState.DRAINING:
            self._drain(now_ns)
        if self._link in (LinkState.SERVING, LinkState.DRAINING) and now_ns >= self._ping_due_ns:
            self._ping_due_ns = now_ns + HEARTBEAT_NS
            self._tell(encode_ping(Ping(now_ns)), "ping")
        if self._link in (LinkState.SERVING, LinkState.DRAINING) and now_ns >= self._pull_due_ns:
            self._pull(now_ns)

    def _say_hello(self, now_ns: int) -> None:
        if now_ns < self._hello_due_ns or self._link in (LinkState.DRAINING, LinkState.STOPPED):
            return
        if self._link is LinkState.JOINING:
            self._hello_due_ns = now_ns + HELLO_EVERY_NS
        else:  # jitter, so that a cluster's workers do not greet a stalled router in step
            self._hello_due_ns = now_ns + int(SECOND * random.uniform(0.75, 1.25))
            _LOG.warning("router silent for %.1f s; saying HELLO", (now_ns - self._heard_ns) / SECOND)
        if self._handshake is not None and self._handshake.look(now_ns):
            _LOG.warning("%s", self._handshake.failure)
        is_sent = self._send(encode_control(Control(Kind.HELLO, self._hello.body(), LOWEST)))
        if is_sent and not self._is_connected:
            _LOG.info("connected")
        self._is_connected = is_sent

    def _welcomed(self, welcome: WorkerWelcome, now_ns: int) -> None:
        epoch = welcome.epoch
        if epoch != self._epoch:
            n_dropped = self._gpus.forget_held()
            _LOG.info("welcomed under epoch %d; %d held batches dropped", epoch, n_dropped)
            self._epoch = epoch
            self._is_drain_told = False
        if self._handshake is not None:
            self._handshake.succeeded()
        self._move(LinkEvent.WELCOMED)
        self._ping_due_ns = now_ns
        self._pull(now_ns)
        if not self._is_announced:
            self._is_announced = True
            self._on_ready()

    def _lose(self, why: str) -> None:
        """Go back to joining; batches that have not started are somebody else's now."""
        if self._link in (LinkState.JOINING, LinkState.STOPPED):
            return
        n_dropped = self._gpus.forget_held()
        _LOG.warning("%s; %d held batches dropped", why, n_dropped)
        self._epoch = None
        self._move(LinkEvent.LOST)
        self._hello_due_ns = self._clock.now_ns()

    # --- receiving ------------------------------------------------------------------------

    def _receive_all(self) -> None:
        if not sockets.is_readable(self._socket):
            return
        while self._link is not LinkState.STOPPED:
            try:
                frames = sockets.receive(self._socket)
                if frames is None:
                    return
                self._heard_ns = now_ns = self._clock.now_ns()
                self._handle(frames, now_ns)
            except WireError as error:
                self._drop("malformed", str(error))

    def _handle(self, frames: Sequence[Buffer], now_ns: int) -> None:
        message = decode(frames)
        handler = self._handlers.get(type(message))
        if handler is None:
            raise WireError(f"{message.kind.name.lower()}: not for a worker")
        handler(message, now_ns)

    def _drop(self, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] == 1:  # the others are counted, and told when it stops
            _LOG.warning("dropped a message, %s: %s", reason, detail)

    def _ping(self, ping: Ping, _now_ns: int) -> None:
        # Its own failure shows in the heartbeat; whoever pings need not have welcomed us yet.
        self._send(encode_pong(Pong(ping.stamp_ns, self._clock.now_ns())))

    def _directive(self, directive: Directive, now_ns: int) -> None:
        if directive.epoch != self._epoch:
            self._drop("of another epoch", f"batch {directive.batch_id} of epoch {directive.epoch}")
            return
        if directive.slot >= self._gpus.n_slots:
            n_slots = self._gpus.n_slots
            raise WireError(f"directive: slot: expected 0 to {n_slots - 1}, got {directive.slot}")
        self._busy_ns = now_ns
        fault = self._fault(directive)
        if fault is not None:
            self._refuse(directive, Status.FAILED, fault, now_ns)
        elif not self._gpus.submit(directive, now_ns):
            self._refuse(directive, Status.OVERLOADED, "the worker's queue is full", now_ns)

    def _fault(self, directive: Directive) -> str | None:
        """Return why no GPU can run this batch, or None."""
        profile = self._profile
        if directive.subnet >= profile.n_subnets:
            return f"subnet: expected 0 to {profile.n_subnets - 1}, got {directive.subnet}"
        if directive.n > profile.max_batch_size:
            return f"batch: expected at most {profile.max_batch_size} queries, got {directive.n}"
        return None

    def _refuse(self, directive: Directive, status: Status, reason: str, now_ns: int) -> None:
        self._drop(f"refused as {status.name}", reason)
        outcome, state = refused(directive, status, reason), self._gpus.state(directive.slot, now_ns)
        self._refused.append(
            finished(directive, outcome, state, received_ns=now_ns, started_ns=now_ns, ended_ns=now_ns)
        )

    def _control(self, message: Control, now_ns: int) -> None:
        body = message.body
        error = version_refused(message)
        if error is not None:
            raise RefusedError(f"the router refused this worker: {error}")
        match message.kind:
            case Kind.WELCOME:
                self._welcomed(WorkerWelcome.from_body(body), now_ns)
            case Kind.REFUSED if body.get("code") == "say-hello":
                self._lose(f"refused: {body.get('reason', 'say-hello')}")
            case Kind.REFUSED:
                raise RefusedError(f"the router refused this worker: {_why(body)}")
            case Kind.DRAIN if body.get("worker") == self._name:
                self._begin_drain(now_ns)  # now: its BYE may be the next message
            case Kind.DRAIN:
                _LOG.info("the router drains")
            case Kind.BYE if self._link is LinkState.DRAINING:
                self._over("drained")
            case Kind.BYE:
                self._lose("the router said BYE")
            case _:
                raise WireError(f"{message.kind.name.lower()}: not for a worker")

    # --- reporting ------------------------------------------------------------------------

    def _report(self, now_ns: int) -> None:
        """Tell the router what has ended, all in one message."""
        ended = self._gpus.finish_due(now_ns)
        ended += self._refused
        if not ended:
            return
        self._refused = []
        self._busy_ns = now_ns
        if self._metrics is not None:
            self._metrics.ended(ended)
        rows = [report.row for report in ended if report.epoch == self._epoch]
        if len(rows) < len(ended):
            self.counts["ended under another epoch"] += len(ended) - len(rows)
            self._pull_due_ns = now_ns  # their GPUs are free, and no DONE will say so
        if not rows:
            return
        if self._link is LinkState.DRAINING:
            for row in rows:
                row.credit = 0
        assert self._epoch is not None, "rows are of this epoch"
        self._tell(encode_done(Done(self._epoch, rows)), "done")

    def _pull(self, now_ns: int) -> None:
        if self._epoch is None:
            return
        self._pull_due_ns = now_ns + PULL_EVERY_NS
        self.gauges = gauges = self._read_gauges()
        is_draining = self._link is LinkState.DRAINING
        rows = [
            _pull_row(slot, self._gpus.state(slot, now_ns), gauges, is_draining=is_draining)
            for slot in range(self._gpus.n_slots)
        ]
        self._tell(encode_pull(Pull(self._epoch, rows)), "pull")

    def _collect(self, now_ns: int) -> None:
        """Collect garbage when nobody can notice: see the module's docstring."""
        is_quiet = now_ns - self._busy_ns > _IDLE_BEFORE_COLLECT_NS and self._gpus.is_idle()
        if is_quiet and now_ns - self._collected_ns > _COLLECT_EVERY_NS:
            gc.collect()
            self._collected_ns = self._clock.now_ns()

    # --- leaving --------------------------------------------------------------------------

    def _begin_drain(self, now_ns: int) -> None:
        self._stop_asked = False
        if self._link not in (LinkState.JOINING, LinkState.SERVING):
            return
        self._move(LinkEvent.STOP)
        self._drain_until_ns = now_ns + DRAIN_TIMEOUT_NS
        self._pull_due_ns = now_ns
        _LOG.info("asked to stop: %s", self._link.value)

    def _drain(self, now_ns: int) -> None:
        if not self._is_drain_told:
            self._is_drain_told = True
            self._tell(encode_control(Control(Kind.DRAIN, {"worker": self._name})), "drain")
        if self._link is not LinkState.DRAINING:  # it could not be told
            return
        if self._gpus.is_idle() and now_ns - self._heard_ns > _UNHEARD_NS:
            self._over("nothing is held, and the router is silent")
        elif now_ns >= self._drain_until_ns:
            self._over(f"not drained within {DRAIN_TIMEOUT_NS // SECOND} s")

    def _over(self, why: str) -> None:
        _LOG.info("%s", why)
        self._move(LinkEvent.OVER)


def _pull_row(slot: int, state: QueueState, gauges: Gauges, *, is_draining: bool) -> PullRow:
    credit = 0 if is_draining else state.credit
    return PullRow(slot, credit, state.held, state.running, state.last_batch, state.free_in_ns, *gauges)


def _why(body: Mapping[str, Any]) -> str:
    """Return a REFUSED message's own words, in one line."""
    words = [str(body[key]) for key in ("code", "reason") if key in body]
    return " ".join(": ".join(words or [str(dict(body))]).split())[:500]
