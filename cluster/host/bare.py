"""What runs on a host before the package is there: any Python from 3.9 on, without packages.

The launcher sends this file's text over ssh's stdin; the host's Python runs it as

    python3 -c '...' probe '{"cluster": ..., ...}'      look, and change nothing
    python3 -c '...' install '{...}' < wheel            put the package there, and what it needs

and reads one JSON object from stdout, between two marks, because a login shell may print before and after it.
`{"error": ...}` contains what went wrong, for people to read.

    STATE/.hosts/CLUSTER/HOST/     0700; STATE as in superserve/roles/local.py
      code/HASH/                   the package, unpacked: a running role keeps the files it began with
      venv/                        made only if the host's Python lacks something that the package needs
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

BEGIN, END = "<<superserve:", ":superserve>>"
"""Printed around an answer, to find it among whatever a shell prints."""

_STATE = "SUPERSERVE_STATE"
_OURS = "SUPERSERVE_HOST_FOLDER"  # in the environment of every role: `cluster.host.config` sets it
_TAIL = 1_500  # characters of a command's output that an error quotes
_LISTENS = "0A"  # proc(5), net/tcp: the state of a listening socket
# Run by another Python: prints which of the given [[distribution, least version], ...] it lacks.
_LACKS = """
import json, re, sys
from importlib import metadata
def numbers(text):
    return [int(n) for n in re.findall(r"[0-9]+", text)[:3]]
def lacks(name, least):
    try:
        return numbers(metadata.version(name)) < numbers(least)
    except metadata.PackageNotFoundError:
        return True
print(json.dumps([name for name, least in json.loads(sys.argv[1]) if lacks(name, least)]))
"""


class BareError(Exception):
    """Something on this host is wrong."""


def host_folder(asked: dict[str, Any]) -> Path:
    """Return the folder of this host's part of a cluster."""
    state = os.environ.get(_STATE)
    if state:
        base = Path(state).absolute()
    else:
        home = os.environ.get("XDG_STATE_HOME")
        base = (Path(home) if home else Path.home() / ".local" / "state") / "superserve"
    return base / ".hosts" / str(asked["cluster"]) / str(asked["host"])


# --- probe ------------------------------------------------------------------------------------


def probe(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what this host has; change nothing."""
    began = time.time()
    folder = host_folder(asked)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    python, lacks = interpreter(asked, folder)
    return {
        "python": list(sys.version_info[:3]),
        "folder": str(folder),
        "interpreter": python,
        "lacks": lacks,
        "has_code": (folder / "code" / asked["hash"]).is_dir(),
        "other_code": sorted(path.name for path in folder.glob("code/*") if path.name != asked["hash"]),
        "gpus": cuda_devices(),
        "ports": {str(port): holder(port, folder) for port in asked["ports"]},
        "files": [soft, hard],
        "disk_bytes": free_bytes(folder),
        "writable": writable(folder),
        "router": lookup(asked["router"]),
        "clock": (began + time.time()) / 2,
    }


def interpreter(asked: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    """Return the Python to run roles with, and the distributions that it lacks.

    The one that runs this, if it has them all; otherwise the one of the environment made for the
    cluster, if there is one.
    """
    own = lacking(sys.executable, asked["requirements"])
    made = folder / "venv" / "bin" / "python"
    if not own or not made.exists():
        return sys.executable, own
    return str(made), lacking(str(made), asked["requirements"])


def lacking(python: str, requirements: list[list[str]]) -> list[str]:
    """Return which of [[distribution, least version], ...] a Python lacks."""
    argv = [python, "-c", _LACKS, json.dumps(requirements)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BareError(f"{python}: {done.stderr.strip()[-_TAIL:]}")
    lacks: list[str] = json.loads(done.stdout)
    return lacks


def cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that the driver shows."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [path.name for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    argv = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def holder(port: int, folder: Path) -> str:
    """Return what listens on a TCP port: "" for nothing, "ours", or a process in words."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                return "ours" if is_ours(process, folder) else described(process)
    return "a process of another user"


def is_ours(process: Path, folder: Path) -> bool:
    """Return whether a process is a role of this cluster on this host."""
    return f"{_OURS}={folder}".encode() in (process / "environ").read_bytes().split(b"\0")


def described(process: Path) -> str:
    """Return a process in words."""
    command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    return f"pid {process.name} ({command[:60]})"


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free where the folder is, or will be."""
    return shutil.disk_usage(existing(folder)).free


def lookup(name: str) -> str:
    """Return "" if a name can be looked up here, or is not to be looked up; otherwise why not."""
    try:
        if name:
            socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def writable(folder: Path) -> str:
    """Return "" if the folder can be made and written, otherwise where that fails."""
    path = existing(folder)
    return "" if os.access(path, os.W_OK | os.X_OK) else str(path)


# --- install ----------------------------------------------------------------------------------


def install(asked: dict[str, Any], wheel: bytes) -> dict[str, Any]:
    """Unpack the package, and provide a Python with what it needs; return that Python's path."""
    folder = host_folder(asked)
    for made in (folder.parent.parent, folder.parent, folder):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    unpack(wheel, folder / "code" / asked["hash"])
    python, lacks = interpreter(asked, folder)
    if lacks:
        python = complete(folder, asked["requirements"])
        lacks = lacking(python, asked["requirements"])
    if lacks:
        raise BareError(f"{python}: pip installed what it was asked for, and still lacks {', '.join(lacks)}")
    return {"interpreter": python}


def unpack(wheel: bytes, target: Path) -> None:
    """Unpack a wheel into a folder that appears complete, or not at all."""
    if target.is_dir():
        return
    target.parent.mkdir(mode=0o700, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        archive.extractall(part)
    try:
        part.rename(target)
    except OSError:  # another launcher unpacked it first
        shutil.rmtree(part)


def complete(folder: Path, requirements: list[list[str]]) -> str:
    """Make an environment from the host's Python, and install what is lacking with its pip."""
    venv = folder / "venv"
    python = str(venv / "bin" / "python")
    call([sys.executable, "-P", "-m", "venv", "--system-site-packages", "--without-pip", str(venv)])
    if sys.prefix != sys.base_prefix:  # already an environment: venv would link the base Python instead
        import sysconfig  # noqa: PLC0415  rarely needed

        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "beneath.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    if subprocess.run([python, "-P", "-c", "import pip"], capture_output=True, check=False).returncode:
        call([python, "-P", "-m", "ensurepip", "--default-pip"])
    wanted = [f"{name}>={least}" for name, least in requirements]
    call([python, "-P", "-m", "pip", "install", "--no-input", "--quiet", *wanted])
    return python


def call(argv: list[str]) -> None:
    """Run a command; raise BareError with its last output if it fails."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        words = re.sub(r"\s*\n\s*", "; ", done.stdout.strip()[-_TAIL:])
        raise BareError(f"`{' '.join(argv[:5])} ...` failed on {socket.gethostname()}: {words}")


def marked(answer: dict[str, Any]) -> str:
    """Return an answer in its printed form."""
    return f"\n{BEGIN}{json.dumps(answer)}{END}\n"


def main(verb: str, text: str) -> None:
    """Run a verb, and print its result."""
    asked = json.loads(text)
    try:
        result = probe(asked) if verb == "probe" else install(asked, sys.stdin.buffer.read())
    except (BareError, OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        result = {"error": str(error)}
    sys.stdout.write(marked(result))


if __name__ == "__main__":
    main(*sys.argv[1:3])
