"""`python -m loadgen.null_sink`: what costs a load generator nothing but itself.

It welcomes, and answers every message of queries at once with one group without outputs. So a run against
it takes the very path of a run against a router, and whatever is late in it is the generator's or the
machine's. Announces {"endpoint": ..}.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import zmq

from superserve import wire
from superserve.errors import WireError
from superserve.processes import announce_ready, die_with_parent
from superserve.sockets import bind_router, receive, rest, send, wait
from superserve.wire import Control, Group, Kind, Ping, Pong, Queries, Results, Status

if TYPE_CHECKING:
    from superserve.wire import Buffer, Message

EPOCH = 1
_WELCOME = {
    "epoch": EPOCH,
    "model": {"input": None, "output": None, "supernet": "null"},
    "subnets": [["null", 100.0]],
    "policy": "null",
}


def answer(message: Message, now_ns: int) -> list[Buffer] | None:
    """Return the frames that answer a message; None if it wants none."""
    if isinstance(message, Queries):
        group = Group(message.n, Status.OK, 0, 1, 100.0, 0, 0, 0, 0, bytes(message.ids), 0, b"")
        return wire.encode_results(Results(EPOCH, [group]))
    if isinstance(message, Ping):
        return wire.encode_pong(Pong(message.stamp_ns, now_ns))
    if isinstance(message, Control) and message.kind is Kind.HELLO:
        return wire.encode_control(Control(Kind.WELCOME, _WELCOME))
    if isinstance(message, Control) and message.kind is Kind.STATUS:
        times = os.times()
        router = {"policy": "null", "pid": os.getpid(), "cpu_s": times.user + times.system}
        return wire.encode_control(Control(Kind.STATUS, {"router": router, "workers": []}))
    return None


def serve() -> None:
    """Answer until killed."""
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        announce_ready({"endpoint": endpoint})
        while True:
            began_ns = time.monotonic_ns()
            n = 0
            while (frames := receive(socket)) is not None:
                n += 1
                try:
                    reply = answer(wire.decode(frames[1:]), time.monotonic_ns())
                except WireError as error:
                    sys.stderr.write(f"malformed: {error}\n")
                    continue
                if reply is not None:
                    send(socket, [frames[0], *reply])
            if n:
                rest(began_ns)
            else:
                wait((socket,), None)


def main() -> int:
    """Serve as a role: end with the process that started it."""
    die_with_parent()
    serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
