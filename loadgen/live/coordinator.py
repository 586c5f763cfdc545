"""The coordinator of a host's senders: splits a schedule, starts them together, merges their records."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from loadgen.live.progress import Seconds
from loadgen.live.records import COLUMNS
from loadgen.results.result import NoiseProbe
from superserve.clock import MS
from superserve.net.context import new_context
from superserve.net.sockets import bind_router, receive, send
from superserve.roles.processes import ProcessGroup
from superserve.wire import RunProgress, RunReady, RunReport, RunStart, RunStop, decode_run, encode_run

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    import zmq

    from loadgen.live.progress import Watch
    from loadgen.live.records import SenderPlan
    from loadgen.traces.trace import Trace
    from superserve.wire import Ping, Pong, RunMessage

SENDER = "loadgen.live.sender"
"""The module that a sender's process runs."""
_START_AFTER_NS = 300 * MS
"""From the order to start until the first instant: by then every sender has the order."""
_STOP_AFTER_NS = 400 * MS
"""From the order to stop until that instant: a sender reads orders four times a second."""
_LAST_WORDS_MS = 1_000
"""An ended sender's report arrives within this, however busy the machine: it was sent before the end."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a larger run decides for a run that is part of it.

    Attributes:
        start: Called once every sender is ready; returns the instant to start at, of this host's clock.
        stop: Once set, nothing more is sent; the run is reported up to there.
    """

    start: Callable[[], int]
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class Offering:
    """What the senders send.

    Attributes:
        trace: When each query is due after the start.
        n_senders: Number of senders; the queries go to them in turn.
        payloads: Real payloads, uint8, shape (n_payloads, n_bytes); each query draws one.
        seed: Of that draw.
    """

    trace: Trace
    n_senders: int = 1
    payloads: npt.NDArray[np.uint8] | None = None
    seed: int = 0


@contextlib.contextmanager
def coordinated(
    plan: SenderPlan,
    schedule: Offering,
    *,
    hooks: Hooks | None = None,
    watch: Watch | None = None,
    module: str = SENDER,
) -> Iterator[Coordinator]:
    """Start the senders of a schedule, and yield their coordinator; they and their files end with the block.

    Raises:
        ProcessError: A sender did not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="superserve-run-")))
        context = stack.enter_context(new_context())
        control, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        stack.callback(control.close, 0)
        plans = deal(replace(plan, control=endpoint, folder=str(folder)), schedule)
        group = stack.enter_context(ProcessGroup())
        for one in plans:
            path = folder / f"{one.name}.json"
            path.write_bytes(orjson.dumps(asdict(one)))
            group.start(one.name, ["-m", module, str(path)])
        group.wait_ready(60.0)
        yield Coordinator(control, group, plans, schedule, hooks, watch)


def deal(plan: SenderPlan, schedule: Offering) -> list[SenderPlan]:
    """Split a schedule among senders, and write each one's files."""
    folder, pick = Path(plan.folder), None
    if schedule.payloads is not None:
        np.save(folder / "payloads.npy", schedule.payloads)
        rng = np.random.default_rng(schedule.seed)
        pick = rng.integers(0, len(schedule.payloads), schedule.trace.n)
        np.save(folder / "pick.npy", pick)
    plans = []
    for i in range(min(schedule.n_senders, schedule.trace.n)):
        one = replace(plan, name=f"sender-{i}")
        np.save(one.path("due"), schedule.trace.due_ns[i :: schedule.n_senders])
        if pick is not None:
            np.save(one.path("pick"), pick[i :: schedule.n_senders])
        plans.append(one)
    return plans


def merge(plans: Sequence[SenderPlan], schedule: Offering, start_ns: int) -> dict[str, npt.NDArray[Any]]:
    """Put the senders' columns back into the order of the schedule; instants count from the start."""

    def merged(name: str) -> npt.NDArray[Any]:
        parts = [np.load(plan.path(name)) for plan in plans]
        whole = np.empty((schedule.trace.n, *parts[0].shape[1:]), parts[0].dtype)
        for i, part in enumerate(parts):
            whole[i :: schedule.n_senders] = part
        return whole

    columns = {"due_ns": schedule.trace.due_ns, **{name: merged(name) for name in COLUMNS}}
    for name in ("sent_ns", "answered_ns"):
        columns[name] = np.where(columns[name] < 0, -1, columns[name] - start_ns)
    if schedule.payloads is not None:
        columns["payload"] = np.load(Path(plans[0].folder) / "pick.npy")
    if all(plan.keep_outputs and plan.path("outputs").exists() for plan in plans):
        columns["outputs"] = merged("outputs")
    return columns


class Coordinator:
    """Starts the senders at one instant and listens to them until all are done.

    Attributes:
        start_ns: The instant, of this host's clock; 0 before `start`.
        stop_ns: When sending ended early, from the start; None if everything was sent.
        subnets: Name and accuracy of each row of the profile, as the senders received them.
        reasons: For each status without an output, one of the router's reasons.
        n_duplicates: Answers beyond the first of a query.
        noise: When the noise probe woke, from the start, and how late; once `follow` has returned.
    """

    def __init__(
        self,
        control: zmq.Socket[bytes],
        group: ProcessGroup,
        plans: Sequence[SenderPlan],
        schedule: Offering,
        hooks: Hooks | None,
        watch: Watch | None,
    ) -> None:
        self.start_ns = 0
        self.stop_ns: int | None = None
        self.subnets: list[tuple[str, float]] = []
        self.reasons: dict[str, str] = {}
        self.n_duplicates = 0
        self.noise = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._control = control
        self._group = group
        self._plans = plans
        self._schedule = schedule
        self._hooks = hooks
        self._watch = watch
        self._probe = NoiseProbe()
        self._progress: dict[bytes, RunProgress] = {}
        self._n_done = 0
        self._senders: set[bytes] = set()
        self._seconds: Seconds | None = None

    def start(self) -> None:
        """Wait for every sender, then send all of them the instant to start at."""
        while len(self._senders) < len(self._plans):
            for key, message in self._messages():
                if isinstance(message, RunReady):
                    self._senders.add(key)
        hooks = self._hooks
        self.start_ns = time.monotonic_ns() + _START_AFTER_NS if hooks is None else hooks.start()
        self._order(RunStart(at_ns=self.start_ns))
        self._probe.start()
        if self._watch is not None:
            self._seconds = self._told(self._watch)

    def _told(self, watch: Watch) -> Seconds:
        """Return the reader of the senders' rows while they run."""
        trace, n = self._schedule.trace, self._schedule.n_senders
        feeds = {plan.name: (plan.live_path, trace.due_ns[i::n]) for i, plan in enumerate(self._plans)}
        return Seconds(
            feeds, start_ns=self.start_ns, duration_ns=trace.duration_ns, slo_ns=self._plans[0].slo_ns,
            on_second=watch.on_second,
        )  # fmt: skip

    def _order(self, message: RunStart | RunStop) -> None:
        order = encode_run(message)
        for key in self._senders:
            send(self._control, [key, *order])

    def _stop(self) -> None:
        """Send every sender one instant at which all stop, late enough that each has read it by then."""
        self.stop_ns = max(0, time.monotonic_ns() - self.start_ns) + _STOP_AFTER_NS
        if self._seconds is not None:
            self._seconds.duration_ns = min(self._seconds.duration_ns, self.stop_ns)
        self._order(RunStop(self.stop_ns))

    def follow(self, on_progress: Callable[[dict[str, int]], None] | None = None) -> None:
        """Forward progress until every sender is done."""
        stopper = self._watch or self._hooks
        while self._n_done < len(self._plans):
            if stopper is not None and stopper.stop.is_set() and self.stop_ns is None:
                self._stop()
            for key, message in self._messages():
                if isinstance(message, RunReport):
                    self._finish(message)
                elif isinstance(message, RunProgress):
                    self._note(key, message)
                    if on_progress is not None:
                        on_progress(self._total())
        late_ns = self._probe.stop()
        self.noise = (self._probe.woke_ns - self.start_ns, late_ns)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the senders' records, once `follow` has returned."""
        return merge(self._plans, self._schedule, self.start_ns)

    def _finish(self, report: RunReport) -> None:
        if self._seconds is not None and report.rows is not None:
            self._seconds.read(report.name, report.rows, self._seconds.duration_ns)
        self._n_done += 1
        self.n_duplicates += report.duplicates
        self.reasons |= report.reasons
        self.subnets = list(report.subnets)

    def _note(self, key: bytes, progress: RunProgress) -> None:
        if self._seconds is not None and progress.rows is not None:
            self._seconds.read(progress.name, progress.rows, progress.until_ns)
        self._progress[key] = progress

    def _total(self) -> dict[str, int]:
        parts = self._progress.values()
        return {what: sum(getattr(part, what) for part in parts) for what in ("due", "sent", "answered")}

    def _messages(self) -> Iterator[tuple[bytes, RunMessage | Ping | Pong]]:
        if not self._control.poll(200) and self._n_done < len(self._plans):
            self._check_senders()
        while (frames := receive(self._control)) is not None:
            yield bytes(frames[0]), decode_run(frames[1:])

    def _check_senders(self) -> None:
        """Raise ProcessError if a sender died; one that is done may have ended, its report on the way."""
        n_running = sum(process.poll() is None for process in self._group.processes)
        if n_running < len(self._plans) - self._n_done and not self._control.poll(_LAST_WORDS_MS):
            self._group.check()
