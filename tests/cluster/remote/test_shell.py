"""The `ssh` command as it is called, by a stand-in that writes down how, and its failures."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.remote.shell import OpenSsh, RemoteError, UnreachableError, parallel
from cluster.spec.roles import Target
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

# Runs its last argument as a remote shell would, with what it was called with in $CALLS.
SSH = """#!/bin/sh
printf '%s\\n' "$@" >> "$CALLS"; echo --- >> "$CALLS"
for last; do :; done
case "$*" in *"-O exit"*) exit 0;; esac
exec sh -c "$last"
"""
HOST = Target("gpu1", "serve", 2222)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Put the stand-in on the PATH; return what reads the calls to it."""
    log = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH)
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("CALLS", str(log))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SUPERSERVE_SSH_CONFIG", raising=False)
    return lambda: [call.splitlines() for call in log.read_text().split("---\n") if call]


def test_a_command_arrives_word_for_word(calls: Callable[[], list[list[str]]]) -> None:
    """Whatever a remote shell would make of a word, the command gets it as it is; stdin too."""
    words = ["a b", "c'd", '"$HOME"', "*", "e;f", ""]
    with OpenSsh() as shell:
        echo = shell.run(HOST, ["printf", "<%s>", *words], timeout_s=30)
        cat = shell.run(HOST, ["cat"], stdin=b"\x00\xff", timeout_s=30)

    assert echo.stdout.decode() == "".join(f"<{word}>" for word in words)
    assert cat.stdout == b"\x00\xff"
    first = calls()[0]
    assert "-F" not in first
    assert [first[i + 1] for i in range(len(first)) if first[i] in ("-p", "-l")] == ["2222", "serve"]
    assert "BatchMode=yes" in first
    assert first[-3:-1] == ["--", "gpu1"]


def test_connections_are_private_short_and_closed(calls: Callable[[], list[list[str]]]) -> None:
    """The shared connection's socket is in a folder of this user alone, gone with the block."""
    with OpenSsh() as shell:
        shell.run(HOST, ["true"], timeout_s=30)
        option = next(word for word in calls()[0] if word.startswith("ControlPath="))
        folder = Path(option.removeprefix("ControlPath=")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(f"{folder}/") + 40 + 17 <= 107  # %C, what ssh appends while it connects; sun_path

    assert not folder.exists()
    assert calls()[-1][-4:] == ["-O", "exit", "--", "gpu1"]


def test_a_configuration_file_is_named_by_file_or_environment(
    calls: Callable[[], list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given comes before the variable; one that is not there is an error."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.touch()
    other.touch()
    monkeypatch.setenv("SUPERSERVE_SSH_CONFIG", str(other))
    for config, used in ((one, one), (None, other)):
        with OpenSsh(config) as shell:
            shell.run(HOST, ["true"], timeout_s=30)
        assert calls()[-2][:2] == ["-F", str(used)]

    other.unlink()
    with pytest.raises(ConfigError, match="other: expected a configuration file of ssh"), OpenSsh():
        pass


@pytest.mark.usefixtures("calls")
def test_failures_of_ssh_are_told_from_those_of_the_command() -> None:
    """Ssh's own exit code is 255, and its last line says why; any other code is the command's."""
    with OpenSsh() as shell:
        assert shell.run(HOST, ["sh", "-c", "echo no >&2; exit 3"], timeout_s=30).code == 3
        with pytest.raises(UnreachableError, match=r"^ssh: connect to host gpu1: No route$"):
            shell.run(
                HOST, ["sh", "-c", "echo a banner; echo ssh: connect to host gpu1: No route >&2; exit 255"],
                timeout_s=30,
            )  # fmt: skip
        with pytest.raises(RemoteError, match=r"did not end within 0\.2 s: sleep 30"):
            shell.run(HOST, ["sleep", "30"], timeout_s=0.2)


def test_work_is_done_at_once_and_comes_back_in_order() -> None:
    """Each item waits for all others, so that none could come before the last has begun."""
    barrier = threading.Barrier(8, timeout=30)

    def work(i: int) -> int:
        barrier.wait()
        return i * i

    assert parallel(range(8), work) == [i * i for i in range(8)]
    assert parallel([], work) == []
