"""Verbs of `cluster.host.onhost` on a host: asked over its shell, answered with one JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cluster.host.bare import BEGIN, END
from cluster.host.onhost import do
from cluster.remote.shell import RemoteError

if TYPE_CHECKING:
    from cluster.remote.record import KnownHost
    from cluster.remote.shell import Completed, Shell

ASK_S = 60.0
"""What a verb may take, unless its caller knows better."""


def ask(
    shell: Shell, host: KnownHost, verb: str, *, timeout_s: float = ASK_S, **asked: Any
) -> dict[str, Any]:
    """Have a host do a verb of `cluster.host.onhost`; see `SupervisorEngine.ask`."""
    if host.is_here:
        return checked(host.name, do(verb, {"folder": host.folder, **asked}))
    argv = host.python("-m", "cluster.host.onhost", verb)
    stdin = orjson.dumps({"folder": host.folder, **asked})
    try:
        done = shell.run(host.target, argv, stdin=stdin, timeout_s=timeout_s)
    except RemoteError as error:
        raise type(error)(f"{host.name}: {error}") from error
    return answer(host.name, done)


def answer(host: str, done: Completed) -> dict[str, Any]:
    """Return the JSON object that a command on a host printed between marks, whatever stands around it.

    A shell may print a greeting, without a newline even, or a farewell, and end with a code of its own.

    Raises:
        RemoteError: There is none; quotes the command's last words.
    """
    _, _, rest = done.stdout.rpartition(BEGIN.encode())
    text, end, _ = rest.partition(END.encode())
    try:
        said = orjson.loads(text) if end else None
    except orjson.JSONDecodeError:
        said = None
    if not isinstance(said, dict):
        words = (done.stderr or done.stdout.decode(errors="replace")).strip().splitlines()[-3:]
        raise RemoteError(f"{host}: exit code {done.code}: {'; '.join(words) or 'nothing was written'}")
    return checked(host, said)


def checked(host: str, said: dict[str, Any]) -> dict[str, Any]:
    """Return what a host answered; RemoteError if that is why it failed."""
    if "error" in said:
        raise RemoteError(f"{host}: {said['error']}")
    return said
