"""The reference: a bare pyzmq ROUTER that sends every message back, and does nothing else."""

from __future__ import annotations

import sys

import zmq

from superserve.net.sockets import HIGH_WATER_MARK
from superserve.roles.processes import announce_ready, die_with_parent


def serve() -> None:
    """Echo until killed; announces {"endpoint": ..}."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        # As the router has it: with pyzmq's default of 1,000 a burst would be dropped silently.
        socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.bind("tcp://127.0.0.1:*")
        announce_ready({"endpoint": socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")})
        while True:
            socket.send_multipart(socket.recv_multipart())


def main() -> int:
    """Serve as a role: end with the process that started it."""
    die_with_parent()
    serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
