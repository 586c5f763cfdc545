"""The supervisor: who is started when, who is started again and how often, who is given up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host.supervisor import (
    FIRST_BACKOFF_NS,
    GOOD_SERVICE_NS,
    MAX_RESTARTS_IN_A_ROW,
    TRANSITIONS,
    WORKER_STOP_S,
    RoleEvent,
    Supervisor,
    backoff_ns,
)
from cluster.spec.plan import CLIENT, WORKER, Plan, RolePlan
from superserve.clock import SECOND, VirtualClock
from superserve.errors import ProcessError
from superserve.roles.local import RoleState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.host.launcher import Handle

ANY = "tcp://127.0.0.1:*"
READY = {"client": "tcp://127.0.0.1:1000", "worker": "tcp://127.0.0.1:1001"}
PLAN = Plan(
    "test",
    (
        RolePlan("router", "router", ("--client", CLIENT, "--worker", WORKER), "queries"),
        RolePlan("worker-0", "worker", ("--connect", WORKER), "one GPU"),
        RolePlan("worker-1", "worker", ("--connect", WORKER), "another"),
    ),
    ready_timeout_s=30.0,
)


class FakeHandle:
    """A role that becomes ready and ends when a test says so."""

    def __init__(self, name: str, argv: Sequence[str], stops: list[str]) -> None:
        self.name = name
        self.argv = list(argv)
        self.ready: dict[str, Any] = {}
        self.pid = 4_000_000  # nobody's
        self.exit_code: int | None = None
        self.is_ready = False
        self._stops = stops

    def announce(self) -> None:
        """Become ready."""
        self.ready, self.is_ready = dict(READY), True

    def check(self) -> bool:
        """Say whether it is ready, or that it ended."""
        if self.exit_code is not None:
            raise ProcessError(f"{self.name} ended with {self.exit_code}")
        return self.is_ready

    def poll(self) -> int | None:
        """Return the exit code."""
        return self.exit_code

    def tail(self, n_lines: int = 20) -> str:
        """Return its last words."""
        return f"the last {n_lines} lines"

    def stop(self, timeout_s: float) -> int:
        """End as told."""
        assert timeout_s >= 0
        if self.exit_code is None:
            self._stops.append(self.name)
            self.exit_code = 0
        return self.exit_code

    def terminate(self) -> None:
        """Note that it was told to end; it does when a test says so."""
        self._stops.append(self.name)

    def kill(self) -> int:
        """End at once."""
        if self.exit_code is None:
            self.exit_code = -9
        return self.exit_code


class FakeLauncher:
    """Starts fake roles, and fails where a test says so."""

    def __init__(self) -> None:
        self.started: list[FakeHandle] = []
        self.stops: list[str] = []
        self.refuses: set[str] = set()

    def start(self, name: str, argv: Sequence[str], log_path: Path) -> Handle:
        """Start one."""
        assert log_path == Path("/logs") / f"{name}.log"
        if name in self.refuses:
            raise ProcessError(f"{name} could not be started: no memory")
        self.started.append(FakeHandle(name, argv, self.stops))
        return self.started[-1]

    def latest(self, name: str) -> FakeHandle:
        """Return the youngest life of a role."""
        return next(handle for handle in reversed(self.started) if handle.name == name)


class Scene:
    """A supervisor among fakes."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.launcher = FakeLauncher()
        self.supervisor = Supervisor(
            PLAN, self.launcher, Path("/logs"), client_endpoint=ANY, worker_endpoint=ANY, clock=self.clock
        )

    def states(self) -> list[str]:
        """Return every role's state."""
        return [str(role.state) for role in self.supervisor.roles()]

    def bring_up(self) -> None:
        """Have every role ready."""
        for _ in range(3):
            self.supervisor.step()
            for handle in self.launcher.started:
                handle.announce()
        assert self.supervisor.is_ready

    def crash(self, name: str) -> None:
        """End a role by a signal."""
        self.launcher.latest(name).exit_code = -9
        assert self.supervisor.step()

    def restart(self, name: str) -> None:
        """Let a waiting role's time come, and have it ready."""
        wait_ns = self.supervisor.wait_ns()
        assert wait_ns is not None
        self.clock.advance(wait_ns)
        assert self.supervisor.step()
        self.launcher.latest(name).announce()
        assert self.supervisor.step()


@pytest.fixture
def scene() -> Scene:
    """Return a supervisor that has not begun."""
    return Scene()


def test_workers_are_started_once_the_router_has_said_where(scene: Scene) -> None:
    """And are told the port that it got."""
    scene.supervisor.step()
    assert scene.states() == ["starting", "idle", "idle"]
    was_bound = scene.supervisor.is_bound
    assert scene.launcher.latest("router").argv == ["--client", ANY, "--worker", ANY]

    scene.launcher.latest("router").announce()
    assert scene.supervisor.step()
    assert scene.states() == ["ready", "starting", "starting"]
    assert scene.launcher.latest("worker-1").argv == ["--connect", READY["worker"]]
    assert (was_bound, scene.supervisor.is_bound) == (False, True)

    assert not scene.supervisor.step()  # nothing has changed
    scene.bring_up()
    assert scene.supervisor.wait_ns() is None  # signals wake the owner


def test_a_role_that_was_never_ready_is_given_up_at_once(scene: Scene) -> None:
    """What is wrong with it would be again."""
    scene.supervisor.step()
    scene.crash("router")

    assert scene.states() == ["FATAL", "idle", "idle"]
    assert scene.supervisor.has_failed
    assert scene.supervisor.roles()[0].why == "router ended with -9"


def test_a_role_that_cannot_be_started_is_given_up(scene: Scene) -> None:
    """The system refused, say for want of memory."""
    scene.launcher.refuses.add("worker-0")
    scene.supervisor.step()
    scene.launcher.latest("router").announce()
    scene.supervisor.step()

    assert scene.states() == ["ready", "FATAL", "starting"]
    assert "no memory" in scene.supervisor.roles()[1].why


def test_a_start_that_takes_too_long_is_given_up_with_the_logs_end(scene: Scene) -> None:
    """Those that are ready stay so; the others have their last words quoted."""
    scene.supervisor.step()
    scene.launcher.latest("router").announce()
    scene.supervisor.step()
    scene.launcher.latest("worker-0").announce()
    scene.supervisor.step()

    scene.supervisor.give_up("was not ready in time")

    assert scene.states() == ["ready", "ready", "FATAL"]
    assert (
        "was not ready in time; its log (/logs/worker-1.log) ends:\nthe last"
        in scene.supervisor.roles()[2].why
    )
    assert scene.launcher.latest("worker-1").exit_code == -9


def test_a_crashed_worker_is_started_again_after_a_while(scene: Scene) -> None:
    """Not before its back-off is over; the others are left alone."""
    scene.bring_up()
    scene.crash("worker-0")
    assert scene.states() == ["ready", "waiting", "ready"]
    assert scene.supervisor.wait_ns() == FIRST_BACKOFF_NS

    scene.clock.advance(FIRST_BACKOFF_NS - 1)
    assert not scene.supervisor.step()
    scene.clock.advance(1)
    assert scene.supervisor.step()
    assert scene.states() == ["ready", "starting", "ready"]
    scene.launcher.latest("worker-0").announce()
    scene.supervisor.step()

    assert scene.supervisor.is_ready
    role = scene.supervisor.roles()[1]
    assert (role.restarts, role.why) == (1, "worker-0 ended with -9")
    assert len(scene.launcher.started) == 4


def test_a_router_is_started_again_on_its_ports(scene: Scene) -> None:
    """Workers and clients find it where it was; nobody else is started again."""
    scene.bring_up()
    scene.crash("router")
    scene.restart("router")

    assert scene.launcher.latest("router").argv == ["--client", READY["client"], "--worker", READY["worker"]]
    assert scene.states() == ["ready"] * 3
    assert [handle.name for handle in scene.launcher.started].count("worker-0") == 1


def test_a_role_that_keeps_crashing_is_given_up(scene: Scene) -> None:
    """Five restarts in a row, each after twice as long, and then no more."""
    scene.bring_up()
    waits_ns = []
    for _ in range(MAX_RESTARTS_IN_A_ROW):
        scene.crash("worker-0")
        waits_ns.append(scene.supervisor.wait_ns())
        scene.restart("worker-0")
    scene.crash("worker-0")

    assert waits_ns == [FIRST_BACKOFF_NS << i for i in range(5)]
    assert scene.states() == ["ready", "FATAL", "ready"]
    assert scene.supervisor.roles()[1].restarts == 5
    scene.clock.advance(3_600 * SECOND)
    assert not scene.supervisor.step()  # a given-up role never starts by itself


def test_a_crash_while_starting_again_counts_in_the_row(scene: Scene) -> None:
    """It was ready once, so it is tried again, but no more often."""
    scene.bring_up()
    scene.crash("worker-0")
    for _ in range(MAX_RESTARTS_IN_A_ROW):
        wait_ns = scene.supervisor.wait_ns()
        assert wait_ns is not None
        scene.clock.advance(wait_ns)
        scene.supervisor.step()
        scene.crash("worker-0")

    assert scene.states() == ["ready", "FATAL", "ready"]


def test_a_minute_of_good_service_forgets_the_past(scene: Scene) -> None:
    """A crash a day is no crash loop."""
    scene.bring_up()
    for _ in range(3 * MAX_RESTARTS_IN_A_ROW):
        scene.clock.advance(GOOD_SERVICE_NS)
        scene.crash("worker-0")
        assert scene.supervisor.wait_ns() == FIRST_BACKOFF_NS
        scene.restart("worker-0")

    assert scene.states() == ["ready"] * 3


def test_a_restart_that_hangs_is_killed_and_counts_as_a_crash(scene: Scene) -> None:
    """It has as long as the first start had."""
    scene.bring_up()
    scene.crash("worker-0")
    scene.clock.advance(FIRST_BACKOFF_NS)
    scene.supervisor.step()

    scene.clock.advance(30 * SECOND)
    assert not scene.supervisor.step()
    scene.clock.advance(1)
    assert scene.supervisor.step()

    assert scene.states() == ["ready", "waiting", "ready"]
    assert "was not ready again within 30 s" in scene.supervisor.roles()[1].why


def test_a_worker_that_ends_as_told_is_not_started_again(scene: Scene) -> None:
    """Somebody drained it on purpose."""
    scene.bring_up()
    scene.launcher.latest("worker-0").exit_code = 0
    scene.supervisor.step()

    assert scene.states() == ["ready", "stopped", "ready"]
    assert not scene.supervisor.has_failed
    scene.clock.advance(3_600 * SECOND)
    assert not scene.supervisor.step()


def test_the_router_is_stopped_first(scene: Scene) -> None:
    """Its queue is served before the workers go."""
    scene.bring_up()

    scene.supervisor.stop()

    assert scene.launcher.stops[0] == "router"
    assert sorted(scene.launcher.stops) == ["router", "worker-0", "worker-1"]


def test_stopping_what_never_began_does_nothing(scene: Scene) -> None:
    """And what has ended already is left alone."""
    scene.supervisor.stop()
    scene.supervisor.step()
    scene.crash("router")
    scene.supervisor.stop()

    assert scene.launcher.stops == []


@pytest.mark.parametrize("state", RoleState)
@pytest.mark.parametrize("event", RoleEvent)
def test_every_pair_of_state_and_event_is_a_transition_or_a_mistake(
    scene: Scene, state: RoleState, event: RoleEvent
) -> None:
    """A pair that is not in the table raises and names role, pair and history."""
    role = scene.supervisor._watched[0]
    role.state = state
    if (state, event) in TRANSITIONS:
        role.move(event, 0)
        assert role.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match="router: "):
            role.move(event, 0)


def test_back_offs_are_bounded() -> None:
    """None after the last."""
    assert backoff_ns(1) == FIRST_BACKOFF_NS
    assert backoff_ns(MAX_RESTARTS_IN_A_ROW) == 8 * SECOND
    assert backoff_ns(MAX_RESTARTS_IN_A_ROW + 1) is None


# --- orders -----------------------------------------------------------------------------------


def test_a_worker_that_was_told_to_stop_stays_stopped(scene: Scene) -> None:
    """It is asked to end, is stopping until it has, and is not started again by itself."""
    scene.bring_up()
    scene.supervisor.order_stop("worker-0")
    scene.supervisor.order_stop("worker-0")
    assert scene.states() == ["ready", "stopping", "ready"]
    assert scene.launcher.stops == ["worker-0"]

    scene.launcher.latest("worker-0").exit_code = 0
    assert scene.supervisor.step()

    assert scene.states() == ["ready", "stopped", "ready"]
    scene.clock.advance(3_600 * SECOND)
    assert not scene.supervisor.step()


def test_whatever_ends_a_role_that_was_told_to_stop_is_no_crash(scene: Scene) -> None:
    """An exit code, a signal, or that it had to be killed."""
    scene.bring_up()
    scene.supervisor.order_stop("worker-0")
    scene.supervisor.order_stop("worker-1")
    scene.crash("worker-0")
    scene.clock.advance(int(WORKER_STOP_S * SECOND))
    assert scene.supervisor.wait_ns() == 0
    scene.supervisor.step()

    assert scene.states() == ["ready", "stopped", "stopped"]
    assert "-9" in scene.supervisor.roles()[1].why
    assert "was killed" in scene.supervisor.roles()[2].why


def test_a_waiting_role_can_be_stopped(scene: Scene) -> None:
    """Its next restart does not come."""
    scene.bring_up()
    scene.crash("worker-0")
    scene.supervisor.order_stop("worker-0")
    scene.clock.advance(3_600 * SECOND)

    assert not scene.supervisor.step()
    assert scene.states() == ["ready", "stopped", "ready"]


@pytest.mark.parametrize("is_given_up", [False, True])
def test_a_role_that_ended_is_started_on_order(scene: Scene, is_given_up: bool) -> None:
    """Stopped or given up: it begins anew, its restarts in a row forgotten."""
    scene.bring_up()
    for _ in range(MAX_RESTARTS_IN_A_ROW if is_given_up else 0):
        scene.crash("worker-0")
        scene.restart("worker-0")
    scene.launcher.latest("worker-0").exit_code = -9 if is_given_up else 0
    scene.supervisor.step()
    assert scene.states()[1] == ("FATAL" if is_given_up else "stopped")

    scene.supervisor.order_start("worker-0")
    scene.supervisor.order_start("worker-0")
    scene.launcher.latest("worker-0").announce()
    scene.supervisor.step()

    assert scene.supervisor.is_ready
    scene.crash("worker-0")
    assert scene.supervisor.wait_ns() == FIRST_BACKOFF_NS


def test_a_role_that_fails_when_started_on_order_is_given_up_at_once(scene: Scene) -> None:
    """Whoever ordered it learns so, and need not wait for five restarts."""
    scene.bring_up()
    scene.launcher.latest("worker-0").exit_code = 0
    scene.supervisor.step()
    scene.supervisor.order_start("worker-0")
    scene.crash("worker-0")

    assert scene.states() == ["ready", "FATAL", "ready"]


def test_a_start_on_order_that_hangs_is_given_up(scene: Scene) -> None:
    """It has as long as the first start had."""
    scene.bring_up()
    scene.launcher.latest("worker-0").exit_code = 0
    scene.supervisor.step()
    scene.supervisor.order_start("worker-0")
    scene.clock.advance(30 * SECOND + 1)
    scene.supervisor.step()

    assert scene.states() == ["ready", "FATAL", "ready"]


def test_a_router_that_is_started_on_order_keeps_its_ports(scene: Scene) -> None:
    """Workers and clients find it where it was."""
    scene.bring_up()
    scene.supervisor.order_stop("router")
    scene.launcher.latest("router").exit_code = 0
    scene.supervisor.step()
    assert scene.supervisor.is_bound

    scene.supervisor.order_start("router")

    assert scene.launcher.latest("router").argv == ["--client", READY["client"], "--worker", READY["worker"]]


def test_orders_that_cannot_be_followed_say_why(scene: Scene) -> None:
    """An unknown name, a role that waits for the router, a start while it is stopping."""
    with pytest.raises(ProcessError, match=r"worker-7: expected one of router, worker-0, worker-1"):
        scene.supervisor.order_stop("worker-7")
    with pytest.raises(ProcessError, match="it waits for the router"):
        scene.supervisor.order_stop("worker-0")
    scene.bring_up()
    scene.supervisor.order_stop("worker-0")
    with pytest.raises(ProcessError, match="it is stopping: try again soon"):
        scene.supervisor.order_start("worker-0")
