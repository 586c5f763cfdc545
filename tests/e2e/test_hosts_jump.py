"""Many hosts behind one jump host, whose server of ssh turns away what comes all at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.e2e.netns import Net, net

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

N_HOSTS = 24


@pytest.fixture
def hosts() -> Iterator[Net]:
    """Give a jump host whose server is strict; it stands for all hosts."""
    with net("j") as here:
        here.stop_sshd("j")
        here.start_sshd("j", first="MaxStartups 4:80:12")
        yield here


def test_hosts_behind_one_jump_host_are_all_reached(hosts: Net) -> None:
    """The server drops four of five connections beyond the fourth that waits for its login; none is lost."""
    jump = f"Host jump\n  HostName {hosts.address('j')}\n"
    behind = f"Host h*\n  HostName {hosts.address('j')}\n  ProxyJump jump\n"
    hosts.ssh_config.write_text(jump + behind + hosts.ssh_config.read_text())
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from cluster.remote.shell import OpenSsh, RemoteError, parallel\n"
        "from cluster.spec.roles import Target\n"
        "def ask(host):\n"
        "    try:\n"
        "        return shell.run(host, ['echo', host.address], timeout_s=60).stdout.decode().strip()\n"
        "    except RemoteError as error:\n"
        "        return str(error)\n"
        f"hosts = [Target(f'h{{i}}') for i in range({N_HOSTS})]\n"
        "with OpenSsh(Path(os.environ['SUPERSERVE_SSH_CONFIG'])) as shell:\n"
        "    print('\\n'.join(parallel(hosts, ask)))\n"
    )
    status, output = hosts.run(sys.executable, "-c", code)
    assert (status, output.split("\n")[:-1]) == (0, [f"h{i}" for i in range(N_HOSTS)])
