"""One batch script for Slurm: a heterogeneous job with the routers and all workers.

    cluster render slurm hosts.yaml > ss.sbatch && sbatch ss.sbatch

The first components are the routers', and each worker has one with its GPU. All start and end together, and
Slurm requeues all of them if a node dies: `engine: slurm` has a job for each role instead. The script must be
submitted where its own folder, and that of the keys, are seen by every node.
"""

from __future__ import annotations

import base64
import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING

from cluster.engines.describe import RolePlace, apart
from cluster.spec.engines import SlurmSettings
from cluster.spec.hostkeys import secret_path
from cluster.spec.roles import at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cluster.engines.describe import Description, Process, RoleGroup

MOST_COMPONENTS = 128
"""Slurm's own bound for a heterogeneous job."""

_FOLDER = "@FOLDER@"  # no character of it needs quotes in a shell, nor of those for routers
_LIST = "routers.json"

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
# routers answer what they hold while there are workers, then the workers drain.
end() {
  touch "$folder/ending"
  for component in @COMPONENTS@; do scancel --signal=TERM "$SLURM_JOB_ID+$component" || true; done
  for pid in $router_pids; do wait "$pid" || true; done
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap end TERM
router_pids=""
"""


def render(description: Description) -> str:
    """Return a batch script that runs the described cluster as one heterogeneous job.

    Raises:
        ConfigError: It has more workers than such a job can have components.
    """
    most = MOST_COMPONENTS - len(description.routers)
    if description.n_workers > most:
        raise description.error(
            ("hosts",),
            f"expected at most {most} workers in a heterogeneous job, got {description.n_workers}: "
            f"`engine: slurm` has a job for each",
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
    for _ in description.routers[1:]:
        yield "#SBATCH hetjob"
        yield from _options("--ntasks=1", *settings.options, *settings.router_options)
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
    ports = apart(description.routers)
    for i in range(len(ports)):
        yield f'node=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_{i}" | head -n 1)'
        yield 'shown=$(scontrol --oneliner show node "$node")'
        yield f"router{i}=$(printf '%s' " + '"$shown"' + r" | sed 's/.*NodeAddr=\([^ ]*\).*/\1/')"
    for group in description.groups:
        yield from _files(description, group)
    if description.is_listed:
        yield from _list(ports)
    yield ""
    yield _KEEP.replace("@COMPONENTS@", " ".join(map(str, range(len(ports)))))
    for i, group in enumerate(description.routers):
        yield f"keep {i} {_command(description, group, group.processes[0], ports)} &"
        yield 'router_pids="$router_pids $!"'
    for i, (group, process) in enumerate(_workers(description)):
        turn = i % len(ports)  # each begins its list with another router
        words = _command(description, group, process, ports, turn)
        yield f"keep {len(ports) + i} {words} &"
    # A signal ends `wait`: the roles end after it.
    yield 'while [ -n "$(jobs -p)" ]; do wait || true; jobs > /dev/null; done'


def _list(ports: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Write the list of routers, once the job knows where they are; one router has no others to name."""
    yield f'cat > "$folder/{_LIST}" <<END'
    entries = (
        f'{{"client": "{at(_variable(i), client)}", "worker": "{at(_variable(i), worker)}"}}'
        for i, (client, worker) in enumerate(ports)
    )
    yield f'{{"routers": [{", ".join(entries) if len(ports) > 1 else ""}]}}'
    yield "END"


def _router(i: int) -> str:
    """Return what stands for a router's address until a word has its quotes."""
    return f"@ROUTER{i}@"


def _variable(i: int) -> str:
    return f"${{router{i}}}"


def _command(
    description: Description,
    group: RoleGroup,
    process: Process,
    ports: Sequence[tuple[int, int]],
    turn: int = 0,
) -> str:
    host = description.hosts.host(group.host)
    address = description.hosts.metrics.address
    ends = [at(_router(i), worker) for i, (_, worker) in enumerate(ports)]
    i, metrics = 0, process.metrics
    if group.is_router:
        i = description.routers.index(group)
        first = description.hosts.metrics.router
        metrics = None if first is None else first + i  # all may be on one node
    place = RolePlace(
        folder=f"{_FOLDER}/{group.name}", connect=tuple(ends[turn:] + ends[:turn]), name=process.name,
        device="cuda:0" if group.gpus else "cpu", metrics=None if metrics is None else (address, metrics),
        listed=f"{_FOLDER}/{_LIST}" if description.is_listed else "", ports=ports[i],
    )  # fmt: skip
    env = ("env", *(f"{name}={value}" for name, value in group.env)) if group.env else ()
    words = (*env, host.python, "-P", *description.argv(group, place))
    names = {_FOLDER: "${folder}", **{_router(i): _variable(i) for i in range(len(ports))}}
    return " ".join(_word(word, names) for word in words)


def _word(word: str, names: Mapping[str, str]) -> str:
    """Return a word for the shell, with the variables for what only the job knows."""
    quoted = shlex.quote(word)
    if quoted != word:
        return quoted
    for name, variable in names.items():
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
