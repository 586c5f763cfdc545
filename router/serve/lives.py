"""Lives of a worker: the same process on a new connection, an older one that is gone, or another by its name.

A worker that says HELLO under a name that is known takes the place of the one before: mostly that is itself,
or a life that has ended. Two that both live would throw each other out at every HELLO, several times a
second, and lose each other's batches. So while the first is heard, the second is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from superserve.hello import WorkerHello

SILENT_BEATS = 3
"""A worker that has missed so many heartbeats may be an older life: its name is free."""


def life_of(key: bytes, hello: WorkerHello) -> str:
    """Return what tells a worker process from every other; its HELLO's own word for it, if it has one.

    Older workers give host and process number. Without any, a connection is a life.
    """
    if hello.life:
        return hello.life
    if hello.host and hello.pid:
        return f"{hello.host} {hello.pid}"
    return key.hex()


def check_name(name: str, quiet_ns: int, heartbeat_ns: int, host: str) -> None:
    """Raise ConfigError if a worker of this name, in another process, has been heard lately.

    Args:
        name: The worker's.
        quiet_ns: For how long nothing was heard of the one that has the name.
        heartbeat_ns: How often it should be heard.
        host: Where it runs, as it says; "" where it does not.
    """
    if quiet_ns < SILENT_BEATS * heartbeat_ns:
        where = f" on {host}" if host else ""
        raise ConfigError(
            f"worker {name}: a live worker{where} has this name: give each its own with --name, or leave"
            " that out"
        )
