"""A Slurm cluster for a test: a controller beside the operator, and a slurmd in each host's namespace.

Everything is in the folder of the hosts' network: configuration, munge's key and socket, state and logs. The
daemons are children of the test and end with it; what they started lives in the namespaces and ends with
those.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.netns import net

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.netns import Net

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "nsenter")
_ENTER = ("nsenter",)  # `ip netns exec` would hide the machine's control groups, and slurmd looks for them
_N_GPUS = 2  # of each node: files stand for the devices
GRACE_S = 3
"""How long a job of the partition "spare" has when one of "main" takes its node."""


class SlurmNet:
    """A Slurm cluster on the hosts of a network; commands go to the operator's namespace.

    Attributes:
        net: The hosts.
    """

    def __init__(self, here: Net) -> None:
        self.net = here
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = here.folder / "slurm"
        here.env["SLURM_CONF"] = str(self._folder / "slurm.conf")  # with it every command finds this cluster

    def open(self) -> None:
        """Start every daemon; return when all nodes take jobs."""
        self._folder.mkdir(mode=0o755)
        self.net.folder.chmod(0o755)
        self._configure()
        socket = self._folder / "munge.socket"
        self._start(
            "munged", "op", shutil.which("munged") or "munged", "--foreground", "--force",
            f"--key-file={self._folder / 'munge.key'}", f"--socket={socket}",
            f"--pid-file={self._folder / 'munged.pid'}", f"--seed-file={self._folder / 'munged.seed'}",
            f"--log-file={self._folder / 'munged.log'}",
        )  # fmt: skip
        self.net.until(socket.exists)
        self._start("slurmctld", "op", "slurmctld", "-D", "-c")
        for host in self.net.hosts:
            self.start_node(host)
        self.net.until(self._is_ready)

    def _is_ready(self) -> bool:
        """Return whether the controller answers and every node takes jobs."""
        code, output = self.net.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t")
        return code == 0 and output.split() == ["idle"] * len(self.net.hosts)

    def close(self) -> None:
        """End every daemon."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()

    def start_node(self, host: str) -> None:
        """Start a host's slurmd."""
        self._start(f"slurmd-{host}", host, "slurmd", "-D", "-N", host)

    def call(self, *argv: str) -> str:
        """Run a command of Slurm as the operator; return what it printed."""
        code, output = self.net.run(*argv)
        assert code == 0, output
        return output

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Return the state and the node of the newest job of each name."""
        lines = self.call("squeue", "-h", "-t", "all", "-S", "i", "-o", "%j|%T|%N").splitlines()
        return {name: (state, node) for name, state, node in (line.split("|") for line in lines)}

    def _configure(self) -> None:
        (self._folder / "munge.key").write_bytes(os.urandom(1_024))
        (self._folder / "munge.key").chmod(0o600)
        nodes = "".join(
            f"NodeName={host} NodeHostname={host} NodeAddr={self.net.address(host)} Port=17001 CPUs=8 "
            f"RealMemory=2000 Gres=gpu:{_N_GPUS}\n"
            for host in self.net.hosts
        )
        (self._folder / "slurm.conf").write_text(
            f"""\
ClusterName=test
SlurmctldHost={platform.node()}(10.77.0.100)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self._folder / "munge.socket"},cred_expire=5
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={self._folder / "state"}
SlurmdSpoolDir={self._folder / "spool-%n"}
SlurmctldPidFile={self._folder / "slurmctld.pid"}
SlurmdPidFile={self._folder / "slurmd-%n.pid"}
SlurmctldLogFile={self._folder / "slurmctld.log"}
SlurmdLogFile={self._folder / "slurmd-%n.log"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=6
InactiveLimit=0
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}PartitionName=main Nodes=ALL Default=YES LLN=YES PriorityTier=2 PreemptMode=OFF State=UP
PartitionName=spare Nodes=ALL LLN=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S} State=UP
"""
        )
        devices = self._folder / "gpus"
        devices.mkdir()
        for i in range(_N_GPUS):
            (devices / f"nvidia{i}").touch()
        (self._folder / "gres.conf").write_text(f"Name=gpu File={devices}/nvidia[0-{_N_GPUS - 1}]\n")
        for name in ("state", *(f"spool-{host}" for host in self.net.hosts)):
            (self._folder / name).mkdir()

    def _start(self, name: str, host: str, *argv: str) -> None:
        with (self._folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*_ENTER, f"--net=/run/netns/{self.net.namespace(host)}", *argv], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, env={**os.environ, **self.net.env},
            )  # fmt: skip


def why_not() -> str:
    """Return why this machine cannot have a Slurm cluster; "" if it can."""
    lacking = [name for name in _NEEDED if shutil.which(name) is None]
    return f"{', '.join(lacking)}: not installed; Debian has slurm-wlm and munge" if lacking else ""


@contextlib.contextmanager
def slurm(*hosts: str) -> Iterator[SlurmNet]:
    """Give a Slurm cluster; skip the test, with the reason, where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    with net(*hosts) as here:
        cluster = SlurmNet(here)
        try:
            cluster.open()
            yield cluster
        finally:
            cluster.close()


def logs(here: SlurmNet) -> str:
    """Return the end of every daemon's output, for an assertion that fails."""
    folder: Path = here.net.folder / "slurm"
    return "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in sorted(folder.glob("*.log")))
