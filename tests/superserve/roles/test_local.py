"""State files: what is written is read, what is mangled is named, and a stale one is known as such."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from superserve.errors import ConfigError
from superserve.net.keys import peer_keys
from superserve.roles import local
from superserve.roles.local import Liveness, LocalCluster, Phase, ProcessId, Role, RoleState

if TYPE_CHECKING:
    from collections.abc import Callable


def me() -> ProcessId:
    """Return this process."""
    found = ProcessId.of(os.getpid())
    assert found is not None
    return found


def example(name: str = "default", *, keeper: ProcessId | None = None) -> LocalCluster:
    """Return a cluster whose keeper is this process, if nobody else is named."""
    return LocalCluster(
        name, Phase.RUNNING, os.uname().nodename, local.boot_id(), keeper or me(), "2026-01-01",
        {"policy": "slackfit", "client_port": 0}, "tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556",
        (
            Role("router", "router", RoleState.RUNNING, "policy slackfit", "/tmp/router.log", me()),
            Role("worker-0", "worker", RoleState.FATAL, "2 GPUs", "/tmp/w.log", None, 5, "it said [no]"),
        ),
    )  # fmt: skip


def put(base: Path, cluster: LocalCluster) -> Path:
    """Write a state file; return its folder."""
    folder = base / cluster.name
    folder.mkdir(parents=True)
    local.save(cluster, folder)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every field survives, and the file is for this user alone."""
    folder = put(tmp_path, example())

    assert local.load(folder) == example()
    assert (folder / "state.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    """Nothing is no error, whether the folder or only the file is missing."""
    assert local.load(tmp_path) is None
    assert local.load(tmp_path / "none") is None
    assert local.names(tmp_path / "none") == []


def without(key: str) -> Callable[[dict[str, Any]], None]:
    """Return what removes a field."""
    return lambda body: body.pop(key)


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (without("keeper"), r"state.json: keeper: expected an object, got nothing"),
        (without("schema"), r"state.json: schema: expected 2, got nothing"),
        (lambda body: body.update(schema=1), r"schema: expected 2, got 1"),
        (lambda body: body.update(phase="asleep"), r"phase: expected one of starting, .*, got 'asleep'"),
        (lambda body: body["keeper"].update(pid="12"), r"keeper: pid: expected an integer, got '12'"),
        (lambda body: body["keeper"].update(pid=True), r"keeper: pid: expected an integer, got True"),
        (lambda body: body["keeper"].update(pid=-1), r"keeper: pid: expected a number above 1, got -1"),
        (lambda body: body.update(roles={}), r"roles: expected a list, got \{\}"),
        (lambda body: body["roles"].append(7), r"roles\[2\]: expected an object, got 7"),
        (lambda body: body["roles"][1].update(state="well"), r"roles\[1\]: state: expected one of"),
        (lambda body: body["roles"][0]["process"].pop("start_ticks"), r"roles\[0\]: process: start_ticks"),
    ],
)
def test_a_mangled_file_is_an_error_that_names_file_and_field(
    tmp_path: Path, mangle: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Whatever field is missing, of another type or impossible."""
    folder = put(tmp_path, example())
    body = orjson.loads((folder / "state.json").read_bytes())
    mangle(body)
    (folder / "state.json").write_bytes(orjson.dumps(body))

    with pytest.raises(ConfigError, match=message):
        local.load(folder)


@pytest.mark.parametrize("text", [b"", b"no JSON", b"[]", b'{"schema": 1', b"\xff\xfe"])
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path: Path, text: bytes) -> None:
    """Empty, cut off, or never one of ours."""
    (tmp_path / "state.json").write_bytes(text)

    with pytest.raises(ConfigError, match=r"state\.json: expected"):
        local.load(tmp_path)


# --- who is alive -----------------------------------------------------------------------------


def test_a_recycled_number_is_not_the_process() -> None:
    """The same number with another start is somebody else: not alive, and never signalled."""
    other = replace(me(), start_ticks=me().start_ticks - 1)

    assert not other.is_alive()
    assert other.open() is None
    assert not other.signal(signal.SIGKILL)  # this very process, were it not for its start
    assert example(keeper=other).liveness() is Liveness.GONE


@pytest.fixture(params=["with descriptors", "without"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Play a kernel that gives descriptors of processes, and one that does not, as Linux 4.18."""
    if request.param == "without":

        def refuse(*_: object) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(os, "pidfd_open", refuse)
    return str(request.param)


@pytest.mark.usefixtures("kernel")
def test_a_process_is_signalled_and_awaited_on_any_kernel() -> None:
    """Once it has ended, and only then, it counts as ended; then there is nobody to signal."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = ProcessId.of(child.pid)
    assert process is not None
    try:
        assert not process.await_end(0.05)
        assert not replace(process, start_ticks=process.start_ticks - 1).signal(signal.SIGKILL)
        assert replace(process, start_ticks=process.start_ticks - 1).await_end(20.0)
        assert process.is_alive()
        assert process.signal(signal.SIGKILL)
        assert process.await_end(20.0)
        assert not process.signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


@pytest.mark.usefixtures("kernel")
def test_a_process_that_may_not_be_signalled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for one that has ended."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    with pytest.raises(ConfigError, match=r"process \d+ cannot be stopped: Operation not permitted"):
        me().signal(signal.SIGCONT)


def test_no_home_is_an_error_only_where_a_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither HOME nor an entry in passwd, as in a container with a user of its own."""

    def nobody(_: int) -> None:
        raise KeyError

    for name in ("HOME", "XDG_STATE_HOME", local.STATE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("pwd.getpwnam", nobody)

    with pytest.raises(ConfigError, match=rf"HOME is not set, .* set {local.STATE_VARIABLE} to a folder"):
        local.client_endpoint()
    with pytest.raises(ConfigError, match="expected a path without ~"):
        peer_keys("~/client.key")
    assert local.remembered_keys("tcp://127.0.0.1:5555") == ""
    assert peer_keys(None) is None
    monkeypatch.setenv(local.STATE_VARIABLE, "/nowhere")
    assert local.state_folder() == Path("/nowhere")


def test_a_process_that_ended_is_gone_even_before_it_is_reaped() -> None:
    """A zombie holds its number and nothing else."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = ProcessId.of(child.pid)
    assert process is not None
    descriptor = process.open()
    assert descriptor is not None
    try:
        assert process.signal(signal.SIGKILL)
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)

        assert ProcessId.of(child.pid) is None
        assert not process.is_alive()
    finally:
        os.close(descriptor)
        child.wait()


def test_a_living_keeper_is_alive() -> None:
    """And its cluster with it."""
    assert example().liveness() is Liveness.ALIVE


def test_a_file_from_before_a_restart_of_this_machine_is_stale() -> None:
    """Its numbers may be anybody's by now."""
    assert replace(example(), boot_id="another").liveness() is Liveness.GONE


def test_a_file_of_another_host_is_left_alone() -> None:
    """With shared home folders, its state cannot be seen from this host."""
    there = replace(example(), boot_id="another", host="elsewhere")

    assert there.liveness() is Liveness.ELSEWHERE
    assert "elsewhere" in local.remains(there)


# --- which one is meant -----------------------------------------------------------------------

GONE = ProcessId(4_000_000, 1)


def test_the_default_cluster_is_found_among_others(tmp_path: Path) -> None:
    """It is the one meant by a command that names none."""
    put(tmp_path, example("other"))
    put(tmp_path, example())

    assert local.running(tmp_path).name == "default"


def test_the_only_cluster_is_found_whatever_its_name(tmp_path: Path) -> None:
    """One that is gone does not count."""
    put(tmp_path, example("other"))
    put(tmp_path, example(keeper=GONE))

    assert local.running(tmp_path).name == "other"


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([], r"no cluster runs on this machine: start one with `cluster up`"),
        ([example(keeper=GONE)], r"'default' .* is gone: its keeper \(pid 4000000\).*`cluster up`"),
        ([replace(example(), phase=Phase.STARTING)], r"'default' .* is starting: try again"),
        ([example("a"), example("b")], r"a at tcp://127.0.0.1:5555, b at .*--connect"),
    ],
)
def test_without_one_to_use_the_error_says_what_to_type(
    tmp_path: Path, clusters: list[LocalCluster], message: str
) -> None:
    """None, a dead one, one that starts, or too many."""
    for cluster in clusters:
        put(tmp_path, cluster)

    with pytest.raises(ConfigError, match=message):
        local.running(tmp_path)


def remember(base: Path, name: str, endpoint: str) -> None:
    """Write what an operator remembers of a cluster on other hosts, as far as clients need it."""
    path = base / local.REMEMBERED / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(orjson.dumps({"client_endpoint": endpoint}))


def test_a_cluster_on_other_hosts_is_found_where_this_machine_has_none(tmp_path: Path) -> None:
    """The only one, whatever its name; one of this machine comes first; torn files do not count."""
    remember(tmp_path, "far", "tcp://10.0.0.1:5555")
    (tmp_path / local.REMEMBERED / "torn.json").write_text("{")
    assert local.client_endpoint(tmp_path) == "tcp://10.0.0.1:5555"

    put(tmp_path, example())
    assert local.client_endpoint(tmp_path) == example().client_endpoint


def test_of_several_on_other_hosts_the_default_one_is_meant(tmp_path: Path) -> None:
    """Without a default one the error names them all."""
    remember(tmp_path, "far", "tcp://10.0.0.1:5555")
    remember(tmp_path, "farther", "tcp://10.0.0.2:5555")
    with pytest.raises(ConfigError, match=r"far at tcp://10.0.0.1:5555, farther at .*--connect"):
        local.client_endpoint(tmp_path)

    remember(tmp_path, "default", "tcp://10.0.0.3:5555")
    assert local.client_endpoint(tmp_path) == "tcp://10.0.0.3:5555"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 65, "a b"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    """A name cannot leave the state folder."""
    with pytest.raises(ConfigError, match="--name"):
        local.cluster_folder(name)


def test_the_state_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours first, then the desktop's convention, then the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv(local.STATE_VARIABLE, raising=False)
    assert local.state_folder() == tmp_path / ".local" / "state" / "superserve"

    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert str(local.state_folder()) == "/xdg/superserve"

    monkeypatch.setenv(local.STATE_VARIABLE, "/ours")
    assert str(local.state_folder()) == "/ours"


def test_the_key_for_a_cluster_elsewhere_is_remembered_with_it(tmp_path: Path) -> None:
    """By the router's endpoint; records that are torn, older than keys or of other routers have none."""
    folder = tmp_path / local.REMEMBERED
    folder.mkdir()
    for name, body in (
        ("with", '{"client_endpoint": "tcp://10.0.0.1:5555", "keys": "/ring/operators/up.key"}'),
        ("without", '{"client_endpoint": "tcp://10.0.0.2:5555", "keys": ""}'),
        ("older", '{"client_endpoint": "tcp://10.0.0.3:5555"}'),
        ("torn", "{"),
    ):
        (folder / f"{name}.json").write_text(body)
    found = [local.remembered_keys(f"tcp://10.0.0.{i}:5555", tmp_path) for i in (1, 2, 3, 4)]
    assert found == ["/ring/operators/up.key", "", "", ""]
