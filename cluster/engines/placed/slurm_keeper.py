"""What a role's job runs: it starts the role as a step, and drains it when it must.

    SIGTERM    `cluster drain`, `down`, `scale`: the role drains, and the job ends
    SIGUSR1    the job's time is nearly up, or Slurm will take its node: the role drains, and the job is
    queued again

Slurm also signals the step itself when it preempts a job: the role drains by itself, and the job waits here
for Slurm to requeue it. A role that crashes is started again, with growing pauses, a few times; then the job
fails. Where the routers are is asked for before each start and every half minute, and more often where a
router's list of them is not complete: see `routing`.

The step is signalled by scancel: srun itself would kill it on SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engines.placed import slurm_commands as slurm
from cluster.engines.placed.base import Started
from cluster.engines.placed.routing import RouterAt, RoutersKnown, router_at
from cluster.engines.placed.slurm import router_nodes
from cluster.remote.shell import RemoteError
from cluster.spec.roles import Timing, is_router
from superserve.fields import read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LOOK_S = 30.0  # between two looks where the routers are; each asks the controller
_FIND_S = 1.0  # between two looks while there is none
_LIST_S = 2.0  # the same of a router while another one is missing, or new: it tells all that know it
_KILL_S = 5.0  # after a role's grace: then its step is killed
_REQUEUED_S = 300.0  # a preempted job waits here for its end: longer than grace times usually are


class Backoff:
    """How long a role that crashes pauses before its next start."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._n = 0

    def after(self, ran_s: float) -> float | None:
        """Return the pause after a run of `ran_s` seconds; None if another start would not help."""
        if ran_s >= self._timing.good_service_s:
            self._n = 0
        if self._n >= self._timing.most_restarts:
            return None
        self._n += 1
        return self._timing.first_backoff_s * float(2 ** (self._n - 1))


class JobKeeper:
    """Keeps one role running as a step of this job.

    Args:
        role: What to run.
        cluster: The cluster's name, by which the routers' jobs are found.
        roles: The folder with what each role of the cluster was started with.
        job: This job's number.
        step: The words before the role's command line.
        say: Receives lines for the job's log.
    """

    def __init__(
        self,
        role: Started,
        cluster: str,
        roles: Path,
        job: int,
        step: Sequence[str] = ("srun", "--ntasks=1", "--unbuffered"),
        say: Callable[[str], None] = lambda line: print(line, flush=True),  # noqa: T201  the job's log
    ) -> None:
        self._role = role
        self._cluster = cluster
        self._roles = roles
        self._job = job
        self._step = tuple(step)
        self._say = say
        self._asked = 0
        self._known = RoutersKnown(role.name, role.argv, roles.parent / f"{role.name}.routers.json")
        self._addresses: dict[str, str] = {}
        self._names: list[str] = []
        self._n_missing = 0
        self._wake, self._woken = os.pipe()

    def run(self) -> int:
        """Run the role until it should not run any more; return the job's exit code."""
        self._listen()
        backoff = Backoff(Timing())
        while not self._is_asked():
            argv = self._known.started(self._routers() or {})
            if argv is None:
                self._pause(_FIND_S)
                continue
            began_s = time.monotonic()
            code, moved = self._run_once(argv)
            if self._is_asked():
                break
            if moved:
                continue
            if code == 0:
                return self._drained_by_others()
            pause_s = backoff.after(time.monotonic() - began_s)
            if pause_s is None:
                self._say(f"{self._role.name}: ended with exit code {code} too often")
                return code if 0 < code < 126 else 1
            self._say(f"{self._role.name}: ended with exit code {code}; starting it again in {pause_s:g} s")
            self._pause(pause_s)
        return self._queued_again() if self._asked == signal.SIGUSR1 else 0

    def _is_asked(self) -> bool:
        """Return whether a signal has asked for an end: handlers run between any two lines."""
        return self._asked != 0

    # --- one run of the role ------------------------------------------------------------------

    def _run_once(self, argv: Sequence[str]) -> tuple[int, bool]:
        """Run the step to its end; return its exit code, and whether it was ended to follow the routers."""
        role = self._role
        step = subprocess.Popen(
            [*self._step, role.interpreter or sys.executable, "-P", *argv],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(role.env)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        moved = False
        every_s = _LIST_S if self._known.is_listed else _LOOK_S
        looked_s = woken_s = time.monotonic()
        while step.poll() is None:
            self._rest(woken_s + every_s - time.monotonic())
            now_s = time.monotonic()
            if now_s >= woken_s + every_s and step.poll() is None and not self._is_asked():
                woken_s = now_s
                if self._is_due(now_s - looked_s):
                    moved, looked_s = self._have_moved(), now_s
            if self._is_asked() or moved:
                self._drain(step)
        return step.returncode, moved

    def _drain(self, step: subprocess.Popen[bytes]) -> None:
        """Drain the role, and kill its step if it takes too long."""
        with contextlib.suppress(RemoteError):
            slurm.terminate_steps(self._job)
        give_up_s = time.monotonic() + self._role.stop_s + _KILL_S
        while step.poll() is None and time.monotonic() < give_up_s:
            self._rest(give_up_s - time.monotonic())
        if step.poll() is None:
            self._say(f"{self._role.name}: did not drain within {self._role.stop_s + _KILL_S:g} s: killed")
            step.terminate()  # srun kills its step
            step.wait()

    # --- the routers --------------------------------------------------------------------------

    def _is_due(self, since_s: float) -> bool:
        """Return whether to ask the controller again: at once if its last answer cannot be all."""
        return since_s >= _LOOK_S or self._names != self._router_names() or self._n_missing > 0

    def _router_names(self) -> list[str]:
        """Return the routers that the cluster should have: what each was started with is in the folder."""
        return sorted(path.stem for path in self._roles.glob("router*.json") if is_router(path.stem))

    def _routers(self) -> dict[str, RouterAt] | None:
        """Return where the routers are that run; None if that is not known."""
        if not (self._known.needs_one or self._known.is_listed):
            return {}
        argvs = {}
        self._names = self._router_names()
        for name in self._names:
            with contextlib.suppress(FileNotFoundError):  # it has just been taken away
                argvs[name] = json.loads((self._roles / f"{name}.json").read_bytes())["argv"]
        try:
            nodes = router_nodes(self._cluster, list(argvs))
            for node in nodes.values():
                if node not in self._addresses:
                    self._addresses[node] = slurm.address_of(node)
        except RemoteError as error:
            self._say(f"{self._role.name}: where the routers are, is not known: {error}")
            return None
        self._n_missing = len(argvs) - len(nodes)
        return {name: router_at(argvs[name], self._addresses[node]) for name, node in nodes.items()}

    def _have_moved(self) -> bool:
        """Return whether no router is where this role can know of it; where that is not known, it stays."""
        found = self._routers()
        if found is None or not self._known.has_moved(found):
            return False
        self._say(f"{self._role.name}: routers are at {', '.join(r.worker for r in found.values())} now")
        return True

    # --- the end of the job -------------------------------------------------------------------

    def _queued_again(self) -> int:
        self._say(f"{self._role.name}: drained before the job's time was up: queued again")
        try:
            slurm.requeue(self._job)
        except RemoteError as error:
            self._say(f"{self._role.name}: not queued again: {error}")
            return 1
        self._stay()
        return 0

    def _drained_by_others(self) -> int:
        """End after a role that ended well without this job's doing; a preempted job waits for Slurm."""
        try:
            preempted = slurm.is_preempted(self._job)
        except RemoteError:
            preempted = False
        if preempted:
            self._say(f"{self._role.name}: drained for another job")
            self._stay()
        return 0

    # --- signals ------------------------------------------------------------------------------

    def _listen(self) -> None:
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes `_rest`

    def _ask(self, number: int, _: object) -> None:
        if self._asked != signal.SIGTERM:  # an end that was asked for stays one
            self._asked = number

    def _stay(self) -> None:
        """Wait for Slurm to end this job, or for SIGTERM."""
        give_up_s = time.monotonic() + _REQUEUED_S
        while self._asked != signal.SIGTERM and time.monotonic() < give_up_s:
            self._rest(give_up_s - time.monotonic())

    def _pause(self, seconds: float) -> None:
        """Wait until time is up, or until this job is asked to end."""
        end_s = time.monotonic() + seconds
        while not self._is_asked() and time.monotonic() < end_s:
            self._rest(end_s - time.monotonic())

    def _rest(self, seconds: float) -> None:
        """Wait for a signal, of a child that ended too, or until time is up.

        Commands of Slurm are children as well, so this may return at once: callers look at the clock.
        """
        select.select([self._wake], [], [], max(seconds, 0))
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4_096)


def main(path: str, cluster: str) -> int:
    """Keep the role of a file; return the job's exit code."""
    role = read_file(Started, json.loads(Path(path).read_bytes()), path)
    return JobKeeper(role, cluster, Path(path).parent, int(os.environ["SLURM_JOB_ID"])).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
