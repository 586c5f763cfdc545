"""The null sink: a router that welcomes, answers every query at once if asked to, and does nothing else.

A generator that offers its load to the sink shows what it can do alone: the senders' whole path runs,
sending, receiving and recording, but nothing queues and nothing executes. The sink answers each message
with one group, like a cluster, using only the header: it is the cheapest peer that speaks the protocol, so
that the generator is what is measured.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from typing import TYPE_CHECKING

from superserve import wire
from superserve.clock import MS
from superserve.errors import VersionError, WireError
from superserve.hello import ClientWelcome, ModelSpec
from superserve.net.context import new_context
from superserve.net.sockets import bind_router, receive, send, wait
from superserve.roles.command import one_line
from superserve.roles.processes import ProcessGroup, announce_ready, die_with_parent
from superserve.roles.version import version
from superserve.status import (
    BatchCounts,
    EndCounts,
    GpusNeeded,
    QueryCounts,
    QueueStatus,
    Recent,
    RecentWindow,
    RouterInfo,
    RouterStatus,
)
from superserve.wire import Control, Group, Kind, Ping, Pong, Queries, Results, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    import zmq

POLICY = "null sink"
"""The sink's policy name, which distinguishes the result of a run against it from a cluster's."""
_WAIT_NS = 200 * MS  # how soon it notices a stop; queries wake it at once
_SILENT = "--silent"


class Sink:
    """Answers what arrives on a ROUTER socket; for one thread.

    Args:
        socket: Bound; the caller closes it.
        answers: Whether queries are answered, rather than dropped.

    Attributes:
        n_malformed: Messages that could not be decoded.
    """

    def __init__(self, socket: zmq.Socket[bytes], *, answers: bool = True) -> None:
        self._answers = answers
        self.n_malformed = 0
        self._socket = socket
        self._epoch = time.time_ns() >> 10

    def drain(self) -> None:
        """Answer everything that has arrived."""
        while (frames := receive(self._socket)) is not None:
            key = frames[0]
            if not self._answers and len(frames) > 2 and wire.kind_of(bytes(frames[1])) == Kind.QUERIES:
                continue
            try:
                message = wire.decode(frames[1:])
            except VersionError as error:
                send(self._socket, [key, *wire.encode_control(wire.refusal(error))])
                continue
            except WireError:
                self.n_malformed += 1
                continue
            if isinstance(message, Queries):
                answer = wire.encode_results(Results(self._epoch, [_answer(message)]))
            elif isinstance(message, Ping):
                answer = wire.encode_pong(Pong(message.stamp_ns, time.monotonic_ns()))
            elif isinstance(message, Control) and message.kind in (Kind.HELLO, Kind.STATUS):
                answer = wire.encode_control(self._control(message))
            else:
                continue
            send(self._socket, [key, *answer])

    def _control(self, greeting: Control) -> Control:
        agreed = wire.agreed(greeting)
        if greeting.kind is Kind.HELLO:
            welcome = ClientWelcome(self._epoch, ModelSpec(), (("none", 0.0),), POLICY, agreed)
            return Control(Kind.WELCOME, welcome.body(), agreed)
        return Control(Kind.STATUS, _status(self._epoch).body(), agreed)


def _status(epoch: int) -> RouterStatus:
    """Return STATUS: the real policy, process and CPU time, and all counts 0."""
    nothing = RecentWindow(0.0, 0, EndCounts(), 0.0, 0.0, 0)
    return RouterStatus(
        router=RouterInfo(
            draining=False, pid=os.getpid(), host=platform.node(), version=version(), epoch=epoch,
            policy=POLICY, client_endpoint="", worker_endpoint="", cpu_s=time.process_time(), loop_s=0.0,
        ),
        queries=QueryCounts(0, 0, EndCounts(), 0, 0.0, 0, 0.0, 0, 0),
        queue=QueueStatus(0, None, 0),
        batches=BatchCounts(0, 0, 0),
        lost_processes=0,
        model=ModelSpec(),
        clients=0,
        counts={},
        recent=Recent(nothing, nothing),
        workers_ready=0,
        workers_needed=GpusNeeded(0.0, 0.0),
        workers=(),
    )  # fmt: skip


def _answer(queries: Queries) -> Group:
    return Group(queries.n, Status.OK, 0, 1, 0.0, 0, 0, 0, 0, queries.ids, 0, b"")


@contextlib.contextmanager
def sink_server(*, answers: bool = True) -> Iterator[str]:
    """Run a null sink in a separate process; yields its endpoint.

    Raises:
        ProcessError: It did not start.
    """
    with ProcessGroup() as group:
        server = group.start("sink", ["-m", "loadgen.live.sink", *([] if answers else [_SILENT])])
        group.wait_ready(20.0)
        yield str(server.ready["endpoint"])


def main() -> int:
    """Serve as a role: end with the process that started it."""
    die_with_parent()
    with new_context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        sink = Sink(socket, answers=_SILENT not in sys.argv)
        announce_ready({"endpoint": endpoint})
        while True:
            wait((socket,), _WAIT_NS)
            sink.drain()


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
