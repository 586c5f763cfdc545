"""Lives of a worker: the same process on a new connection, an earlier one that is gone, or another process.

A worker that sends HELLO under a known name replaces the earlier one: usually that is itself, or a process
that has ended. Two live processes would replace each other at every HELLO, several times a second, and lose
each other's batches. So while the first one answers, the second is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from superserve.hello import WorkerHello

SILENT_BEATS = 3
"""A worker that has missed this many heartbeats may have ended: its name is free."""


def life_of(key: bytes, hello: WorkerHello) -> str:
    """Return what distinguishes a worker process from every other: the identifier in its HELLO, if any.

    Older workers send host and process number. Without those, the connection counts as the process.
    """
    if hello.life:
        return hello.life
    if hello.host and hello.pid:
        return f"{hello.host} {hello.pid}"
    return key.hex()


def check_name(name: str, quiet_ns: int, heartbeat_ns: int, host: str) -> None:
    """Raise ConfigError if another process with this worker's name has answered lately.

    Args:
        name: The worker's name.
        quiet_ns: How long the process that has the name has been silent.
        heartbeat_ns: How often it should send something.
        host: Its host, as it stated; "" if it did not.
    """
    if quiet_ns < SILENT_BEATS * heartbeat_ns:
        where = f" on {host}" if host else ""
        raise ConfigError(
            f"worker {name}: a live worker{where} has this name: give each its own with --name, or leave"
            " that out"
        )
