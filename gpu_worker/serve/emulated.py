"""Emulated GPUs: `PlayedGpu`s behind a real socket. No clock or torch.

The output of a query is the subnet's row, so that a client can see which subnet ran.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING

from gpu_worker.core.batches import EndedBatch, Outcome, expired_reason, mixed, unexpired
from gpu_worker.core.played import AS_PROFILED, Pace, PlayedGpu, PlayedGpus
from superserve.subnet import TensorSpec
from superserve.wire import Status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gpu_worker.serve.eventlog import EventLogWriter
    from profiles.table import Profile
    from superserve.wire import Directive

OUTPUT = TensorSpec("int32", ())
"""One query's output: the row of the subnet that ran."""

_ROW = struct.Struct("<i")


def emulated_gpus(
    profile: Profile, n_gpus: int, log: EventLogWriter | None = None, pace: Pace = AS_PROFILED
) -> PlayedGpus[Directive]:
    """Return the emulated GPUs of one process.

    Args:
        profile: The profile that each of them follows.
        n_gpus: Number of GPUs.
        log: Where to record what they ran; the caller opens and closes it.
        pace: How fast they are compared with the profile.
    """
    gpus = [PlayedGpu(profile, outcome_of, pace=pace) for _ in range(n_gpus)]
    return PlayedGpus(gpus, None if log is None else partial(_note, log))


def outcome_of(directive: Directive, waited_ns: int) -> Outcome:
    """Return the outcome of a directive that starts after `waited_ns` here: expired queries do not run."""
    alive = unexpired(directive, waited_ns)
    output = _ROW.pack(directive.subnet)
    if alive is None:
        return Outcome(directive.n, _ROW.size, output * directive.n)
    return _partly_expired(alive, output, expired_reason(waited_ns))


def _partly_expired(alive: npt.NDArray[np.bool_], output: bytes, reason: bytes) -> Outcome:
    statuses = [Status.OK if is_alive else Status.EXPIRED for is_alive in alive]
    outputs = [output if is_alive else reason for is_alive in alive]
    return mixed(statuses, outputs, int(alive.sum()))


def _note(log: EventLogWriter, found: list[EndedBatch]) -> None:
    for batch in found:
        if batch.n_run:  # a batch that was refused whole took no GPU time
            row = batch.row
            log.add(row.slot, row.batch_id, batch.subnet, batch.n_run, batch.started_ns, batch.ended_ns)
