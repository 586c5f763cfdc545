"""Which workers scaling starts and drains, and how a fleet follows its load."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.engines.engine import HostSeen, RoleSeen
from cluster.operate.hosts_health import problems
from cluster.operate.scaling import Change, change, follow, noted
from cluster.remote import record as records
from cluster.remote.record import KnownHost, Record
from cluster.remote.shell import RemoteError
from cluster.spec.roles import Target
from router.report.scaler import Scaler, ScalerSettings
from superserve.errors import ConfigError
from superserve.status import GpusNeeded
from tests.cluster.operated import role
from tests.superserve import statuses

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.status import RouterStatus


def _record(engine: str = "slurm", **hosts: int) -> Record:
    """Return a cluster with the router on the first host, and so many workers on each."""
    known = tuple(
        KnownHost(
            name, Target(engine), "/f", "", "",
            (*(("router",) if not i else ()), *(f"worker-{name}-{k}" for k in range(n))),
        )
        for i, (name, n) in enumerate(hosts.items())
    )  # fmt: skip
    slots = tuple((worker, 2) for host in known for worker in host.roles if worker != "router")
    return Record(
        "default", "/h.yaml", None, "a", "tcp://x:5555", "tcp://x:5556", "p", known, slots, (), "", engine
    )


def test_those_that_ended_come_back_before_new_ones() -> None:
    """In the file's order; new ones go where there are fewest."""
    record = _record(a=2, b=1)

    assert change(record, {"worker-a-1"}, 2) == Change(start=(("worker-a-0", "a"),))
    assert change(record, {"worker-a-1", "worker-b-0"}, 5).start == (
        ("worker-a-0", "a"), ("worker-b-1", "b"), ("worker-a-2", "a"),
    )  # fmt: skip


def test_those_that_came_last_go_first() -> None:
    """And the same number twice changes nothing."""
    record = _record(a=3)
    running = {"worker-a-0", "worker-a-1", "worker-a-2"}

    assert change(record, running, 1) == Change(stop=("worker-a-2", "worker-a-1"))
    assert change(record, running, 3) == Change()


def test_over_ssh_there_are_those_of_the_file() -> None:
    """More of them is an error that says what to do; so is none at all."""
    record = _record("ssh", a=2)

    with pytest.raises(ConfigError, match=r"at most the 2 workers of /h\.yaml, got 3"):
        change(record, set(), 3)
    with pytest.raises(ConfigError, match="expected 1 to"):
        change(record, set(), 0)


def test_what_scaling_does_is_kept() -> None:
    """New workers have a host and slots; drained ones rest until they are started again."""
    record = noted(_record(a=1), Change(start=(("worker-a-1", "a"),)))
    assert record.hosts[0].roles == ("router", "worker-a-0", "worker-a-1")
    assert dict(record.slots)["worker-a-1"] == 2

    record = noted(record, Change(stop=("worker-a-1",)))
    assert record.resting == ("worker-a-1",)
    assert noted(record, Change(start=(("worker-a-1", "a"),))).resting == ()


def test_a_worker_that_rests_is_no_problem() -> None:
    """One that ended otherwise is."""
    record = _record(a=1)
    seen = (HostSeen("a", "", None, (role("router"), role("worker-a-0", state="STOPPED"))),)
    status = statuses.status()

    assert problems(record, seen, status) == ["a: worker-a-0 is STOPPED"]
    assert problems(replace(record, resting=("worker-a-0",)), seen, status) == []


class FakeEngine:
    """An engine whose workers start and end at once, under a router that says what it needs."""

    def __init__(self, record: Record, needs: list[GpusNeeded | None]) -> None:
        self.record = record
        self.running = {"worker-a-0"}
        self.needs = needs
        self.sizes: list[int] = []
        self.error = ""

    def keep(self, record: Record) -> None:
        """Replace the record."""
        self.record = record

    def roles(self) -> tuple[HostSeen, ...]:
        """Return every worker."""
        found: list[RoleSeen] = [
            role(name, state="RUNNING" if name in self.running else "STOPPED")
            for host in self.record.hosts
            for name in host.roles
            if name != "router"
        ]
        return (HostSeen("a", self.error, None, tuple(found)),)

    def scale(self, name: str, n: int) -> None:
        """Start or end a worker."""
        (self.running.add if n else self.running.remove)(name)

    def router_status(self) -> RouterStatus | None:
        """Return the next need, in a STATUS."""
        self.sizes.append(len(self.running))
        need = self.needs.pop(0)
        return None if need is None else replace(statuses.status(), workers_needed=need)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give commands a state folder of their own."""
    monkeypatch.setenv("SUPERSERVE_STATE", str(tmp_path))
    return tmp_path


def _follow(engine: FakeEngine) -> list[str]:
    said: list[str] = []
    clock = iter(range(0, 1_000_000, 100))
    own = ScalerSettings(floor=1, ceiling=3, down_after_s=100.0, down_cool_s=0.0)
    follow(
        engine, Scaler(own), said.append, every_s=1.0,  # type: ignore[arg-type]  # what `follow` asks of it
        is_over=lambda: not engine.needs, pause=lambda _: None, now_s=lambda: float(next(clock)),
    )  # fmt: skip
    return said


def test_a_fleet_grows_and_shrinks_with_its_load(state: Path) -> None:
    """By what its router needs; each change is said, and kept before it is made."""
    del state
    idle, busy = GpusNeeded(0.2, 0.1), GpusNeeded(7.0, 2.0)
    engine = FakeEngine(_record(a=1), [idle, busy, busy, idle, idle, idle, idle])

    said = _follow(engine)

    assert engine.sizes == [1, 1, 3, 3, 3, 1, 1]
    assert said[0].startswith("7.00 GPUs needed")
    assert said[0].endswith("from 1 workers to 3")
    kept = records.load("default")
    assert kept is not None
    assert kept.resting == ("worker-a-2", "worker-a-1")


def test_a_fleet_that_cannot_be_seen_is_left_alone(state: Path) -> None:
    """Neither a silent router nor a silent engine changes anything; each is said once."""
    del state
    engine = FakeEngine(_record(a=1), [None, None, GpusNeeded(0.2, 0.1)])
    assert _follow(engine) == ["nothing is changed: the router does not answer"]

    engine = FakeEngine(_record(a=1), [GpusNeeded(9.0, 9.0)])
    engine.error = str(RemoteError("squeue: no answer within 30 s"))
    assert _follow(engine) == ["nothing is changed: squeue: no answer within 30 s"]
    assert engine.running == {"worker-a-0"}
