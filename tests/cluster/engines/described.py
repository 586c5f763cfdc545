"""Hosts files of the renderers' tests, and what they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.engines.describe import describe
from cluster.spec.hostkeys import complete
from cluster.spec.hosts import load_hosts
from superserve.net.keys import add_peer, make_ring

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.engines.describe import Description

ONE_HOST = """\
router: {host: a}
hosts: [{name: a, workers: 2}]
emulate: cnn-8gpu-modelled
security: none
"""
TWO_HOSTS = """\
router: {host: a}
hosts:
  - {name: a, workers: 1, env: {TZ: UTC}}
  - {name: b, gpus: [0, 1], threads: 2}
security: none
"""
TWO_ROUTERS = """\
routers: [{host: a}, {host: b}]
hosts:
  - {name: a, address: 10.0.0.1, workers: 2}
  - {name: b, address: 10.0.0.2, workers: 1}
emulate: cnn-8gpu-modelled
security: none
"""
"""Of an engine with several machines."""


def described(folder: Path, text: str) -> Description:
    """Return what a hosts file with this text describes."""
    path = folder / "hosts.yaml"
    path.write_text(text, encoding="utf-8")
    return describe(path)


def with_keys(folder: Path, text: str) -> Description:
    """Return what it describes with new keys, and a client's."""
    make_ring(folder / "keys")
    add_peer(folder / "keys", "client", "web")
    path = folder / "hosts.yaml"
    path.write_text(text.replace("security: none", "keys: keys"), encoding="utf-8")
    complete(load_hosts(path))
    return describe(path)
