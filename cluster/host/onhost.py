"""`python -P -m cluster.host.onhost VERB`: what the launcher does on one host, on that host.

It is run over ssh, reads one JSON object from stdin and writes one to stdout, marked; `{"error": ...}`
contains what went wrong, for people to read. On this machine the launcher calls `do` directly. Supervisor is
reached through its socket, in a folder that only its user may enter.

    apply      run exactly the given roles, with files beside them; return what changed
    undo       run the roles that ran before the last `apply`
    states     the state of each role
    down       stop every role and supervisord itself
    start, stop   one role; return at once
    status     the router's STATUS
    tail       the last lines of a role's log
    facts      the facts for `cluster doctor`

Only differences are touched: a second `apply` changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]  # it ships no types

from cluster.host.bare import marked
from cluster.host.config import (
    BEFORE,
    CONFIG,
    KEEPER_LOG,
    PLAN,
    SOCKET,
    kept_digests,
    script,
    supervisord_conf,
    tail_of,
)  # fmt: skip
from cluster.host.facts import look
from cluster.host.folder import HeldError, alone, await_end, clean, end, outliving, tidy_unowned
from cluster.spec.roles import FILLED, KEYS, OPERATOR_KEY, HostPlan, HostRole, Timing
from superserve.errors import ConfigError, ProcessError, SuperServeError
from superserve.fields import read_file
from superserve.files import write_private
from superserve.net.connection import ask_status
from superserve.roles.local import ProcessId
from superserve.roles.processes import PARENT_PID_VARIABLE, READY_FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FILES_WANTED = 65_536  # the router keeps a descriptor per peer, and the usual soft limit is 1,024
_STARTED_S = 15.0  # the keeper imports supervisor, on a host that may be busy
_CALL_S = 20.0  # longer than a role may take to stop, because `update` waits for that
_STOPPED_S = 30.0  # beyond the time that the roles may take
_START_AGAIN_S = 0.02  # nothing wakes the caller when the keeper's file appears
_LOCK_S = 60.0  # the command that holds it may be waiting for roles to stop
_TAIL_LINES = 15  # the end of a traceback, with the error itself
_IDLE = ("STOPPED", "EXITED", "FATAL")  # supervisor's states of a process that does not run
_NOT_THERE = {
    "state": "STOPPED", "pid": None, "up_s": 0, "exit": 0, "restarts": 0, "why": "", "metrics": "",
}  # fmt: skip
_NOT_THE_KEEPERS = (READY_FD_VARIABLE, PARENT_PID_VARIABLE)


class _Connection(http.client.HTTPConnection):
    """To a socket of this machine; supervisor's own class would wait for a suspended process for ever."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CALL_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CALL_S)
        self.sock.connect(self._path)


class Supervisord:
    """The supervisord of one folder, running or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _call(self, method: str, *args: Any) -> Any:
        """Call one of its functions.

        Raises:
            OSError: No process answers at the socket.
            ProcessError: It does not answer: it is suspended, or its machine is very busy.
        """
        # Through a descriptor: a socket's address holds 107 bytes, and the folder may be deeper than that.
        # A new connection each time: one that failed cannot be used again.
        descriptor = os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        path = f"/proc/self/fd/{descriptor}/{SOCKET}"
        transport = SupervisorTransport(None, None, f"unix://{path}")
        transport._get_connection = lambda: _Connection(path)
        try:
            return getattr(xmlrpc.client.ServerProxy("http://127.0.0.1", transport), method)(*args)
        except TimeoutError as error:
            raise ProcessError(f"the keeper did not answer within {_CALL_S:g} s") from error
        except http.client.HTTPException as error:  # it has just ended
            raise ConnectionError(str(error)) from error
        finally:
            transport.close()
            os.close(descriptor)

    def pid(self) -> int | None:
        """Return its process; None if no process answers at its socket."""
        try:
            return int(self._call("supervisor.getPID"))
        except (OSError, xmlrpc.client.Error):
            return None

    def start(self, plan: HostPlan, hold: int | None = None, kept_open: Sequence[int] = ()) -> None:
        """Start it with the present files; return when it answers.

        Args:
            plan: What it runs.
            hold: A socket: until `keep` comes over it, the end of its peer ends everything; None to run on.
            kept_open: Sockets that reserve ports for as long as it runs.

        Raises:
            ProcessError: It ended or stayed silent; the error quotes its output.
        """
        path = self.folder / KEEPER_LOG
        argv = [plan.interpreter, "-P", "-m", "cluster.host.watch", *([] if hold is None else [str(hold)])]
        with path.open("wb") as file:
            process = subprocess.Popen(
                argv, env=_environment(plan), cwd=self.folder, start_new_session=True,
                pass_fds=(*kept_open, *(() if hold is None else (hold,))),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        give_up_s = time.monotonic() + _STARTED_S
        while self.pid() is None:
            if process.poll() is not None or time.monotonic() > give_up_s:
                process.kill()
                process.wait()
                lines = "\n".join(tail_of(path, _TAIL_LINES))
                ends = f"ends:\n{lines}" if lines else "is empty"
                raise ProcessError(f"the keeper did not start; its log ({path}) {ends}")
            time.sleep(_START_AGAIN_S)
        process.returncode = 0  # it is on its own from now on: do not wait for it

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return the state of each role, as `WatchedProcess.seen` gives it; nothing if it does not run."""
        try:
            return {info["name"]: info for info in json.loads(self._call("superserve.roles"))}
        except OSError:
            return {}
        except xmlrpc.client.Fault as error:
            pid = self.pid()
            raise ProcessError(
                f"the keeper (pid {pid}) is of another version, and cannot be asked: `kill {pid}` ends it"
            ) from error

    def update(self) -> dict[str, str]:
        """Make it read its files again; return what changed, by role."""
        added, changed, removed = self._call("supervisor.reloadConfig")[0]
        for name in (*changed, *removed):
            self._call("supervisor.stopProcessGroup", name)
            self._call("supervisor.removeProcessGroup", name)
        for name in (*added, *changed):
            self._call("supervisor.addProcessGroup", name)
        words = {"started": added, "restarted": changed, "stopped": removed}
        return {name: word for word, names in words.items() for name in names}

    def begin(self, name: str) -> None:
        """Start a role that has ended; leave alone one that runs, or soon will.

        Raises:
            ProcessError: It is just stopping.
        """
        if self.infos().get(name, {}).get("state") == "STOPPING":
            raise ProcessError(f"{name}: expected a role that has ended; it is stopping: try again soon")
        with _unless("ALREADY_STARTED"):
            self._call("supervisor.startProcess", name, False)

    def end(self, name: str) -> None:
        """Make a role stop, and do not wait."""
        with _unless("NOT_RUNNING"):
            self._call("supervisor.stopProcess", name, False)

    def shut_down(self, within_s: float) -> None:
        """Stop the router, then every worker, then itself; return when its process has ended."""
        pid = self.pid()
        process = None if pid is None else ProcessId.of(pid)
        if process is None:
            return
        process.signal(signal.SIGTERM)
        if not await_end(process, within_s):
            raise ProcessError(f"the keeper (pid {pid}) did not stop within {within_s:g} s")


def _environment(plan: HostPlan) -> dict[str, str]:
    """Return a keeper's environment, which its roles inherit, without the launcher's own variables."""
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_THE_KEEPERS}
    return {**environment, "PYTHONUNBUFFERED": "1", **({"PYTHONPATH": plan.code} if plan.code else {})}


@contextlib.contextmanager
def _unless(fault: str) -> Iterator[None]:
    try:
        yield
    except xmlrpc.client.Fault as error:
        if not error.faultString.startswith(fault):
            raise ConfigError(f"supervisor: {error.faultString}") from error


# --- verbs ------------------------------------------------------------------------------------


def apply(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run exactly the plan's roles, with these files beside them; return what changed of both."""
    plan = read_file(HostPlan, asked["plan"], PLAN)
    hold = asked.get("hold")
    with alone(folder, wait_s=_LOCK_S if hold is None else 0.0):
        contents = {name: base64.b64decode(text) for name, text in asked["files"].items()}
        if hold is not None:
            _check_free(folder)
            return _start_here(folder, plan, contents, hold, asked["kept_open"])
        files = _put_files(folder, contents)
        is_running = Supervisord(folder).pid() is not None
        before = _read(folder / PLAN) if is_running else None
        if before is None:
            (folder / BEFORE).unlink(missing_ok=True)
        else:
            write_private(folder / BEFORE, before.encode())
        return {"changed": _run(folder, plan), "files": files}


def _start_here(
    folder: Path, plan: HostPlan, contents: dict[str, bytes], hold: int, kept_open: Sequence[int]
) -> dict[str, Any]:
    """Start a cluster of this machine, not kept yet; if that fails, leave nothing of it."""
    try:
        for path in folder.glob("*.log*"):  # of an earlier cluster
            path.unlink()
        files = _put_files(folder, contents) if contents else []
        _write(folder, plan)
        Supervisord(folder).start(plan, hold, kept_open)
    except BaseException:
        tidy_unowned(folder)
        raise
    return {"changed": {role.name: "started" for role in plan.roles}, "files": files}


def _check_free(folder: Path) -> None:
    """Raise HeldError if another command has started this machine's cluster meanwhile."""
    if Supervisord(folder).pid() is not None:
        raise HeldError(f"{folder}: it is being started or stopped by another command")


def undo(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Run the roles that ran before the last `apply`, or none if none ran."""
    before = _read(folder / BEFORE)
    if before is None:
        return down(folder, asked)
    with alone(folder, wait_s=_LOCK_S):
        return {"changed": _run(folder, read_file(HostPlan, json.loads(before), BEFORE))}


def _run(folder: Path, plan: HostPlan) -> dict[str, str]:
    """Run exactly the plan's roles; touch only what differs."""
    supervisord = Supervisord(folder)
    is_new = supervisord.pid() is None
    if is_new:
        for path in folder.glob("*.log*"):  # of an earlier cluster
            path.unlink()
    _write(folder, plan)
    if is_new:
        supervisord.start(plan)
        return {role.name: "started" for role in plan.roles}
    infos = supervisord.infos()
    changed = supervisord.update()
    for name, info in infos.items():
        if name not in changed and info["state"] in _IDLE:
            supervisord.begin(name)
            changed[name] = f"started (was {info['state']})"
    _forget_code(folder)
    return changed


def _write(folder: Path, plan: HostPlan) -> None:
    (folder / "roles").mkdir(mode=0o700, exist_ok=True)
    before, config, digests = _read(folder / PLAN), _read(folder / CONFIG), {}
    if before is not None and config is not None:
        with contextlib.suppress(ConfigError):  # another version wrote it: all its roles are restarted
            digests = kept_digests(read_file(HostPlan, json.loads(before), PLAN), config, plan)
    write_private(folder / PLAN, json.dumps(asdict(plan)).encode())
    for role in plan.roles:
        write_private(folder / "roles" / f"{role.name}.sh", script(role, plan).encode())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    min_files = _FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, _FILES_WANTED)
    write_private(folder / CONFIG, supervisord_conf(plan, min_files=min_files, digests=digests).encode())


def _put_files(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Put exactly these files into the folders that `apply` fills, for this user; return which changed."""
    changed = []
    for name in FILLED:
        (folder / name).mkdir(mode=0o700, exist_ok=True)
        for path in [path for path in (folder / name).rglob("*") if path.is_file()]:
            if (old := str(path.relative_to(folder))) not in files:
                path.unlink()
                changed.append(old)
    for name, content in files.items():
        path = folder / name
        assert name.split("/")[0] in FILLED, name
        assert ".." not in path.parts, name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            write_private(path, content)
            changed.append(name)
    return changed


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _forget_code(folder: Path) -> None:
    """Remove versions of the package that neither the plan nor the previous one runs."""
    texts = [_read(folder / PLAN), _read(folder / BEFORE)]
    kept = {Path(json.loads(text)["code"]) for text in texts if text is not None}
    for path in (folder / "code").glob("*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def states(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the state of each role, with the end of its log if it is not well."""
    supervisord = Supervisord(folder)
    infos = supervisord.infos() if folder.is_dir() else {}
    n_lines = int(asked.get("lines", _TAIL_LINES))
    roles = []
    for role in _roles(folder):
        info = infos.get(role.name, {**_NOT_THERE, "name": role.name})
        path = folder / f"{role.name}.log"
        is_bad = info["state"] in ("FATAL", "BACKOFF")
        more = {"kind": role.kind, "serves": role.serves, "log": str(path)}
        roles.append({**info, **more, "tail": tail_of(path, n_lines) if is_bad else []})
    return {"supervisord": supervisord.pid() if infos else None, "roles": roles}


def _roles(folder: Path) -> list[HostRole]:
    text = _read(folder / PLAN)
    return [] if text is None else list(read_file(HostPlan, json.loads(text), PLAN).roles)


def put(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Replace a file that `apply` has put beside the roles, which read it again by themselves."""
    path = folder / asked["name"]
    if not path.is_file():
        raise ConfigError(f"{path}: expected the file of a cluster that runs: `cluster up` puts it there")
    write_private(path, base64.b64decode(asked["content"]))
    return {}


def down(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Stop every role, or those of a kind; with all of them, supervisord too; return what ran."""
    if not folder.is_dir():
        return {"stopped": []}
    with alone(folder, wait_s=_LOCK_S):
        supervisord = Supervisord(folder)
        running = [info for info in supervisord.infos().values() if info["pid"]]
        kinds = {role.name: role.kind for role in _roles(folder)}
        kind = asked.get("kind")
        stopped = [(info["name"], info["pid"]) for info in running if kind in (None, kinds.get(info["name"]))]
        processes = [process for _, pid in stopped if (process := ProcessId.of(pid)) is not None]
        within_s = _stop_s(folder)
        if kind is None:
            supervisord.shut_down(within_s)
            end(outliving(folder), wait_s=0.0)
            clean(folder)
        else:
            for name, _ in stopped:
                supervisord.end(name)
        give_up_s = time.monotonic() + within_s
        left = [str(p.pid) for p in processes if not await_end(p, give_up_s - time.monotonic())]
        if left:
            raise ProcessError(f"still there after being stopped: pid {', '.join(left)}")
        return {"stopped": stopped}


def _stop_s(folder: Path) -> float:
    """Return how long all roles may take to stop, plus a reserve."""
    text = _read(folder / PLAN)
    timing = Timing() if text is None else read_file(HostPlan, json.loads(text), PLAN).timing
    return timing.router_stop_s + timing.worker_stop_s + _STOPPED_S


def start(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Start a role that does not run."""
    Supervisord(folder).begin(asked["role"])
    return {}


def stop(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Make a role stop."""
    Supervisord(folder).end(asked["role"])
    return {}


def facts(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about the host, and how many files the processes `pids` have open."""
    return asdict(look(folder, asked["pids"]))


def status(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the router's STATUS, asked with the key that `apply` put here; None without an answer."""
    key = folder / KEYS / OPERATOR_KEY
    try:
        shown = str(key) if key.exists() else ""
        found = ask_status(asked["endpoint"], asked.get("timeout_s", 2.0), keys=shown)
        return {"status": orjson.loads(orjson.dumps(found.body()))}
    except ConfigError as error:
        return {"status": None, "why": str(error)}


def tail(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the last lines of a role's log."""
    return {"lines": tail_of(folder / f"{asked['role']}.log", asked["lines"])}


VERBS = {
    "apply": apply, "put": put, "undo": undo, "states": states, "down": down, "start": start, "stop": stop,
    "status": status, "tail": tail, "facts": facts,
}  # fmt: skip


def do(verb: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Run one verb; return its result, or `{"error": ...}`."""
    try:
        return VERBS[verb](Path(asked["folder"]), asked)
    except (SuperServeError, OSError, xmlrpc.client.Error) as error:
        return {"error": str(error)}


def main(verb: str) -> None:
    """Run one verb and print its result."""
    sys.stdout.write(marked(do(verb, json.load(sys.stdin))))


if __name__ == "__main__":
    main(sys.argv[1])
