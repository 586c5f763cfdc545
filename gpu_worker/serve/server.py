"""The worker's server: the host of `gpu_worker.core` that owns the sockets. It never computes.

With several routers, `gpu_worker.core.choice` says to which one the process belongs.

Garbage collection is off while it serves, because nothing in a query's path makes cycles.
Cycles that failures leave behind are collected after 5 idle seconds, at most once a minute.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING

import zmq

from gpu_worker.core import WorkerCore
from gpu_worker.core.lending import Lender
from gpu_worker.core.link import Gauges, LinkState
from gpu_worker.serve.memories import WorkerMemories
from superserve.clock import SECOND
from superserve.errors import WireError
from superserve.hello import WorkerWelcome
from superserve.net import sockets
from superserve.wire import Control, Directive, Kind, Message, Ping, Pong, decode, encode, encode_pong

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from typing import Self

    from gpu_worker.core.queue import Gpus
    from gpu_worker.serve.metrics import WorkerMetrics
    from gpu_worker.serve.routers import WorkerRouters
    from superserve.clock import Clock
    from superserve.hello import WorkerHello
    from superserve.net.handshake import Handshake

_LOG = logging.getLogger(__name__)

_IDLE_BEFORE_COLLECT_NS = 5 * SECOND  # collecting stops the loop: not between two bursts
_COLLECT_EVERY_NS = 60 * SECOND  # only failures leave cycles, so there is little to collect
_BYE_LINGER_MS = 200  # for the BYE to leave; without a router it is not worth more of a stop's time


class Waker:
    """A pipe by which signals and the compute thread wake the server; use it as a context manager."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pipe; threads that could wake it have ended, or are daemons."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._write_fd)

    def wake(self) -> None:
        """Wake the server, from any thread."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: the server has ended
            os.write(self._write_fd, b"\0")

    def drain(self) -> None:
        """Discard the wake-ups so far."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.fd, 4096)) == 4096:
                pass

    def on_signals(self, stop: Callable[[], None]) -> None:
        """Make SIGTERM and SIGINT call `stop` and wake the server; main thread only."""
        # The handler alone does not end a select(), which Python resumes after it: the byte in the pipe does.
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop())


class WorkerServer:
    """Serves one process's GPUs to one router at a time.

    Args:
        socket: A DEALER, connected; the caller closes it.
        gpus: What runs the batches.
        hello: The HELLO to send.
        clock: The process's clock.
        waker: Woken by signals and by GPUs that report from another thread.
        gauges: Reads the device's gauges; must be quick.
        handshake: The socket's: reports why no router answers, and retries; the caller closes it.
        on_ready: Called once, after the first WELCOME.
        metrics: Receives ended batches; None if nothing is exported.
        routers: The ways to all routers; None if there is only that of `socket`.

    Attributes:
        core: Decides what to say and do.
        memories: The memories of clients that it reads payloads from.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        gpus: Gpus[Directive],
        hello: WorkerHello,
        *,
        clock: Clock,
        waker: Waker,
        gauges: Callable[[], Gauges] = Gauges,
        handshake: Handshake | None = None,
        on_ready: Callable[[], None] = lambda: None,
        metrics: WorkerMetrics | None = None,
        routers: WorkerRouters | None = None,
    ) -> None:
        self._socket = socket
        self._routers = routers
        self._gpus = gpus
        self._clock = clock
        self._waker = waker
        self._on_ended = None if metrics is None else metrics.ended
        self._handshake = handshake
        self._on_ready = on_ready
        self._is_announced = False
        self._stop_asked = False
        self._is_connected = False
        now_ns = clock.now_ns()
        self._collected_ns = self._passed_ns = now_ns
        self.core: WorkerCore[Directive] = WorkerCore(
            gpus, hello.body(), now_ns, gauges=gauges, jitter=partial(random.uniform, 0.75, 1.25),
            note=_LOG.info, warn=_LOG.warning,
        )  # fmt: skip
        self._lender: Lender[Directive] = Lender(self.core, gpus, hello.body())
        self.memories = WorkerMemories(self.core.counts, is_allowed=bool(hello.shared))

    @property
    def link(self) -> LinkState:
        """The state of the link to the router."""
        return self.core.link

    @property
    def counts(self) -> Counter[str]:
        """Dropped messages, by reason."""
        return self.core.counts

    @property
    def gauges(self) -> Gauges:
        """The device's gauges in the latest PULL."""
        return self.core.gauges

    def since_pass_ns(self) -> int:
        """Return how long ago the loop last passed; from any thread."""
        return self._clock.now_ns() - self._passed_ns

    def stop(self) -> None:
        """Ask the server to drain and return from `run`; safe in a signal handler."""
        self._stop_asked = True

    def run(self) -> None:
        """Serve until stopped.

        Raises:
            RefusedError: The router has refused this worker.
        """
        gc.freeze()
        gc.disable()
        watched = [self._socket] if self._routers is None else self._routers.all_sockets()
        waiter = sockets.Waiter(watched, [self._waker.fd])
        many = self._gpus.n_slots > 1  # a single GPU must never wait for its server
        while self.link is not LinkState.STOPPED:
            waiter.wait(self._next_due_ns() - self._clock.now_ns())
            self._waker.drain()
            began_ns = self._clock.now_ns()
            self.step()
            if self._routers is not None and len(self._routers.doors) != len(watched):
                watched = self._routers.all_sockets()
                waiter = sockets.Waiter(watched, [self._waker.fd])
            if many:
                sockets.rest(began_ns)
        self.memories.close()
        if self._routers is not None:
            self._routers.part_all(self._lender)
        if (bye := self.core.goodbye()) is not None:
            sockets.send(self._socket, encode(bye))
            self._socket.set(zmq.LINGER, _BYE_LINGER_MS)
        _LOG.info("stopped; dropped: %s", dict(self.counts) or "nothing")

    def step(self) -> None:
        """Receive everything, send what is due, and collect garbage if the worker is idle."""
        self._receive_all()
        self.memories.follow(self.core.epoch)
        now_ns = self._passed_ns = self._clock.now_ns()
        if self._stop_asked:
            self._stop_asked = False
            self.core.stop(now_ns)
        if self._routers is not None and not self._look_at_routers(self._routers, now_ns):
            return
        for message in self.core.poll(now_ns, self._on_ended):
            if not self._tell(message, now_ns):
                break
        if self._routers is not None:
            self._routers.lend(self._lender, now_ns)
        if not self._is_announced and self.core.epoch is not None:
            self._is_announced = True
            self._on_ready()
        self._collect(now_ns)

    def _next_due_ns(self) -> int:
        due_ns = self.core.next_due_ns()
        if self._routers is None:
            return due_ns
        lender_ns = self._lender.next_due_ns()
        if lender_ns is not None and lender_ns < due_ns:
            due_ns = lender_ns
        routers_ns = self._routers.choice.next_due_ns()
        if self._routers.choice.own is None:
            return due_ns if routers_ns is None else routers_ns
        return due_ns if routers_ns is None else min(due_ns, routers_ns)

    def _look_at_routers(self, routers: WorkerRouters, now_ns: int) -> bool:
        """Ask the routers, and turn to another one if it is time; return whether one is chosen."""
        choice, core = routers.choice, self.core
        if not choice.is_many:
            return True
        lender = self._lender
        routers.listen(lender, now_ns)
        routers.ask(now_ns)
        door = None if choice.own is None else routers.doors[choice.own]
        is_connected = door is not None and door.is_connected()
        self._turn_to(choice.turn(core, now_ns, is_connected=is_connected), now_ns)
        lender.turn(choice.own, choice.prices(now_ns), now_ns)
        return choice.own is not None or core.link is LinkState.STOPPED

    def _turn_to(self, i: int | None, now_ns: int) -> None:
        """Greet another router."""
        routers = self._routers
        if i is None or routers is None:
            return
        door = routers.doors[i]
        assert door is not None, "only a router that answered is chosen"
        if door.socket is not self._socket:
            routers.part(self._socket)
        self._socket, self._handshake = door.socket, door.handshake
        self._is_connected = False
        self.core.greet(now_ns)
        _LOG.info("turns to the router at %s", routers.choice.endpoints[i])

    def _tell(self, message: Message, now_ns: int) -> bool:
        """Send to the router; if the router that gave this epoch cannot be reached, it is lost."""
        is_hello = isinstance(message, Control) and message.kind is Kind.HELLO
        if is_hello and self._handshake is not None and self._handshake.look(now_ns):
            _LOG.warning("%s", self._handshake.failure)
        is_sent = sockets.send(self._socket, encode(message))
        if is_hello:
            if is_sent and not self._is_connected:
                _LOG.info("connected")
            self._is_connected = is_sent
        # An unsent HELLO is normal while no router is there. Anything else unsent means that it has gone.
        elif not is_sent:
            self.counts[f"{message.kind.name.lower()} unsent"] += 1
            self.core.lost("the router cannot be reached", now_ns)
            return False
        return True

    def _receive_all(self) -> None:
        if not sockets.is_readable(self._socket):
            return
        while self.link is not LinkState.STOPPED:
            try:
                frames = sockets.receive(self._socket)
                if frames is None:
                    return
                self._receive(decode(frames))
            except WireError as error:
                self.core.drop("malformed", str(error))

    def _receive(self, message: Message) -> None:
        epoch = self.core.epoch
        if isinstance(message, Directive):
            if message.epoch == epoch:
                self.memories.fill(message)
        elif isinstance(message, Control) and message.kind is Kind.SHARE:
            self.memories.follow(epoch)
            answer = self.memories.share(message)
            if answer is not None:
                sockets.send(self._socket, encode(answer))
            return
        elif isinstance(message, Control) and message.kind is Kind.STATUS and self._routers is not None:
            own = self._routers.choice.own
            if own is not None:
                self._routers.answered(own, message, self._clock.now_ns())
            return
        elif isinstance(message, Control) and message.kind is Kind.WELCOME and self._routers is not None:
            self._routers.learn(WorkerWelcome.from_body(message.body).routers or ())
        pong = self.core.receive(_for_worker(message), self._clock.now_ns())
        if pong is not None:
            # A failure here shows in the heartbeat; a router may ping before it has welcomed this worker.
            sockets.send(self._socket, encode_pong(pong))
        if self._handshake is not None and self.core.epoch not in (None, epoch):
            self._handshake.succeeded()

    def _collect(self, now_ns: int) -> None:
        """Collect garbage if the worker is idle: see the module's docstring."""
        is_quiet = now_ns - self.core.busy_ns > _IDLE_BEFORE_COLLECT_NS and self._gpus.is_idle()
        if is_quiet and now_ns - self._collected_ns > _COLLECT_EVERY_NS:
            gc.collect()
            self._collected_ns = self._clock.now_ns()


def _for_worker(message: Message) -> Directive | Control | Ping | Pong:
    """Return the message.

    Raises:
        WireError: A router never sends this kind to a worker.
    """
    if not isinstance(message, Directive | Control | Ping | Pong):
        raise WireError(f"{message.kind.name.lower()}: not for a worker")
    return message
