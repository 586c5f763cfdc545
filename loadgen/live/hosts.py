"""A run from several load generator hosts: shared out, started at one instant, and merged exactly.

Each agent (`loadgen.live.agent`) gets every n-th query. All start at one instant: an agent receives the delay
in nanoseconds, less half its round trip, so that each start is off by at most that half, which the result
states. The agents' columns come back and are put into the trace's order; so counts and quantiles are those
of a single generator. An agent that is lost leaves a marked gap: its queries count as unsent, because their
outcome is unknown, and the run does not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from loadgen.live.agent import SILENT_S
from loadgen.live.records import COLUMNS, UNANSWERED
from loadgen.live.run import summarise
from loadgen.results.run import Run
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError, WireError
from superserve.net.connection import ask_status
from superserve.net.context import new_context
from superserve.net.sockets import connect_dealer, receive, send
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
    decode_run,
    encode_ping,
    encode_run,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from loadgen.live.run import RunSettings
    from loadgen.traces.trace import Trace
    from superserve.wire import RunMessage

_PINGS = 8  # the shortest of eight round trips is nearly free of queueing
_GREET_S, _PREPARE_S = 5.0, 60.0
_START_AFTER_NS = 500 * MS  # every agent has the message by then, and its senders are waiting
_PING_EVERY_S = 1.0  # an agent without one for SILENT_S stops its run


@dataclass(slots=True)
class _Generator:
    """One agent, as the head sees it."""

    name: str
    socket: zmq.Socket[bytes]
    due_ns: npt.NDArray[np.int64]
    round_trip_ns: int = 0
    heard_s: float = 0.0
    progress: RunProgress = field(default_factory=lambda: RunProgress(0, 0, 0))
    is_ready: bool = False
    is_lost: bool = False
    done: RunReport | None = None

    def say(self, message: RunMessage) -> None:
        """Send; if the agent is lost, its silence will show that."""
        send(self.socket, encode_run(message))


class Head:
    """Shares a run out to agents and merges their reports; for one use.

    Args:
        agents: HOST:PORT of each.
        stop: Once set, all stop, and the run is reported up to there.

    Raises:
        ConfigError: There are none, one is given twice, or an address is malformed.
    """

    def __init__(self, agents: Sequence[str], stop: threading.Event) -> None:
        if len(set(agents)) < len(agents) or not agents:
            raise ConfigError(f"--generators: expected each HOST:PORT once, got {','.join(agents)!r}")
        self._agents = agents
        self._stop = stop
        self._is_stopping = False
        self._next_ping_s = 0.0
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
            ConfigError: An agent does not answer or cannot begin; names it. Or no router answers.
            KeyboardInterrupt: It was stopped before any query was due.
        """
        policy = ask_status(endpoint).router.policy
        with new_context() as context:
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
                    one.say(RunStop())
                    one.socket.close(linger=500)
        return self._merged(trace, settings, policy)

    # --- until all have started -----------------------------------------------------------

    def _prepare(self, trace: Trace, settings: RunSettings, endpoint: str) -> None:
        for one in self._generators:
            if not len(one.due_ns):
                raise ConfigError(
                    f"trace {trace.name}: expected a query for each of {len(self._agents)} generators"
                )
            one.say(
                RunShare(
                    trace=trace.name, provenance=trace.provenance, endpoint=endpoint,
                    duration_ns=trace.duration_ns, slo_ns=settings.slo_ns, grace_ns=settings.grace_ns,
                    n_senders=settings.n_senders, payload_bytes=settings.payload_bytes, seed=settings.seed,
                    due_ns=one.due_ns.astype(RUN_COLUMNS["due_ns"]).tobytes(),
                )
            )  # fmt: skip
        give_up_s = time.monotonic() + _PREPARE_S
        while waiting := [one for one in self._generators if not one.is_ready]:
            if time.monotonic() > give_up_s:
                raise ConfigError(
                    f"generator {waiting[0].name}: expected its senders ready in {_PREPARE_S:g} s"
                )
            self._take()

    def _start(self) -> None:
        """Start all at one instant: each receives the time left until then, less half its round trip."""
        start_ns = time.monotonic_ns() + _START_AFTER_NS
        for one in self._generators:
            left_ns = start_ns - time.monotonic_ns() - one.round_trip_ns // 2
            one.say(RunStart(in_ns=left_ns))

    def _take(self) -> None:
        """Handle messages that have arrived, and send the PINGs that are due.

        Also while agents prepare: that takes a busy host longer than an agent waits for a silent coordinator.

        Raises:
            ConfigError: An agent reports a failure, or sent a malformed message.
        """
        now_s = time.monotonic()
        if now_s >= self._next_ping_s:  # each side knows by this that the other is there
            self._next_ping_s = now_s + _PING_EVERY_S
            for one in self._generators:
                send(one.socket, encode_ping(Ping(time.monotonic_ns())))
        poller = zmq.Poller()
        for one in self._generators:
            poller.register(one.socket, zmq.POLLIN)
        poller.poll(50)
        for one in self._generators:
            while (frames := receive(one.socket)) is not None:
                one.heard_s = time.monotonic()
                try:
                    _note(one, decode_run(frames))
                except WireError as error:
                    raise ConfigError(f"generator {one.name}: {error}") from error

    # --- while it runs --------------------------------------------------------------------

    def _follow(self, on_progress: Callable[[dict[str, int]], None] | None) -> None:
        """Pass progress on until every agent has finished or is lost."""
        for one in self._generators:
            one.heard_s = time.monotonic()
        while any(one.done is None and not one.is_lost for one in self._generators):
            if self._stop.is_set() and not self._is_stopping:
                self._is_stopping = True
                for one in self._generators:
                    one.say(RunStop())
            self._take()
            for one in self._generators:
                one.is_lost |= one.done is None and time.monotonic() - one.heard_s > SILENT_S
            if on_progress is not None:
                on_progress(self._total())

    def _total(self) -> dict[str, int]:
        parts = [one.progress for one in self._generators]
        return {what: sum(getattr(part, what) for part in parts) for what in ("due", "sent", "answered")}

    # --- at its end -----------------------------------------------------------------------

    def _merged(self, trace: Trace, settings: RunSettings, policy: str) -> Run:
        done = [one.done for one in self._generators if one.done is not None]
        if not done:
            raise ConfigError(
                f"generators: all of {', '.join(self._agents)} were lost; nothing is known of the run"
            )
        columns = self._columns(trace)
        duration_ns = max(report.duration_ns for report in done)
        is_partial = duration_ns < trace.duration_ns
        if is_partial:
            n = int(np.searchsorted(trace.due_ns, duration_ns))
            trace = trace.scaled(duration_s=duration_ns / SECOND)
            columns = {name: column[:n] for name, column in columns.items()}
        subnets = list(done[0].subnets)
        noise = [report.noise_ns for report in done if report.noise_ns is not None]
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
        for report in done:
            reasons |= report.reasons
        n_duplicates = sum(report.duplicates for report in done)
        return Run(
            result,
            columns,
            subnets,
            reasons,
            n_duplicates=n_duplicates,
            noise_p99_9_ns=max(noise, default=None),
        )

    def _columns(self, trace: Trace) -> dict[str, npt.NDArray[Any]]:
        """Put the agents' columns into the trace's order; of a lost agent nothing is known."""
        columns: dict[str, npt.NDArray[Any]] = {"due_ns": trace.due_ns}
        n = len(self._generators)
        for name in COLUMNS:
            fill = {"sent_ns": -1, "answered_ns": -1, "status": UNANSWERED}.get(name, 0)
            columns[name] = np.full(trace.n, fill, RUN_COLUMNS[name])
            for i, one in enumerate(self._generators):
                if one.done is not None:
                    part = np.frombuffer(one.done.columns[name], RUN_COLUMNS[name])
                    columns[name][i::n][: len(part)] = part
        return columns


def _round_trip_ns(one: _Generator) -> int:
    """Return the shortest of some round trips.

    Raises:
        ConfigError: The agent does not answer.
    """
    best: int | None = None
    give_up_s = time.monotonic() + _GREET_S
    n = 0
    while n < _PINGS and time.monotonic() < give_up_s:
        stamp_ns = time.monotonic_ns()
        if not send(one.socket, encode_ping(Ping(stamp_ns))):
            one.socket.poll(20)  # not connected yet
            continue
        while one.socket.poll(500):
            frames = receive(one.socket)
            try:
                answer = None if frames is None else decode_run(frames)
            except WireError as error:
                raise ConfigError(f"generator {one.name}: {error}") from error
            if isinstance(answer, Pong) and answer.stamp_ns == stamp_ns:
                took_ns = time.monotonic_ns() - stamp_ns
                best, n = took_ns if best is None else min(best, took_ns), n + 1
                break
    if best is None:
        raise ConfigError(
            f"generator {one.name}: no `loadgen agent` answers there: start one with "
            f"`loadgen agent --listen ADDRESS:PORT`, or check host and port"
        )
    return best


def _note(one: _Generator, message: RunMessage | Ping | Pong) -> None:
    """Record an agent's report.

    Raises:
        ConfigError: It failed, or its report lacks a column.
    """
    match message:
        case RunFailed():
            raise ConfigError(f"generator {one.name}: {message.why}")
        case RunReady():
            one.is_ready = True
        case RunProgress():
            one.progress = message
        case RunReport():
            if any(name not in message.columns for name in COLUMNS):
                raise ConfigError(
                    f"generator {one.name}: expected the columns {', '.join(COLUMNS)} at its end"
                )
            one.done = message


def _gap(one: _Generator) -> dict[str, Any]:
    return {
        "generator": one.name, "queries": len(one.due_ns),
        "sent_when_last_heard": one.progress.sent,
        "from_s": float(one.due_ns[0]) / SECOND, "to_s": float(one.due_ns[-1]) / SECOND,
    }  # fmt: skip


def _fact(one: _Generator) -> dict[str, Any]:
    return {
        "generator": one.name, "queries": len(one.due_ns), "lost": one.is_lost,
        "start_error_ms": one.round_trip_ns / 2 / MS,
    }  # fmt: skip
