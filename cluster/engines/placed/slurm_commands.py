"""Slurm's commands, as this machine or a node has them; errors quote what Slurm printed."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.remote.shell import RemoteError

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMAND_S = 30.0  # a controller that is restarted answers late; squeue itself gives up after some 10 s
_FORMAT = "%i|%j|%T|%M|%N|%r"
_N_FIELDS = _FORMAT.count("|") + 1
_ELAPSED = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class Job:
    """A job, as squeue shows it.

    Attributes:
        id: Its number.
        name: As it was submitted.
        state: In Slurm's words: "PENDING", "RUNNING", ...
        up_s: How long it has run.
        node: Its nodes; "" before it has any.
        reason: Why it waits or ended; "" if Slurm gives none.
    """

    id: int
    name: str
    state: str
    up_s: int
    node: str
    reason: str


def submit(script: str) -> int:
    """Submit a batch script; return its job's number.

    Raises:
        RemoteError: Slurm refuses it, or does not answer.
    """
    said = _call("sbatch", "--parsable", stdin=script).strip()
    number = said.partition(";")[0]  # NUMBER;CLUSTER in a federation
    if not number.isdecimal():
        raise RemoteError(f"sbatch: expected a job's number, got {said!r}")
    return int(number)


def jobs() -> list[Job]:
    """Return the user's jobs, those that ended lately too.

    Raises:
        RemoteError: Slurm does not answer, or a line has another form.
    """
    text = _call("squeue", "--me", "--noheader", "--states=all", f"--format={_FORMAT}")
    return [_job(line) for line in text.splitlines() if line.strip()]


def running_nodes(names: Sequence[str]) -> dict[str, str]:
    """Return the node on which each job of these names runs, by its name; without those that do not run."""
    if not names:
        return {}
    text = _call("squeue", "--noheader", f"--name={','.join(names)}", "--states=RUNNING", "--format=%j|%N")
    pairs = (line.strip().rpartition("|") for line in text.splitlines())
    return {name: node for name, _, node in pairs if node}


def address_of(node: str) -> str:
    """Return the address at which Slurm itself reaches a node.

    Raises:
        RemoteError: Slurm knows no such node.
    """
    text = _call("scontrol", "--oneliner", "show", "node", node)
    found = re.search(r"\bNodeAddr=(\S+)", text)
    if found is None:
        raise RemoteError(f"scontrol show node {node}: expected NodeAddr=..., got {text.strip()!r}")
    return found[1]


def is_preempted(job: int) -> bool:
    """Return whether Slurm is about to take a job's nodes for another one."""
    text = _call("scontrol", "--oneliner", "show", "job", str(job))
    found = re.search(r"\bPreemptTime=(\S+)", text)
    return found is not None and found[1] not in ("None", "Unknown", "N/A")


def drain(job: int) -> None:
    """Signal SIGTERM to the shell of a job, which drains its role."""
    _call("scancel", "--batch", "--signal=TERM", str(job))


def terminate_steps(job: int) -> None:
    """Signal SIGTERM to the steps of a job, and not to its shell."""
    _call("scancel", "--signal=TERM", str(job))


def cancel(job: int) -> None:
    """End a job, at once if it waits."""
    _call("scancel", str(job))


def requeue(job: int) -> None:
    """Queue a running job again."""
    _call("scontrol", "requeue", str(job))


def _job(line: str) -> Job:
    parts = line.strip().split("|", _N_FIELDS - 1)
    if len(parts) != _N_FIELDS or not parts[0].partition("_")[0].partition("+")[0].isdecimal():
        raise RemoteError(f"squeue: expected {_FORMAT}, got {line!r}")
    number, name, state, elapsed, node, reason = parts
    return Job(
        int(re.split("[_+]", number)[0]), name, state, _seconds(elapsed), node,
        "" if reason == "None" else reason,
    )  # fmt: skip


def _seconds(elapsed: str) -> int:
    """Return the seconds of [DAYS-][HOURS:]MINUTES:SECONDS; 0 if Slurm shows none."""
    found = _ELAPSED.fullmatch(elapsed.strip())
    if found is None:
        return 0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _call(*argv: str, stdin: str = "") -> str:
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
    except FileNotFoundError:
        raise RemoteError(
            f"{argv[0]}: not found: `engine: slurm` needs Slurm's commands here, as a login node has them"
        ) from None
    except subprocess.TimeoutExpired:
        raise RemoteError(f"{argv[0]}: no answer within {_COMMAND_S:g} s") from None
    if done.returncode:
        words = "; ".join(done.stderr.strip().splitlines()[-3:]) or "nothing was written"
        raise RemoteError(f"{' '.join(argv)}: exit code {done.returncode}: {words}")
    return done.stdout
