"""What holds a role on Ray: an actor with a process, which lives and dies with it.

The actor looks where the routers' actors are, starts the role as a child, and passes on what it is asked. A
role that crashes takes its actor along, so that Ray restarts both, on another node if need be; the kernel
kills the role of an actor that is killed. A role that has drained ends its actor for good, which frees the
GPU.

Files that a role reads come with the actor, into a private folder of its node. This module needs only what a
node has: the package, and Ray, which it imports when it runs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engines.placed.base import Started, tail_lines
from cluster.engines.placed.routing import RouterAt, RoutersKnown, router_at
from cluster.spec.roles import is_router
from superserve.fields import read_file
from superserve.files import write_private
from superserve.roles.processes import PARENT_PID_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LOOK_S = 5.0  # between two looks where the routers are: a call to other actors
_FIND_S = 0.5  # between two looks while there is none
_ANSWER_S = 5.0
_CRASH_S = 5.0  # a role that ran for less pauses before its actor ends: Ray restarts at once, for ever
_PAUSE_S = 2.0
_KILL_S = 5.0  # after a role's grace
_TAIL_BYTES = 8_192


def namespace(cluster: str) -> str:
    """Return the namespace of a cluster's actors."""
    return f"superserve-{cluster}"


def keep_files(cluster: str, role: str, files: Mapping[str, bytes]) -> None:
    """Keep a role's files in Ray's control store, which outlives actors; without files, forget them."""
    from ray.experimental import internal_kv  # noqa: PLC0415  nodes have it, this machine may not

    if files:
        internal_kv._internal_kv_put(_kept(cluster, role), pickle.dumps(dict(files)), overwrite=True)
    else:
        internal_kv._internal_kv_del(_kept(cluster, role))


def kept_files(cluster: str, role: str) -> dict[str, bytes]:
    """Return a role's files as they were kept last; nothing if they never were."""
    from ray.experimental import internal_kv  # noqa: PLC0415  nodes have it, this machine may not

    kept = internal_kv._internal_kv_get(_kept(cluster, role))
    found: dict[str, bytes] = {} if kept is None else pickle.loads(kept)  # noqa: S301  Ray pickles everything there
    return found


def _kept(cluster: str, role: str) -> bytes:
    return f"{namespace(cluster)}:{role}".encode()


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
        # Started again by Ray, it is given what it was created with; what was sent since is kept elsewhere.
        kept = kept_files(cluster, self._role.name) if self._role.kind == "router" else {}
        self.put(kept or files)
        self._log = self._here / f"{self._role.name}.log"
        self._known = RoutersKnown(self._role.name, self._role.argv, self._here / "routers.json")
        self._is_stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._began_s = time.monotonic()
        # The kernel kills the role when the thread that started it ends, so that thread waits for it.
        self._thread = threading.Thread(target=self._keep, name="keep", daemon=True)
        self._thread.start()

    # --- asked by others ----------------------------------------------------------------------

    def put(self, files: Mapping[str, bytes]) -> None:
        """Replace the role's files, which it reads again by itself; remove those that are not among them."""
        for name, content in files.items():
            path = self._here / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, content)
        for path in sorted((self._here / "files").rglob("*")):
            if path.is_file() and str(path.relative_to(self._here)) not in files:
                path.unlink()

    def address(self) -> str:
        """Return the address of this node."""
        import ray  # noqa: PLC0415  nodes have it, this machine may not

        return str(ray.util.get_node_ip_address())

    def ends(self) -> tuple[str, str]:
        """Return where clients and workers reach this router."""
        found = router_at(self._role.argv, self.address())
        return found.client, found.worker

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
            argv = self._known.started(self._routers())
            if argv is None:
                self._is_stopping.wait(_FIND_S)
                continue
            self._process = process = self._start(argv)
            if self._is_stopping.is_set():
                process.terminate()  # `stop` may have come before there was a process
            moved = self._wait(process)
            if moved or self._is_stopping.is_set():
                continue
            if process.returncode != 0:
                self._crash()
            break
        self._end()

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        role = self._role
        there, here = f"{self._folder}/files/", f"{self._here}/files/"
        argv = [word.replace(there, here) for word in words]
        env = {
            **os.environ, "PYTHONUNBUFFERED": "1", PARENT_PID_VARIABLE: str(os.getpid()), **dict(role.env),
        }  # fmt: skip
        self._began_s = time.monotonic()
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [role.interpreter or sys.executable, "-P", *argv], env=env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _wait(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the role's end; return whether it was ended to follow the routers to other nodes."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._grace_s() if self._is_stopping.is_set() else _LOOK_S)
                return False
            if self._is_stopping.is_set():
                process.terminate()
                self._finish(process)
                return False
            if self._known.has_moved(self._routers()):
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

    # --- the routers --------------------------------------------------------------------------

    def _routers(self) -> dict[str, RouterAt]:
        """Return where the routers are whose actors answer, by name; none if this role needs none."""
        if not (self._known.needs_one or self._known.is_listed):
            return {}
        import ray  # noqa: PLC0415  nodes have it, this machine may not

        own, found = self._role.name, {}
        if is_router(own):
            found[own] = RouterAt(*self.ends())  # a call to itself would wait for this thread's place
        try:
            asked = {}
            for one in ray.util.list_named_actors(all_namespaces=True):
                name = one["name"]
                if one["namespace"] == namespace(self._cluster) and is_router(name) and name != own:
                    with contextlib.suppress(ValueError):  # it has ended meanwhile
                        asked[name] = ray.get_actor(name, namespace=one["namespace"]).ends.remote()
            if asked:
                ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
            for name, reference in asked.items():
                with contextlib.suppress(ray.exceptions.RayError):  # it has no place yet, or has just ended
                    found[name] = RouterAt(*ray.get(reference, timeout=0))
        except ray.exceptions.RayError:
            return {}  # nothing is known: all stays as it is
        return found

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
