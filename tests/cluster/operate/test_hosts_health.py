"""When a cluster on several hosts is ready, or well: what supervisors see, compared with the router."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.engines.engine import HostSeen, RoleSeen
from cluster.operate.hosts_health import problems, unready
from cluster.remote.record import Record
from superserve.whole import whole_of
from tests.superserve import statuses

if TYPE_CHECKING:
    from superserve.status import RouterStatus

ROUTER = RoleSeen("a", "router", "router", "", "RUNNING", 10, 60, 0, "/s/router.log", ())
WORKER = RoleSeen("a", "worker-a-0", "worker", "", "RUNNING", 11, 60, 0, "/s/worker-a-0.log", ())
SLOTS = {"worker-a-0": 2}
RECORD = Record(
    "c", "/hosts.yaml", None, "a", "tcp://a:5555", "tcp://a:5556", "cnn-8gpu-modelled", (),
    tuple(SLOTS.items()), (),
)  # fmt: skip


def status(*, n: int = 2, **other: str) -> RouterStatus:
    """Return a STATUS in which the worker has registered GPUs."""
    return statuses.status(*[statuses.gpu("worker-a-0", **other)] * n)


def seen(*roles: RoleSeen, error: str = "") -> list[HostSeen]:
    """Return one host with roles."""
    return [HostSeen("a", error, 1, roles)]


def test_all_registered_is_ready_even_if_young() -> None:
    """What the router gives work to is ready, whatever its keeper has heard of it."""
    young = replace(WORKER, state="STARTING", up_s=1)
    assert unready(seen(ROUTER, young), status(), SLOTS) == []


@pytest.mark.parametrize(
    "said", [status(n=0), status(n=1), status(process="suspect"), status(state="draining"), None]
)
def test_a_worker_that_the_router_does_not_use_is_waited_for(said: RouterStatus | None) -> None:
    """Not registered, not with all its GPUs, not alive to the router: it may yet become so."""
    lines = unready(seen(ROUTER, WORKER), said, SLOTS)
    assert lines
    assert not any(line.is_final for line in lines)
    assert "worker-a-0 (RUNNING) did not register" in lines[-1].text


@pytest.mark.parametrize(
    ("role", "text"),
    [
        (replace(WORKER, state="FATAL", pid=None, tail=("boom",)),
         "a: worker-a-0 is FATAL; the end of /s/worker-a-0.log:\n    boom"),
        (replace(WORKER, state="EXITED", pid=None), "a: worker-a-0 is EXITED with exit code 0"),
    ],
)  # fmt: skip
def test_waiting_for_a_role_that_is_given_up_would_be_in_vain(role: RoleSeen, text: str) -> None:
    """A role that was given up or exited by itself: it is not restarted, and its log has the reason."""
    (line,) = unready(seen(ROUTER, role), status(n=0), SLOTS)
    assert (line.text, line.is_final) == (text, True)


def test_what_is_about_to_be_started_again_is_waited_for() -> None:
    """A role that crashed is in BACKOFF until its restart; one that was stopped is not started by itself."""
    for state, is_final in (("BACKOFF", False), ("STARTING", False), ("STOPPED", True)):
        role = replace(WORKER, state=state, pid=None, exit_code=1)
        assert [line.is_final for line in unready(seen(ROUTER, role), status(n=0), SLOTS)] == [is_final]


def test_each_of_several_routers_has_to_answer() -> None:
    """The others' STATUS hides nothing: the silent one is named, and waited for."""
    routers = [replace(ROUTER, name=f"router-a-{i}") for i in range(2)]
    both = [("tcp://a:1", status()), ("tcp://a:2", status())]
    one = [("tcp://a:1", status()), ("tcp://a:2", None)]

    assert unready(seen(*routers, WORKER), whole_of(both), {"worker-a-0": 1}) == []
    for said, silent in ((whole_of(one), "tcp://a:2"), (status(), "one that has no place yet")):
        (line,) = unready(seen(*routers, WORKER), said, SLOTS)
        assert (line.text, line.is_final) == (f"1 of 2 routers answer, and not {silent}", False)


def test_hosts_that_cannot_be_asked_or_take_no_part_are_problems() -> None:
    """Each is named with the reason; a cluster without either is well."""
    record = replace(RECORD, left_out=(("c", "c: ssh: refused"),))
    lines = problems(record, seen(error="a: ssh: gone"), status())
    assert lines == ["c: takes no part since the last `cluster up`: c: ssh: refused", "a: ssh: gone"]
    assert problems(RECORD, seen(ROUTER, WORKER), status()) == []
