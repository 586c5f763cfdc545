"""How commands begin and end: one line where the system has not what it takes, and streams that are there."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.paths import ROOT

WAIT_S = 30


def run(
    tmp_path: Path, body: str, *, closed: tuple[int, ...] = (), **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a click command whose function has this body, as an entry point does."""
    (tmp_path / "mine.py").write_text(
        "import os, signal, sys, click\n@click.command()\ndef cli() -> None:\n"
        + textwrap.indent(body, "    ")
    )
    words = "from superserve.roles.command import run; run('mine', 'mine')"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}

    def close() -> None:
        for number in closed:
            os.close(number)

    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-P", "-c", words], env=env, text=True, timeout=WAIT_S, check=False,
        stdin=subprocess.DEVNULL, stdout=options.get("stdout", subprocess.PIPE), stderr=subprocess.PIPE,
        preexec_fn=close if closed else options.get("preexec_fn"),
    )  # type: ignore[call-overload]  # fmt: skip
    return done


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            "OSError(28, 'No space left on device', '/disk/r.json')",
            "Error: /disk/r.json: No space left on device",
        ),
        (
            "FileNotFoundError(2, 'No such file or directory')",
            "Error: the working folder is gone: change to one",
        ),
        ("MemoryError()", "Error: out of memory"),
        ("MemoryError('Unable to allocate 9 GiB')", "Error: out of memory: Unable to allocate 9 GiB"),
        (
            "ImportError('libx.so: failed\\nto map')",
            "Error: a library cannot be loaded: libx.so: failed to map",
        ),
        ('RuntimeError("can\'t start new thread")', "Error: no more threads can be started"),
    ],
)
def test_what_the_system_lacks_is_one_line(tmp_path: Path, raised: str, line: str) -> None:
    """Without a traceback, and with exit code 1."""
    done = run(tmp_path, f"raise {raised}\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_folder_for_temporary_files_that_takes_none_says_why(tmp_path: Path) -> None:
    """`tempfile` names the folders that it tried, and no reason."""
    done = run(
        tmp_path, "import tempfile\ntempfile.mkdtemp()\n",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: No usable temporary directory found in ")
    assert done.stderr.endswith(f": {os.strerror(errno.EFBIG)}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("module", "code"), [("library", 0), ("loadgen.page", 1), ("loadgenerator", 0)])
def test_a_warning_of_a_library_is_no_error(
    tmp_path: Path, module: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where warnings are errors; one of this package is."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    done = run(
        tmp_path, f"import warnings\nwarnings.warn_explicit('old', UserWarning, 'x.py', 1, {module!r})\n"
    )
    assert done.returncode == code
    assert ("UserWarning: old" in done.stderr) == bool(code)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    """It is ours to find."""
    done = run(tmp_path, "assert 1 + 1 == 3, 'sums'\n")
    assert done.returncode == 1
    assert "AssertionError: sums" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds(tmp_path: Path, number: signal.Signals) -> None:
    """What a command has promised to remove it removes; a second signal does not stop that."""
    body = f"""
        try:
            signal.raise_signal({int(number)})
        finally:
            signal.raise_signal({int(number)})
            print("tidied")
    """
    done = run(tmp_path, textwrap.dedent(body))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "tidied\n", "")


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """As `nohup` asks for."""
    done = run(
        tmp_path, "signal.raise_signal(signal.SIGHUP)\nprint('on')\n",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_a_blocked_signal_arrives(tmp_path: Path) -> None:
    """A parent that waits for signals in a thread has blocked them, for its children too."""
    done = run(
        tmp_path, "os.kill(os.getpid(), signal.SIGTERM)\nprint('not reached')\n",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (143, "")


def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path) -> None:
    """Also what Python would flush at its very end."""
    with Path("/dev/full").open("w") as full:
        printed = run(tmp_path, "click.echo('text')\n", stdout=full)
        held = run(tmp_path, "sys.stdout.write('text')\n", stdout=full)
    for done in (printed, held):
        assert (done.returncode, done.stderr) == (1, f"Error: {os.strerror(errno.ENOSPC)}\n")


def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    """It knows; what Python would flush at its very end does not complain either."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path, "sys.stdout.write('text')\n", stdout=writer)
    os.close(writer)
    assert done.returncode in (1, 141)  # click's, and ours
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_closed_streams_keep_their_numbers(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Else the first socket becomes stdout, and what is printed goes to a peer."""
    body = f"""
        import socket
        with socket.socket() as one:
            assert one.fileno() > 2
        print("text", flush=True)
        open({str(tmp_path / "seen")!r}, "w").write("on")
    """
    done = run(tmp_path, textwrap.dedent(body), closed=closed)
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == "on"
    assert done.stdout == ("" if 1 in closed else "text\n")


def test_a_terminal_without_the_characters_gets_question_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table's lines, on a terminal of ASCII."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    done = run(tmp_path, "print('a \\u2500 b')\n")
    assert (done.returncode, done.stdout) == (0, "a ? b\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_a_command_is_loaded_ends_it_without_a_word(
    tmp_path: Path, number: signal.Signals
) -> None:
    """An exception in the midst of a library's initialisation may crash it; there is nothing to tidy yet."""
    (tmp_path / "mine.py").write_text(f"import signal\nsignal.raise_signal({int(number)})\nprint('loaded')\n")
    words = "from superserve.roles.command import run; run('mine', 'mine')"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", words],
        env=env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_a_mask_that_closes_files_to_their_owner_is_opened_for_it(tmp_path: Path) -> None:
    """We could not read what we write; what it closes to others stays closed."""
    made = str(tmp_path / "made")
    code = f"open({made!r}, 'w').close()\nprint(oct(os.stat({made!r}).st_mode & 0o777))\n"
    done = run(tmp_path, code, preexec_fn=lambda: os.umask(0o477))
    assert (done.returncode, done.stdout) == (0, "0o600\n")
