"""What a role's job runs: it starts the role as a step, and drains it when it must.

    SIGTERM    `cluster drain`, `down`, `scale`: the role drains, and the job ends
    SIGUSR1    the job's time is nearly up, or Slurm will take its node: the role drains, and the job is
    queued again

Slurm also signals the step itself when it preempts a job: the role drains by itself, and the job waits here
for Slurm to requeue it. A role that crashes is started again, with growing pauses, a few times; then the job
fails. A worker follows the router to another node: where that is, is asked for before each start and every
half minute.

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
from cluster.engines.placed.base import ROUTER_HOST, Started
from cluster.engines.placed.slurm import router_address
from cluster.remote.shell import RemoteError
from cluster.spec.roles import Timing
from superserve.fields import read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LOOK_S = 30.0  # between two looks where the router is; each asks the controller
_FIND_S = 1.0  # between two looks while it is nowhere
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
        cluster: The cluster's name, by which the router's job is found.
        job: This job's number.
        step: The words before the role's command line.
        say: Receives lines for the job's log.
    """

    def __init__(
        self,
        role: Started,
        cluster: str,
        job: int,
        step: Sequence[str] = ("srun", "--ntasks=1", "--unbuffered"),
        say: Callable[[str], None] = lambda line: print(line, flush=True),  # noqa: T201  the job's log
    ) -> None:
        self._role = role
        self._cluster = cluster
        self._job = job
        self._step = tuple(step)
        self._say = say
        self._asked = 0
        self._address = ""
        self._wake, self._woken = os.pipe()

    def run(self) -> int:
        """Run the role until it should not run any more; return the job's exit code."""
        self._listen()
        backoff = Backoff(Timing())
        while not self._is_asked():
            if not self._found_router():
                self._pause(_FIND_S)
                continue
            began_s = time.monotonic()
            code, moved = self._run_once()
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

    def _run_once(self) -> tuple[int, bool]:
        """Run the step to its end; return its exit code, and whether it was ended to follow the router."""
        role = self._role
        argv = [word.replace(ROUTER_HOST, self._address) for word in role.argv]
        step = subprocess.Popen(
            [*self._step, role.interpreter or sys.executable, "-P", *argv],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(role.env)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        moved = False
        look_s = time.monotonic() + _LOOK_S
        while step.poll() is None:
            self._rest(look_s - time.monotonic())
            if time.monotonic() >= look_s and step.poll() is None and not self._is_asked():
                moved = self._router_moved()
                look_s = time.monotonic() + _LOOK_S
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

    # --- the router ---------------------------------------------------------------------------

    @property
    def _needs_router(self) -> bool:
        return any(ROUTER_HOST in word for word in self._role.argv)

    def _found_router(self) -> bool:
        if not self._needs_router:
            return True
        try:
            self._address = router_address(self._cluster)
        except RemoteError as error:
            self._say(f"{self._role.name}: where the router is, is not known: {error}")
            return False
        return bool(self._address)

    def _router_moved(self) -> bool:
        """Return whether the router is on another node than at the start; where it is not known, it stays."""
        if not self._needs_router:
            return False
        try:
            now = router_address(self._cluster)
        except RemoteError:
            return False
        if now in ("", self._address):
            return False
        self._say(f"{self._role.name}: the router is at {now} now")
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
    return JobKeeper(role, cluster, int(os.environ["SLURM_JOB_ID"])).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
