"""A cluster's folder: one keeper at a time, and nothing of a dead one."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cluster.host.folder import HeldError, await_end, end, hold, make, tidy
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.local import LocalCluster, Phase, ProcessId, Role, RoleState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GONE = ProcessId(4_000_000, 1)
DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("on", flush=True)
signal.pause()
"""


@pytest.fixture
def child() -> Iterator[ProcessId]:
    """Yield a process that only ends when it is made to, and does not heed SIGTERM."""
    popen = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
    with popen:
        try:
            assert popen.stdout is not None
            popen.stdout.readline()
            process = ProcessId.of(popen.pid)
            assert process is not None
            yield process
        finally:
            popen.kill()


def remains(folder: Path, keeper: ProcessId, worker: ProcessId) -> LocalCluster:
    """Write the state file of a keeper with one worker."""
    make(folder)
    role = Role("worker-0", "worker", RoleState.RUNNING, "", "/log", worker)
    cluster = LocalCluster(
        folder.name, Phase.RUNNING, "here", local.boot_id(), keeper, "2026", {}, "", "", (role,)
    )
    local.save(cluster, folder)
    return cluster


def test_a_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    """Even if it was there before, and open to all."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o755)

    make(folder)

    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file is in the way."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"file/x: expected a folder .* set SUPERSERVE_STATE"):
        make(tmp_path / "file" / "x")


def test_only_one_holds_a_folder(tmp_path: Path) -> None:
    """The next can when the first lets go, and no lock file stays."""
    with hold(tmp_path / "x"):
        with pytest.raises(HeldError), hold(tmp_path / "x"):
            pytest.fail("two hold it")
        assert (tmp_path / "x" / "lock").exists()
    with hold(tmp_path / "x"):
        pass
    assert list((tmp_path / "x").iterdir()) == []


def test_a_dead_keepers_file_is_removed_and_what_outlived_it_killed(tmp_path: Path, child: ProcessId) -> None:
    """Nothing should outlive it; if something did, it does not stay."""
    left = remains(tmp_path / "x", GONE, child)

    assert tidy(tmp_path / "x", wait_s=0.0) == left

    assert not child.is_alive()
    assert list((tmp_path / "x").iterdir()) == []
    assert tidy(tmp_path / "x") is None


def test_a_recycled_number_in_a_dead_keepers_file_is_not_killed(tmp_path: Path, child: ProcessId) -> None:
    """The process has the number and another start: it is somebody else's."""
    remains(tmp_path / "x", GONE, ProcessId(child.pid, child.start_ticks - 1))

    assert tidy(tmp_path / "x") is not None

    assert child.is_alive()


def test_a_living_keepers_file_is_left_alone(tmp_path: Path, child: ProcessId) -> None:
    """It is no remains; nor is a folder that somebody holds."""
    remains(tmp_path / "x", child, child)
    assert tidy(tmp_path / "x") is None

    remains(tmp_path / "y", GONE, child)
    with hold(tmp_path / "y"):
        assert tidy(tmp_path / "y") is None
    assert local.load(tmp_path / "x") is not None
    assert local.load(tmp_path / "y") is not None
    assert child.is_alive()


def test_the_end_of_a_process_is_awaited_without_being_its_parent(child: ProcessId) -> None:
    """Not in time, then killed; one that is gone has ended."""
    assert not await_end(child, 0.0)
    assert child.signal(signal.SIGTERM)  # which it ignores

    assert end([child, GONE], wait_s=0.0) == [child]

    assert await_end(child, 0.0)
    assert end([child], wait_s=0.0) == []
