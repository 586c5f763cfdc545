"""Serving the demo's load: a cluster for each policy, and again if it missed what is expected."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from gpu_worker.models.names import DIGITS
from loadgen.demo.live import RECORDING, live_page
from loadgen.demo.machine import MachineUse, MachineWatch
from loadgen.live.run import RunSettings, run_trace
from loadgen.options import DEFAULT_POLICY
from loadgen.results.calm import await_calm
from loadgen.study.spans.remembered import RunMemory
from superserve.clock import MS
from superserve.errors import ProcessError
from superserve.roles import local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from loadgen.demo.load import DemoLoad
    from loadgen.results.result import RunResult
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace

OPTIONS = ("--device", "cpu", "--supernet", DIGITS, "--ready-timeout-s", "120")
"""Options of each of the demo's clusters."""

_PROGRESS_S = 5.0
_QUIET_NS = 2 * MS  # a sleeper's p99 delay on a machine that is not busy


@dataclass(frozen=True, slots=True)
class Served:
    """The load under one policy.

    Attributes:
        policy: Its name.
        run: What was measured.
        noise: What disturbed it, in words; "" on a quiet machine.
    """

    policy: str
    run: Run
    noise: str = ""

    @property
    def result(self) -> RunResult:
        """The figures of the result file."""
        return self.run.result


@dataclass(frozen=True, slots=True)
class DemoServing:
    """Serves one load under any policy.

    Attributes:
        load: What to offer.
        payloads: Bytes of each image, (n, n_bytes).
        profile: The router's profile; its folder contains the cluster's state.
    """

    load: DemoLoad
    payloads: npt.NDArray[np.uint8]
    profile: Path

    def is_watched(self, policy: str) -> bool:
        """Return whether a live page shows this policy's run, and its recording is kept: the default's is."""
        return policy == DEFAULT_POLICY

    def serve(self, policy: str) -> Served:
        """Serve the load, and print its progress now and then."""
        click.echo(f"Serving it under {policy}: starting a router and a worker ...")
        settings = RunSettings(self.load.slo_ns, payloads=self.payloads, keep_outputs=True)
        saved = self.profile.parent / RECORDING if self.is_watched(policy) else None
        with (
            serving(policy, self.profile, margin_ms=self.load.margin_ms) as cluster,
            live_page(cluster.client_endpoint, saved),
        ):
            processes = (cluster.keeper, *(role.process for role in cluster.roles))
            with MachineWatch(one.pid for one in processes if one is not None) as watch:
                trace = self.load.trace
                run = run_trace(trace, settings, cluster.client_endpoint, _progress(trace))
                use: MachineUse = watch.use()
            memory = RunMemory("", is_needed=True)
            memory.fetch(cluster.client_endpoint)
        run = replace(run, result=replace(run.result, lanes=memory.lanes()))
        return Served(policy, run, use.noise(run.noise_p99_9_ns, self.load.slo_ns))


def until_met(
    serve: Callable[[], Served], missed: Callable[[Served], list[str]], may_repeat: Callable[[], bool]
) -> Served:
    """Serve; once more if that missed the expectation. The second run counts, whatever its result.

    Also on a machine that looked calm: a stall of a fifth of a second costs one query in fifty of a short
    run, and neither averages of the cores' counters nor the noise probe's p99.9 show it. A serve that is
    broken misses both times.
    """
    served = serve()
    if not (missed(served) and may_repeat()):
        return served
    click.echo(f"  {'; '.join(missed(served))} ({served.noise or 'once'}); serving it again")
    await_calm(_QUIET_NS)
    return serve()


@contextlib.contextmanager
def serving(policy: str, profile: Path, *, margin_ms: float) -> Iterator[local.LocalCluster]:
    """Run a cluster on this machine that serves by `profile`; stop it at the end.

    Its state is beside the profile, so that it belongs to the demo alone, and the next demo finds a cluster
    that this demo could not stop because it was killed.

    Raises:
        ProcessError: It did not start or stop; quotes what `cluster` printed.
    """
    state = profile.parent / "cluster"
    if local.names(state):
        run_cluster(state, "down")
    try:
        run_cluster(
            state, "up", "--policy", policy, "--margin-ms", f"{margin_ms:g}", "--profile", str(profile),
            *OPTIONS,
        )  # fmt: skip
        yield local.running(state)
    finally:
        run_cluster(state, "down")
    shutil.rmtree(state)  # the logs of a cluster that worked are not needed


def run_cluster(state: Path, verb: str, *options: str) -> None:
    """Run `cluster` for the demo's own cluster; ProcessError, with what it printed, if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster", verb, "--name", "demo", *options],
        env={**os.environ, local.STATE_VARIABLE: str(state)}, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise ProcessError(f"cluster {verb}: exit code {done.returncode}:\n{done.stdout.rstrip()}")


def _progress(trace: Trace) -> Callable[[dict[str, int]], None]:
    """Return a function that prints a line every 5 seconds."""
    began_s = time.monotonic()
    next_s = began_s + _PROGRESS_S

    def show(total: dict[str, int]) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s < next_s:
            return
        next_s = now_s + _PROGRESS_S
        waiting = total["sent"] - total["answered"]
        click.echo(f"  {now_s - began_s:4.0f} s  {total['sent']:,} of {trace.n:,} sent, {waiting:,} waiting")

    return show
