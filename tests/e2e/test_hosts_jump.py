"""Many hosts behind one jump host, whose server of ssh turns away what comes all at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.e2e.netns import Net, net

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

N_HOSTS = 8
BUSY_S = 1.5


@pytest.fixture
def hosts() -> Iterator[Net]:
    """Give a jump host whose server is strict; its loopback addresses stand for the hosts behind it."""
    with net("j") as here:
        here.stop_sshd("j")
        behind = [f"ListenAddress 127.0.0.{i + 1}" for i in range(N_HOSTS)]
        here.start_sshd("j", *behind, max_startups="8:100:9")
        yield here


def test_hosts_behind_one_jump_host_are_all_reached(hosts: Net) -> None:
    """For a while eight others wait for their login, and the server drops whatever comes; no host is lost."""
    address = hosts.address("j")
    jump = f"Host jump\n  HostName {address}\n"
    behind = "".join(
        f"Host h{i}\n  HostName 127.0.0.{i + 1}\n  HostKeyAlias {address}\n  ProxyJump jump\n"
        for i in range(N_HOSTS)
    )
    hosts.ssh_config.write_text(jump + behind + hosts.ssh_config.read_text())
    code = (
        "import os, socket, threading\n"
        "from pathlib import Path\n"
        "from cluster.remote.shell import OpenSsh, RemoteError, parallel\n"
        "from cluster.spec.roles import Target\n"
        "def ask(host):\n"
        "    try:\n"
        "        return shell.run(host, ['echo', host.address], timeout_s=60).stdout.decode().strip()\n"
        "    except RemoteError as error:\n"
        "        return str(error)\n"
        f"others = [socket.create_connection(('{address}', 22)) for _ in range(8)]\n"
        "for other in others:\n"
        "    other.recv(1)\n"  # the server knows of it
        f"threading.Timer({BUSY_S}, lambda: [other.close() for other in others]).start()\n"
        f"hosts = [Target(f'h{{i}}') for i in range({N_HOSTS})]\n"
        "with OpenSsh(Path(os.environ['SUPERSERVE_SSH_CONFIG'])) as shell:\n"
        "    print('\\n'.join(parallel(hosts, ask)))\n"
    )
    status, output = hosts.run(sys.executable, "-c", code)
    assert (status, output.split("\n")[:-1]) == (0, [f"h{i}" for i in range(N_HOSTS)])
