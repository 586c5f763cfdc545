"""Runs one pair, in a process and a folder of its own: `python -m tests.environments.pair`, asked by JSON."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.environments import judge, launch
from tests.environments.commands import COMMANDS
from tests.environments.draw import Pair
from tests.environments.judge import Seen
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.environments.commands import Step
    from tests.environments.hostile import Hostile

LIMIT_S = 45.0
_STOP_S = 15.0
_END_S = 5.0  # for what ends by itself once its parent has
_FOLDERS = ("home", "tmp", "cwd", "out", "gone")
_SHOWN = 2_500


def scripts(folder: Path) -> None:
    """Make the commands as pip does, from this checkout's entry points."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, entry in entries.items():
        module, _, attribute = entry.partition(":")
        (folder / name).write_text(
            f"#!{sys.executable}\nimport sys\nfrom {module} import {attribute}\n"
            f"if __name__ == '__main__':\n    sys.exit({attribute}())\n",
            encoding="utf-8",
        )


class Stage:
    """The folder of one pair, spoiled as its environment says.

    Attributes:
        hostile: The environment.
        base: The folder.
        env: Its variables.
    """

    def __init__(self, hostile: Hostile, base: Path, inputs: Path) -> None:
        self.hostile, self.base, self._inputs = hostile, base, inputs
        self.mark = secrets.token_hex(8)
        self.env: dict[str, str] = {}
        self.door = socket.create_server(("127.0.0.1", 0))

    def prepare(self) -> None:
        """Make what lies there, mount what is mounted, and set the variables."""
        hostile, base = self.hostile, self.base
        base.chmod(0o755)
        for name in (*_FOLDERS, "bin"):
            (base / name).mkdir()
        scripts(base / "bin")
        for name, text in hostile.files.items():
            _put(base / name, text)
        if hostile.user is not None:
            # Its own, since processes are counted by user.
            self.hostile = hostile = replace(hostile, user=hostile.user + os.getpid() % 10_000)
            for name in _FOLDERS:
                _own(base / name, hostile.user or 0)
        for name, mode in hostile.modes.items():
            (base / name).chmod(mode)
        self._mount()
        self._set()
        # The caller's folder is nothing to these processes.
        os.chdir("/")

    def _mount(self) -> None:
        needs_passwd = self.hostile.env.get("HOME", "x") in (None, "") and self.hostile.user is None
        if not self.hostile.mounts and not needs_passwd and self.hostile.user is None:
            return
        mounts = launch.Mounts()
        mounts.enter()
        if self.hostile.user is not None:
            mounts.open_way(Path(sys.base_prefix))
        for name, kind in self.hostile.mounts.items():
            mounts.put(self.base / name, kind)
        if needs_passwd:
            passwd = self.base / "bin/passwd"
            passwd.write_text(f"root:x:0:0:root:{self.base}/home:/bin/sh\n", encoding="utf-8")
            mounts.over(passwd, "/etc/passwd")

    def _set(self) -> None:
        base = str(self.base)
        plain: dict[str, str | None] = {
            "PATH": f"{base}/bin:{os.environ.get('PATH', os.defpath)}", "HOME": f"{base}/home",
            "TMPDIR": f"{base}/tmp", "PWD": f"{base}/cwd", "LANG": "C.UTF-8", "TERM": "xterm",
            "USER": "root",
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR"),
        }  # fmt: skip
        path = [str(ROOT)]
        for name, value in self.hostile.env.items():
            filled = None if value is None else value.replace("{base}", base)
            if name == "PYTHONPATH" and filled is not None:
                path.insert(0, filled)
            else:
                plain[name] = filled
        self.env = {name: value for name, value in plain.items() if value is not None}
        self.env |= {"PYTHONPATH": os.pathsep.join(path), launch.MARK: self.mark}
        # A full disk or a limit on files has Python leave compiled files cut off: none of this checkout's.
        self.env["PYTHONDONTWRITEBYTECODE"] = "1"

    def clean(self) -> Hostile:
        """Return the environment as nobody has spoiled it, but for what is mounted."""
        return type(self.hostile)("clean", user=self.hostile.user)

    def argv(self, step: Step) -> list[str]:
        """Return a step's command line."""
        names = {
            "{out}": str(self.base / self.hostile.out), "{in}": str(self._inputs),
            "{port}": str(self.door.getsockname()[1]),
        }  # fmt: skip
        words = list(step.argv)
        for name, value in names.items():
            words = [word.replace(name, value) for word in words]
        return [sys.executable, str(self.base / "bin" / words[0]), *words[1:]]

    def contents(self, step: Step) -> dict[str, str]:
        """Return the files that a step is to write, of those that are there."""
        found = {}
        for name in step.files:
            with contextlib.suppress(OSError):
                path = self.base / self.hostile.out / name
                found[name] = path.read_bytes().decode(errors="replace")
        return found


def _put(path: Path, text: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.mkdir(parents=True, exist_ok=True)
    elif text.startswith("-> "):
        path.symlink_to(text.removeprefix("-> "))
    else:
        path.write_text(text, encoding="utf-8")


def _own(folder: Path, user: int) -> None:
    os.chown(folder, user, user)
    for path in folder.rglob("*"):
        os.chown(path, user, user, follow_symlinks=False)


class _Output:
    """What comes out of a pipe, read by a thread until its end."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        self._chunks: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while chunk := os.read(self._reader, 65_536):
            self._chunks.append(chunk)

    def start(self) -> None:
        """Read from now on; the writing end is the command's alone."""
        os.close(self.writer)
        self._thread.start()

    def text(self) -> str:
        """Return what came, once the pipe has ended or is held open by what the command left."""
        self._thread.join(1.0)
        return b"".join(self._chunks).decode(errors="replace")


def run_step(stage: Stage, step: Step, hostile: Hostile) -> Seen:
    """Run one step and return what was seen; files and what is left are the caller's to look at."""
    outputs = _Output(), _Output()
    process = launch.started(
        stage.argv(step), hostile, stage.base, stage.env, stage.base / (hostile.cwd or "gone"),
        (outputs[0].writer, outputs[1].writer),
    )  # fmt: skip
    for output in outputs:
        output.start()
    was_serving = False
    sent = hostile.sent
    if step.serves and not sent:
        was_serving = launch.serves(process, stage.door, step.serves, LIMIT_S)
        sent = ((0.0, int(signal.SIGTERM)),)
    code = _ended(process, sent, _STOP_S if step.serves else LIMIT_S)
    texts = [
        output.text() if hostile.streams.get(name) is None else None
        for name, output in zip(("stdout", "stderr"), outputs, strict=True)
    ]
    return Seen(
        code, texts[0], texts[1], was_serving=was_serving, sent=tuple(number for _, number in hostile.sent)
    )


def _ended(
    process: subprocess.Popen[bytes], sent: tuple[tuple[float, int], ...], limit_s: float
) -> int | None:
    """Return how a process ended, sent some signals; None if it had to be killed."""
    began_s = time.monotonic()
    for at_s, number in sent:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, began_s + at_s - time.monotonic()))
        process.send_signal(number)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def run(pair: Pair, inputs: Path) -> dict[str, object]:
    """Run a pair; return the complaints, and what was seen where there are some."""
    base = Path(tempfile.mkdtemp(prefix="ss-", dir="/tmp"))  # short: sockets' paths are
    stage = Stage(pair.hostile, base, inputs)
    try:
        stage.prepare()
        found, seen = _run(stage, COMMANDS[pair.command])
    finally:
        for number in launch.relatives(stage.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        stage.door.close()
    shown = [
        {"code": one.code, "stdout": (one.stdout or "")[-_SHOWN:], "stderr": (one.stderr or "")[-_SHOWN:]}
        for one in seen
    ]
    return {"complaints": found, "seen": shown, "base": str(base)}


def _run(stage: Stage, steps: tuple[Step, ...]) -> tuple[list[str], list[Seen]]:
    before = launch.listing(stage.base)
    found: list[str] = []
    all_seen: list[Seen] = []
    asked: set[str] = set()
    is_up = False
    for number, step in enumerate(steps):
        old = stage.contents(step)
        seen = run_step(stage, step, stage.hostile)
        is_last = number == len(steps) - 1 or not judge.worked(step, seen, stage.hostile)
        # Also where it could not print that it is up: exit code 1, and a cluster that `down` finds.
        is_unread = stage.hostile.streams.get("stdout") in ("full", "broken")
        is_up = is_up or (
            step.argv[:2] == ("cluster", "up") and (is_unread or judge.worked(step, seen, stage.hostile))
        )
        if is_last and is_up and not (step.argv[1] == "down" and judge.worked(step, seen, stage.hostile)):
            # The cluster was asked for, and is up: what is judged is that a later `down` finds all of it.
            run_step(stage, steps[-1], stage.clean())
        if is_last:
            seen = replace(seen, left=_left(stage.mark))
        files = _new(before, launch.listing(stage.base)) if is_last else {}
        contents = {name: text for name, text in stage.contents(step).items() if old.get(name) != text}
        seen = replace(seen, files=files, contents=contents)
        wrong = judge.complaints(step, seen, stage.hostile, asked)
        found += [f"{' '.join(step.argv[:2])}: {one}" for one in wrong]
        all_seen.append(seen)
        asked |= set(step.files)
        if is_last:
            break
    return found, all_seen


def _new(before: dict[str, int | None], after: dict[str, int | None]) -> dict[str, int | None]:
    """Return what was not there, and what was emptied."""
    return {
        name: size for name, size in after.items() if name not in before or (size == 0 and before[name] != 0)
    }


def _left(mark: str) -> tuple[str, ...]:
    end_s = time.monotonic() + _END_S
    while (left := launch.relatives(mark)) and time.monotonic() < end_s:
        time.sleep(0.02)
    return tuple(left.values())


def main() -> None:
    """Read a pair from stdin, run it, and print what was found."""
    asked = json.load(sys.stdin)
    try:
        said = run(Pair(**asked["pair"]), Path(asked["inputs"]))
    except PermissionError as error:
        said = {"skipped": str(error)}
    os.chdir("/")
    base = said.pop("base", None)
    print(json.dumps(said), flush=True)  # noqa: T201  what the parent reads
    if isinstance(base, str):
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
