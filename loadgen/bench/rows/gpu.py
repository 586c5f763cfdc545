"""What SubnetAct costs and saves on a CUDA device, with OFA-ResNet50 as a worker holds it.

Weights are random: neither time nor bytes depend on their values. Kernels are timed by events around
replays of a CUDA graph, so that the comparison is of the device's work, without the launches.
"""

from __future__ import annotations

import copy
import functools
import statistics as st
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gpu_worker.engines.torch_executor import Placement, TorchExecutor
from gpu_worker.models.kinds import KINDS, RANDOM, resident
from gpu_worker.models.names import OFA_RESNET50
from gpu_worker.models.ofa_resnet50 import extracted
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.calibration import calibrate
from gpu_worker.supernet.operators.fused_norm import fusing
from loadgen.bench.rows.calls import actuation_ns
from loadgen.bench.rows.row import BenchRow
from loadgen.bench.rows.subnetact import N_EXTRACTED, N_HOSTED, N_RESIDENT, PROFILE, control_of, n_bytes
from profiles.table import evenly, load_profile
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from gpu_worker.supernet.supernet import Supernet

_PIXELS, _CALIBRATION_PIXELS = 224, 64
_SIZES = (1, 16)
_ROUNDS = 200
_WARM_UP = 5


class OnGpu:
    """Measures one row each, on the first CUDA device."""

    @functools.cached_property
    def pareto(self) -> tuple[Subnet, ...]:
        """The subnets of the profile."""
        return tuple(Subnet(row.name, row.control) for row in load_profile(PROFILE).subnets)

    @functools.cached_property
    def three(self) -> tuple[Subnet, ...]:
        """The smallest, the middle and the largest of these."""
        return tuple(self.pareto[row] for row in evenly(len(self.pareto), 3))

    def actuation(self) -> BenchRow:
        """Actuate random subnets of the resident 32, each with its own statistics; p99.

        Also: the first time, when a subnet's statistics are copied from host memory, including the copy; and
        what alternating between two subnets costs a served batch of one. The reference is what actuation
        replaces: reading the middle subnet's checkpoint from disk to the device.
        """
        supernet = _supernet(self.pareto[:N_RESIDENT])
        p50_ns, p99_ns = actuation_ns(supernet)
        drawn = np.random.default_rng(0)
        hosted = _supernet([Subnet(f"s{i}", _random(supernet, drawn)) for i in range(N_HOSTED)])
        first_us = _first_us(hosted)
        load_us = _load_us(self.three[1])
        conditions = {
            **_conditions(), "subnets": N_RESIDENT, "p50_us": p50_ns / 1e3, "budget_us": 1_000,
            f"first_time_of_{N_HOSTED}_hosted_p50_us": float(np.quantile(first_us, 0.5)),
            f"first_time_of_{N_HOSTED}_hosted_p99_us": float(np.quantile(first_us, 0.99)),
            **self._switch(),
        }  # fmt: skip
        reference = "the subnet read from disk to the device"
        return BenchRow("gpu_actuation_us", p99_ns / 1e3, "us", reference, load_us, conditions)

    def _switch(self) -> dict[str, float]:
        """Return the median microseconds of a batch of one on one subnet, and alternating between two."""
        executor = _executor([self.pareto[0], self.pareto[1]], uses_graphs=True)
        batch = _queries(executor, 1)
        same = [st.median(_execute_us(executor, (row,), batch)) for row in (0, 1)]
        alternating = st.median(_execute_us(executor, (0, 1), batch))
        return {"batch_of_1_same_subnet_us": st.mean(same), "batch_of_1_alternating_us": alternating}

    def graph_speedup(self) -> BenchRow:
        """A batch of one on the middle subnet, by a CUDA graph compared with kernel by kernel."""
        by_graph = _executor(self.three, uses_graphs=True)
        eager = _executor(self.three, uses_graphs=False)
        found: dict[str, dict[str, float]] = {}
        for size in _SIZES:
            batch = _queries(eager, size)
            for row, subnet in enumerate(self.three):
                graph_us, eager_us = (
                    st.median(_execute_us(executor, (row,), batch)) for executor in (by_graph, eager)
                )
                found[f"{subnet.name}_batch_{size}"] = {"graph_us": graph_us, "eager_us": eager_us}
        middle = found[f"{self.three[1].name}_batch_1"]
        conditions = {**_conditions(by_graph), "copies_counted": True, "each": found}
        return BenchRow(
            "gpu_graph_us", middle["graph_us"], "us", "launched eagerly", middle["eager_us"], conditions
        )

    def actuated_over_extracted(self) -> BenchRow:
        """The device's time for a batch in place over that of the extracted subnet; the worst."""
        supernet = _supernet(self.three)
        supernet.trim(_images(1, torch.float32))
        supernet.to_half()
        found: dict[str, float] = {}
        for size in _SIZES:
            x = _images(size, torch.float16)
            ratios = [self._ratios(supernet, row, x) for row in range(len(self.three))]
            found[f"views_batch_{size}"] = max(views for views, _ in ratios)
            found[f"packed_batch_{size}"] = max(packed for _, packed in ratios)
        conditions = {
            **_conditions(), "precision": "float16", "pixels": _PIXELS, **found,
            "budgets": {"views_batch_1": 1.6, "views_batch_16": 1.25, "packed": 1.05},
        }  # fmt: skip
        return BenchRow("gpu_actuated_over_extracted", found["views_batch_1"], "x", "budget", 1.6, conditions)

    def _ratios(self, supernet: Supernet, row: int, x: torch.Tensor) -> tuple[float, float]:
        """Return the time by views, and packed, over the time of the extracted subnet."""
        alone = _halved(extracted(control_of(self.three[row])).eval()).cuda()
        alone = alone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
        packed = copy.deepcopy(supernet)
        packed.pack([row], x[:1], budget_bytes=2**30)
        for one in (supernet, packed):
            actuate(one, row)
        views_us, packed_us, alone_us = _replay_us([supernet, packed, alone], x)
        return views_us / alone_us, packed_us / alone_us

    def memory_ratio(self) -> BenchRow:
        """Bytes on the device of six extracted subnets over those of a worker's supernet with 32 resident."""
        chosen = [control_of(self.pareto[row]) for row in evenly(len(self.pareto), N_EXTRACTED)]
        before = torch.cuda.memory_allocated()
        alone = [
            _halved(extracted(control).eval()).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
            for control in chosen
        ]
        alone_bytes = torch.cuda.memory_allocated() - before
        parameters = sum(map(n_bytes, alone))
        del alone
        torch.cuda.empty_cache()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        executor = _executor(self.pareto[:N_RESIDENT], uses_graphs=True, sizes=(1, 2, 4, 8, 16))
        report = executor.memory()
        with_graphs = torch.cuda.memory_allocated() - before
        conditions = {
            **_conditions(executor), "resident_subnets": report.n_resident, "reported_bytes": report.device,
            "statistics_bytes": report.statistics_resident, "packed_bytes": report.packed,
            "extracted_parameter_bytes": parameters, "allocated_with_graphs_and_buffers_bytes": with_graphs,
            "reserved_with_graphs_and_buffers_bytes": torch.cuda.memory_reserved() - reserved,
        }  # fmt: skip
        return BenchRow("gpu_memory_ratio", alone_bytes / report.device, "x", "budget", 2.6, conditions)


def _conditions(executor: TorchExecutor | None = None) -> dict[str, Any]:
    found = {
        "supernet": OFA_RESNET50, "device": torch.cuda.get_device_name(), "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }  # fmt: skip
    return found if executor is None else {**found, "precision": executor.precision}


def _supernet(subnets: Sequence[Subnet]) -> Supernet:
    """Return OFA-ResNet50 on the device, channels last, hosting subnets with their own statistics."""
    supernet = resident(KINDS[OFA_RESNET50], RANDOM)
    supernet.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
    images = torch.randn(2, 3, _CALIBRATION_PIXELS, _CALIBRATION_PIXELS)
    supernet.host(subnets)
    supernet.set_statistics(calibrate(supernet, subnets, [images]))
    for row in range(len(subnets)):
        actuate(supernet, row)
    return supernet


def _executor(
    subnets: Sequence[Subnet], *, uses_graphs: bool, sizes: tuple[int, ...] = _SIZES
) -> TorchExecutor:
    placement = Placement(device="cuda", batch_sizes=sizes, uses_graphs=uses_graphs)
    executor = TorchExecutor.load(OFA_RESNET50, subnets, weights=RANDOM, placement=placement)
    executor.warm_up()
    return executor


def _random(supernet: Supernet, drawn: np.random.Generator) -> Any:
    return supernet.controls.space.random(drawn)


def _queries(executor: TorchExecutor, n: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, *executor.input_spec.shape)).astype(np.uint8)


def _images(n: int, dtype: torch.dtype) -> torch.Tensor:
    images = torch.randn(n, 3, _PIXELS, _PIXELS, device="cuda", dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last)


def _halved(model: nn.Module) -> nn.Module:
    """Cast a network as a worker casts its supernet: everything except the norms."""
    for module in model.modules():
        if not isinstance(module, nn.BatchNorm2d) and not list(module.children()):
            module.half()
    return model


def _execute_us(executor: TorchExecutor, rows: Sequence[int], batch: npt.NDArray[Any]) -> list[float]:
    """Return the microseconds of batches that run on `rows` in turn, including copies in both directions."""
    took_us = []
    for number in range(_WARM_UP + _ROUNDS):
        began_ns = time.perf_counter_ns()
        executor.execute(rows[number % len(rows)], batch)
        took_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return took_us[_WARM_UP:]


def _replay_us(ways: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> list[float]:
    """Return each way's median microseconds on the device, replayed in turn as CUDA graphs."""
    graphs = [_captured(way, x) for way in ways]
    took_ms = np.empty((_WARM_UP + _ROUNDS, len(graphs)))
    for number in range(len(took_ms)):
        for way, graph in enumerate(graphs):
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            took_ms[number, way] = begin.elapsed_time(end)
    medians: list[float] = (1e3 * np.median(took_ms[_WARM_UP:], axis=0)).tolist()
    return medians


def _captured(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    with torch.inference_mode(), fusing():
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            forward(x)
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own


def _first_us(supernet: Supernet) -> npt.NDArray[np.float64]:
    """Return the times of subnets' first actuations, including the copy of their statistics."""
    supernet.host(supernet.subnets)  # now only the first is prepared
    torch.cuda.synchronize()
    taken = []
    for row in range(1, len(supernet.subnets)):
        began_ns = time.perf_counter_ns()
        actuate(supernet, row)
        torch.cuda.synchronize()
        taken.append((time.perf_counter_ns() - began_ns) / 1e3)
    return np.asarray(taken)


def _load_us(subnet: Subnet) -> float:
    """Return the median time to read a subnet's checkpoint to the device, its file in the page cache."""
    model = extracted(control_of(subnet)).cuda()
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subnet.pt"
        torch.save(model.state_dict(), path)
        for _ in range(5):
            torch.cuda.synchronize()
            began_ns = time.perf_counter_ns()
            model.load_state_dict(torch.load(path, map_location="cuda", weights_only=True))
            torch.cuda.synchronize()
            taken.append((time.perf_counter_ns() - began_ns) / 1e3)
    return st.median(taken)
