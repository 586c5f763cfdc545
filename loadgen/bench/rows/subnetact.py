"""What SubnetAct costs and saves on OFA-ResNet50, on one CPU thread: actuation, running in place, memory.

Weights are random: neither time nor bytes depend on their values.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics as st
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gpu_worker.models.kinds import KINDS, RANDOM, resident
from gpu_worker.models.names import OFA_RESNET50
from gpu_worker.models.ofa_resnet50 import OfaResNet50, extracted
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.calibration import calibrate
from loadgen.bench.rows.calls import actuation_ns
from loadgen.bench.rows.row import BenchRow
from profiles.table import evenly, load_profile
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import MemoryReport, Supernet

PROFILE = "ofa-resnet50-pareto"
"""A pareto set of the supernet: 32 subnets or more."""

N_RESIDENT, N_EXTRACTED, N_HOSTED = 32, 6, 500
_PIXELS = 224
_ROUNDS = {1: 24, 16: 4}  # by batch size, for each subnet and way to run it
_CALIBRATION_PIXELS = 32  # statistics have the same size for any image

HAND_MADE = {"ResNet-18": (2, 2, 2, 2), "ResNet-34": (3, 4, 6, 3), "ResNet-50": (3, 4, 6, 3),
             "ResNet-101": (3, 4, 23, 3)}  # fmt: skip
"""Blocks of each stage; the last two have bottlenecks."""


def resnet_parameters(name: str) -> int:
    """Return the parameters of a hand-made ResNet for 1,000 classes, from its definition.

    Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR '16), table 1.
    """
    has_bottlenecks = name in ("ResNet-50", "ResNet-101")
    total, before = _conv(3, 64, 7), 64
    for stage, n_blocks in enumerate(HAND_MADE[name]):
        width = 64 * 2**stage
        out = 4 * width if has_bottlenecks else width
        for block in range(n_blocks):
            if has_bottlenecks:
                total += _conv(before, width, 1) + _conv(width, width, 3) + _conv(width, out, 1)
            else:
                total += _conv(before, width, 3) + _conv(width, out, 3)
            if block == 0 and before != out:
                total += _conv(before, out, 1)
            before = out
    return total + 1000 * before + 1000


def _conv(inputs: int, outputs: int, kernel_size: int) -> int:
    """Return the parameters of a convolution without bias, and of the scale and shift after it."""
    return inputs * outputs * kernel_size**2 + 2 * outputs


def control_of(subnet: Subnet) -> Control:
    """Return a subnet's control tuple."""
    assert subnet.control is not None, "a pareto set has control tuples"
    return dict(subnet.control)


def n_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


class _Ratios(NamedTuple):
    """How long one subnet takes in place compared with extracted, at one batch size; medians over rounds."""

    views: float
    packed: float


class SubnetAct:
    """Measures one row each; each builds a new supernet, because some rows drop a part of it."""

    @functools.cached_property
    def supernet(self) -> Supernet:
        """OFA-ResNet50 on one thread, channels last, hosting the pareto set."""
        torch.set_num_threads(1)
        supernet = resident(KINDS[OFA_RESNET50], RANDOM)
        supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
        supernet.host(self.pareto)
        return supernet

    @functools.cached_property
    def pareto(self) -> tuple[Subnet, ...]:
        """The subnets of the profile."""
        return tuple(Subnet(row.name, row.control) for row in load_profile(PROFILE).subnets)

    def actuation(self) -> BenchRow:
        """Actuate random subnets of the resident 32, each with its own statistics; p99.

        The reference is what actuation replaces: reading the middle subnet's checkpoint from disk.
        """
        supernet = self._host(self._resident())
        p50_ns, p99_ns = actuation_ns(supernet)
        hosted = self._host(self._random(N_HOSTED))
        many_p50_ns, many_p99_ns = actuation_ns(hosted)
        first_us = _first_us(hosted)
        load_us = _load_us(control_of(self.pareto[len(self.pareto) // 2]))
        conditions = {
            "supernet": OFA_RESNET50, "subnets": N_RESIDENT, "p50_us": p50_ns / 1e3, "budget_us": 1_000,
            f"of_{N_HOSTED}_hosted_p50_us": many_p50_ns / 1e3,
            f"of_{N_HOSTED}_hosted_p99_us": many_p99_ns / 1e3,
            "first_time_p50_us": first_us,
        }  # fmt: skip
        return BenchRow("actuation_us", p99_ns / 1e3, "us", "the subnet read from disk", load_us, conditions)

    def actuated_over_extracted(self) -> BenchRow:
        """Run the smallest, the middle and the largest subnet in place and extracted; the worst ratio."""
        self.supernet.host(self.pareto)
        self.supernet.trim(_images(1))
        found: dict[str, float] = {}
        for batch_size, rounds in _ROUNDS.items():
            x = _images(batch_size)
            ratios = [self._ratios(row, x, rounds) for row in evenly(len(self.pareto), 3)]
            found[f"views_batch_{batch_size}"] = max(ratio.views for ratio in ratios)
            found[f"packed_batch_{batch_size}"] = max(ratio.packed for ratio in ratios)
        conditions = {
            "supernet": OFA_RESNET50, "threads": 1, "pixels": _PIXELS, **found,
            "budgets": {"views_batch_1": 1.6, "views_batch_16": 1.25, "packed": 1.05},
        }  # fmt: skip
        return BenchRow("actuated_over_extracted", found["views_batch_1"], "x", "budget", 1.6, conditions)

    def memory_ratio(self) -> BenchRow:
        """Bytes of six extracted subnets over the supernet's with 32 resident, as a worker holds it.

        A worker trims the supernet to what its subnets use; whole, it could host any other subnet too.
        """
        chosen = [control_of(self.pareto[row]) for row in evenly(len(self.pareto), N_EXTRACTED)]
        alone = sum(n_bytes(extracted(control)) for control in chosen)
        trimmed = copy.deepcopy(self._host(self._resident()))
        whole = trimmed.memory()
        trimmed.trim(_images(1))
        report = _resident_memory(trimmed)
        hand_made = 4 * sum(map(resnet_parameters, HAND_MADE))
        many = self._host(self._random(N_HOSTED)).memory()
        conditions = {
            "supernet": OFA_RESNET50, "resident_subnets": report.n_resident, "device_bytes": report.device,
            "statistics_bytes": report.statistics_resident,
            "statistics_over_shared_pct": 100 * report.statistics_resident / report.shared,
            "extracted_bytes": alone,
            "whole_bytes": whole.device, "extracted_over_whole": alone / whole.device,
            "hand_made_bytes": hand_made, "hand_made_over_supernet": hand_made / report.device,
            f"with_{N_HOSTED}_hosted_shared_bytes": many.shared,
            f"with_{N_HOSTED}_hosted_statistics_bytes": many.statistics_resident + many.statistics_idle,
        }  # fmt: skip
        return BenchRow("memory_ratio", alone / report.device, "x", "budget", 2.6, conditions)

    def _random(self, n: int) -> list[Subnet]:
        drawn = np.random.default_rng(0)
        return [Subnet(f"s{i}", self.supernet.controls.space.random(drawn)) for i in range(n)]

    def _resident(self) -> list[Subnet]:
        return [self.pareto[row] for row in evenly(len(self.pareto), N_RESIDENT)]

    def _host(self, subnets: Sequence[Subnet]) -> Supernet:
        """Host subnets, each with its own statistics, and prepare as many as stay resident."""
        images = torch.randn(2, 3, _CALIBRATION_PIXELS, _CALIBRATION_PIXELS)
        supernet = self.supernet
        supernet.host(subnets)
        supernet.set_statistics(calibrate(supernet, subnets, [images]))
        _resident_memory(supernet)
        return supernet

    def _ratios(self, row: int, x: torch.Tensor, rounds: int) -> _Ratios:
        """Run one subnet by views, packed and extracted in turn; compare within each round."""
        alone = extracted(control_of(self.pareto[row])).eval()
        alone = alone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
        packed = copy.deepcopy(self.supernet)
        packed.pack([row], x[:1], budget_bytes=2**30)
        for supernet in (self.supernet, packed):
            actuate(supernet, row)
        ways: list[Callable[[torch.Tensor], torch.Tensor]] = [self.supernet, packed, alone]
        took_ms = np.empty((rounds + 1, len(ways)))  # the first round warms up
        for number in range(rounds + 1):
            for turn in range(len(ways)):
                way = (number + turn) % len(ways)
                took_ms[number, way] = _run_ms(ways[way], x)
        views, of_packed, _ = np.median(took_ms[1:] / took_ms[1:, 2:], axis=0).tolist()
        return _Ratios(views, of_packed)


def _resident_memory(supernet: Supernet) -> MemoryReport:
    """Return the memory of a supernet once all its subnets have run."""
    for row in range(len(supernet.subnets)):
        actuate(supernet, row)
    return supernet.memory()


def _first_us(supernet: Supernet) -> float:
    """Return the median time of a subnet's first actuation, which makes views of its statistics."""
    supernet.host(supernet.subnets)  # now only the first is prepared
    taken = []
    for row in range(1, len(supernet.subnets)):
        began_ns = time.perf_counter_ns()
        actuate(supernet, row)
        taken.append((time.perf_counter_ns() - began_ns) / 1e3)
    return st.median(taken)


def _run_ms(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    with torch.inference_mode():
        began_ns = time.perf_counter_ns()
        forward(x)
        return (time.perf_counter_ns() - began_ns) / 1e6


def _images(batch_size: int) -> torch.Tensor:
    images = torch.randn(batch_size, 3, _PIXELS, _PIXELS)
    return images.contiguous(memory_format=torch.channels_last)


def _load_us(control: Control) -> float:
    """Return the median time to read a subnet's checkpoint into a model, its file in the page cache."""
    model = extracted(control)
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subnet.pt"
        torch.save(model.state_dict(), path)
        for _ in range(5):
            began_ns = time.perf_counter_ns()
            _read(path, model)
            taken.append((time.perf_counter_ns() - began_ns) / 1e3)
            gc.collect()
    return st.median(taken)


def _read(path: Path, model: OfaResNet50) -> None:
    model.load_state_dict(torch.load(path, weights_only=True))
