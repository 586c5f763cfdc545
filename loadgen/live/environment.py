"""Where, when and by which command a run was made: what you need to repeat it."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import zmq

_PACKAGES = ("superserve", "numpy", "pyzmq", "torch")
_CPUINFO = Path("/proc/cpuinfo")


def environment_of(**more: Any) -> dict[str, Any]:
    """Return the result file's `environment`: date, command, machine, versions, and further facts.

    Args:
        more: Facts that only the caller has, as JSON; None is left out.
    """
    found = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": os.fsencode(command_line(sys.argv)).decode(errors="backslashreplace"),
        "machine": machine(),
        "versions": versions(),
    }
    return found | {name: value for name, value in more.items() if value is not None}


def command_line(argv: list[str]) -> str:
    """Return the command that runs now, as you would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return shlex.join([Path(argv[0]).name, *argv[1:]])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *argv[1:]])


def machine() -> dict[str, Any]:
    """Return this machine's name, CPU, cores, memory and system."""
    return {
        "host": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpu() -> str:
    """Return the CPU's name; its architecture if the system gives none."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python, of ZeroMQ's library, and of the packages that are installed."""
    found = {"python": platform.python_version(), "libzmq": zmq.zmq_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
