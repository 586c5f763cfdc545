"""The last lines of logs on several hosts, and what is written from then on."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING

from cluster.remote.shell import RemoteError
from superserve.errors import ConfigError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable

    from cluster.engines.engine import ClusterEngine

_N_LINES = 20  # of each role, before the new ones
_ENDED_S = 5.0  # the remote `tail` may hang on a dead connection, and Ctrl-C must not


def chosen(fleet: ClusterEngine, names: Iterable[str]) -> list[str]:
    """Return the roles that names of hosts or roles mean; all, if there are no names.

    Raises:
        ConfigError: A name is neither a host's nor a role's; the error lists them.
    """
    found: list[str] = []
    for name in names:
        if name in fleet.record.host_names:
            found += fleet.record.host(name).roles
        elif name in fleet.record.role_names:
            found.append(name)
        else:
            known = ", ".join((*fleet.record.host_names, *fleet.record.role_names))
            raise ConfigError(f"{name}: expected a host or a role: {known}")
    return list(dict.fromkeys(found)) or list(fleet.record.role_names)


def show_tails(fleet: ClusterEngine, roles: Iterable[str]) -> list[str]:
    """Print the last lines of each role's log; return what could not be read, and why."""
    wrong = []
    for role in roles:
        try:
            lines = fleet.logs(role, _N_LINES)
        except RemoteError as error:
            wrong.append(str(error))
            continue
        host = fleet.record.host_of(role).name
        sys.stdout.write("\n".join([f"==> {host}: {role} <==", *lines, "", ""]))
    return wrong


def follow(fleet: ClusterEngine, roles: Iterable[str]) -> None:
    """Print what roles write, each line with its role in front, until Ctrl-C or no host is left."""
    roles = list(roles)
    width = max(map(len, roles))
    readers: list[subprocess.Popen[bytes]] = []
    threads = []
    for role in roles:
        reader = fleet.follow(role, _N_LINES)
        readers.append(reader)
        threads.append(threading.Thread(target=_copy, args=(reader, role.ljust(width)), daemon=True))
    for thread in threads:
        thread.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for thread in threads:
                thread.join()
    finally:
        for reader in readers:
            reader.terminate()
            reader.wait(_ENDED_S)


def _copy(reader: subprocess.Popen[bytes], name: str) -> None:
    assert reader.stdout is not None, "it was started with a pipe"
    for line in reader.stdout:
        sys.stdout.write(f"{name} | {line.decode(errors='replace').rstrip()}\n")
        sys.stdout.flush()
