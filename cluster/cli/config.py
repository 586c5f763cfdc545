"""What `cluster config` prints for a hosts file without errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.spec.hosts import load_hosts
from cluster.spec.hosts_file import dump

if TYPE_CHECKING:
    from pathlib import Path


def checked(path: Path, *, effective: bool) -> str:
    """Return the text for a hosts file.

    Args:
        path: The file.
        effective: Whether to return the whole file, as YAML with every default filled in.

    Raises:
            ConfigError: It has errors; the message has a line for each.
    """
    hosts = load_hosts(path)
    if effective:
        return dump(hosts).rstrip()
    n_workers = sum(host.n_workers for host in hosts.hosts)
    n_hosts = len(hosts.hosts)
    return (
        f"{path}: no errors: cluster {hosts.cluster!r}, the router on {hosts.router.host}, "
        f"{n_workers} worker{'s' if n_workers > 1 else ''} on {n_hosts} host{'s' if n_hosts > 1 else ''}"
    )
