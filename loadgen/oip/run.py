"""A run against a server of the protocol: schedule, figures and rules are those of any run."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loadgen.live.coordinator import Offering, coordinated
from loadgen.live.records import SenderPlan
from loadgen.live.run import summarise, until
from loadgen.oip.model import target_model
from loadgen.results.result import quantile_ns
from loadgen.results.run import Run
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from loadgen.live.progress import Watch
    from loadgen.live.run import RunSettings
    from loadgen.traces.trace import Trace

MODULE = "loadgen.oip.sender"


def check_installed(url: str) -> None:
    """Refuse a target whose protocol needs a package that is not installed.

    Raises:
        ConfigError: It is not; the error names what to install.
    """
    module = "grpc" if url.startswith("grpc:") else "httptools"
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--target {url}: needs {module}: pip install 'superserve[gateway]'")


def run_target(trace: Trace, settings: RunSettings, url: str, watch: Watch | None = None) -> Run:
    """Offer `trace` to the server at `url`, open loop, and merge the senders' records.

    Raises:
        ConfigError: It does not answer, or the payloads do not fit its model.
        ProcessError: A sender died.
        KeyboardInterrupt: It ended before any query was due.
    """
    if trace.n == 0:
        raise ConfigError(f"trace {trace.name}: expected at least one query")
    check_installed(url)
    model = target_model(url)
    payload_bytes = settings.payload_bytes if settings.payloads is None else settings.payloads.shape[1]
    plan = SenderPlan(
        url, settings.slo_ns, payload_bytes, settings.grace_ns, settings.keep_outputs,
        is_watched=watch is not None,
    )  # fmt: skip
    schedule = Offering(trace, settings.n_senders, settings.payloads, settings.seed)
    with coordinated(plan, schedule, watch=watch, module=MODULE) as senders:
        with contextlib.nullcontext() if watch is None else watch.endings.gently():
            senders.start()
            senders.follow(None)
        columns = senders.columns()
    is_partial = senders.stop_ns is not None and senders.stop_ns < trace.duration_ns
    if is_partial:
        trace, columns = until(trace, columns, senders.stop_ns or 0)
    noise = quantile_ns(senders.noise[1], 999)
    knows_accuracy = not np.isnan(columns["accuracy"]).any()
    result = summarise(trace, settings.slo_ns, model.server, columns, senders.subnets, noise)
    if not knows_accuracy:
        result = replace(result, mean_accuracy=None)
    return Run(
        replace(result, partial=True) if is_partial else result, columns, senders.subnets, senders.reasons,
        n_duplicates=senders.n_duplicates, noise_p99_9_ns=noise, noise=senders.noise,
    )  # fmt: skip
