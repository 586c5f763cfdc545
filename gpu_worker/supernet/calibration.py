"""SubnetNorm's statistics: gathered by passes over calibration data, kept in one small file.

The file is safetensors:

    values    float32, all subnets' `SubnetStatistics.values`, end to end
    channels  int32 (subnets, norms), each subnet's `SubnetStatistics.channels`

with metadata

    supernet  whose it is
    subnets   JSON, a list of {"name", "control"}
    norms     JSON, the norms' paths
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gpu_worker.supernet.operators import NormCalibration
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from gpu_worker.supernet.supernet import Supernet
    from superserve.subnet import Subnet


def calibrate(
    supernet: Supernet, subnets: Iterable[Subnet], batches: Sequence[torch.Tensor]
) -> dict[str, SubnetStatistics]:
    """Gather each subnet's statistics: means over all examples of what each norm's input is like.

    A batch counts by its examples, and its variance is the biased one, as in Once for All. A norm behind
    another sees what that one normalised by the batch. The subnets need not be hosted. What is actuated,
    and what the supernet holds, stays; dropout is off meanwhile.

    Args:
        supernet: In float32, on any device.
        subnets: The subnets to gather statistics for.
        batches: Inputs of the model, each of several queries; more of them give steadier statistics.

    Returns:
        By subnet name; {} if the supernet has no BatchNorm.

    Raises:
        ConfigError: If there is no batch, or a subnet does not fit.

    Source: Cai et al., "Once for All" (ICLR '20), `set_running_statistics` of its published code.
    """
    if not batches:
        raise ConfigError("calibration: expected at least one batch")
    if not supernet.norms:
        return {}
    with _in_evaluation(supernet.model):
        return {subnet.name: _calibrate_one(supernet, subnet, batches) for subnet in subnets}


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation, and back to what each was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


def _calibrate_one(supernet: Supernet, subnet: Subnet, batches: Sequence[torch.Tensor]) -> SubnetStatistics:
    settings = list(supernet.settings_of(subnet))
    gathered = []
    for norm in supernet.norms:
        zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=supernet.device)
        gathered.append(NormCalibration(zeros, torch.ones_like(zeros)))
        settings[norm.place] = gathered[-1]
    with torch.no_grad():
        for batch in batches:
            supernet.run_with(tuple(settings), batch.to(supernet.device))
    parts = [part[: seen.channels] for seen in gathered for part in (seen.mean, seen.variance)]
    values = torch.cat(parts).float().cpu() if parts else torch.empty(0)
    return SubnetStatistics(tuple(seen.channels for seen in gathered), values)


def save_statistics(path: Path, supernet: Supernet, name: str, subnets: Sequence[Subnet]) -> None:
    """Write the statistics that `supernet`, called `name`, holds of `subnets`.

    Raises:
        ConfigError: If it holds none of a subnet.
    """
    missing = [subnet.name for subnet in subnets if subnet.name not in supernet.statistics]
    if missing:
        raise ConfigError(f"statistics: subnet {missing[0]} was not calibrated")
    held = [supernet.statistics[subnet.name] for subnet in subnets]
    tensors = {
        "values": torch.cat([one.values for one in held]) if held else torch.empty(0),
        "channels": torch.tensor([one.channels for one in held], dtype=torch.int32),
    }
    metadata = {
        "supernet": name,
        "subnets": json.dumps([{"name": subnet.name, "control": subnet.control} for subnet in subnets]),
        "norms": json.dumps([norm.path for norm in supernet.norms]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata=metadata))


def load_statistics(
    path: Path, supernet: Supernet, name: str, subnets: Sequence[Subnet]
) -> dict[str, SubnetStatistics]:
    """Read the statistics of `subnets`, of the supernet called `name`.

    Raises:
        ConfigError: A subnet is missing in the file or has another control tuple there, or something
            else does not fit; the error names the file and the subnet.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values, channels = file.get_tensor("values"), file.get_tensor("channels").tolist()
        if metadata.get("supernet") != name:
            raise ConfigError(f"expected statistics of {name}, got those of {metadata.get('supernet')}")
        if json.loads(metadata["norms"]) != [norm.path for norm in supernet.norms]:
            raise ConfigError(f"norms: expected those of {name}, in its order")
        known = {
            row["name"]: (number, row["control"])
            for number, row in enumerate(json.loads(metadata["subnets"]))
        }
        starts = _starts(channels, values)
        return {subnet.name: _one(subnet, known, channels, starts, values) for subnet in subnets}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: expected a file of SubnetNorm's statistics: {error!r}") from error


def _starts(channels: Sequence[Sequence[int]], values: torch.Tensor) -> list[int]:
    starts = [0]
    for row in channels:
        starts.append(starts[-1] + 2 * sum(row))
    if starts[-1] != len(values):
        raise ConfigError(f"values: expected {starts[-1]}, got {len(values)}")
    return starts


def _one(
    subnet: Subnet,
    known: Mapping[str, tuple[int, object]],
    channels: Sequence[Sequence[int]],
    starts: Sequence[int],
    values: torch.Tensor,
) -> SubnetStatistics:
    if subnet.name not in known:
        raise ConfigError(f"subnet {subnet.name}: not in the file")
    number, control = known[subnet.name]
    if control != subnet.control:
        raise ConfigError(
            f"subnet {subnet.name}: expected the control tuple {subnet.control}, the file has {control}"
        )
    return SubnetStatistics(tuple(channels[number]), values[starts[number] : starts[number + 1]].clone())


def accuracy_percent(
    forward: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Return the percentage of labels (B,) that `forward` of inputs hits.

    Args:
        forward: Returns logits (B, classes), which peak at the answer, or class numbers (B,).
        batches: Inputs and their labels.

    Raises:
        ConfigError: If there is no batch, or the answers are neither.
    """
    right = total = 0
    with torch.inference_mode():
        for inputs, labels in batches:
            answers = forward(inputs)
            if answers.dim() != (2 if answers.is_floating_point() else 1):
                raise ConfigError(
                    "accuracy: expected logits (B, classes) or class numbers (B,), "
                    f"got {answers.dtype} {tuple(answers.shape)}"
                )
            classes = answers.argmax(1) if answers.is_floating_point() else answers
            right += int((classes.cpu() == labels.cpu()).sum())
            total += len(labels)
    if not total:
        raise ConfigError("accuracy: expected at least one batch")
    return 100 * right / total
