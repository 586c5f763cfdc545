"""The doctor: for each possible problem, its finding and the command that it suggests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host.facts import Facts, look
from cluster.operate.doctor import Finding, Seen, Verdict, examine
from cluster.operate.supervised import HostFacts
from superserve.status import GpusNeeded, QueueStatus
from tests.cluster.operated import role
from tests.superserve import statuses
from tests.superserve.statuses import gpu, info

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.status import GpuStatus, RouterStatus

FACTS = Facts(0.0, 80 << 30, 1_000, "/w0.log", {"100": (40, 1_048_576)})


def status(*gpus: GpuStatus, **other: Any) -> RouterStatus:
    """Return a STATUS that is well."""
    well: dict[str, Any] = {
        "workers_ready": 2,
        "queue": QueueStatus(3, None, 0),
        "counts": {"malformed": 0, "loops": 1_000},
    }
    return statuses.status(*(gpus or (gpu("w0"), gpu("w1"))), **(well | other))


WELL = Seen(
    "default", True, (role("router"), role("w0"), role("w1", host="b")), status(), status(),
    (HostFacts("a", "", FACTS, 0.0, 0.0), HostFacts("b", "", FACTS, 0.5, 0.0)),
)  # fmt: skip


def bad(seen: Seen) -> list[Finding]:
    """Return what is not well."""
    return [finding for finding in examine(seen) if finding.verdict is not Verdict.OK]


def roles(**worker: Any) -> tuple[Any, ...]:
    """Return the roles; w0 has the given state."""
    return (role("router"), role("w0", **worker), role("w1", host="b"))


def facts(**other: Any) -> tuple[HostFacts, ...]:
    """Return the hosts; the first one has the given facts."""
    return (HostFacts("a", "", replace(FACTS, **other), 0.0, 0.0), WELL.hosts[1])


def test_a_cluster_that_is_well_has_a_line_for_each_check() -> None:
    """So that one sees what was looked at."""
    found = examine(WELL)

    assert bad(WELL) == []
    assert [finding.check for finding in found] == [
        "hosts", "router", "processes", "registered", "restarts", "versions", "speed", "load", "counters",
        "clocks", "files", "disks", "logs",
    ]  # fmt: skip


GIVEN_UP: dict[str, Any] = {"state": "FATAL", "why": "ended:\nno memory"}
STOPPED: dict[str, Any] = {"state": "STOPPED"}
WAITING: dict[str, Any] = {"state": "BACKOFF"}


@pytest.mark.parametrize(
    ("change", "check", "verdict", "text", "fix"),
    [
        ({"roles": roles(**GIVEN_UP)}, "processes", "wrong", "w0: FATAL",
         "fix what its last lines report (`cluster logs w0` has more), then `cluster restart w0`"),
        ({"roles": roles(**STOPPED)}, "processes", "wrong", "w0: STOPPED", "`cluster restart w0`"),
        ({"roles": roles(**WAITING)}, "processes", "wrong", "w0: BACKOFF", "wait: it restarts automatically"),
        ({"roles": (role("router", **STOPPED), *WELL.roles[1:]), "status": None}, "router", "wrong",
         "router: does not answer; its process is STOPPED", "`cluster restart --router`"),
        ({"status": status(router=info(draining=True))}, "router", "wrong",
         "router: drains, and refuses queries", "wait until it has ended"),
        ({"status": status(gpu("w0"))}, "registered", "wrong", "w1: runs, and the router does not know it",
         "`cluster logs w1`, then `cluster restart w1`"),
        ({"status": status(gpu("w0", process="suspect"), gpu("w1"))}, "registered", "wrong",
         "w0: of its GPUs, the router has 1 suspect, ready", "`cluster logs w0`"),
        ({"roles": roles(restarts=1, why="no memory")}, "restarts", "note",
         "w0: crashed and was restarted once", "`cluster logs w0`"),
        ({"roles": roles(restarts=3)}, "restarts", "wrong", "w0: crashed and was restarted 3 times",
         "`cluster logs w0`"),
        ({"status": status(gpu("w0"), gpu("w1", version="1+b"))}, "versions", "wrong",
         "w1: runs 1+b, the router 1+a", "`cluster restart --rolling --router`"),
        ({"status": status(gpu("w0"), gpu("w1", version=""))}, "versions", "wrong",
         "w1: runs an unknown version, the router 1+a", "`cluster restart --rolling --router`"),
        ({"status": status(gpu("w0", slowdown=1.26), gpu("w1"))}, "speed", "wrong",
         "w0: 1.26 times as slow as in the profile p", "see what else uses that device"),
        ({"status": status(workers_needed=GpusNeeded(3.0, 2.5))}, "load", "wrong",
         "2.5 GPUs needed at the lowest accuracy, 2 take work; 3 queries wait", "add GPUs"),
        ({"status": status(workers_needed=GpusNeeded(3.0, 0.5))}, "load", "note",
         "3.0 GPUs needed as now served, 2 take work; 3 queries wait", "add GPUs"),
        ({"status": status(counts={"malformed": 7})}, "counters", "wrong",
         "7 messages that could not be decoded, 7 more within a second", "`cluster logs router`"),
        ({"status": status(counts={"revoked_frames": 7}), "before": status(counts={"revoked_frames": 7})},
         "counters", "note", "7 messages of peers whose key was revoked, none just now",
         "`cluster logs router`"),
        ({"hosts": (WELL.hosts[0], HostFacts("b", "b: ssh: timed out", None, 0.0, 0.0))}, "hosts", "wrong",
         "b: ssh: timed out", "try `ssh` to it"),
        ({"hosts": (WELL.hosts[0], HostFacts("b", "", FACTS, -9.0, 1.0))}, "clocks", "note",
         "b: its clock is -9.0 s off this machine's", "`timedatectl set-ntp true` there"),
        ({"hosts": facts(open_files={"100": (90, 100)})}, "files", "wrong",
         "w0: has 90 files open and may have 100", "`ulimit -n 65536`"),
        ({"hosts": facts(free_bytes=3 << 20)}, "disks", "wrong", "a: 3 MiB are left where the logs are",
         "make room"),
        ({"hosts": facts(log_bytes=2 << 30)}, "logs", "wrong", "a: 2048 MiB of logs",
         "`truncate -s 0 /w0.log` empties the largest"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_to_type(
    change: dict[str, Any], check: str, verdict: str, text: str, fix: str
) -> None:
    """One cause has its finding; everything else is as it was."""
    found = [finding for finding in bad(replace(WELL, **change)) if finding.check == check]

    assert len(found) == 1
    assert (found[0].verdict, found[0].text) == (verdict, text)
    assert found[0].fix.startswith(fix)


def test_a_role_of_a_host_that_cannot_be_asked_is_not_told_of_twice() -> None:
    """The host is what is wrong."""
    away = {"state": "UNREACHABLE"}
    seen = replace(
        WELL,
        roles=(*WELL.roles[:2], role("w1", host="b", **away)),
        hosts=(WELL.hosts[0], HostFacts("b", "b: ssh: timed out", None, 0.0, 0.0)),
    )

    assert [finding.check for finding in bad(seen)] == ["hosts"]


def test_last_words_are_told() -> None:
    """The finding shows a role's last lines: they usually contain the cause."""
    assert bad(replace(WELL, roles=roles(**GIVEN_UP)))[0].more == "ended:\nno memory"


def test_commands_name_a_cluster_that_is_not_the_default_one() -> None:
    """What is printed can be typed as it stands."""
    found = bad(replace(WELL, name="prod", roles=roles(**STOPPED)))

    assert found[0].fix == "`cluster restart --name prod w0`"


def test_facts_are_of_this_machine(tmp_path: Path) -> None:
    """Logs are summed, a process that is not there is left out."""
    (tmp_path / "a.log").write_bytes(b"x" * 10)
    (tmp_path / "a.log.1").write_bytes(b"x" * 30)

    seen = look(tmp_path, [1 << 30])

    assert (seen.log_bytes, seen.largest_log, seen.open_files) == (40, str(tmp_path / "a.log.1"), {})
    assert seen.free_bytes > 0
