"""A worker process's sockets, one to each router that it knows. It belongs to one, and asks the others.

The sockets stay open, so that a lost router costs one message and no new connection.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import zmq

from superserve.errors import ConfigError, WireError
from superserve.hello import RouterBrief
from superserve.net import sockets
from superserve.wire import Control, Directive, Kind, Ping, Pong, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.core.choice import RouterChoice
    from gpu_worker.core.lending import Lender
    from superserve.net.handshake import Handshake

_LOG = logging.getLogger(__name__)

_POLLOUT = int(zmq.POLLOUT)


class RouterDoor:
    """The way to one router.

    Attributes:
        handshake: Watches the socket.
        socket: The DEALER.
    """

    __slots__ = ("handshake", "socket")

    def __init__(self, handshake: Handshake) -> None:
        self.handshake = handshake
        self.socket = handshake.socket

    def is_connected(self) -> bool:
        """Return whether there is a connection: with IMMEDIATE a DEALER is writable only then."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & _POLLOUT)


class WorkerRouters:
    """Asks routers how many GPUs they have, and passes on what they answer.

    Args:
        choice: Decides.
        connect: Opens the way to a router; the caller closes it.
        farewell: The process's BYE.

    Attributes:
        choice: Decides.
        doors: By the numbers of `choice`; None for a router that cannot be connected to.
    """

    def __init__(self, choice: RouterChoice, connect: Callable[[str], Handshake], farewell: Control) -> None:
        self.choice = choice
        self._farewell = farewell
        self._connect = connect
        self.doors: list[RouterDoor | None] = []
        for endpoint in choice.endpoints:
            self.doors.append(RouterDoor(connect(endpoint)))

    def ask(self, now_ns: int) -> None:
        """Send the questions that are due."""
        for i in self.choice.questions(now_ns):
            door = self.doors[i]
            if door is not None:
                door.handshake.look(now_ns)
                sockets.send(door.socket, encode(Control(Kind.STATUS, {"brief": True})))

    def listen(self, lender: Lender[Directive], now_ns: int) -> None:
        """Read what routers other than the own one have sent; all but answers is for the lender."""
        for i, door in enumerate(list(self.doors)):
            if i == self.choice.own or door is None:
                continue
            if not door.is_connected():
                self.choice.forget(i)
                continue
            while sockets.is_readable(door.socket):
                try:
                    frames = sockets.receive(door.socket)
                    message = None if frames is None else decode(frames)
                except WireError:
                    continue
                if isinstance(message, Control) and message.kind is Kind.STATUS:
                    self.answered(i, message, now_ns)
                elif isinstance(message, Control | Directive | Ping | Pong):
                    try:
                        lender.receive(i, message, now_ns)
                    except WireError as error:
                        _LOG.warning("%s: %s", self.choice.endpoints[i], error)

    def answered(self, i: int, message: Control, now_ns: int) -> None:
        """Take a router's answer.

        Raises:
            WireError: It is malformed.
        """
        try:
            brief = RouterBrief.from_body(message.body)
        except WireError as error:
            _LOG.warning("%s: %s", self.choice.endpoints[i], error)
            return
        self.choice.told(i, brief, now_ns)
        self.learn(brief.routers or ())

    def learn(self, endpoints: tuple[str, ...]) -> None:
        """Connect to the routers of a list that are new."""
        for i in self.choice.learn(endpoints):
            endpoint = self.choice.endpoints[i]
            try:
                self.doors.append(RouterDoor(self._connect(endpoint)))
            except ConfigError as error:
                self.doors.append(None)
                _LOG.warning("router %s: %s", endpoint, error)
            else:
                _LOG.info("knows of a router at %s", endpoint)

    def lend(self, lender: Lender[Directive], now_ns: int) -> None:
        """Send what lending credits takes."""
        lost: set[int] = set()
        for i, message in lender.poll(now_ns):
            door = self.doors[i]
            if i not in lost and (door is None or not sockets.send(door.socket, encode(message))):
                lost.add(i)
                lender.lost(i, now_ns)

    def part_all(self, lender: Lender[Directive]) -> None:
        """Say BYE to the routers that are visited: the process ends."""
        for i, message in lender.farewells():
            door = self.doors[i]
            if door is not None:
                sockets.send(door.socket, encode(message))

    def part(self, socket: zmq.Socket[bytes]) -> None:
        """Send BYE to a router that is left; one that is stopped reads it when it goes on."""
        sockets.send(socket, encode(self._farewell))

    def all_sockets(self) -> list[zmq.Socket[bytes]]:
        """Return the sockets to sleep on."""
        return [door.socket for door in self.doors if door is not None]
