"""The keys of a cluster on several hosts: made if the operator's folder lacks them, and who gets which.

    on the operator's machine            on a host, under the cluster's folder
    ─────────────────────────────────────────────────────────────────────────
    router.key, */NAME.pub               keys/DIGEST/...          the router's host only
    operators/cluster-up.key             keys/operator.key        the router's host only
    workers/HOST.key                     keys/worker-DIGEST.key   HOST only

A path contains a digest of the public keys, so that other keys make another command line, and a role that
reads its key once, at its start, is restarted. The lists are not in the digest: a router watches them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec.roles import KEYS, OPERATOR_KEY
from superserve.errors import ConfigError
from superserve.net.keys import FOLDERS, add_peer, peer_keys, read_public, read_ring, router_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.spec.hosts import Hosts

OPERATOR = "cluster-up"
"""The name of the operator's key that `up` makes, uses for STATUS, and leaves to `top` and `loadgen run`."""

_DIGEST_CHARACTERS = 12  # 48 bits: it only tells folders of keys apart, and verifies nothing


@dataclass(frozen=True, slots=True)
class HostKeys:
    """The key files for a host.

    Attributes:
        files: Each file's path in the cluster's folder there, and its content: secrets, never shown.
        ring: The router's folder of keys, as such a path; "" on hosts without the router.
        worker: The workers' key file; "" on hosts without workers.
    """

    files: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    ring: str = ""
    worker: str = ""


def operator_key(hosts: Hosts) -> str:
    """Return the key file with which this machine's commands ask the router; "" without keys."""
    return "" if hosts.keys is None else str(_own(Path(hosts.keys), "operator", OPERATOR))


def secret_path(hosts: Hosts, name: str) -> Path:
    """Return the key file of a host's workers, on the operator's machine; the file must have keys."""
    assert hosts.keys is not None, "asked only with keys"
    return _own(Path(hosts.keys), "worker", name)


def check(folder: Path) -> None:
    """Raise ConfigError unless `folder` is a router's folder of keys, and all its files are valid."""
    router_keys(folder)
    try:
        problems = read_ring(folder)[1]
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    if problems:
        raise ConfigError("; ".join(problems))


def complete(hosts: Hosts) -> list[Path]:
    """Make the keys that `up` needs and the folder lacks: the operator's, and one for each worker's host.

    Args:
        hosts: The file; without keys in it none are needed.

    Returns:
        The secret files that were made.

    Raises:
        ConfigError: The folder is not a router's, or has only one half of a key.
    """
    if hosts.keys is None:
        return []
    folder = Path(hosts.keys)
    wanted = [("operator", OPERATOR), *(("worker", host.name) for host in hosts.hosts if host.n_workers)]
    return [made for role, name in wanted if (made := _make(folder, role, name)) is not None]


def _make(folder: Path, role: str, name: str) -> Path | None:
    own = _own(folder, role, name)
    listed = own.with_suffix(".pub")
    if own.exists() and listed.exists():
        return None
    if listed.exists():
        raise ConfigError(
            f"{own}: no such file, and {listed.name} lists it: put it back, or type `cluster keys "
            f"--out {folder} revoke {name}`, and `cluster up` makes another"
        )
    if own.exists():
        raise ConfigError(f"{own}: not listed any more: remove it, and `cluster up` makes another")
    return add_peer(folder, role, name)[0]


def keys_of(hosts: Hosts, name: str) -> HostKeys:
    """Return the key files for a host: none without keys, and never another host's secret.

    Raises:
        ConfigError: A key is missing, or does not fit the list or the router.
    """
    if hosts.keys is None:
        return HostKeys()
    folder = Path(hosts.keys)
    files: list[tuple[str, bytes]] = []
    ring = worker = ""
    if name in {place.host for place in hosts.places}:  # all routers have the same key
        ring = f"{KEYS}/{_digest(router_keys(folder).public)}"
        operator, _ = _secret(folder, "operator", OPERATOR)
        files += [*_ring_files(folder, ring), (f"{KEYS}/{OPERATOR_KEY}", operator)]
    if hosts.host(name).n_workers:
        secret, digest = _secret(folder, "worker", name)
        worker = f"{KEYS}/worker-{digest}.key"
        files.append((worker, secret))
    return HostKeys(tuple(files), ring, worker)


def _ring_files(folder: Path, ring: str) -> list[tuple[str, bytes]]:
    check(folder)
    names = ["router.key", "router.pub"]
    for below in FOLDERS.values():
        listed: Sequence[Path] = sorted((folder / below).glob("[!.]*.pub"))
        names += [f"{below}/{path.name}" for path in listed]
    return [(f"{ring}/{name}", _content(folder / name)) for name in names]


def _secret(folder: Path, role: str, name: str) -> tuple[bytes, str]:
    """Return the content of a secret file, and a digest of the keys in it."""
    path = _own(folder, role, name)
    keys = peer_keys(path, "worker" if role == "worker" else "client")
    assert keys is not None, "the path is not empty"
    if keys.public != read_public(path.with_suffix(".pub"), role):
        raise ConfigError(f"{path}: public: expected the key that {path.with_suffix('.pub').name} lists")
    if keys.router != router_keys(folder).public:
        raise ConfigError(
            f"{path}: router: expected the key of {folder / 'router.key'}, got another router's"
        )
    return _content(path), _digest(keys.public + keys.router)


def _own(folder: Path, role: str, name: str) -> Path:
    return folder / FOLDERS[role] / f"{name}.key"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a key file: {error.strerror}") from error


def _digest(public: str) -> str:
    return hashlib.sha256(public.encode("ascii")).hexdigest()[:_DIGEST_CHARACTERS]
