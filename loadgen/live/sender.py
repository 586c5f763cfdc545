"""The open-loop sender: a process that sends its share of a schedule at the planned instants.

The schedule is computed before the run; nothing that happens in the run moves a query. A sender that
wakes late sends everything that is due at once, and records the lag: latency counts from the instant
at which a query was *due*, so a slow sender can only make results worse. It sleeps between sends, and
never spins.

`Sender` keeps the schedule; a `SenderTarget` is where queries go and answers come from. `BulkTarget` sends
everything that is due as one message to a router; those of `loadgen.bench.senders` send one query at a
time, as applications do.
"""

from __future__ import annotations

import abc
import gc
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson

from loadgen.live.records import LIVE_ROW, UNANSWERED, Payloads, Records, SenderPlan
from superserve import wire
from superserve.client.spread import Spread
from superserve.clock import MS
from superserve.errors import ConfigError, SuperServeError
from superserve.net.connection import Connection
from superserve.net.context import new_context
from superserve.net.endpoints import endpoints_of, resolved
from superserve.net.keys import peer_keys
from superserve.net.sockets import Waiter, connect_dealer, receive, send, wait
from superserve.roles.command import one_line
from superserve.roles.processes import announce_ready, die_with_parent
from superserve.wire import (
    MAX_QUERIES,
    Queries,
    RunProgress,
    RunReady,
    RunReport,
    RunStart,
    RunStop,
    decode_run,
    encode_run,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy.typing as npt
    import zmq

    Steps = Generator[int, None, None]
    """Yields how long there is nothing to do, in ns: the caller waits or sleeps that long."""

_PROGRESS_NS = 250 * MS
_WELCOME_NS = 10_000 * MS
LATE_NS = 250 * MS
"""How long after its deadline a query's row is written: only a stuck answer takes longer."""


class SenderTarget(abc.ABC):
    """Where queries go and answers come from; both are entered in `records`.

    Attributes:
        at_once: Most queries sent in a row before answers are received.
        idle_ns: How long to wait at a time once all is sent; short if an answer does not end `wait`.
        subnets: Name and accuracy of each row of the profile, as far as it is known.
    """

    at_once = MAX_QUERIES
    idle_ns = 20 * MS

    def __init__(self, plan: SenderPlan, records: Records) -> None:
        self.plan = plan
        self.records = records
        self.subnets: list[tuple[str, float]] = []

    @abc.abstractmethod
    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries from `lo` on, with the slack left to each; return how many were taken."""

    @abc.abstractmethod
    def take(self) -> None:
        """Receive the answers that have come."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Enter all that was received."""

    def tick(self, now_ns: int) -> None:  # noqa: B027  most have nothing to do
        """Do periodic work, such as heartbeats."""

    @abc.abstractmethod
    def wait(self, duration_ns: int) -> None:
        """Wait this long, or until there is something to take."""


class BulkTarget(SenderTarget):
    """A router: everything due at one wake-up goes as one message, over one connection."""

    def __init__(self, plan: SenderPlan, records: Records, connection: Connection) -> None:
        super().__init__(plan, records)
        self.connection = connection
        self.payloads = Payloads(plan)
        self._waiter = Waiter((connection.socket,))

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries as one message; a full connection takes none."""
        n, hi = len(slacks_ns), lo + len(slacks_ns)
        ids = np.arange(lo, hi, dtype="<u8").tobytes()
        message = Queries(
            self.connection.epoch or 0, now_ns, n, ids, slacks_ns.tobytes(),
            self.payloads.each, self.payloads.buffers(lo, hi), self.payloads.framed,
        )  # fmt: skip
        if not self.connection.send_queries(message):
            return 0
        self.records.sent_ns[lo:hi] = now_ns
        return n

    def take(self) -> None:
        """Collect the answers that have come."""
        for results in self.connection.receive():
            arrived_ns = time.monotonic_ns()
            for group in results.groups:
                if self.records.gather(group, arrived_ns):
                    self.settle()

    def settle(self) -> None:
        """Enter the collected answers."""
        self.records.settle(keep_outputs=self.plan.keep_outputs)

    def wait(self, duration_ns: int) -> None:
        """Wait for answers."""
        self._waiter.wait(duration_ns)

    def tick(self, now_ns: int) -> None:
        """Send heartbeats, and HELLO again if the router has gone."""
        self.connection.tick(now_ns)
        self.subnets = self.connection.subnets


class SpreadTarget(BulkTarget):
    """Several routers: each message goes to one of them, as `superserve.client.spread` says."""

    def __init__(self, plan: SenderPlan, records: Records, connections: Sequence[Connection]) -> None:
        super().__init__(plan, records, connections[0])
        self.connections = connections
        self.spread = Spread(random.random())
        for _ in connections[1:]:
            self.spread.add()
        self.n_again = 0
        self._waiter = Waiter([connection.socket for connection in connections])
        self._deadlines_ns = np.zeros(len(records.status), np.int64)
        self._taken_back: list[int] = []
        records.is_copied = np.zeros(len(records.status), np.bool_)

    def __contains__(self, query_id: object) -> bool:
        return self.records.status[query_id] == UNANSWERED  # type: ignore[call-overload,no-any-return]  # an int

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries to the router that will serve them soonest."""
        i, n = self.spread.choose(len(slacks_ns)), len(slacks_ns)
        if i is None:
            return 0
        self.connection = self.connections[i]
        self._deadlines_ns[lo : lo + n] = slacks_ns + now_ns
        if super().send(lo, slacks_ns, now_ns) == 0:
            self.connection.lose()
            self._observe(i)
            return self.send(lo, slacks_ns, now_ns)
        self.spread.sent(i, range(lo, lo + n), now_ns)
        if self.spread.is_bloated(i):
            self.settle()
            self.spread.prune(i, self)
        return n

    def take(self) -> None:
        """Collect the answers that have come, and look after the routers."""
        for i, connection in enumerate(self.connections):
            for results in connection.receive():
                arrived_ns = time.monotonic_ns()
                for group in results.groups:
                    self.spread.answered(i, group.count)
                    if group.status == wire.Status.DRAINING:
                        self.spread.routes[i].is_draining = True
                        if len(self.spread.live()) > 1:
                            self._taken_back += np.frombuffer(group.ids, "<i8").tolist()
                            continue
                    if self.records.gather(group, arrived_ns):
                        self.settle()
            self._observe(i)
        self._look_after(time.monotonic_ns())

    def _observe(self, i: int) -> None:
        """Notice that a router came or went; another gets what a lost one had."""
        connection, route = self.connections[i], self.spread.routes[i]
        connection.look()
        if connection.epoch != route.epoch:
            lost = [one for ids in route.sent for one in ids] if route.epoch is not None else []
            route.forget()
            route.epoch = connection.epoch
            there = self.spread.on_live()
            self._taken_back += [one for one in lost if one not in there]
        route.gpus, route.is_draining = connection.gpus, route.is_draining or connection.is_draining

    def _look_after(self, now_ns: int) -> None:
        """Ask silent routers, give up dead ones, and send again what they had, or may have lost."""
        spread = self.spread
        for connection, route in zip(self.connections, spread.routes, strict=True):
            connection.tick(now_ns)
            route.hear(connection.heard_ns)
        if (beat_ns := spread.next_beat_ns()) is not None and now_ns >= beat_ns:
            self.settle()
            asked, dead = spread.beat(now_ns, self)
            for i in asked:
                self.connections[i].ping(now_ns)
            for i in dead:
                self.connections[i].lose()
                self._observe(i)
        for i in spread.suspects():
            self._taken_back += spread.copies(
                i, lambda one: one in self and self._deadlines_ns[one] > now_ns, now_ns
            )
        if self._taken_back:
            self._send_again(now_ns)

    def _send_again(self, now_ns: int) -> None:
        self.settle()
        ids = np.array(self._taken_back, np.int64)
        self._taken_back = []
        slacks_ns = self._deadlines_ns[ids] - now_ns
        is_open = (self.records.status[ids] == UNANSWERED) & (slacks_ns > 2 * MS)
        ids, slacks_ns = ids[is_open], slacks_ns[is_open]
        i = self.spread.choose(len(ids))
        if i is None or not len(ids):
            return
        connection, each = self.connections[i], self.payloads.each
        message = Queries(
            connection.epoch or 0, now_ns, len(ids), ids.astype("<u8").tobytes(), slacks_ns.tobytes(), each,
            self.payloads.picked(ids), self.payloads.framed, resubmitted=True,
        )  # fmt: skip
        if connection.send_queries(message):
            self.n_again += len(ids)
            self.spread.sent(i, ids.tolist(), now_ns)
            assert self.records.is_copied is not None, "the constructor made it"
            self.records.is_copied[ids] = True

    def tick(self, now_ns: int) -> None:
        """Note what the rows of the profile are; `take` does the rest."""
        del now_ns
        self.subnets = max((connection.subnets for connection in self.connections), key=len)


class Sender:
    """Sends a schedule to a target; `run` returns when every query is answered or given up."""

    def __init__(self, target: SenderTarget, due_ns: npt.NDArray[np.int64]) -> None:
        self.plan = target.plan
        self.records = target.records
        self.n_sent = 0
        self.target = target
        self._due_ns = due_ns
        self._n_written = 0

    def run(self, start_ns: int, on_progress: Callable[[int], int | None]) -> None:
        """Send every query at `start_ns` plus its offset, and collect the answers; see `steps`."""
        for duration_ns in self.steps(start_ns, on_progress):
            self.target.wait(duration_ns)

    def steps(self, start_ns: int, on_progress: Callable[[int], int | None]) -> Steps:
        """Send every query at `start_ns` plus its offset, and collect the answers.

        `on_progress` receives how many were due; it may return the offset at which the schedule ends early.
        """
        plan, target, records, due_ns = self.plan, self.target, self.records, self._due_ns
        n, i = len(due_ns), 0
        next_due_ns = start_ns + int(due_ns[0]) if n else 0
        patience_ns = plan.slo_ns + plan.grace_ns
        give_up_ns = start_ns + (int(due_ns[-1]) if n else 0) + patience_ns
        next_progress_ns = start_ns
        while True:
            now_ns = time.monotonic_ns()
            if i < n and next_due_ns <= now_ns:
                part_ns = due_ns[i : min(n, i + target.at_once)]
                part_ns = part_ns[: part_ns.searchsorted(now_ns - start_ns, "right")]
                # Refused queries count as unsent: an open loop does not wait for a router that is full.
                self.n_sent += target.send(i, part_ns + (start_ns + plan.slo_ns - now_ns), now_ns)
                i += len(part_ns)
                next_due_ns = start_ns + int(due_ns[i]) if i < n else 0
            target.take()
            if now_ns >= next_progress_ns:
                next_progress_ns = now_ns + _PROGRESS_NS
                target.tick(now_ns)
                stop_ns = on_progress(i)
                if stop_ns is not None:
                    n = max(i, min(n, int(due_ns.searchsorted(stop_ns))))
                    give_up_ns = max(now_ns, start_ns + (int(due_ns[n - 1]) if n else 0)) + patience_ns
            if i >= n and (records.n_ended >= self.n_sent or now_ns >= give_up_ns):
                target.settle()  # this may find duplicates, and then answers are still missing
                if records.n_ended >= self.n_sent or now_ns >= give_up_ns:
                    return
            # Waking for every query would cost more than sending it: see `SenderPlan.least_sleep_ns`.
            next_ns = max(next_due_ns, now_ns + plan.least_sleep_ns) if i < n else now_ns + target.idle_ns
            left_ns = min(next_ns, next_progress_ns) - time.monotonic_ns()
            if left_ns > 0 and not (i < n and next_due_ns <= now_ns):
                yield left_ns

    def write_rows(self, until_ns: int | None) -> int:
        """Write the rows of queries due before this offset, None for all; return how many are written."""
        records, low = self.records, self._n_written
        self.target.settle()
        high = len(self._due_ns) if until_ns is None else int(np.searchsorted(self._due_ns, until_ns))
        if high > low:
            rows = np.empty(high - low, LIVE_ROW)
            for name in LIVE_ROW.names or ():
                rows[name] = getattr(records, name)[low:high]
            with self.plan.live_path.open("ab") as file:
                file.write(rows.tobytes())
            self._n_written = high
        return self._n_written

    # --- on a coordinator's orders ------------------------------------------------------------

    def play(self, context: zmq.Context[zmq.Socket[bytes]]) -> Steps:
        """Report readiness, start when ordered to, send; then write the records, and report."""
        gc.collect()
        gc.freeze()
        gc.disable()  # answers are kept until the end of the run: each collection would walk all of them
        announce_ready({"name": self.plan.name})
        control = connect_dealer(context, self.plan.control)
        try:
            while not send(control, encode_run(RunReady(self.plan.name))):
                yield 5 * MS
            while (frames := receive(control)) is None:
                self.target.tick(time.monotonic_ns())
                self.target.take()
                yield 20 * MS
            order = decode_run(frames)
            assert isinstance(order, RunStart), "the first order is to start"
            assert order.at_ns is not None, "a sender and its coordinator share a clock"
            start_ns = order.at_ns
            yield from self.steps(start_ns, lambda i: self._report(control, i, start_ns))
            rows = self.write_rows(None) if self.plan.is_watched else 0
            self.records.save(self.plan)
            reasons, n_duplicates = self.records.reasons, self.records.n_duplicates
            report = RunReport(tuple(self.target.subnets), reasons, n_duplicates, self.plan.name, rows)
            send(control, encode_run(report))
        finally:
            control.close(linger=2_000)

    def _report(self, control: zmq.Socket[bytes], i: int, start_ns: int) -> int | None:
        """Report what was due, sent and answered so far. Return when to stop, if one was ordered."""
        rows, until_ns = None, 0
        if self.plan.is_watched:
            until_ns = max(0, time.monotonic_ns() - start_ns - self.plan.slo_ns - LATE_NS)
            rows = self.write_rows(until_ns)
        progress = RunProgress(i, self.n_sent, self.records.n_ended, self.plan.name, rows, until_ns)
        send(control, encode_run(progress))
        frames = receive(control)
        if frames is None:
            return None
        message = decode_run(frames)
        assert isinstance(message, RunStop), "a sender that has started is only ordered to stop"
        return message.after_ns


def _await_welcome(connections: Sequence[Connection]) -> Connection:
    """Wait for a router with workers, and return the connection to it."""
    give_up_ns = time.monotonic_ns() + _WELCOME_NS
    while True:
        now_ns = time.monotonic_ns()
        for connection in connections:
            if connection.epoch is not None and connection.model is not None:
                return connection
        if now_ns > give_up_ns or all(connection.mismatch is not None for connection in connections):
            for connection in connections:
                if connection.epoch is not None:
                    raise ConfigError(f"{connection.endpoint}: no worker has joined this router")
            raise ConfigError("; ".join(dict.fromkeys(connection.absence for connection in connections)))
        for connection in connections:
            connection.tick(now_ns)
        wait([connection.socket for connection in connections], 20 * MS)
        for connection in connections:
            for _ in connection.receive():
                pass


def run_sender(plan: SenderPlan) -> None:
    """Connect, wait for the coordinator's start, send the schedule, write the records.

    Raises:
        SuperServeError: The router is absent, or the plan's files are malformed.
    """
    due_ns = np.load(plan.path("due"))
    records = Records(len(due_ns))
    with new_context() as context:
        open_at = partial(Connection, context=context, keys=peer_keys(plan.keys))
        connections = [open_at(endpoint) for endpoint in resolved(endpoints_of(plan.endpoint))]
        try:
            connection = _await_welcome(connections)
            known = [one.endpoint for one in connections]
            connections += [open_at(one) for one in connection.routers if one not in known]
            target = BulkTarget(plan, records, connection)
            if len(connections) > 1:
                target = SpreadTarget(plan, records, connections)
            expected = None if connection.model is None else connection.model.input
            if expected is not None and expected.n_bytes != target.payloads.each:
                raise ConfigError(
                    f"payload: the model takes {expected.n_bytes} bytes a query "
                    f"({expected.dtype} {expected.shape}), got {target.payloads.each}: use --payload-bytes"
                )
            for duration_ns in Sender(target, due_ns).play(context):
                target.wait(duration_ns)
        finally:
            for one in connections:
                one.close()


def main(argv: list[str], run: Callable[[SenderPlan], None] = run_sender) -> int:
    """Run the sender of the plan, a JSON file named on the command line."""
    die_with_parent()
    plan = SenderPlan(**orjson.loads(Path(argv[0]).read_bytes()))
    try:
        run(plan)
    except SuperServeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    with one_line():
        sys.exit(main(sys.argv[1:]))
