"""One batch script for Slurm: a heterogeneous job with the router and all workers.

    cluster render slurm hosts.yaml > ss.sbatch && sbatch ss.sbatch

Component 0 is the router's, and each worker has one with its GPU. All start and end together, and Slurm
requeues all of them if a node dies: `engine: slurm` has a job for each role instead. The script must be
submitted where its own folder, and that of the keys, are seen by every node.
"""

from __future__ import annotations

import base64
import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING

from cluster.engines.describe import RolePlace
from cluster.spec.engines import SlurmSettings
from cluster.spec.hostkeys import secret_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.engines.describe import Description, Process, RoleGroup

MOST_COMPONENTS = 128
"""Slurm's own bound for a heterogeneous job."""

_ROUTER, _FOLDER = "@ROUTER@", "@FOLDER@"  # no character of these needs quotes in a shell
_VARIABLES = {_ROUTER: "${router}", _FOLDER: "${folder}"}

_KEEP = """\
# Start a role as a step of its component, again after a crash, until the job is about to end.
keep() {
  component=$1
  shift
  until srun --het-group="$component" --ntasks=1 --unbuffered "$@"; do
    if [ -e "$folder/ending" ]; then return 0; fi
    sleep 1
  done
}

# Slurm signals this shell before the time limit, and `scancel --batch --signal=TERM JOB` at any time: the
# router answers what it holds while there are workers, then the workers drain.
end() {
  touch "$folder/ending"
  scancel --signal=TERM "$SLURM_JOB_ID+0" || true
  wait "$router_pid" || true
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap end TERM
"""


def render(description: Description) -> str:
    """Return a batch script that runs the described cluster as one heterogeneous job.

    Raises:
        ConfigError: It has more workers than such a job can have components.
    """
    if description.n_workers >= MOST_COMPONENTS:
        raise description.error(
            ("hosts",),
            f"expected at most {MOST_COMPONENTS - 1} workers in a heterogeneous job, got "
            f"{description.n_workers}: `engine: slurm` has a job for each",
        )
    return "\n".join([*_head(description), *_body(description), ""])


def _head(description: Description) -> Iterator[str]:
    settings = description.hosts.slurm or SlurmSettings()
    yield "#!/bin/bash"
    yield f"# Written by `cluster render slurm {PurePath(description.file).name}`."
    yield from _options(
        f"--job-name=superserve-{description.name}", f"--output=superserve-{description.name}-%j.log",
        "--open-mode=append", "--requeue", f"--signal=B:TERM@{settings.notice_s}", "--ntasks=1",
        *settings.options, *settings.router_options,
    )  # fmt: skip
    for group, _ in _workers(description):
        yield "#SBATCH hetjob"
        gpus = (f"--gres=gpu:{group.gpus}",) if group.gpus else ()
        yield from _options("--ntasks=1", *gpus, *settings.options, *settings.worker_options)


def _options(*options: str) -> Iterator[str]:
    for option in options:
        yield f"#SBATCH {option}"


def _workers(description: Description) -> Iterator[tuple[RoleGroup, Process]]:
    for group in description.workers:
        for process in group.processes:
            yield group, process


def _body(description: Description) -> Iterator[str]:
    yield ""
    yield "set -eu"
    yield f'folder="$PWD/superserve-{description.name}-$SLURM_JOB_ID"'
    yield 'mkdir -p -m 700 "$folder"'
    yield 'rm -f "$folder/ending"  # of a run before the job was queued again'
    yield 'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n 1)'
    yield 'shown=$(scontrol --oneliner show node "$node")'
    yield r"router=$(printf '%s' " + '"$shown"' + r" | sed 's/.*NodeAddr=\([^ ]*\).*/\1/')"
    for group in description.groups:
        yield from _files(description, group)
    yield ""
    yield _KEEP
    yield f"keep 0 {_command(description, description.router, description.router.processes[0])} &"
    yield "router_pid=$!"
    for i, (group, process) in enumerate(_workers(description), start=1):
        yield f"keep {i} {_command(description, group, process)} &"
    # A signal ends `wait`: the roles end after it.
    yield 'while [ -n "$(jobs -p)" ]; do wait || true; jobs > /dev/null; done'


def _command(description: Description, group: RoleGroup, process: Process) -> str:
    host = description.hosts.host(group.host)
    address = description.hosts.metrics.address
    place = RolePlace(
        folder=f"{_FOLDER}/{group.name}", router=_ROUTER, name=process.name,
        device="cuda:0" if group.gpus else "cpu",
        metrics=None if process.metrics is None else (address, process.metrics),
    )  # fmt: skip
    env = ("env", *(f"{name}={value}" for name, value in group.env)) if group.env else ()
    words = (*env, host.python, "-P", *description.argv(group, place))
    return " ".join(map(_word, words))


def _word(word: str) -> str:
    """Return a word for the shell, with the variables for what only the job knows."""
    quoted = shlex.quote(word)
    if quoted != word:
        return quoted
    for name, variable in _VARIABLES.items():
        word = word.replace(name, variable)
    return word if word == quoted else f'"{word}"'


def _files(description: Description, group: RoleGroup) -> Iterator[str]:
    """Put a group's files into its folder: keys as links, so that no secret is in the script."""
    hosts = description.hosts
    own = f'"$folder/{group.name}'
    if group.files:
        yield f'mkdir -p {own}"'
    if hosts.keys is not None:
        if group.is_router:
            yield f'ln -sfn {shlex.quote(hosts.keys)} {own}/keys"'
        else:
            yield f'mkdir -p {own}/keys"'
            yield f'ln -sf {shlex.quote(str(secret_path(hosts, group.host)))} {own}/keys/worker.key"'
    for file in group.files:
        if not file.path.startswith("keys/"):
            yield f'mkdir -p {own}/{PurePath(file.path).parent}"'
            yield f"base64 --decode > {own}/{file.path}\" <<'END'"
            text = base64.b64encode(file.content).decode()
            yield from (text[i : i + 100] for i in range(0, len(text), 100))
            yield "END"
