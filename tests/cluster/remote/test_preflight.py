"""What a host has, judged against what it is to run; and ssh's errors with what to do about them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host.bare import marked
from cluster.remote.preflight import COLUMNS, judge, look, requirements
from cluster.remote.shell import Completed, UnreachableError
from cluster.remote.wheel import FOR_FAMILIES, FOR_SUPERNETS, ON_EVERY_HOST, Wheel
from cluster.spec.roles import Target, Wanted

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

WANTED = Wanted("a", Target("10.0.0.1", "serve"), "python3", (5555, 5556), (0, 2), True, ("router",))
FOUND: dict[str, Any] = {
    "python": [3, 11, 2], "folder": "/s/.hosts/c/a", "interpreter": "/usr/bin/python3", "lacks": [],
    "has_code": True, "other_code": [], "gpus": ["H100"] * 4, "ports": {"5555": "ours", "5556": ""},
    "files": [1_024, 20_000], "disk_bytes": 80 * 10**9, "writable": "", "router": "", "clock": 0.0,
}  # fmt: skip
WHEEL = Wheel("superserve.whl", b"", "abc", "0.1.0")


def test_a_host_that_has_everything_takes_part() -> None:
    """Nothing is wrong, nothing is to be noted, nothing is to be installed."""
    found = judge(WANTED, FOUND, offset_s=0.3, within_s=0.5)
    assert (found.wrong, found.notes, found.needs_install) == ((), (), False)
    assert found.cells == (
        "a",
        "ok",
        "3.11.2",
        "same",
        "2 of 4",
        "5555 ours, 5556 free",
        "ok",
        "20,000",
        "80 GB",
    )
    assert len(found.cells) == len(COLUMNS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": [3, 9, 1]}, "a: Python: expected 3.11 or newer, got 3.9.1: name another with `python:`"),
        ({"gpus": ["H100"]}, "a: GPUs: expected CUDA device 2, and its driver shows 1"),
        ({"gpus": []}, "a: GPUs: expected CUDA device 0, 2, and its driver shows none"),
        ({"ports": {"5555": "pid 7 (nginx)"}},
         "a: port 5555: expected a free one, and pid 7 (nginx) listens there"),
        ({"files": [256, 256]},
         "a: files: expected a limit of 1024 open files or more, got 256: `ulimit -Hn`"),
        ({"disk_bytes": 10**8}, "a: disk: expected 0.5 GB free, got 0.1 GB where /s/.hosts/c/a is"),
        ({"disk_bytes": 10**9, "lacks": ["torch"]},
         "a: disk: expected 8.6 GB free, got 1.0 GB where /s/.hosts/c/a is"),
        ({"writable": "/s"}, "a: disk: expected a folder that can be written, got /s"),
    ],
)  # fmt: skip
def test_what_would_keep_a_role_from_running_is_wrong(change: dict[str, Any], message: str) -> None:
    """Each is named with its host, what was expected and what was found."""
    assert judge(WANTED, FOUND | change, offset_s=0.0, within_s=0.1).wrong == (message,)


def test_a_host_that_cannot_look_up_the_router_takes_no_part() -> None:
    """The error comes before anything starts, with a fix: workers would try to connect for ever."""
    want = replace(WANTED, router="alias")
    found = judge(want, FOUND | {"router": "Name or service not known"}, offset_s=0.0, within_s=0.1)
    assert found.lacks_router
    assert "a: router: expected an address that this host can look up, got 'alias'" in found.wrong[0]
    assert "`router: {host: ..., address: ...}`" in found.wrong[0]


def test_a_clock_that_is_off_is_a_note() -> None:
    """Deadlines never cross hosts; and what the asking itself took is no offset."""
    assert judge(WANTED, FOUND, offset_s=1.4, within_s=1.0).notes == ()
    found = judge(WANTED, FOUND, offset_s=-90.2, within_s=0.4)
    assert found.wrong == ()
    assert found.notes == ("a: clock: -90.0 s from this machine's: logs of hosts do not compare",)


@pytest.mark.parametrize(
    ("change", "cell"),
    [({"has_code": False}, "none yet"), ({"has_code": False, "other_code": ["x"]}, "another"),
     ({"lacks": ["orjson", "pyzmq"]}, "same, lacks 2")],
)  # fmt: skip
def test_a_host_that_lacks_something_is_to_be_completed(change: dict[str, Any], cell: str) -> None:
    """The package itself, this version of it, or what it needs."""
    found = judge(WANTED, FOUND | change, offset_s=0.0, within_s=0.1)
    assert (found.cells[3], found.needs_install, found.wrong) == (cell, True, ())


def test_only_real_supernets_need_torch() -> None:
    """An emulated GPU does without gigabytes."""
    assert requirements(WANTED) == (*ON_EVERY_HOST, *FOR_SUPERNETS)
    emulated = Wanted("a", Target("a"), "python3", (), (), False, ())
    assert requirements(emulated) == ON_EVERY_HOST


def test_only_families_need_a_reader_of_their_file() -> None:
    """Which ONNX Runtime is installed is left to the host's owner: the two own the same files."""
    family = replace(WANTED, serves_family=True)
    assert requirements(family) == (*ON_EVERY_HOST, *FOR_SUPERNETS, *FOR_FAMILIES)
    assert not [name for name, _ in requirements(family) if name.startswith("onnx")]
    assert requirements(replace(family, serves_supernet=False)) == ON_EVERY_HOST


class Fake:
    """A shell to hosts that answers or fails as the test requires."""

    def __init__(self, answers: dict[str, Completed | UnreachableError]) -> None:
        self._answers = answers

    def run(self, target: Target, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Give the host's answer."""
        assert argv[-2] == "probe"
        assert int(argv[-3]) == len(stdin)
        assert timeout_s > 0
        answer = self._answers[target.address]
        if isinstance(answer, UnreachableError):
            raise answer
        return answer

    def start(self, target: Target, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start nothing."""
        raise NotImplementedError


def test_hosts_that_cannot_be_looked_at_are_rows_like_all_others() -> None:
    """One that cannot be reached, one without Python, one that works: three rows, two reasons."""
    hosts = [Wanted(name, Target(name), "python3.12", (), (), False, ()) for name in ("gone", "bare", "well")]
    shell = Fake({
        "gone": UnreachableError("ssh: connect to host gone port 22: Connection refused"),
        "bare": Completed(127, b"", "sh: python3.12: command not found"),
        "well": Completed(0, f"a banner{marked(FOUND)}".encode(), ""),
    })  # fmt: skip

    gone, bare, well = look(shell, "c", hosts, WHEEL)

    assert gone.cells[:3] == ("gone", "FAILED", "-")
    refused = "gone: ssh: connect to host gone port 22: Connection refused"
    assert gone.wrong == (f"{refused}; it is on, and no ssh server listens there",)
    assert bare.cells[:3] == ("bare", "ok", "FAILED")
    assert "name another with `python:`" in bare.wrong[0]
    assert well.wrong == ()
