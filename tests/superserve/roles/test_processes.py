"""Roles are started, waited for and stopped, and none is ever left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from superserve.errors import ProcessError
from superserve.roles import processes
from superserve.roles.processes import ProcessGroup, RoleProcess, start, wait_ready

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

WAIT_S = 60.0  # far more than any child here takes; reached only when something is broken
PRELUDE = "import os, signal, sys\nfrom superserve.roles.processes import announce_ready, die_with_parent\n"
OBEDIENT = PRELUDE + "die_with_parent()\nannounce_ready({'pid': os.getpid()})\nsignal.pause()\n"
SILENT = PRELUDE + "die_with_parent()\nprint('still loading')\nsignal.pause()\n"
DEAF = (
    PRELUDE
    + """
print("deaf", flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
announce_ready({})
signal.pause()
"""
)
# Notes in a file that it was asked to stop, then obeys.
NOTING = (
    PRELUDE
    + """
def note(*_):
    with open(sys.argv[2], "a") as notes:
        notes.write(sys.argv[1] + "\\n")
    sys.exit(0)

signal.signal(signal.SIGTERM, note)
announce_ready({})
signal.pause()
"""
)
# Answers SIGTERM with the signal that a terminal's Ctrl-C sends its parent, and lives on.
INTERRUPTING = (
    PRELUDE
    + """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
announce_ready({})
while True:
    signal.pause()
"""
)
# Starts a role that reports on a named pipe, and then does nothing more itself.
PARENT = (
    PRELUDE
    + """
from superserve.roles.processes import start, wait_ready

CHILD = sys.argv[2]
role = start("child", ["-c", CHILD, sys.argv[1]])
wait_ready(role, 20.0)
signal.pause()
"""
)
# Holds the named pipe open for as long as it lives.
PIPE_HOLDER = (
    PRELUDE
    + """
die_with_parent()
pipe = open(sys.argv[1], "w")
pipe.write("alive\\n")
pipe.flush()
announce_ready({})
signal.pause()
"""
)


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep temporary logs in the test's folder, and count descriptors and children."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = _open_descriptors()
    yield
    assert _open_descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def _open_descriptors() -> set[str]:
    # The listing's own descriptor is closed again before its link is read.
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{link.name} {link.readlink()}")
        except FileNotFoundError:
            continue
    return found


def _logs(folder: Path) -> list[Path]:
    return list(folder.glob("superserve-*.log"))


def _is_gone(process: RoleProcess) -> bool:
    return process.poll() is not None


def test_a_ready_role_has_told_its_parent_what_it_needs() -> None:
    """What announce_ready is given reaches the parent, whole."""
    with start("worker", ["-c", OBEDIENT]) as worker:
        said = wait_ready(worker, WAIT_S)

        assert said == worker.ready == {"pid": worker.pid}
        assert worker.is_ready
        assert worker.poll() is None


def test_a_parent_with_a_loop_of_its_own_can_ask_without_waiting() -> None:
    """Not ready, ready, and ended: the last with the end of its log."""
    with start("worker", ["-c", SILENT]) as silent, start("other", ["-c", OBEDIENT]) as worker:
        assert not silent.check()
        wait_ready(worker, WAIT_S)
        assert worker.check()

        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessError, match=r"other .*SIGKILL\) while it was needed"):
            worker.check()


def test_a_role_run_as_a_module_is_started_by_this_interpreter(tmp_path: Path) -> None:
    """`-m module` runs with the parent's interpreter and the given environment."""
    (tmp_path / "role.py").write_text(
        PRELUDE + "announce_ready({'python': sys.executable, 'arguments': sys.argv[1:]})\nsignal.pause()\n"
    )
    with start("role", ["-m", "role", "--x"], env={"PYTHONPATH": str(tmp_path)}) as role:
        assert wait_ready(role, WAIT_S) == {"python": sys.executable, "arguments": ["--x"]}


def test_a_role_does_not_hear_the_terminals_ctrl_c() -> None:
    """A role leads a session of its own, so signals to the parent's group pass it by."""
    with start("worker", ["-c", OBEDIENT]) as worker:
        assert os.getsid(worker.pid) == worker.pid != os.getsid(0)


def test_a_role_that_ends_before_it_is_ready_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    """The error has the name, the exit code and the end of the log, which is kept."""
    role = start("worker-3", ["-c", "import sys; print('no GPU here'); sys.exit(7)"])

    with pytest.raises(ProcessError, match=r"worker-3 .*exit code 7 before it was ready(.|\n)*no GPU here"):
        wait_ready(role, WAIT_S)

    assert role.stop() == 7
    assert _logs(tmp_path) == [role.log_path]


def test_a_role_killed_before_it_is_ready_is_named_with_its_signal() -> None:
    """An exit by a signal is reported with the signal's name."""
    role = start("worker", ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])

    with pytest.raises(ProcessError, match="SIGKILL"):
        wait_ready(role, WAIT_S)


def test_a_role_that_stays_silent_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    """Time out: an error that names the limit, and no process left."""
    role = start("router", ["-c", "import signal; signal.pause()"])

    with pytest.raises(
        ProcessError, match=r"router .*was not ready within 0.2 s; it wrote nothing to its log"
    ):
        wait_ready(role, 0.2)

    assert role.poll() == -signal.SIGKILL
    assert _logs(tmp_path) == []  # it wrote nothing: an empty file tells nothing


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("b'not json\\n'", "expected one JSON object"),
        ("b'[1]\\n'", "expected one JSON object"),
        ("b'x' * 70_000", "said more than 65536 bytes"),
        ("b''", "closed its pipe without saying"),
    ],
)
def test_a_garbled_announcement_is_an_error(said: str, expected: str) -> None:
    """What comes through the pipe must be one JSON object on one line, of bounded size."""
    code = (
        f"fd = int(os.environ['SUPERSERVE_READY_FD'])\nos.write(fd, {said})\nos.close(fd)\nsignal.pause()\n"
    )
    role = start("worker", ["-c", PRELUDE + code])

    with pytest.raises(ProcessError, match=expected):
        wait_ready(role, WAIT_S)

    assert _is_gone(role)


def test_a_grandchild_that_holds_the_pipe_does_not_hide_a_death() -> None:
    """A role's end is noticed even while something else keeps its pipe open."""
    code = PRELUDE + "if os.fork() == 0:\n    signal.pause()\nsys.exit(3)\n"
    role = start("worker", ["-c", code])
    try:
        with pytest.raises(ProcessError, match="exit code 3 before"):
            wait_ready(role, WAIT_S)
    finally:
        os.killpg(role.pid, signal.SIGKILL)  # the forked child, still in the role's session


def test_a_command_that_cannot_be_run_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No interpreter, no process: the error names the role."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))

    with pytest.raises(ProcessError, match="router could not be started"):
        start("router", ["-m", "router"])

    assert not _logs(tmp_path)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """The error names the path."""
    with pytest.raises(ProcessError, match=r"absent/router\.log"):
        start("router", ["-c", OBEDIENT], log_path=tmp_path / "absent" / "router.log")


def test_stopping_a_role_ends_it_in_order_and_removes_its_temporary_log(tmp_path: Path) -> None:
    """SIGTERM suffices for an obedient role; stopping it twice changes nothing."""
    role = start("worker", ["-c", "print('hello')\n" + OBEDIENT])
    wait_ready(role, WAIT_S)
    assert _logs(tmp_path) == [role.log_path]

    assert role.stop() == -signal.SIGTERM
    assert role.stop() == -signal.SIGTERM
    assert not _logs(tmp_path)
    assert role.tail() == "hello"


def test_a_role_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """After the timeout comes SIGKILL, and the log is kept: something was wrong."""
    role = start("worker", ["-c", DEAF])
    wait_ready(role, WAIT_S)

    assert role.stop(timeout_s=0.1) == -signal.SIGKILL
    assert _logs(tmp_path) == [role.log_path]


def test_a_stopped_role_is_killed_all_the_same() -> None:
    """SIGSTOP does not protect from stop()."""
    role = start("worker", ["-c", OBEDIENT])
    wait_ready(role, WAIT_S)
    os.kill(role.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, role.pid, os.WSTOPPED | os.WNOWAIT)  # or SIGTERM would overtake it

    assert role.stop(timeout_s=0.1) == -signal.SIGKILL


def test_killing_a_role_is_immediate() -> None:
    """kill() gives no time to obey, and is no error the second time."""
    role = start("worker", ["-c", DEAF])
    wait_ready(role, WAIT_S)

    assert role.kill() == -signal.SIGKILL
    assert role.kill() == -signal.SIGKILL


def test_a_given_log_is_appended_to_and_kept(tmp_path: Path) -> None:
    """A restarted role adds to its log; tail() shows only its own life."""
    log_path = tmp_path / "worker.log"
    for life in ("first", "second"):
        code = PRELUDE + f"print({life!r}); announce_ready({{}}); signal.pause()"
        with start("worker", ["-c", code], log_path=log_path) as worker:
            wait_ready(worker, WAIT_S)
            assert worker.tail() == life

    assert log_path.read_text() == "first\nsecond\n"


def test_the_tail_is_bounded() -> None:
    """However much a role writes, tail() reads the end of it."""
    code = PRELUDE + "print('x' * 100_000)\nprint(*range(100), sep='\\n')\nannounce_ready({})\nsignal.pause()"
    with start("worker", ["-c", code]) as worker:
        wait_ready(worker, WAIT_S)

        assert worker.tail(3) == "97\n98\n99"


def test_a_role_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent killed by SIGKILL takes its roles along, though it could not stop them."""
    path = tmp_path / "alive"
    os.mkfifo(path)
    command = [sys.executable, "-c", PARENT, str(path), PIPE_HOLDER]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed parent removes no log
    with subprocess.Popen(command, env=env, start_new_session=True) as parent, path.open() as pipe:
        assert pipe.readline() == "alive\n"
        parent.kill()

        assert pipe.read() == ""  # the pipe's end: its only writer, the role, is gone


def test_a_role_whose_parent_is_already_gone_does_not_start() -> None:
    """Between its start and die_with_parent() a role may have been orphaned: it ends."""
    absent = subprocess.Popen([sys.executable, "-c", ""])
    absent.wait()
    code = PRELUDE + "die_with_parent()\nprint('alive')"
    env = {**os.environ, "SUPERSERVE_PARENT_PID": str(absent.pid)}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stdout == ""
    assert "is gone" in done.stderr


def test_a_role_started_by_hand_needs_no_parent() -> None:
    """Without the variables both calls do nothing."""
    code = PRELUDE + "die_with_parent()\nannounce_ready({'x': 1})\nprint('alive')"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "alive\n"


def test_a_role_cannot_speak_for_its_parent() -> None:
    """The variables are gone once used, so what a role starts does not inherit them."""
    code = (
        "die_with_parent()\nannounce_ready({})\nprint([v for v in os.environ if v.startswith('SUPERSERVE_')])"
    )
    with start("worker", ["-c", PRELUDE + code + "\nannounce_ready({})\nsignal.pause()"]) as worker:
        wait_ready(worker, WAIT_S)
        worker.kill()

        assert worker.tail() in ("[]", "")  # "" if killed before it printed


def test_a_group_stops_its_roles_last_first(tmp_path: Path) -> None:
    """Senders end before the workers, workers before the router they talk to."""
    notes = tmp_path / "notes"
    with ProcessGroup() as group:
        for name in ("router", "worker", "sender"):
            group.start(name, ["-c", NOTING, name, str(notes)])
        group.wait_ready(WAIT_S)
        group.check()

    assert notes.read_text().split() == ["sender", "worker", "router"]
    assert [process.poll() for process in group.processes] == [0, 0, 0]
    assert not _logs(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_group_stops_its_roles_whatever_ended_the_block(error: type[BaseException]) -> None:
    """Ctrl-C included."""
    group = ProcessGroup()

    def run() -> None:
        with group:
            group.start("router", ["-c", OBEDIENT])
            group.wait_ready(WAIT_S)
            group.start("worker", ["-c", SILENT])
            raise error

    with pytest.raises(error):
        run()
    assert all(_is_gone(process) for process in group.processes)


def test_an_interrupted_stop_kills_what_is_left() -> None:
    """A second Ctrl-C, while the group stops, costs the remaining roles their grace."""
    group = ProcessGroup()

    def run() -> None:
        with group:
            group.start("router", ["-c", DEAF])
            group.start("worker", ["-c", INTERRUPTING])
            group.wait_ready(WAIT_S)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [process.poll() for process in group.processes] == [-signal.SIGKILL] * 2


def _wait_for_group(codes: dict[str, str], timeout_s: float) -> None:
    with ProcessGroup() as group:
        for name, code in codes.items():
            group.start(name, ["-c", code])
        group.wait_ready(timeout_s)


def test_a_role_that_was_stopped_is_not_waited_for() -> None:
    """Waiting for a role that has ended is an error, not an empty answer."""
    role = start("worker", ["-c", SILENT])
    role.kill()

    with pytest.raises(ProcessError, match=r"worker .*SIGKILL.* before it was ready"):
        wait_ready(role, WAIT_S)


def test_a_role_that_dribbles_is_late_all_the_same() -> None:
    """Bytes without an end do not put off the end of its time."""
    code = "import time\nfd = int(os.environ['SUPERSERVE_READY_FD'])\n"
    code += "while True:\n    os.write(fd, b' ')\n    time.sleep(0.01)\n"
    with pytest.raises(ProcessError, match=r"was not ready within 0.3 s"):
        _wait_for_group({"worker": PRELUDE + code}, 0.3)


def test_the_first_role_to_fail_is_the_one_reported() -> None:
    """A group does not wait out a silent role while another has already ended."""
    with pytest.raises(ProcessError, match=r"worker-1 .*exit code 5"):
        _wait_for_group({"worker-0": SILENT, "worker-1": "raise SystemExit(5)"}, WAIT_S)


def test_all_late_roles_are_named() -> None:
    """One error lists every role that was not ready in time."""
    with pytest.raises(ProcessError, match=r"worker-0 .*nor: worker-1"):
        _wait_for_group({"worker-0": SILENT, "worker-1": SILENT}, 0.2)


def test_a_group_tells_when_a_role_has_ended() -> None:
    """check() names the role that is no longer there."""
    with ProcessGroup() as group:
        group.start("router", ["-c", OBEDIENT])
        worker = group.start("worker", ["-c", OBEDIENT])
        group.wait_ready(WAIT_S)
        worker.kill()

        with pytest.raises(ProcessError, match=r"worker .*SIGKILL.* while it was needed"):
            group.check()


@pytest.mark.parametrize("how", ["ignored", "blocked"])
def test_a_role_can_be_stopped_wherever_its_parent_runs(how: str) -> None:
    """A parent that ignores or blocks SIGTERM hands that down, and is the one that sends it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        if how == "ignored":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        role = start("router", ["-c", OBEDIENT])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    wait_ready(role, WAIT_S)
    assert role.stop(timeout_s=WAIT_S) == -signal.SIGTERM


def test_garbage_in_our_variables_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started by hand, where a user has set them, serves all the same."""
    monkeypatch.setenv("SUPERSERVE_READY_FD", "garbage")
    monkeypatch.setenv("SUPERSERVE_PARENT_PID", "garbage")
    processes.die_with_parent()
    processes.announce_ready({"port": 1})


def test_a_role_that_could_write_nothing_on_a_full_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log alone would tell nobody why it ended."""
    real = os.statvfs
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=0) if path == tmp_path else real(path)
    )
    with pytest.raises(ProcessError, match=rf"it wrote nothing, as no space is left in {tmp_path}"):
        wait_ready(start("worker", ["-c", "raise SystemExit(1)"]), WAIT_S)


def test_the_end_of_a_log_is_shown_without_the_steps_of_a_traceback() -> None:
    """The exception is what a reader needs; the log has the rest."""
    code = "print('before'); print('at work', flush=True); raise OSError('no more threads')"
    with processes.start("failing", ["-c", code]) as failing, pytest.raises(ProcessError) as told:
        processes.wait_ready(failing, WAIT_S)

    assert str(told.value).endswith("ends:\nbefore\nat work\nOSError: no more threads")
    assert "Traceback" in failing.log_path.read_text()


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_role_reports_to_systemd_that_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool
) -> None:
    """Once, on the socket that the unit names; a socket that is gone does not end the role."""
    path = f"@superserve-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + path[1:] if is_abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        processes.announce_ready({})
        processes.announce_ready({})
        systemd.setblocking(False)
        assert systemd.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    processes.announce_ready({})
