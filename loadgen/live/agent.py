"""`loadgen agent`: a load generator on another host, which sends its share of a run when it is told to.

Messages between it and `loadgen.live.hosts`, each a Control of kind STATUS, and behind it, where the table
says so, one frame with a file's bytes (NumPy's own format, read without pickle):

    head -> agent    do: ping, stamp                       agent -> head   says: pong, stamp
    head -> agent    do: prepare, settings + due instants  agent -> head   says: ready | failed, why
    head -> agent    do: start, in_ns                      agent -> head   says: progress, due, sent, answered
    head -> agent    do: stop                              agent -> head   says: done, ... + columns

`in_ns` is a duration: instants never cross hosts. An agent serves one run at a time, and whoever reaches its
port may have it send load to anywhere: so it listens on loopback unless it is told that the network is safe.
A head that falls silent for `SILENT_S` has its run stopped.
"""

from __future__ import annotations

import contextlib
import io
import queue
import threading
import time
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from loadgen.live.run import Hooks, RunSettings, run_trace
from loadgen.traces.trace import Trace
from superserve import wire
from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.net.sockets import bind_router, receive, send
from superserve.wire import Control, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from loadgen.results.run import Run
    from superserve.wire import Buffer

SILENT_S = 5.0
"""A head or an agent that has said nothing for so long is taken for lost; both speak four times a second."""
_POLL_MS = 20
_CONTROL_FRAMES = 2  # of a Control; the file comes behind them
_SETTINGS = ("slo_ns", "n_senders", "payload_bytes", "seed", "grace_ns")


def packed(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return columns as one file."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **columns)
    return file.getvalue()


def unpacked(data: Buffer) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of one file.

    Raises:
        WireError: It is not what `packed` makes.
    """
    try:
        with np.load(io.BytesIO(bytes(data)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WireError(f"columns: expected a NumPy archive: {error}") from error


def say(socket: zmq.Socket[bytes], to: Sequence[Buffer], body: dict[str, Any], *more: bytes) -> bool:
    """Send one message of the table above; False if the peer is gone."""
    return send(socket, [*to, *wire.encode_control(Control(Kind.STATUS, body)), *more])


def heard(frames: Sequence[Buffer]) -> tuple[dict[str, Any], Buffer | None]:
    """Return the body of one message of the table, and the file behind it.

    Raises:
        WireError: It is no such message.
    """
    message = wire.decode(list(frames[:_CONTROL_FRAMES]))
    if not isinstance(message, Control) or len(frames) > _CONTROL_FRAMES + 1:
        raise WireError("expected a message between load generators")
    return message.body, frames[_CONTROL_FRAMES] if len(frames) > _CONTROL_FRAMES else None


@dataclass(slots=True)
class _Share:
    """A run's share on this host: its thread, and what it has to tell.

    Attributes:
        key: Of the head.
        start_ns: Of this host's clock; 0 until it is ordered.
    """

    key: bytes
    trace: Trace
    settings: RunSettings
    endpoint: str
    said: queue.SimpleQueue[tuple[dict[str, Any], bytes | None]] = field(default_factory=queue.SimpleQueue)
    ordered: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    start_ns: int = 0
    heard_s: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Run the share; for a thread of its own."""
        hooks = Hooks(start=self._start, stop=self.stop)
        try:
            run = run_trace(self.trace, self.settings, self.endpoint, self._progress, hooks=hooks)
        except (SuperServeError, KeyboardInterrupt) as error:
            self.said.put(({"says": "failed", "why": str(error) or "stopped before anything was due"}, None))
            return
        self.said.put((_report(run), packed(run.columns)))

    def _start(self) -> int:
        """Say that the senders are ready, and wait to be told when they start."""
        self.said.put(({"says": "ready"}, None))
        while not self.ordered.wait(0.1):
            if self.stop.is_set():
                raise ConfigError("stopped before it started")
        return self.start_ns

    def _progress(self, progress: dict[str, int]) -> None:
        self.said.put(({"says": "progress", **progress}, None))


def _report(run: Run) -> dict[str, Any]:
    return {
        "says": "done", "subnets": run.subnets, "reasons": run.reasons, "duplicates": run.n_duplicates,
        "noise_ns": run.noise_p99_9_ns, "duration_s": run.result.duration_s,
    }  # fmt: skip


class Agent:
    """Serves runs, one after the other, until `stop`.

    Args:
        endpoint: Where it listens.
    """

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket, self.endpoint = bind_router(self._context, endpoint)
        self._share: _Share | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def stop(self) -> None:
        """Have `run` return. Safe in a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._is_stopping:
                self._socket.poll(_POLL_MS)
                while (frames := receive(self._socket)) is not None:
                    with contextlib.suppress(WireError):  # a stranger's; nothing of ours depends on it
                        body, data = heard(frames[1:])
                        self._obey(bytes(frames[0]), body, data)
                self._tell()
        finally:
            self._end()
            self._socket.close(0)
            self._context.term()

    def _obey(self, key: bytes, body: dict[str, Any], data: Buffer | None) -> None:
        share = self._share
        if share is not None and share.key == key:
            share.heard_s = time.monotonic()
        what = body.get("do")
        if what == "ping":
            say(self._socket, [key], {"says": "pong", "stamp": body.get("stamp")})
        elif what == "prepare" and data is not None:
            self._prepare(key, body, data)
        elif what == "start" and share is not None and share.key == key:
            share.start_ns = time.monotonic_ns() + int(body["in_ns"])
            share.ordered.set()
        elif what == "stop" and share is not None and share.key == key:
            share.stop.set()

    def _prepare(self, key: bytes, body: dict[str, Any], data: Buffer) -> None:
        """Begin a run, if none goes on and it is what it should be; else say why not."""
        if self._share is not None:
            say(self._socket, [key], {"says": "failed", "why": "this agent is in the middle of another run"})
            return
        try:
            due_ns = unpacked(data)["due_ns"]
            trace = Trace(str(body["trace"]), due_ns, int(body["duration_ns"]), str(body["provenance"]))
            self._share = _Share(key, trace, _settings_of(body["settings"]), str(body["endpoint"]))
        except (SuperServeError, KeyError, TypeError, ValueError) as error:
            say(self._socket, [key], {"says": "failed", "why": f"prepare: {error}"})
            return
        self._thread = threading.Thread(target=self._share.run, name="share", daemon=True)
        self._thread.start()

    def _tell(self) -> None:
        """Pass on what the run has to say; forget it at its end, and stop one whose head is lost."""
        share = self._share
        if share is None:
            return
        while not share.said.empty():
            body, data = share.said.get()
            say(self._socket, [share.key], body, *(() if data is None else (data,)))
            if body["says"] in ("done", "failed"):
                self._end()
                return
        if time.monotonic() - share.heard_s > SILENT_S:
            share.stop.set()

    def _end(self) -> None:
        if self._share is not None and self._thread is not None:
            self._share.stop.set()
            self._thread.join(30.0)
        self._share = self._thread = None


def _settings_of(body: Mapping[str, Any]) -> RunSettings:
    if int(body["n_senders"]) < 1 or int(body["slo_ns"]) < 1 or int(body["payload_bytes"]) < 0:
        raise ConfigError("n_senders: expected 1 at least, slo_ns above 0, payload_bytes not below it")
    return RunSettings(
        slo_ns=int(body["slo_ns"]), n_senders=int(body["n_senders"]),
        payload_bytes=int(body["payload_bytes"]), seed=int(body["seed"]), grace_ns=int(body["grace_ns"]),
    )  # fmt: skip


def settings_dict(settings: RunSettings) -> dict[str, int]:
    """Return the settings that an agent is given."""
    return {name: int(getattr(settings, name)) for name in _SETTINGS}
