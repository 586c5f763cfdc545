"""The list of a cluster's routers, which a router passes on to its clients and workers.

A file says which routers there are. It is read again when it changes, so that adding or removing a router
restarts no other: each says WELCOME again to its clients, which connect to what is new, and sends its workers
what they otherwise ask for: the list, and how many GPUs it has.

    {"routers": [{"client": "tcp://10.0.0.1:5555", "worker": "tcp://10.0.0.1:5556"}, ...]}
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import orjson

from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.net.endpoints import MOST_ROUTERS
from superserve.status import is_well

if TYPE_CHECKING:
    from pathlib import Path

    from router.core import RouterCore

log = logging.getLogger("router")

_LOOK_NS = 200 * MS
"""Time between two looks at the file's date."""


class Listed(NamedTuple):
    """Where routers listen, in the same order; empty if there is only one."""

    clients: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()


ALONE = Listed()


class RouterList:
    """The list in a file, as it was when it was last well-formed.

    Args:
        path: The file; None for a router without others.

    Attributes:
        listed: The routers.
    """

    def __init__(self, path: Path | None) -> None:
        self.listed = ALONE
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._look_ns = 0

    def load(self) -> None:
        """Read the file.

        Raises:
            ConfigError: It is missing or malformed.
        """
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self.listed = read_list(self._path)

    def look(self, now_ns: int) -> bool:
        """Read the file again if it has changed; return whether the list did."""
        if self._path is None or now_ns < self._look_ns:
            return False
        self._look_ns = now_ns + _LOOK_NS
        stamp = _stamp(self._path)
        if stamp is None or stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            listed = read_list(self._path)
        except ConfigError as error:  # it goes on with the list that it has
            log.error("%s; the list stays as it was", error)
            return False
        is_new = listed != self.listed
        self.listed = listed
        return is_new


def ready_gpus(core: RouterCore) -> int:
    """Return how many GPUs get work."""
    n = 0
    for peer in core.peers.values():
        if peer.is_guest:
            continue
        process = peer.machine.state.value
        n += sum([is_well(process, worker.machine.state.value) for worker in peer.workers])
    return n


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def read_list(path: Path) -> Listed:
    """Read a list of routers.

    Raises:
        ConfigError: The file cannot be read, or is malformed; the error names it and the entry.
    """
    try:
        body = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: expected the list of routers") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    routers = body.get("routers") if isinstance(body, dict) else None
    if not isinstance(routers, list) or len(routers) > MOST_ROUTERS:
        raise ConfigError(f'{path}: expected {{"routers": [...]}} with at most {MOST_ROUTERS} routers')
    ends: dict[str, list[str]] = {"client": [], "worker": []}
    for i, router in enumerate(routers):
        for end, found in ends.items():
            endpoint = router.get(end) if isinstance(router, dict) else None
            if not isinstance(endpoint, str) or "://" not in endpoint:
                raise ConfigError(
                    f"{path}: routers[{i}].{end}: expected tcp://HOST:PORT, got {endpoint!r:.100}"
                )
            if endpoint in found:
                raise ConfigError(f"{path}: routers[{i}].{end}: {endpoint} is listed twice")
            found.append(endpoint)
    return Listed(tuple(ends["client"]), tuple(ends["worker"]))
