"""A simulated router's STATUS and flight record, as the live page gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadgen.simulator.simulate import START_NS, Simulation, Workload
from profiles.table import load_profile
from router.report.flight import FlightRecorder
from router.report.load import Load
from router.report.status import LoopFacts, Origin, status_of
from superserve.clock import MS
from superserve.roles.version import version

if TYPE_CHECKING:
    from loadgen.traces.trace import Trace
    from router.core.events import Action
    from superserve.status import RouterStatus

PROFILE = load_profile("cnn-8gpu-modelled")


class WatchedRouter:
    """A simulated router that answers as a live one does."""

    def __init__(self, trace: Trace, gpus: int = 2, policy: str = "slackfit") -> None:
        self.policy = policy
        self.simulation = Simulation([PROFILE] * gpus, policy=policy)
        self.simulation.offer(Workload(trace, 36 * MS))
        self.recorder = FlightRecorder()
        self.load = Load()
        self.epoch = 1

        def note(now_ns: int, actions: list[Action]) -> None:
            self.recorder.note(self.simulation.core, actions, now_ns)
            self.load.note(self.simulation.core, now_ns)

        self.simulation.on_pass = note

    def at(self, ms: int, since: int | None) -> tuple[RouterStatus, dict[str, Any]]:
        """Let time pass until `ms` of the trace, and return what a question then gives."""
        now_ns = START_NS + ms * MS
        self.simulation.run(now_ns)
        core = self.simulation.core
        facts = LoopFacts(self.epoch, self.policy, "c", "w", 0, None, 1, {}, self.load)
        asked: dict[str, Any] = {"river": True, "profiles": since is None}
        if since is not None:
            asked["since"] = since
        origins = {peer: Origin("host", version()) for peer in core.peers}
        return status_of(core, facts, now_ns, origins=origins), self.recorder.answer(core, asked, now_ns)
