"""A stand-in for a watched router: its watchers work as hard, and cost the real one nothing.

It answers STATUS with what the real router has answered before, in turn, then with the last of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zmq

from superserve import wire
from superserve.hello import ClientHello
from superserve.wire import Control, Kind, Ping, Pong

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.queues import SimpleQueue

_SPAWN = multiprocessing.get_context("spawn")
_WAIT_MS = 10_000


@dataclass(slots=True)
class Answers:
    """What a router has answered.

    Attributes:
        welcome: The body of its WELCOME.
        statuses: The bodies of its answers to STATUS with the flight record, the first with profiles.
    """

    welcome: dict[str, Any] = field(default_factory=dict)
    statuses: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def recorded(endpoint: str, every_s: float = 0.25) -> Iterator[Answers]:
    """Ask a router time after time while a block runs; give what it answers, which grows."""
    answers, is_over = Answers(), threading.Event()
    thread = threading.Thread(target=_record, args=(endpoint, every_s, answers, is_over))
    thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        thread.join()


def _record(endpoint: str, every_s: float, answers: Answers, is_over: threading.Event) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        hello = ClientHello(session=1, wire=wire.OURS).body()
        answers.welcome = _asked(socket, Control(Kind.HELLO, hello, wire.LOWEST))
        cursor = None
        while not is_over.wait(every_s):
            flight = {"river": True, "profiles": cursor is None, "since": cursor}
            body = _asked(socket, Control(Kind.STATUS, {"wire": wire.OURS, "flight": flight}))
            answers.statuses.append(body)
            cursor = body["flight"]["cursor"]
        socket.send_multipart(wire.encode_control(Control(Kind.BYE)))


def _asked(socket: zmq.Socket[bytes], question: Control) -> dict[str, Any]:
    """Return the body of the answer."""
    wanted = {Kind.HELLO: Kind.WELCOME, Kind.STATUS: Kind.STATUS}[question.kind]
    socket.send_multipart(wire.encode_control(question))
    while socket.poll(_WAIT_MS):
        message = wire.decode(socket.recv_multipart())
        if isinstance(message, Control) and message.kind is wanted:
            return message.body
    raise AssertionError(f"no answer to {question.kind.name}")


@contextlib.contextmanager
def sink(answers: Answers) -> Iterator[str]:
    """Run the stand-in as a process for a block; give its endpoint."""
    told: SimpleQueue[str] = _SPAWN.SimpleQueue()
    process = _SPAWN.Process(target=_answer, args=(answers, told), daemon=True)
    process.start()
    try:
        yield told.get()
    finally:
        process.terminate()
        process.join()


def _answer(answers: Answers, told: SimpleQueue[str]) -> None:
    n_asked: dict[bytes, int] = {}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        told.put(f"tcp://127.0.0.1:{port}")
        while True:
            key, *frames = socket.recv_multipart()
            message = wire.decode(frames)
            if isinstance(message, Ping):
                socket.send_multipart([key, *wire.encode_pong(Pong(message.stamp_ns, time.monotonic_ns()))])
            elif isinstance(message, Control) and message.kind is Kind.HELLO:
                _reply(socket, key, Kind.WELCOME, answers.welcome)
            elif isinstance(message, Control) and message.kind is Kind.STATUS:
                n = n_asked[key] = n_asked.get(key, -1) + 1
                _reply(socket, key, Kind.STATUS, _status(answers.statuses, n, message.body.get("flight")))


def _status(statuses: list[dict[str, Any]], n: int, asked: dict[str, Any] | None) -> dict[str, Any]:
    """Return the n-th answer; after the last one, that again with nothing new in its record."""
    body = statuses[min(n, len(statuses) - 1)]
    if asked is None:
        return {name: value for name, value in body.items() if name != "flight"}
    flight = {**body["flight"], "since": asked.get("since"), "more": False}
    if n >= len(statuses):
        flight["entries"] = ""
    if asked.get("profiles"):
        first = statuses[0]["flight"]
        flight |= {"profiles": first["profiles"], "profile_of": first["profile_of"]}
    return {**body, "flight": flight}


def _reply(socket: zmq.Socket[bytes], key: bytes, kind: Kind, body: dict[str, Any]) -> None:
    socket.send_multipart([key, *wire.encode_control(Control(kind, body))])
