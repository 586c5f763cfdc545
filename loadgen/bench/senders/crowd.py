"""A crowd of small callers in one process: a loop over plain sockets, so that the server is what is measured.

    python -m loadgen.bench.senders.crowd PLAN.json

Messages are encoded before the run and answers read after it; during it a query costs one send(), one recv()
and a few list operations. The same loop speaks to the router, to the bare echo and over HTTP: see `framings`.
Open loop, a query is due at an instant that nothing in the run moves, and latency counts from there. Closed
loop, each connection has one message under way: this shows the highest rate of that many callers who wait.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from loadgen.bench.senders.cost import Threads, threads_of
from loadgen.bench.senders.framings import FRAMINGS, Framing
from loadgen.results.result import quantile_ns
from superserve.clock import MS
from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.roles.processes import announce_ready, die_with_parent

if TYPE_CHECKING:
    import numpy.typing as npt

_STAMP = struct.Struct("<q").pack_into
_READ_BYTES = 16_384
_CONNECT_S = 20.0
N_PARTS = 10
"""Parts of what counts whose costs are read apart."""
_GRACE_NS = 500 * MS
"""After the last query's deadline, so long answers are awaited."""


@dataclass(frozen=True, slots=True)
class CrowdPlan:
    """What a crowd does.

    Attributes:
        host: Of the server.
        port: Of the server.
        framing: A name of `FRAMINGS`.
        report: The file that it writes.
        rate_qps: Poisson arrivals at this rate; 0 for a closed loop.
        seconds: How long is counted, after the warm-up.
        warm_s: Not counted.
        n_connections: Callers.
        n_each: Queries in each message.
        payload_bytes: Of each query.
        slo_ns: From due to deadline.
        rest_ns: Least time between two rounds: what comes or is due meanwhile shares the next one.
        pids: Processes whose cost is read at the beginning and the end of what is counted.
        seed: Of the arrivals.
        most_qps: Closed loop: messages for this rate are made.
    """

    host: str
    port: int
    framing: str
    report: str
    rate_qps: float = 0.0
    seconds: float = 2.0
    warm_s: float = 1.0
    n_connections: int = 256
    n_each: int = 1
    payload_bytes: int = 64
    slo_ns: int = 36 * MS
    rest_ns: int = MS // 2
    pids: list[int] = field(default_factory=list)
    seed: int = 0
    most_qps: float = 60_000.0


class CostMarks:
    """Reads what processes have cost when what counts begins, after each of its parts, and when it ends.

    Args:
        pids: The processes; this one comes last.
        from_ns: When it begins.
        to_ns: When it ends.

    Attributes:
        read: The instants at which it read, and the counters of each process.
    """

    def __init__(self, pids: list[int], from_ns: int, to_ns: int) -> None:
        self.read: list[tuple[int, list[Threads]]] = []
        self._pids = [*pids, os.getpid()]
        self._at_ns = [from_ns + i * (to_ns - from_ns) // N_PARTS for i in range(N_PARTS + 1)]

    @property
    def are_passed(self) -> bool:
        """Whether all were read."""
        return len(self.read) == len(self._at_ns)

    def pass_by(self, now_ns: int) -> None:
        """Read, if it is time."""
        if not self.are_passed and now_ns >= self._at_ns[len(self.read)]:
            self.read.append((now_ns, [threads_of(pid) for pid in self._pids]))


class Crowd:
    """The connections of a plan, and the loop over them.

    Attributes:
        arrived: Each answer, with the instant at which it was received.
    """

    def __init__(self, plan: CrowdPlan) -> None:
        self.plan = plan
        self.framing: Framing = FRAMINGS[plan.framing](plan.payload_bytes, plan.n_each)
        self.arrived: list[tuple[int, bytes]] = []
        self._sockets: list[socket.socket] = []
        self._of_fd: dict[int, int] = {}
        self._left: dict[int, bytes] = {}  # of a connection: the beginning of its next answer
        self._unsent: dict[int, bytes] = {}  # of a connection: what the kernel did not take
        self._under_way: list[int] = []
        self._free: deque[int] = deque()
        self._messages: list[memoryview] = []
        self._poller = select.epoll()
        self._sent: list[int] = []
        self._next_link = 0
        self._stamp_at: int | None = None

    # --- before the run -------------------------------------------------------------------

    def connect(self) -> None:
        """Connect every caller, and hear its server's greeting out.

        Raises:
            ConfigError: The server is not there, or does not greet.
        """
        plan = self.plan
        try:
            for i in range(plan.n_connections):
                link = socket.create_connection((plan.host, plan.port), _CONNECT_S)
                self._sockets.append(link)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._left[i] = self.framing.greet(link, time.time_ns() + i)
                link.settimeout(0)
        except (OSError, WireError) as error:
            raise ConfigError(f"{plan.host}:{plan.port}: {error}") from error
        for i, link in enumerate(self._sockets):
            self._of_fd[link.fileno()] = i
            self._poller.register(link.fileno(), select.EPOLLIN)
        self._under_way = [0] * plan.n_connections
        self._free.extend(range(plan.n_connections))

    def prepare(self, n: int) -> None:
        """Encode `n` messages; each still lacks the instant of its sending."""
        plan = self.plan
        ids = np.arange(n * plan.n_each, dtype=np.uint64)
        rows = self.framing.messages(ids, plan.slo_ns)
        each = rows.shape[1]
        whole = memoryview(bytearray(rows.tobytes()))
        self._messages = [whole[at : at + each] for at in range(0, n * each, each)]
        self._stamp_at = self.framing.stamp_at
        self._sent = [-1] * n

    # --- during it ------------------------------------------------------------------------

    def play(self, start_ns: int, due_ns: npt.NDArray[np.int64], marks: CostMarks) -> None:
        """Send each message when it is due, open loop, and collect the answers."""
        rest_s = self.plan.rest_ns / 1e9
        due = (due_ns + start_ns).tolist()
        n, i = len(due), 0
        n_left = n * self.plan.n_each
        give_up_ns = due[-1] + self.plan.slo_ns + _GRACE_NS
        while True:
            now_ns = time.monotonic_ns()
            marks.pass_by(now_ns)
            while i < n and due[i] <= now_ns:
                link = self._pick()
                if link is None:
                    break
                self._send(link, i, now_ns)
                i += 1
            n_left -= self._take()
            if (not n_left and marks.are_passed) or now_ns > give_up_ns:
                break
            time.sleep(rest_s)

    def play_closed(self, end_ns: int, marks: CostMarks) -> None:
        """Keep one message under way on each connection until the end.

        Raises:
            ConfigError: The plan's `most_qps` was too low.
        """
        rest_s = self.plan.rest_ns / 1e9
        n, i, free = len(self._messages), 0, self._free
        now_ns = time.monotonic_ns()
        while now_ns < end_ns:
            while free and i < n:
                self._send(free.popleft(), i, now_ns)
                i += 1
            time.sleep(rest_s)
            self._take()
            now_ns = time.monotonic_ns()
            marks.pass_by(now_ns)
        if i == n:
            raise ConfigError(f"most_qps: all messages for {self.plan.most_qps:g} q/s were sent")
        give_up_ns = now_ns + self.plan.slo_ns + _GRACE_NS
        while any(self._under_way) and time.monotonic_ns() < give_up_ns:
            self._take()
            time.sleep(rest_s)

    def _pick(self) -> int | None:
        """Return a connection for the next message: a free one, any if none is and it may pipeline."""
        if self._free:
            return self._free.popleft()
        if not self.framing.pipelines:
            return None
        self._next_link = (self._next_link + 1) % len(self._sockets)
        return self._next_link

    def _send(self, link: int, i: int, now_ns: int) -> None:
        message = self._messages[i]
        if self._stamp_at is not None:
            _STAMP(message, self._stamp_at, now_ns)
        self._sent[i] = now_ns
        self._under_way[link] += self.plan.n_each
        if link in self._unsent:
            self._send_rest(link, bytes(message))
            return
        try:
            n_taken = self._sockets[link].send(message)
        except BlockingIOError:
            n_taken = 0
        if n_taken < len(message):
            self._unsent[link] = bytes(message[n_taken:])

    def _send_rest(self, link: int, more: bytes = b"") -> None:
        """Send what the kernel has not taken of a connection, and then `more`."""
        data = self._unsent.pop(link, b"") + more
        with contextlib.suppress(BlockingIOError):
            data = data[self._sockets[link].send(data) :]
        if data:
            self._unsent[link] = data

    def _take(self) -> int:
        """Receive what has come; return how many queries that ends."""
        for link in tuple(self._unsent):
            self._send_rest(link)
        n = 0
        cut, count = self.framing.cut, self.framing.count
        sockets, of_fd, under_way = self._sockets, self._of_fd, self._under_way
        events = self._poller.poll(0, len(sockets))
        now_ns = time.monotonic_ns()
        for fd, _ in events:
            link = of_fd[fd]
            data = sockets[link].recv(_READ_BYTES)
            if not data:
                raise ConfigError(f"{self.plan.host}:{self.plan.port}: the server closed a connection")
            left = self._left.pop(link, b"")
            answers, left, back = cut(left + data if left else data)
            if left:
                self._left[link] = left
            if back:
                self._send_rest(link, back)
            for answer in answers:
                n_ended = count(answer)
                n += n_ended
                under_way[link] -= n_ended
                self.arrived.append((now_ns, answer))
                if not under_way[link]:
                    self._free.append(link)
        return n

    # --- after it -------------------------------------------------------------------------

    def answered_ns(self) -> npt.NDArray[np.int64]:
        """Return when each message's last query was answered; -1 unless all of them got outputs."""
        n_each, n = self.plan.n_each, len(self._sent)
        at_ns = np.full(n * n_each, -1, np.int64)
        for now_ns, answer in self.arrived:
            for i in self.framing.answered(answer):
                at_ns[i] = now_ns
        of_message = at_ns.reshape(n, n_each)
        found: npt.NDArray[np.int64] = np.where(of_message.min(1) < 0, -1, of_message.max(1))
        return found

    def close(self) -> None:
        """Close every connection."""
        self._poller.close()
        for link in self._sockets:
            link.close()

    def report(self, marks: CostMarks, due_ns: npt.NDArray[np.int64] | None) -> dict[str, Any]:
        """Return the figures of what counted; costs are of the plan's processes, and of this one last."""
        plan = self.plan
        (from_ns, before), (to_ns, after) = marks.read[0], marks.read[-1]
        sent_ns, answered_ns = np.array(self._sent, np.int64), self.answered_ns()
        began_ns = sent_ns if due_ns is None else due_ns
        is_counted = (began_ns >= from_ns) & (began_ns < to_ns)
        latency_ns = np.where(answered_ns < 0, np.iinfo(np.int64).max, answered_ns - began_ns)[is_counted]
        n_answered = int(((answered_ns >= from_ns) & (answered_ns < to_ns)).sum()) * plan.n_each
        lag_ns = (sent_ns - began_ns)[is_counted & (sent_ns >= 0)]
        known_ns = latency_ns[latency_ns < np.iinfo(np.int64).max]
        return {
            "seconds": (to_ns - from_ns) / 1e9,
            "answered_qps": n_answered / ((to_ns - from_ns) / 1e9),
            "n_counted": int(is_counted.sum()) * plan.n_each,
            "n_answered": n_answered,
            "share_in_time": float((latency_ns <= plan.slo_ns).mean()) if len(latency_ns) else 0.0,
            "latency_p50_ms": _ms(known_ns, 500),
            "latency_p99_ms": _ms(known_ns, 990),
            "lag_p99_9_ms": _ms(lag_ns, 999),
            "n_unanswered": int((answered_ns[sent_ns >= 0] < 0).sum()) * plan.n_each,
            "parts": [self._part(answered_ns, *pair) for pair in pairwise(marks.read)],
            "costs": [asdict(now.since(then)) for now, then in zip(after, before, strict=True)],
        }

    def _part(
        self,
        answered_ns: npt.NDArray[np.int64],
        before: tuple[int, list[Threads]],
        after: tuple[int, list[Threads]],
    ) -> dict[str, Any]:
        """Return how many queries were answered between two readings, and what each process took."""
        n = int(((answered_ns >= before[0]) & (answered_ns < after[0])).sum()) * self.plan.n_each
        costs_s = [now.since(then).cpu_s for now, then in zip(after[1], before[1], strict=True)]
        return {"n": n, "cpu_s": costs_s}


def _ms(values_ns: npt.NDArray[np.int64], permille: int) -> float | None:
    found = quantile_ns(values_ns, permille)
    return None if found is None else found / MS


def run(plan: CrowdPlan) -> dict[str, Any]:
    """Connect, play the plan, and return its figures.

    Raises:
        ConfigError: The server is absent, or ends a connection.
    """
    crowd = Crowd(plan)
    try:
        crowd.connect()
        whole_s = plan.warm_s + plan.seconds
        if plan.rate_qps:
            gaps_s = np.random.default_rng(plan.seed).exponential(
                plan.n_each / plan.rate_qps, int(1.2 * whole_s * plan.rate_qps / plan.n_each) + 100
            )
            due_ns = (np.cumsum(gaps_s) * 1e9).astype(np.int64)
            due_ns = due_ns[due_ns < int(whole_s * 1e9)]
        else:
            due_ns = np.zeros(int(plan.most_qps * whole_s / plan.n_each), np.int64)
        # Encoded for an instant that is then awaited: encoding takes a microsecond a message.
        start_ns = time.monotonic_ns() + 300 * MS + 3_000 * len(due_ns)
        crowd.prepare(len(due_ns))
        gc.collect()
        gc.freeze()
        gc.disable()
        announce_ready({"start_ns": start_ns})
        time.sleep(max(0, start_ns - time.monotonic_ns()) / 1e9)
        from_ns = start_ns + int(plan.warm_s * 1e9)
        marks = CostMarks(plan.pids, from_ns, from_ns + int(plan.seconds * 1e9))
        if plan.rate_qps:
            crowd.play(start_ns, due_ns, marks)
            return crowd.report(marks, due_ns + start_ns)
        crowd.play_closed(from_ns + int(plan.seconds * 1e9), marks)
        return crowd.report(marks, None)
    finally:
        crowd.close()


def main(argv: list[str]) -> int:
    """Play the plan named on the command line, and write its report."""
    die_with_parent()
    plan = CrowdPlan(**orjson.loads(Path(argv[0]).read_bytes()))
    try:
        Path(plan.report).write_bytes(orjson.dumps(run(plan)))
    except SuperServeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
