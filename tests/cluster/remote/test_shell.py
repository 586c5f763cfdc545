"""The `ssh` command as it is called, by a stand-in that writes down how, and its failures."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.remote import shell as shell_module
from cluster.remote.shell import Completed, LocalShell, OpenSsh, RemoteError, UnreachableError, parallel
from cluster.spec.roles import HERE, Target
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

# Runs its last argument as a remote shell would, with what it was called with in $CALLS.
SSH = """#!/bin/sh
call=$(printf '%s\\n' "$@" ---)
printf '%s\\n' "$call" >> "$CALLS"  # in one write: many may write at once
for last; do :; done
case "$*" in *"-O exit"*) exit 0;; esac
if [ -s "$CALLS.refusals" ]; then
    head -n 1 "$CALLS.refusals" >&2; sed -i 1d "$CALLS.refusals"; exit 255
fi
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
    assert [len(call) for call in calls()] == [len(first)] * 3 + [len(first) + 1]  # to log in; two; to close
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


def test_a_connection_that_is_turned_away_is_tried_again(
    calls: Callable[[], list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has begun then; the command itself is run once. What will not change is not tried again."""
    monkeypatch.setattr(shell_module, "_FIRST_PAUSE_S", 0.001)
    dropped = "kex_exchange_identification: Connection closed by remote host"
    (tmp_path / "calls.refusals").write_text(f"{dropped}\nConnection closed by UNKNOWN port 65535\n")
    with OpenSsh() as shell:
        assert shell.run(HOST, ["echo", "once"], timeout_s=30).stdout == b"once\n"
    assert [call[-1] for call in calls()[:-1]] == ["true", "true", "true", "echo once"]

    (tmp_path / "calls.refusals").write_text("serve@gpu1: Permission denied (publickey).\n")
    with OpenSsh() as shell, pytest.raises(UnreachableError, match="Permission denied"):
        shell.run(HOST, ["true"], timeout_s=30)

    (tmp_path / "calls.refusals").write_text(f"{dropped}\n" * 100)
    with OpenSsh() as shell, pytest.raises(UnreachableError, match="kex_exchange_identification"):
        shell.run(HOST, ["true"], timeout_s=30)


def test_few_connections_are_made_at_once(calls: Callable[[], list[list[str]]], tmp_path: Path) -> None:
    """As many hosts as may be behind one jump host; what runs over a connection that is there may be many."""
    lock = tmp_path / "running"
    lock.mkdir()
    count = (
        f'touch {lock}/$$; ls {lock} | wc -l >> {tmp_path}/most; python3 -c "import time; time.sleep(0.2)"; '
        f"rm {lock}/$$"
    )
    ssh = tmp_path / "bin/ssh"
    ssh.write_text(
        SSH.replace('exec sh -c "$last"', f'[ "$last" = true ] && {{ {count}; }}; exec sh -c "$last"')
    )
    hosts = [Target(f"gpu{i}") for i in range(16)]
    with OpenSsh() as shell:
        done = parallel(hosts, lambda host: shell.run(host, ["echo", host.address], timeout_s=60))
    assert [one.stdout.decode().strip() for one in done] == [host.address for host in hosts]
    assert max(int(n) for n in (tmp_path / "most").read_text().split()) <= shell_module._MAX_HANDSHAKES
    assert len([call for call in calls() if call[-1] == "true"]) == len(hosts)


def test_this_machine_needs_no_ssh() -> None:
    """The same shell, without a connection: words, stdin, exit codes and times are as over ssh."""
    here = LocalShell()
    done = here.run(HERE, ["sh", "-c", "cat; echo no >&2; exit 3"], stdin=b"in", timeout_s=30)
    assert done == Completed(3, b"in", "no")
    with pytest.raises(RemoteError, match=r"did not end within 0\.2 s: sleep 30"):
        here.run(HERE, ["sleep", "30"], timeout_s=0.2)
    with pytest.raises(UnreachableError, match="no-such-command: No such file"):
        here.run(HERE, ["no-such-command"], timeout_s=30)
    with here.start(HERE, ["echo", "a b"]) as reader:
        assert reader.stdout is not None
        assert reader.stdout.read() == b"a b\n"


def test_work_is_done_at_once_and_comes_back_in_order() -> None:
    """Each item waits for all others, so that none could come before the last has begun."""
    barrier = threading.Barrier(8, timeout=30)

    def work(i: int) -> int:
        barrier.wait()
        return i * i

    assert parallel(range(8), work) == [i * i for i in range(8)]
    assert parallel([], work) == []


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs the OpenSSH client")
@pytest.mark.parametrize("line", ["RemoteCommand tmux attach", "LocalForward 1 localhost:1"])
def test_what_is_meant_for_a_person_who_logs_in_is_left_out(tmp_path: Path, line: str) -> None:
    """A command of the configuration's own would end ours before a connection is tried."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        config = tmp_path / "config"
        config.write_text(f"IgnoreUnknown UseKeychain\nUseKeychain yes\nHost *\n{line}\nRequestTTY yes\n")
        target = Target("127.0.0.1", None, closed.getsockname()[1])
        with OpenSsh(config) as shell, pytest.raises(UnreachableError, match="Connection refused"):
            shell.run(target, ["true"], timeout_s=30)
