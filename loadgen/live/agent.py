"""`loadgen agent`: a load generator on another host, which sends its share of a run when ordered.

Messages between it and `loadgen.live.hosts`; `superserve.wire` has their fields:

    coordinator -> agent    PING                           agent -> coordinator    PONG
    coordinator -> agent    RUN_SHARE                      agent -> coordinator    RUN_READY | RUN_FAILED
    coordinator -> agent    RUN_START                      agent -> coordinator    RUN_PROGRESS
    coordinator -> agent    RUN_STOP                       agent -> coordinator    RUN_REPORT | RUN_FAILED

An agent serves one run at a time, and any peer that reaches its port can make it send load to anywhere: so it
listens on loopback unless an option states that the network is safe. If a coordinator is silent for
`SILENT_S`, its run is stopped.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from loadgen.live.coordinator import Hooks
from loadgen.live.records import COLUMNS
from loadgen.live.run import RunSettings, run_trace
from loadgen.traces.trace import Trace
from superserve import wire
from superserve.clock import SECOND
from superserve.errors import ConfigError, SuperServeError, VersionError, WireError
from superserve.net.context import new_context
from superserve.net.sockets import bind_router, receive, send
from superserve.wire import (
    RUN_COLUMNS,
    Ping,
    Pong,
    RunFailed,
    RunProgress,
    RunReady,
    RunReport,
    RunShare,
    RunStart,
    RunStop,
    encode_run,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import zmq

    from loadgen.results.run import Run
    from superserve.wire import Buffer, RunMessage

SILENT_S = 5.0
"""How long a coordinator or an agent may be silent before it counts as lost; both send every second."""
_POLL_MS = 20  # the longest that a stop waits: the signal only sets a flag


@dataclass(slots=True)
class _Share:
    """A run's share on this host: its thread, and its reports.

    Attributes:
        key: The coordinator's.
        start_ns: On this host's clock; 0 until the order to start.
    """

    key: bytes
    trace: Trace
    settings: RunSettings
    endpoint: str
    said: queue.SimpleQueue[RunMessage] = field(default_factory=queue.SimpleQueue)
    ordered: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    start_ns: int = 0
    heard_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Run the share; in a separate thread."""
        hooks = Hooks(start=self._start, stop=self.stop)
        try:
            run = run_trace(self.trace, self.settings, self.endpoint, self._progress, hooks=hooks)
        except (SuperServeError, KeyboardInterrupt) as error:
            self.said.put(RunFailed(str(error) or "stopped before anything was due"))
            return
        self.said.put(_report(run))

    def _start(self) -> int:
        """Report that the senders are ready, and wait for the order to start."""
        self.said.put(RunReady())
        while not self.ordered.wait(0.1):
            if self.stop.is_set():
                raise ConfigError("stopped before it started")
        return self.start_ns

    def _progress(self, progress: dict[str, int]) -> None:
        self.said.put(RunProgress(progress["due"], progress["sent"], progress["answered"]))


def _report(run: Run) -> RunReport:
    return RunReport(
        subnets=tuple(run.subnets),
        reasons=run.reasons,
        duplicates=run.n_duplicates,
        duration_ns=round(run.result.duration_s * SECOND),
        noise_ns=run.noise_p99_9_ns,
        columns={name: run.columns[name].astype(RUN_COLUMNS[name]).tobytes() for name in COLUMNS},
    )


class Agent:
    """Serves runs, one after the other, until `stop`; use it as a context manager.

    Args:
        endpoint: Where it listens.
    """

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = new_context()
        self._socket, self.endpoint = bind_router(self._context, endpoint)
        self._share: _Share | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def stop(self) -> None:
        """Make `run` return. Safe in a signal handler."""
        self._is_stopping = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End a run and close the socket: left open, it would keep Python from ending."""
        self._end()
        self._socket.close(0)
        self._context.destroy(0)

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._is_stopping:
            self._socket.poll(_POLL_MS)
            while (frames := receive(self._socket)) is not None:
                self._take(bytes(frames[0]), frames[1:])
            self._tell()

    def _say(self, key: bytes, message: RunMessage) -> None:
        send(self._socket, [key, *encode_run(message)])

    def _take(self, key: bytes, frames: Sequence[Buffer]) -> None:
        """Obey a coordinator's message; ignore other peers, since nothing depends on them."""
        try:
            message = wire.decode_run(frames)
        except VersionError as error:
            send(self._socket, [key, *wire.encode_control(wire.refusal(error))])
            return
        except WireError:
            return
        share = self._share
        is_ours = share is not None and share.key == key
        if share is not None and is_ours:
            share.heard_s = time.monotonic()
        match message:
            case Ping():
                send(self._socket, [key, *wire.encode_pong(Pong(message.stamp_ns, time.monotonic_ns()))])
            case RunShare():
                self._prepare(key, message)
            case RunStart(in_ns=int(in_ns)) if share is not None and is_ours:
                share.start_ns = time.monotonic_ns() + in_ns
                share.ordered.set()
            case RunStop() if share is not None and is_ours:
                share.stop.set()

    def _prepare(self, key: bytes, asked: RunShare) -> None:
        """Begin a run, unless another goes on or this one cannot run; then report why."""
        if self._share is not None:
            self._say(key, RunFailed("this agent is in the middle of another run"))
            return
        try:
            due_ns = np.frombuffer(asked.due_ns, RUN_COLUMNS["due_ns"])
            trace = Trace(asked.trace, due_ns, asked.duration_ns, asked.provenance)
            self._share = _Share(key, trace, _settings_of(asked), asked.endpoint)
        except (SuperServeError, ValueError) as error:
            self._say(key, RunFailed(f"prepare: {error}"))
            return
        self._thread = threading.Thread(target=self._share.run, name="share", daemon=True)
        self._thread.start()

    def _tell(self) -> None:
        """Send the run's reports; forget the run at its end, and stop one whose coordinator is lost."""
        share = self._share
        if share is None:
            return
        while not share.said.empty():
            message = share.said.get()
            self._say(share.key, message)
            if isinstance(message, RunReport | RunFailed):
                self._end()
                return
        if time.monotonic() - share.heard_s > SILENT_S:
            share.stop.set()

    def _end(self) -> None:
        if self._share is not None and self._thread is not None:
            self._share.stop.set()
            self._thread.join(30.0)
        self._share = self._thread = None


def _settings_of(asked: RunShare) -> RunSettings:
    if asked.n_senders < 1 or asked.slo_ns < 1:
        raise ConfigError("n_senders: expected 1 at least, and slo_ns above 0")
    return RunSettings(
        slo_ns=asked.slo_ns,
        n_senders=asked.n_senders,
        payload_bytes=asked.payload_bytes,
        seed=asked.seed,
        grace_ns=asked.grace_ns,
    )
