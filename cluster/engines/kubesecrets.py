"""A cluster's keys as Secrets of Kubernetes, for `kubectl apply -f -` or a tool that encrypts them.

    NAME-router                             router.key: mounted into the router alone
    NAME-clients, -workers, -operators      the lists: NAME.pub of each admitted peer
    NAME-worker-HOST                        worker.key of a host's workers

Each list is a Secret of its own, mounted as a folder: kubelets update those in place, so a peer that is
removed is cut off without a restart. A file that is mounted by `subPath` would never change.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError
from superserve.net.keys import FOLDERS, ROUTER_KEY, check_name, router_keys

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WORKER_KEY = "worker.key"
"""The file in the Secrets of workers; that of the router's is named as in its folder."""


def secret(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a Secret with these files."""
    data = {file: base64.b64encode(content).decode() for file, content in sorted(files.items())}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "data": data}


def list_names(name: str) -> dict[str, str]:
    """Return the name of each list's Secret, by the list's folder."""
    return {below: f"{name}-{below}" for below in FOLDERS.values()}


def secrets_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return the Secrets of a router's folder of keys.

    Args:
        name: What their names begin with.
        folder: As `cluster keys` made it; workers whose secrets were moved elsewhere get no Secret.

    Raises:
        ConfigError: The folder is not a router's, or a file cannot be read.
    """
    check_name(name)
    router_keys(folder)
    try:
        found = [secret(f"{name}-router", {ROUTER_KEY: (folder / ROUTER_KEY).read_bytes()})]
        for below, listed in list_names(name).items():
            files = {path.name: path.read_bytes() for path in (folder / below).glob("[!.]*.pub")}
            found.append(secret(listed, files))
        found += [
            secret(f"{name}-worker-{path.stem}", {WORKER_KEY: path.read_bytes()})
            for path in sorted((folder / FOLDERS["worker"]).glob("[!.]*.key"))
        ]
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    return found
