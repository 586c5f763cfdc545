"""Measure a family: how accurate each member is on the family's examples, and how long it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gpu_worker.engines.torch_executor import Placement
from gpu_worker.family.engine import FamilyExecutor
from gpu_worker.family.file import load_family
from gpu_worker.models.examples import read_examples
from profiles.measuring.measure import measure, torch_place
from profiles.table import SubnetProfile
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpu_worker.family.file import Family
    from profiles.measuring.measure import Device, Measurement, Setting
    from superserve.clock import Clock


def measure_family(path: Path, setting: Setting, device: Device, *, name: str, clock: Clock) -> Measurement:
    """Make every member of a family resident, prove it, and measure it.

    Args:
        path: The family file.
        setting: How to measure.
        device: Where; its device and threads alone count.
        name: Of the profile.
        clock: Times the runs.

    Raises:
        ConfigError: The file, a member or the device is not as expected, or a member is not proved.
    """
    family = load_family(path)
    placement = Placement(device.device, device.threads, setting.batch_sizes)
    executor = FamilyExecutor.load(family, placement)
    executor.warm_up()
    accuracies, words = _accuracies(family, executor)
    rows = [
        SubnetProfile(subnet.name, subnet.control, accuracies[subnet.name], None, (), ())
        for subnet in executor.subnets
    ]
    rows.sort(key=lambda row: row.accuracy)
    place = torch_place(device.device, device.threads)
    runs_by = executor.runs_by()
    notes = [words, "; ".join(f"{member} by {by}" for member, by in runs_by.items()) + "."]
    notes.append(f"Memory: {executor.memory()}.")
    return measure(
        executor.hosting([row.name for row in rows]), rows, setting,
        replace(place, versions=place.versions | _runtime(runs_by)),
        name=name, supernet=family.name, clock=clock, notes=notes,
    )  # fmt: skip


def _runtime(runs_by: Mapping[str, str]) -> dict[str, str]:
    """Return the version of ONNX Runtime, if a member runs by it."""
    if not any(by.startswith("ONNX Runtime") for by in runs_by.values()):
        return {}
    import onnxruntime  # noqa: PLC0415  an extra's

    return {"onnxruntime": str(onnxruntime.__version__)}


def _accuracies(family: Family, executor: FamilyExecutor) -> tuple[dict[str, float], str]:
    """Return each member's accuracy, given or measured, and how it is known, in words."""
    given = {member.name: member.accuracy for member in family.members if member.accuracy is not None}
    unknown = [member.name for member in family.members if member.accuracy is None]
    words = f"Accuracies are those that {family.path.name} states."
    if not unknown:
        return given, words
    assert family.examples is not None, "load_family checked it"
    measured, n = _measured(executor, family.examples)
    words = f"Accuracy of {', '.join(unknown)} is measured on {n} examples of {family.examples.name}." + (
        f" Other accuracies are those that {family.path.name} states." if given else ""
    )
    return {name: measured[name] for name in unknown} | given, words


def _measured(executor: FamilyExecutor, path: Path) -> tuple[dict[str, float], int]:
    """Return the percentage of a file's examples that each member gets right, and how many they are.

    All are used: nothing was chosen by them.
    """
    spec = executor.output_spec
    if len(spec.shape) > 1:
        raise ConfigError(
            f"{path}: labels: expected members that answer with a number for each class, or a class, got "
            f"{spec.dtype} {list(spec.shape)}: write `accuracy` for each member instead"
        )
    data = read_examples(path, executor.input_spec)
    inputs = np.concatenate([data.selection.inputs, data.held_out.inputs])
    labels = np.concatenate([data.selection.labels, data.held_out.labels])
    size = executor.batch_sizes[-1]
    found = {}
    for row, subnet in enumerate(executor.subnets):
        parts = [executor.execute(row, inputs[i : i + size]) for i in range(0, len(inputs), size)]
        outputs = np.concatenate(parts)
        classes = outputs.argmax(axis=1) if spec.shape else outputs
        found[subnet.name] = 100 * float((classes == labels).mean())
    return found, len(labels)
