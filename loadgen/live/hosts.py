"""A run from several load generator hosts: dealt out, started at one instant, and merged exactly.

Each agent (`loadgen.live.agent`) is given every n-th query. All start at one instant: an agent is told in how
many nanoseconds, less half its round trip, so that none is off by more than that half, which the result
states. What they saw comes back as columns and is put into the trace's order; so counts and quantiles are
those of one generator. An agent that is lost leaves a marked gap: its queries count as unsent, since nobody
knows better, and the run does not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from loadgen.live.agent import SILENT_S, heard, packed, say, settings_dict, unpacked
from loadgen.live.run import summarise
from loadgen.live.sender import COLUMNS, UNANSWERED
from loadgen.results.run import Run
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError, WireError
from superserve.net.connection import ask_status
from superserve.net.sockets import connect_dealer, receive

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from loadgen.live.run import RunSettings
    from loadgen.traces.trace import Trace

_PINGS = 8
_GREET_S, _PREPARE_S = 5.0, 60.0
_START_AFTER_NS = 500 * MS
_PING_EVERY_S = 1.0
_TYPES: dict[str, Any] = {
    "sent_ns": np.int64, "answered_ns": np.int64, "status": np.uint8, "subnet": np.uint16,
    "batch_size": np.uint16, "accuracy": np.float32, "queued_ns": np.int64, "executing_ns": np.int64,
}  # fmt: skip


@dataclass(slots=True)
class _Generator:
    """One agent, as the head sees it."""

    name: str
    socket: zmq.Socket[bytes]
    due_ns: npt.NDArray[np.int64]
    round_trip_ns: int = 0
    heard_s: float = 0.0
    progress: dict[str, int] = field(default_factory=dict)
    is_ready: bool = False
    is_lost: bool = False
    done: dict[str, Any] | None = None
    columns: dict[str, npt.NDArray[Any]] | None = None


class Head:
    """Deals a run out to agents and merges what they saw; one use.

    Args:
        agents: HOST:PORT of each.
        stop: Once set, all stop, and the run is reported up to there.

    Raises:
        ConfigError: There are none, one twice, or one whose address is malformed.
    """

    def __init__(self, agents: Sequence[str], stop: threading.Event) -> None:
        if len(set(agents)) < len(agents) or not agents:
            raise ConfigError(f"--generators: expected each HOST:PORT once, got {','.join(agents)!r}")
        self._agents = agents
        self._stop = stop
        self._is_stopping = False
        self._generators: list[_Generator] = []

    def run(
        self,
        trace: Trace,
        settings: RunSettings,
        endpoint: str,
        on_progress: Callable[[dict[str, int]], None] | None = None,
    ) -> Run:
        """Offer `trace` to the router at `endpoint`, which every agent must reach by that name.

        Raises:
            ConfigError: An agent does not answer or cannot begin; it is named. Or no router answers.
            KeyboardInterrupt: It was stopped before any query was due.
        """
        policy = ask_status(endpoint).router.policy
        with zmq.Context() as context:
            try:
                for i, name in enumerate(self._agents):
                    socket = connect_dealer(context, f"tcp://{name}")
                    self._generators.append(_Generator(name, socket, trace.due_ns[i :: len(self._agents)]))
                for one in self._generators:
                    one.round_trip_ns = _round_trip_ns(one)
                self._prepare(trace, settings, endpoint)
                self._start()
                self._follow(on_progress)
            finally:
                for one in self._generators:
                    say(one.socket, [], {"do": "stop"})
                    one.socket.close(linger=500)
        return self._merged(trace, settings, policy)

    # --- until all have started -----------------------------------------------------------

    def _prepare(self, trace: Trace, settings: RunSettings, endpoint: str) -> None:
        body = {
            "do": "prepare", "trace": trace.name, "provenance": trace.provenance, "endpoint": endpoint,
            "duration_ns": trace.duration_ns, "settings": settings_dict(settings),
        }  # fmt: skip
        for one in self._generators:
            if not len(one.due_ns):
                raise ConfigError(
                    f"trace {trace.name}: expected a query for each of {len(self._agents)} generators"
                )
            say(one.socket, [], body, packed({"due_ns": one.due_ns}))
        give_up_s = time.monotonic() + _PREPARE_S
        while waiting := [one for one in self._generators if not one.is_ready]:
            if time.monotonic() > give_up_s:
                raise ConfigError(
                    f"generator {waiting[0].name}: expected its senders ready in {_PREPARE_S:g} s"
                )
            self._take()

    def _start(self) -> None:
        """Have all start at one instant, each told what is left until then less half its way."""
        start_ns = time.monotonic_ns() + _START_AFTER_NS
        for one in self._generators:
            left_ns = start_ns - time.monotonic_ns() - one.round_trip_ns // 2
            say(one.socket, [], {"do": "start", "in_ns": left_ns})

    def _take(self) -> None:
        """Take in what has come, and keep the connections warm.

        Raises:
            ConfigError: An agent says that it failed, or sent what is no answer.
        """
        poller = zmq.Poller()
        for one in self._generators:
            poller.register(one.socket, zmq.POLLIN)
        poller.poll(50)
        for one in self._generators:
            while (frames := receive(one.socket)) is not None:
                one.heard_s = time.monotonic()
                try:
                    body, data = heard(frames)
                    columns = None if data is None else unpacked(data)
                except WireError as error:
                    raise ConfigError(f"generator {one.name}: {error}") from error
                _note(one, body, columns)

    # --- while it runs --------------------------------------------------------------------

    def _follow(self, on_progress: Callable[[dict[str, int]], None] | None) -> None:
        """Pass progress on until every agent is done, or lost."""
        next_ping_s = 0.0
        for one in self._generators:
            one.heard_s = time.monotonic()
        while any(one.done is None and not one.is_lost for one in self._generators):
            now_s = time.monotonic()
            if now_s >= next_ping_s:  # tells an agent that its head is there, and the head that the agent is
                next_ping_s = now_s + _PING_EVERY_S
                for one in self._generators:
                    say(one.socket, [], {"do": "ping", "stamp": time.monotonic_ns()})
            if self._stop.is_set() and not self._is_stopping:
                self._is_stopping = True
                for one in self._generators:
                    say(one.socket, [], {"do": "stop"})
            self._take()
            for one in self._generators:
                one.is_lost |= one.done is None and time.monotonic() - one.heard_s > SILENT_S
            if on_progress is not None:
                on_progress(self._total())

    def _total(self) -> dict[str, int]:
        parts = [one.progress for one in self._generators]
        return {what: sum(part.get(what, 0) for part in parts) for what in ("due", "sent", "answered")}

    # --- at its end -----------------------------------------------------------------------

    def _merged(self, trace: Trace, settings: RunSettings, policy: str) -> Run:
        done = [one.done for one in self._generators if one.done is not None]
        if not done:
            raise ConfigError(
                f"generators: all of {', '.join(self._agents)} were lost; nothing is known of the run"
            )
        columns = self._columns(trace)
        duration_s = max(float(body["duration_s"]) for body in done)
        is_partial = duration_s < trace.duration_ns / SECOND
        if is_partial:
            n = int(np.searchsorted(trace.due_ns, duration_s * SECOND))
            trace = trace.scaled(duration_s=duration_s)
            columns = {name: column[:n] for name, column in columns.items()}
        subnets = [(str(name), float(accuracy)) for name, accuracy in done[0]["subnets"]]
        noise = [body["noise_ns"] for body in done if body["noise_ns"] is not None]
        result = summarise(trace, settings.slo_ns, policy, columns, subnets, max(noise, default=None))
        lost = [one for one in self._generators if one.is_lost]
        gaps = tuple(_gap(one) for one in lost)
        if lost:
            because = tuple(
                f"generator {g['generator']} was lost: {g['queries']} queries are a gap" for g in gaps
            )
            result = replace(
                result, valid=False, invalid_because=(*because, *result.invalid_because), gaps=gaps
            )
        facts = tuple(_fact(one) for one in self._generators)
        result = replace(result, generators=facts, partial=True if is_partial else None)
        reasons: dict[str, str] = {}
        for body in done:
            reasons |= body["reasons"]
        n_duplicates = sum(int(body["duplicates"]) for body in done)
        return Run(
            result,
            columns,
            subnets,
            reasons,
            n_duplicates=n_duplicates,
            noise_p99_9_ns=max(noise, default=None),
        )

    def _columns(self, trace: Trace) -> dict[str, npt.NDArray[Any]]:
        """Put what the agents saw into the trace's order; of a lost one nothing is known."""
        columns: dict[str, npt.NDArray[Any]] = {"due_ns": trace.due_ns}
        n = len(self._generators)
        for name in COLUMNS:
            fill = {"sent_ns": -1, "answered_ns": -1, "status": UNANSWERED}.get(name, 0)
            columns[name] = np.full(trace.n, fill, _TYPES[name])
            for i, one in enumerate(self._generators):
                if one.columns is not None:
                    part = one.columns[name]
                    columns[name][i::n][: len(part)] = part
        return columns


def _round_trip_ns(one: _Generator) -> int:
    """Return the shortest of some round trips.

    Raises:
        ConfigError: It does not answer.
    """
    best: int | None = None
    give_up_s = time.monotonic() + _GREET_S
    n = 0
    while n < _PINGS and time.monotonic() < give_up_s:
        stamp_ns = time.monotonic_ns()
        if not say(one.socket, [], {"do": "ping", "stamp": stamp_ns}):
            one.socket.poll(20)  # not connected yet
            continue
        while one.socket.poll(500):
            frames = receive(one.socket)
            body = {} if frames is None else heard(frames)[0]
            if body.get("stamp") == stamp_ns:
                took_ns = time.monotonic_ns() - stamp_ns
                best, n = took_ns if best is None else min(best, took_ns), n + 1
                break
    if best is None:
        raise ConfigError(
            f"generator {one.name}: no `loadgen agent` answers there: start one with "
            f"`loadgen agent --listen ADDRESS:PORT`, or check host and port"
        )
    return best


def _note(one: _Generator, body: dict[str, Any], columns: dict[str, npt.NDArray[Any]] | None) -> None:
    """Take in what an agent said."""
    says = body.get("says")
    if says == "failed":
        raise ConfigError(f"generator {one.name}: {body.get('why')}")
    if says == "ready":
        one.is_ready = True
    elif says == "progress":
        one.progress = {what: int(body[what]) for what in ("due", "sent", "answered")}
    elif says == "done":
        if columns is None or any(name not in columns for name in COLUMNS):
            raise ConfigError(f"generator {one.name}: expected the columns {', '.join(COLUMNS)} at its end")
        one.done, one.columns = body, columns


def _gap(one: _Generator) -> dict[str, Any]:
    return {
        "generator": one.name, "queries": len(one.due_ns),
        "sent_when_last_heard": one.progress.get("sent", 0),
        "from_s": float(one.due_ns[0]) / SECOND, "to_s": float(one.due_ns[-1]) / SECOND,
    }  # fmt: skip


def _fact(one: _Generator) -> dict[str, Any]:
    return {
        "generator": one.name, "queries": len(one.due_ns), "lost": one.is_lost,
        "start_error_ms": one.round_trip_ns / 2 / MS,
    }  # fmt: skip
