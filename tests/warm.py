"""Commands in processes of their own, forked from one that has imported them already.

Most of what a short command costs is its imports, and tests type hundreds. `run` gives what a new
`python -P -m MODULE` would: an exit code, and all that was printed. This module is also the program that
forks.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULES = ("cluster", "loadgen")
"""What can be run."""

_LARGEST = 1 << 20
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def run(
    module: str, *args: str, env: Mapping[str, str], timeout_s: float, namespace: str = ""
) -> tuple[int, str]:
    """Run a command in the checkout to its end.

    Args:
        module: One of MODULES.
        args: Its arguments.
        env: All of its environment.
        timeout_s: When to kill it.
        namespace: The network namespace in which it runs; "" for this process's own.

    Returns:
        The exit code, negative for a signal, and what it printed on either stream.

    Raises:
        AssertionError: It did not end in time.
    """
    assert module in MODULES, module
    asked = {"module": module, "args": args, "env": dict(env), "namespace": namespace}
    printed, said = os.pipe(), os.pipe()
    socket.send_fds(_forking(), [json.dumps(asked).encode()], [printed[1], said[1]])
    for fd in (printed[1], said[1]):
        os.close(fd)
    with os.fdopen(said[0], "r") as about, os.fdopen(printed[0], "r", errors="replace") as output:
        pid = int(about.readline())
        late = threading.Timer(timeout_s, os.kill, (pid, signal.SIGKILL))
        late.start()
        try:
            text = output.read()
            code = int(about.readline())
        finally:
            late.cancel()
    assert code != -signal.SIGKILL, f"{module} {args} did not end within {timeout_s:g} s: {text}"
    return code, text


@functools.cache
def _forking() -> socket.socket:
    """Return the connection to a process that forks; it ends when this one does.

    It is nobody's child: tests count theirs.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.run(
        [sys.executable, "-P", "-c", f"import tests.warm; tests.warm.main({its.fileno()})"],
        cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    its.close()
    atexit.register(ours.close)
    return ours


# --- the process that forks ---------------------------------------------------------------------


def main(control_fd: int) -> None:
    """Import what commands import, and fork one for each message until there are no more."""
    if os.fork():
        return
    control = socket.socket(fileno=control_fd)
    for module in MODULES:
        group = importlib.import_module(f"{module}.cli").cli
        context = click.Context(group)
        for name in group.list_commands(context):  # imported when they are run, and so now
            group.get_command(context, name)
    importlib.import_module("loadgen.live.run")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while True:
        message, fds, _, _ = socket.recv_fds(control, _LARGEST, 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            printed, said = fds
            pid = os.fork()
            if pid == 0:
                os.close(said)
                _command(json.loads(message), printed)
            os.close(printed)
            _watch(pid, said)
        for fd in fds:
            os.close(fd)


def _watch(pid: int, said: int) -> NoReturn:
    os.write(said, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(said, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _command(asked: dict[str, Any], printed: int) -> NoReturn:
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)
    os.environ.clear()
    os.environ.update(asked["env"])
    if asked["namespace"]:
        _enter(asked["namespace"])
    module = asked["module"]
    sys.argv = [str(ROOT / module / "__main__.py"), *asked["args"]]
    sys.modules[f"{module}.cli"].cli(prog_name=module)
    raise SystemExit(0)


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(fd, _NEW_NETWORK) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.close(fd)
