"""Check every host before anything is started: what each has, compared with what it will run.

`cluster/host/bare.py` looks, on all hosts at once, and changes nothing; this module judges the answers.
Whatever would keep a role from running is `wrong` and excludes the host; a `note` is worth knowing and
acceptable.
"""

from __future__ import annotations

import importlib.resources
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cluster.remote.ask import answer
from cluster.remote.shell import CONNECT_TIMEOUT_S, RemoteError, UnreachableError, parallel
from cluster.remote.wheel import FOR_FAMILIES, FOR_GATEWAY, FOR_SUPERNETS, FOR_TEXTS, ON_EVERY_HOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.remote.shell import Shell
    from cluster.remote.wheel import Wheel
    from cluster.spec.roles import Wanted

COLUMNS = ("host", "ssh", "Python", "package", "GPUs", "ports", "clock", "files", "disk")
"""Of the table; a host's `cells` have this order."""

LEAST_PYTHON = (3, 11)  # as `requires-python` in pyproject.toml
PROBE_S = 60.0  # a login, two starts of Python, nvidia-smi: seconds, on a busy host
INSTALL_S = 1_800.0  # pip may have to fetch torch, some gigabytes

_LEAST_FILES = 1_024  # sockets and logs of a router with hundreds of peers
_LEAST_DISK_BYTES = 500 << 20  # the package, and the logs at their bounds
_MUCH_DISK_BYTES = 8 << 30  # if torch has to be fetched
_CLOCK_S = 1.0  # deadlines never cross hosts, but comparing logs needs clocks that agree
_GB = 1_000_000_000
# The script's length comes first: the rest of stdin belongs to the script.
# Commands on a host run in HOME, from which nothing must be imported; Python before 3.11 has no `-P`.
_START = (
    "import sys; sys.path[:] = filter(None, sys.path);"
    " exec(compile(sys.stdin.buffer.read(int(sys.argv.pop(1))), 'bare.py', 'exec'))"
)


@dataclass(frozen=True, slots=True)
class HostFinding:
    """The findings on a host.

    Attributes:
        name: Of the host.
        cells: A row of the table.
        wrong: What excludes it, a line each.
        notes: What is worth knowing, a line each.
        folder: The cluster's folder there; "" if it was not reached.
        interpreter: The Python to run roles with.
        needs_install: Whether the package, or something it needs, is missing.
        lacks_router: Whether it cannot look up the router's name.
    """

    name: str
    cells: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folder: str = ""
    interpreter: str = ""
    needs_install: bool = False
    lacks_router: bool = False


def look(shell: Shell, cluster: str, hosts: Sequence[Wanted], wheel: Wheel) -> list[HostFinding]:
    """Return the findings on each host, in order; change nothing there."""
    return parallel(hosts, lambda host: _look(shell, cluster, host, wheel))


def _look(shell: Shell, cluster: str, host: Wanted, wheel: Wheel) -> HostFinding:
    before_s = time.time()
    try:
        found = bare(shell, host, "probe", _asked(cluster, host, wheel), timeout_s=PROBE_S)
    except RemoteError as error:
        is_unreachable = isinstance(error, UnreachableError)
        cells = (host.name, "FAILED" if is_unreachable else "ok", "-" if is_unreachable else "FAILED")
        return HostFinding(host.name, (*cells, *("-",) * (len(COLUMNS) - 3)), (_explained(str(error), host),))
    after_s = time.time()
    return judge(host, found, offset_s=found["clock"] - (before_s + after_s) / 2, within_s=after_s - before_s)


def _asked(cluster: str, host: Wanted, wheel: Wheel) -> dict[str, Any]:
    return {
        "cluster": cluster, "host": host.name, "hash": wheel.hash, "ports": host.ports,
        "requirements": requirements(host), "router": host.router,
    }  # fmt: skip


def requirements(host: Wanted) -> tuple[tuple[str, str], ...]:
    """Return the distributions that a host's roles import, each with its least version."""
    return (
        *ON_EVERY_HOST,
        *(FOR_SUPERNETS if host.serves_supernet else ()),
        *(FOR_FAMILIES if host.serves_supernet and host.serves_family else ()),
        *(FOR_GATEWAY if host.serves_gateway else ()),
        *(FOR_TEXTS if host.serves_texts else ()),
    )


def bare(
    shell: Shell, host: Wanted, verb: str, asked: dict[str, Any], *, content: bytes = b"", timeout_s: float
) -> dict[str, Any]:
    """Run `cluster/host/bare.py` with a host's Python, and return its answer.

    Raises:
        UnreachableError: The host cannot be reached.
        RemoteError: It has no such Python, or the script failed.
    """
    script = importlib.resources.files("cluster.host").joinpath("bare.py").read_bytes()
    argv = [host.python, "-c", _START, str(len(script)), verb, orjson.dumps(asked).decode()]
    try:
        return answer(host.name, shell.run(host.target, argv, stdin=script + content, timeout_s=timeout_s))
    except RemoteError as error:
        words = str(error)
        raise type(error)(words if words.startswith(f"{host.name}: ") else f"{host.name}: {words}") from error


def _explained(words: str, host: Wanted) -> str:
    """Return an error of ssh, with what to do about it."""
    login = host.target.address if host.target.user is None else f"{host.target.user}@{host.target.address}"
    hints = {
        "Permission denied": f"try `ssh {login}`, and `ssh-copy-id {login}` if it asks for a password",
        "Host key verification failed": f"its key is not known: try `ssh {login}` once, and compare the key",
        "timed out": f"nothing answered within {CONNECT_TIMEOUT_S} s: is it on, and its address right?",
        "No route to host": "is it on, and its address right?",
        "Connection refused": "it is on, and no ssh server listens there",
        "not resolve": "expected a name that ssh knows, or an address",
        "command not found": f"expected Python as `{host.python}`: name another with `python:`",
    }
    hint = next((hint for sign, hint in hints.items() if sign in words), "")
    return f"{words}; {hint}" if hint else words


def judge(host: Wanted, found: dict[str, Any], *, offset_s: float, within_s: float) -> HostFinding:
    """Return a host's row and what is wrong with it.

    Args:
        host: What it must have.
        found: The answer of `bare.probe`.
        offset_s: How far its clock is ahead of this machine's.
        within_s: How long the question took: the offset is known to half of that.
    """
    wrong: list[str] = []
    notes: list[str] = []
    cells = (
        host.name,
        "ok",
        _python(found, wrong),
        _package(found),
        _gpus(host, found, wrong),
        _ports(found, wrong),
        _clock(offset_s, within_s, notes),
        _files(found, wrong),
        _disk(host, found, wrong),
    )
    if found["router"]:
        wrong.append(
            f"router: expected an address that this host can look up, got {host.router!r} "
            f"({found['router']}): `router: {{host: ..., address: ...}}` sets where hosts reach it, if ssh "
            f"uses an alias"
        )
    if found["writable"]:
        wrong.append(f"disk: expected a folder that can be written, got {found['writable']}")
    return HostFinding(
        host.name, cells, tuple(f"{host.name}: {line}" for line in wrong),
        tuple(f"{host.name}: {line}" for line in notes), found["folder"], found["interpreter"],
        not found["has_code"] or bool(found["lacks"]), bool(found["router"]),
    )  # fmt: skip


def _python(found: dict[str, Any], wrong: list[str]) -> str:
    version = ".".join(map(str, found["python"]))
    if tuple(found["python"][:2]) < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        wrong.append(f"Python: expected {least} or newer, got {version}: name another with `python:`")
    return version


def _package(found: dict[str, Any]) -> str:
    words = "same" if found["has_code"] else "another" if found["other_code"] else "none yet"
    n = len(found["lacks"])
    return f"{words}, lacks {n}" if n else words


def _gpus(host: Wanted, found: dict[str, Any], wrong: list[str]) -> str:
    if not host.gpus:
        return "-"
    n = len(found["gpus"])
    if lacking := [gpu for gpu in host.gpus if gpu >= n]:
        numbers = ", ".join(map(str, lacking))
        wrong.append(f"GPUs: expected CUDA device {numbers}, and its driver shows {n or 'none'}")
    return f"{len(host.gpus)} of {n}"


def _ports(found: dict[str, Any], wrong: list[str]) -> str:
    words = []
    for port, holder in found["ports"].items():
        if holder not in ("", "ours"):
            wrong.append(f"port {port}: expected a free one, and {holder} listens there")
        words.append(f"{port} {holder or 'free'}" if holder in ("", "ours") else f"{port} TAKEN")
    return ", ".join(words) or "-"


def _clock(offset_s: float, within_s: float, notes: list[str]) -> str:
    # If the offset is no larger than the uncertainty, the clock may be right.
    offset_s = max(0.0, abs(offset_s) - within_s / 2) * (1 if offset_s > 0 else -1)
    if abs(offset_s) > _CLOCK_S:
        notes.append(f"clock: {offset_s:+.1f} s from this machine's: logs of hosts do not compare")
        return f"{offset_s:+.1f} s"
    return "ok"


def _files(found: dict[str, Any], wrong: list[str]) -> str:
    hard = found["files"][1]
    if 0 <= hard < _LEAST_FILES:  # RLIM_INFINITY is -1
        wrong.append(
            f"files: expected a limit of {_LEAST_FILES} open files or more, got {hard}: `ulimit -Hn`"
        )
    return f"{hard:,}" if hard >= 0 else "no limit"


def _disk(host: Wanted, found: dict[str, Any], wrong: list[str]) -> str:
    fetches_torch = host.serves_supernet and "torch" in found["lacks"]
    least = _MUCH_DISK_BYTES if fetches_torch else _LEAST_DISK_BYTES
    free = found["disk_bytes"]
    if free < least:
        wrong.append(
            f"disk: expected {least / _GB:.1f} GB free, got {free / _GB:.1f} GB where {found['folder']} is"
        )
    return f"{free / _GB:,.0f} GB"


def install(shell: Shell, cluster: str, host: Wanted, wheel: Wheel) -> str:
    """Put the package, and what it needs, on a host; return the Python that runs it.

    Raises:
        RemoteError: That failed; the error names the host and quotes the reason.
    """
    said = bare(
        shell, host, "install", _asked(cluster, host, wheel), content=wheel.content, timeout_s=INSTALL_S
    )
    interpreter: str = said["interpreter"]
    return interpreter
