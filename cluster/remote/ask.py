"""Verbs of `cluster.host.onhost` on a host: sent over its shell, answered with one JSON object."""

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
"""How long a verb may take, without another limit."""


def ask(
    shell: Shell, host: KnownHost, verb: str, *, timeout_s: float = ASK_S, **asked: Any
) -> dict[str, Any]:
    """Run a verb of `cluster.host.onhost` on a host; see `SupervisorEngine.ask`."""
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
    """Return the JSON object that a command on a host printed between marks, and ignore the rest.

    A shell may print a greeting, even without a newline, or a farewell, and end with its own exit code.

    Raises:
        RemoteError: There is none; the error quotes the command's last output.
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
    """Return a host's answer; raise RemoteError if it contains an error."""
    if "error" in said:
        raise RemoteError(f"{host}: {said['error']}")
    return said
