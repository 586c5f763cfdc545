"""`python -m cluster.host.onhost VERB`: what the launcher does on one host, on that host.

It is run over ssh, reads one JSON object from stdin and writes one to stdout; `{"error": ...}`
says what went wrong, for people. Supervisor is asked through its socket, in a folder that only
its user may enter.

    apply      have exactly the given roles run, and files there; say what changed
    undo       have the roles run that ran before the last `apply`
    states     how each role stands
    down       stop every role and supervisord itself
    start, stop, signal   one role
    status     the router's STATUS
    tail       the last lines of a role's log

Only what differs is touched: `apply` for the second time changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import xmlrpc.client
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]  # it ships no types

from cluster.host.config import CONFIG, SOCKET, check_folder, script, supervisord_conf
from cluster.spec.roles import FILLED, KEYS, OPERATOR_KEY, HostPlan, HostRole
from superserve.errors import ConfigError, ProcessError, SuperServeError
from superserve.net.connection import ask_status
from superserve.roles.local import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator

_PLAN, _BEFORE = "plan.json", "before.json"  # what runs, and what ran before the last `apply`
_FILES_WANTED = 65_536
_STARTED_S, _STOPPED_S = 15.0, 30.0
_ASK_AGAIN_S = 0.05
_LOCK_S = 60.0
_TAIL_LINES = 15
_TAIL_BYTES = 8_192
_IDLE = ("STOPPED", "EXITED", "FATAL")  # supervisor's words for a process that it does not run


class Supervisord:
    """The supervisord of one folder, running or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _rpc(self) -> Any:
        # A new one each time: a connection that failed once is of no further use.
        transport = SupervisorTransport(None, None, f"unix://{self.folder / SOCKET}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def pid(self) -> int | None:
        """Return its process; None if nobody answers at its socket."""
        try:
            return int(self._rpc.getPID())
        except (OSError, xmlrpc.client.Error):
            return None

    def start(self, plan: HostPlan) -> None:
        """Start it with the files that are there; return when it answers.

        Raises:
            ProcessError: It ended or stayed silent; quotes what it wrote.
        """
        out = self.folder / "supervisord.out"
        with out.open("wb") as file:
            process = subprocess.Popen(
                [plan.interpreter, "-m", "cluster.host.watch", str(self.folder / CONFIG)],
                env={**os.environ, "PYTHONPATH": plan.code}, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        give_up_s = time.monotonic() + _STARTED_S
        while self.pid() is None:
            if process.poll() is not None or time.monotonic() > give_up_s:
                process.kill()
                raise ProcessError(f"supervisord did not start: {out.read_text(errors='replace')[-1_000:]}")
            time.sleep(_ASK_AGAIN_S)

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return what it says of each role; nothing if it does not run."""
        try:
            return {info["name"]: info for info in self._rpc.getAllProcessInfo()}
        except OSError:
            return {}

    def update(self) -> dict[str, str]:
        """Have it read its files again; return what that changed, by role."""
        added, changed, removed = self._rpc.reloadConfig()[0]
        for name in (*changed, *removed):
            self._rpc.stopProcessGroup(name)
            self._rpc.removeProcessGroup(name)
        for name in (*added, *changed):
            self._rpc.addProcessGroup(name)
        words = {"started": added, "restarted": changed, "stopped": removed}
        return {name: word for word, names in words.items() for name in names}

    def begin(self, name: str) -> None:
        """Start a role that does not run."""
        with _unless("ALREADY_STARTED"):
            self._rpc.startProcess(name, False)  # do not wait until it has run for START_S

    def end(self, name: str) -> None:
        """Stop a role; return when it has ended."""
        with _unless("NOT_RUNNING"):
            self._rpc.stopProcess(name)

    def send(self, name: str, signal: str) -> None:
        """Send a role a signal, such as "TERM"."""
        self._rpc.signalProcess(name, signal)

    def shut_down(self) -> None:
        """Stop every role and itself; return when its process is gone."""
        pid = self.pid()
        process = None if pid is None else ProcessId.of(pid)
        if process is None:
            return
        with contextlib.suppress(OSError, xmlrpc.client.Error):  # it may end before it has answered
            self._rpc.shutdown()
        give_up_s = time.monotonic() + _STOPPED_S
        while process.is_alive():
            if time.monotonic() > give_up_s:
                raise ProcessError(f"supervisord (pid {pid}) did not stop within {_STOPPED_S:g} s")
            time.sleep(_ASK_AGAIN_S)


@contextlib.contextmanager
def _unless(fault: str) -> Iterator[None]:
    try:
        yield
    except xmlrpc.client.Fault as error:
        if not error.faultString.startswith(fault):
            raise ConfigError(f"supervisor: {error.faultString}") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have the folder for the block: two launchers that change one host take turns.

    Raises:
        ConfigError: Another one has had it for a minute.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise ConfigError(f"{folder}: another command is at work there") from None
                time.sleep(_ASK_AGAIN_S)
        yield
    finally:
        os.close(descriptor)


# --- verbs ------------------------------------------------------------------------------------


def apply(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Have exactly the plan's roles run, with these files beside them; return what changed of both."""
    plan = HostPlan.from_dict(asked["plan"])
    check_folder(folder)
    with alone(folder):
        files = _put_files(folder, {name: base64.b64decode(text) for name, text in asked["files"].items()})
        is_running = Supervisord(folder).pid() is not None
        before = _read(folder / _PLAN) if is_running else None
        if before is None:
            (folder / _BEFORE).unlink(missing_ok=True)
        else:
            _put(folder / _BEFORE, before)
        return {"changed": _run(folder, plan), "files": files}


def undo(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Have the roles run that ran before the last `apply`, or none if nothing ran."""
    before = _read(folder / _BEFORE)
    if before is None:
        return down(folder, asked)
    with alone(folder):
        return {"changed": _run(folder, HostPlan.from_dict(json.loads(before)))}


def _run(folder: Path, plan: HostPlan) -> dict[str, str]:
    """Have exactly the plan's roles run; touch only what differs."""
    _write(folder, plan)
    supervisord = Supervisord(folder)
    if supervisord.pid() is None:
        for path in folder.glob("*.log*"):  # of an earlier life
            path.unlink()
        supervisord.start(plan)
        return {role.name: "started" for role in plan.roles}
    infos = supervisord.infos()
    changed = supervisord.update()
    for name, info in infos.items():
        if name not in changed and info["statename"] in _IDLE:
            supervisord.begin(name)
            changed[name] = f"started (was {info['statename']})"
    _forget_code(folder)
    return changed


def _write(folder: Path, plan: HostPlan) -> None:
    (folder / "roles").mkdir(mode=0o700, exist_ok=True)
    _put(folder / _PLAN, json.dumps(plan.to_dict()))
    for role in plan.roles:
        _put(folder / "roles" / f"{role.name}.sh", script(role, plan))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    min_files = _FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, _FILES_WANTED)
    _put(folder / CONFIG, supervisord_conf(plan, min_files=min_files))


def _put_files(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Have exactly these files in the folders that `apply` fills, for this user; return which changed."""
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
            _put_bytes(path, content)
            changed.append(name)
    return changed


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _put(path: Path, text: str) -> None:
    _put_bytes(path, text.encode())


def _put_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole: who reads it finds the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    new.replace(path)


def _forget_code(folder: Path) -> None:
    """Remove versions of the package that neither the plan nor the one before it runs."""
    texts = [_read(folder / _PLAN), _read(folder / _BEFORE)]
    kept = {Path(json.loads(text)["code"]) for text in texts if text is not None}
    for path in (folder / "code").iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def states(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return how each role stands, with the end of its log if it is given up."""
    supervisord = Supervisord(folder)
    infos = supervisord.infos()
    n_lines = int(asked.get("lines", _TAIL_LINES))
    roles = []
    for role in _roles(folder):
        name = role.name
        info = infos.get(name, {"statename": "STOPPED", "pid": 0, "start": 0, "now": 0, "exitstatus": 0})
        state = info["statename"]
        is_bad = state in ("FATAL", "BACKOFF") or (state == "EXITED" and info["exitstatus"] != 0)
        roles.append({
            "name": name, "kind": role.kind, "serves": role.serves, "state": state,
            "pid": info["pid"] or None,
            "up_s": info["now"] - info["start"] if info["pid"] else 0,
            "exit": info["exitstatus"],
            "log": str(folder / f"{name}.log"),
            "tail": tail_of(folder / f"{name}.log", n_lines) if is_bad else [],
        })  # fmt: skip
    return {"supervisord": supervisord.pid(), "roles": roles}


def _roles(folder: Path) -> list[HostRole]:
    text = _read(folder / _PLAN)
    return [] if text is None else list(HostPlan.from_dict(json.loads(text)).roles)


def tail_of(path: Path, n_lines: int) -> list[str]:
    """Return the last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-n_lines:]


def down(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Stop every role, or the ones of a kind; with all of them, supervisord too; say what ran."""
    if not folder.is_dir():
        return {"stopped": []}
    with alone(folder):
        supervisord = Supervisord(folder)
        running = [info for info in supervisord.infos().values() if info["pid"]]
        kinds = {role.name: role.kind for role in _roles(folder)}
        kind = asked.get("kind")
        stopped = [(info["name"], info["pid"]) for info in running if kind in (None, kinds.get(info["name"]))]
        processes = [process for _, pid in stopped if (process := ProcessId.of(pid)) is not None]
        if kind is None:
            supervisord.shut_down()
        else:
            for name, _ in stopped:
                supervisord.end(name)
        left = [str(process.pid) for process in processes if process.is_alive()]
        if left:
            raise ProcessError(f"still there after being stopped: pid {', '.join(left)}")
        return {"stopped": stopped}


def start(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Start a role that does not run."""
    Supervisord(folder).begin(asked["role"])
    return {}


def stop(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Stop a role; return when it has ended."""
    Supervisord(folder).end(asked["role"])
    return {}


def signal(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Send a role a signal."""
    Supervisord(folder).send(asked["role"], asked["signal"])
    return {}


def status(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the router's STATUS, asked with the key that `apply` put here; None if it does not answer."""
    key = folder / KEYS / OPERATOR_KEY
    try:
        shown = str(key) if key.exists() else ""
        return {"status": ask_status(asked["endpoint"], asked.get("timeout_s", 2.0), keys=shown)}
    except ConfigError as error:
        return {"status": None, "why": str(error)}


def tail(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the last lines of a role's log."""
    return {"lines": tail_of(folder / f"{asked['role']}.log", asked["lines"])}


VERBS = {
    "apply": apply, "undo": undo, "states": states, "down": down, "start": start, "stop": stop,
    "signal": signal, "status": status, "tail": tail,
}  # fmt: skip


def main(verb: str) -> None:
    """Do one verb and print what it came to."""
    asked = json.load(sys.stdin)
    try:
        result = VERBS[verb](Path(asked["folder"]), asked)
    except (SuperServeError, OSError, xmlrpc.client.Error) as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
