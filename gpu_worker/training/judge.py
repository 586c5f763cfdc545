"""After a training: BatchNorm's statistics, and how good some subnets are."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from gpu_worker.supernet.calibration import calibrate
from gpu_worker.training.loop import begin_epoch
from gpu_worker.training.recipe import apart, seed_of
from gpu_worker.training.sandwich import Adapter, batch_of
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpu_worker.supernet.supernet import Supernet
    from gpu_worker.training.recipe import Recipe

CALIBRATION_BATCHES = 8
"""Batches of the training data that statistics are gathered from."""


class JudgedSubnet(NamedTuple):
    """A subnet and how good it is.

    Attributes:
        subnet: Its name and its control tuple.
        score: The mean over all queries, in the objective's unit.
    """

    subnet: Subnet
    score: float


def calibration_inputs(
    batches: Iterable[Any], supernet: Supernet, adapter: Adapter, seed: int
) -> list[torch.Tensor]:
    """Return the inputs of the first batches of the training data."""
    with apart():
        begin_epoch(batches, seed, 0)
        few = itertools.islice(batches, CALIBRATION_BATCHES)
        return [batch_of(given, supernet.device, adapter).inputs for given in few]


def settle(supernet: Supernet, inputs: Sequence[torch.Tensor]) -> None:
    """Give the BatchNorms the whole network's statistics: what a checkpoint holds of them.

    Args:
        supernet: Trained; its subnets' own statistics are left as they are.
        inputs: Batches of the training data.
    """
    if not supernet.norms:
        return
    whole = Subnet("largest", supernet.controls.space.largest)
    statistics = calibrate(supernet, [whole], inputs)[whole.name]
    lengths = [n for channels in statistics.channels for n in (channels, channels)]
    parts = iter(torch.split(statistics.values, lengths))
    with torch.no_grad():
        for norm in supernet.norms:
            for own in (norm.running_mean, norm.running_var):
                part = next(parts)
                if own is not None:
                    own.copy_(part)


def ends_and_some(supernet: Supernet, n_drawn: int, seed: int) -> list[Subnet]:
    """Return the smallest and the largest subnet, and between them some that are drawn, each once."""
    space = supernet.controls.space
    rng = np.random.default_rng(seed_of(seed, "judged"))
    drawn = [space.random(rng) for _ in range(n_drawn)]
    ends = [space.smallest, space.largest]
    others = [c for i, c in enumerate(drawn) if c not in ends and c not in drawn[:i]]
    return [
        Subnet("smallest", space.smallest),
        *(Subnet(f"drawn {number}", control) for number, control in enumerate(others, start=1)),
        Subnet("largest", space.largest),
    ]


def judge(
    supernet: Supernet,
    subnets: Sequence[Subnet],
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    adapter: Adapter | None = None,
    inputs: Sequence[torch.Tensor] = (),
) -> list[JudgedSubnet]:
    """Return how good subnets are, each with statistics of its own.

    Args:
        supernet: Trained; afterwards it hosts these subnets.
        subnets: Which.
        batches: Not those of the training; without targets the score is how near a subnet is to the largest.
        recipe: Its objective gives the score.
        adapter: What lies between data and model.
        inputs: Batches of the training data, for BatchNorm's statistics.

    Raises:
        ConfigError: There is no batch, or it does not fit.
    """
    adapter = adapter or Adapter()
    supernet.eval()
    supernet.host(subnets)
    if supernet.norms:
        supernet.set_statistics(calibrate(supernet, subnets, inputs))
    learnt, largest = recipe.learnt(), Subnet("largest", supernet.controls.space.largest)
    teacher = next((row for row, one in enumerate(subnets) if one.control == largest.control), None)
    totals, n = [0.0] * len(subnets), 0
    with torch.inference_mode(), apart():
        begin_epoch(batches, recipe.seed, 0)
        for given in batches:
            batch = batch_of(given, supernet.device, adapter)
            outputs = [
                adapter.outputs(supernet.run_with(supernet.prepared(row).settings, batch.inputs))
                for row in range(len(subnets))
            ]
            if batch.targets is None and teacher is None:
                raise ConfigError("judging: expected targets, or the largest among the subnets")
            for row, output in enumerate(outputs):
                if batch.targets is not None:
                    learnt.check(output, batch.targets)
                    scores = learnt.score(output, batch.targets)
                else:
                    assert teacher is not None, "looked at above"
                    scores = learnt.agreement(output, outputs[teacher])
                totals[row] += float(scores.double().sum())
            n += len(batch.inputs)
    if not n:
        raise ConfigError("judging: expected at least one batch, got none")
    return [JudgedSubnet(subnet, total / n) for subnet, total in zip(subnets, totals, strict=True)]
