"""What holds a role on Ray: an actor with a process, which lives and dies with it.

The actor looks where the router's actor is, starts the role as a child, and passes on what it is asked. A
role that crashes takes its actor along, so that Ray restarts both, on another node if need be; the kernel
kills the role of an actor that is killed. A role that has drained ends its actor for good, which frees the
GPU.

Files that a role reads come with the actor, into a private folder of its node. This module needs only what a
node has: the package, and Ray, which it imports when it runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engines.placed.base import ROUTER_HOST, Started, tail_lines
from superserve.fields import read_file
from superserve.files import write_private
from superserve.roles.processes import PARENT_PID_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOOK_S = 5.0  # between two looks where the router is: a call to another actor
_FIND_S = 0.5  # between two looks while it is nowhere
_ANSWER_S = 5.0
_CRASH_S = 5.0  # a role that ran for less pauses before its actor ends: Ray restarts at once, for ever
_PAUSE_S = 2.0
_KILL_S = 5.0  # after a role's grace
_TAIL_BYTES = 8_192


def namespace(cluster: str) -> str:
    """Return the namespace of a cluster's actors."""
    return f"superserve-{cluster}"


def _own_folder(cluster: str, role: str) -> Path:
    """Make a private folder on this node; remove what killed actors of the role have left."""
    head = f"superserve@{cluster}@{role}@"  # no name has an @: a role's name may begin another's
    for left in Path(tempfile.gettempdir()).glob(f"{head}*"):
        if left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=head))


class RoleActor:
    """Holds one role. Its methods are called by the engine, and by other roles' actors.

    Args:
        cluster: The cluster's name.
        role: A `Started`, as JSON.
        folder: The cluster's folder in the role's arguments.
        files: The role's files, by path in that folder.
    """

    def __init__(
        self, cluster: str, role: Mapping[str, Any], folder: str, files: Mapping[str, bytes]
    ) -> None:
        self._role = read_file(Started, dict(role), "role")
        self._cluster = cluster
        self._folder = folder
        self._here = _own_folder(cluster, self._role.name)
        for name, content in files.items():
            path = self._here / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, content)
        self._log = self._here / f"{self._role.name}.log"
        self._is_stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._began_s = time.monotonic()
        # The kernel kills the role when the thread that started it ends, so that thread waits for it.
        self._thread = threading.Thread(target=self._keep, name="keep", daemon=True)
        self._thread.start()

    # --- asked by others ----------------------------------------------------------------------

    def address(self) -> str:
        """Return the address of this node."""
        import ray  # noqa: PLC0415  nodes have it, this machine may not

        return str(ray.util.get_node_ip_address())

    def state(self) -> dict[str, Any]:
        """Return the role's state in supervisor's words, its process, since when, and the node."""
        process = self._process
        is_running = process is not None and process.poll() is None
        state = "STOPPING" if self._is_stopping.is_set() else "RUNNING" if is_running else "STARTING"
        pid = process.pid if process is not None and is_running else 0
        up_s = int(time.monotonic() - self._began_s)
        return {"state": state, "pid": pid, "up_s": up_s, "node": self.address()}

    def tail(self, n_lines: int) -> list[str]:
        """Return the last lines of the role's log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
                return tail_lines(log.read().decode(errors="replace"), n_lines)
        except OSError:
            return []

    def stop(self) -> None:
        """Drain the role, and end this actor once that is done; returns at once."""
        self._is_stopping.set()
        if self._process is not None:
            self._process.terminate()

    # --- the role -----------------------------------------------------------------------------

    def _keep(self) -> None:
        """Run the role to its end, then end this actor; after a crash, Ray restarts it."""
        while not self._is_stopping.is_set():
            address = self._router()
            if address is None:
                self._is_stopping.wait(_FIND_S)
                continue
            self._process = process = self._start(address)
            if self._is_stopping.is_set():
                process.terminate()  # `stop` may have come before there was a process
            moved = self._wait(process, address)
            if moved or self._is_stopping.is_set():
                continue
            if process.returncode != 0:
                self._crash()
            break
        self._end()

    def _start(self, address: str) -> subprocess.Popen[bytes]:
        role = self._role
        there, here = f"{self._folder}/files/", f"{self._here}/files/"
        argv = [word.replace(ROUTER_HOST, address).replace(there, here) for word in role.argv]
        env = {
            **os.environ, "PYTHONUNBUFFERED": "1", PARENT_PID_VARIABLE: str(os.getpid()), **dict(role.env),
        }  # fmt: skip
        self._began_s = time.monotonic()
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [role.interpreter or sys.executable, "-P", *argv], env=env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes], address: str) -> bool:
        """Wait for the role's end; return whether it was ended to follow the router to another node."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._grace_s() if self._is_stopping.is_set() else _LOOK_S)
                return False
            if self._is_stopping.is_set():
                process.terminate()
                self._finish(process)
                return False
            if self._router() not in (None, address):
                process.terminate()
                self._finish(process)
                return True

    def _grace_s(self) -> float:
        return self._role.stop_s + _KILL_S

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(self._grace_s())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- the router ---------------------------------------------------------------------------

    def _router(self) -> str | None:
        """Return the address of the router's node; None while it does not answer, "" if none is needed."""
        if not any(ROUTER_HOST in word for word in self._role.argv):
            return ""
        import ray  # noqa: PLC0415  nodes have it, this machine may not

        try:
            router = ray.get_actor("router", namespace=namespace(self._cluster))
            return str(ray.get(router.address.remote(), timeout=_ANSWER_S))
        except (ValueError, ray.exceptions.RayError):
            return None

    # --- the end ------------------------------------------------------------------------------

    def _crash(self) -> None:
        """End this process, so that Ray restarts the actor; not in a tight loop."""
        if time.monotonic() - self._began_s < _CRASH_S:
            time.sleep(_PAUSE_S)
        self._say(f"{self._role.name}: ended: " + "; ".join(self.tail(3)))
        shutil.rmtree(self._here, ignore_errors=True)
        os._exit(1)

    def _end(self) -> None:
        import ray  # noqa: PLC0415  nodes have it, this machine may not

        shutil.rmtree(self._here, ignore_errors=True)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    @staticmethod
    def _say(line: str) -> None:
        """Write a line to the actor's own log, which the Ray dashboard shows."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
