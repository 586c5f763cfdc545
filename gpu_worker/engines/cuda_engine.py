"""CudaEngine: one CUDA device, kept busy.

- Each batch waits in pinned memory; a copy stream moves it to the device while the batch before it runs.
- Each pareto subnet and batch size is one CUDA graph, captured at start: a batch costs one launch
  instead of some two hundred. Texts have one for each length that batches are cut to. All graphs share a
  memory pool, since one runs at a time.
- Memory is channels last, and half precision where it holds.

A subnet or a size without a graph, and everything if graphs are off, runs eagerly by the same path.
"""

from __future__ import annotations

from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gpu_worker.engines.torch_executor import Staged, answer, fill, model_input
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.operators.fused_norm import fusing
from profiles.table import evenly

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gpu_worker.engines.torch_executor import Batch, Placement
    from gpu_worker.models.kinds import SupernetKind
    from gpu_worker.supernet.supernet import Supernet

MAX_GRAPH_SUBNETS = 32
"""Most subnets with graphs; of more, an even selection of the rows."""

MAX_GRAPH_SIZES = 8
"""Most batch sizes with graphs; of more, the smallest ones, where launches cost most. On an H100, capturing
160 graphs took 3 s, and they and their buffers held 0.3 GB."""

N_BUFFERS = 2
"""Staging buffers for each size: one is filled while the batch in the other runs."""

_WARM_UP_PASSES = 2  # before a capture: libraries choose their kernels and allocate in these


_Shape = tuple[int, ...]
"""Of a batch on the device: its padded size, then that of one query."""


@dataclass(slots=True)
class _Buffer:
    """Where one batch waits.

    Attributes:
        host: Pinned, (size, *input).
        device: The same on the device.
        output: Pinned, (size, *output).
        is_ready: Recorded when the input has arrived.
        is_done: Recorded when the output is back.
    """

    host: torch.Tensor
    device: torch.Tensor
    output: torch.Tensor
    is_ready: torch.cuda.Event
    is_done: torch.cuda.Event


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor  # (size, *output)


class CudaEngine:
    """One CUDA device; `stage` may be called by one thread while another one calls `run`."""

    def __init__(
        self, supernet: Supernet, kind: SupernetKind, placement: Placement, dtype: torch.dtype
    ) -> None:
        self._supernet = supernet
        self._kind = kind
        self._dtype = dtype
        self._device = supernet.device
        self._sizes = placement.batch_sizes
        self._uses_graphs = placement.uses_graphs
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own
        self._compute = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        spec = kind.input_spec
        lengths = None if kind.lengths is None else kind.lengths.buckets
        # What one query of a batch may be like: its own shape, or that of each bucket of texts.
        self._shapes = [spec.shape] if lengths is None else [(*spec.shape[:-1], n) for n in lengths]
        self._free: dict[_Shape, SimpleQueue[_Buffer]] = {}
        self._inputs: dict[_Shape, torch.Tensor] = {}  # what graphs read
        self._graphs: dict[tuple[int, _Shape], _Graph] = {}

    def stage(self, batch: Batch, size: int) -> Staged:
        """Copy a batch to pinned memory and start its way to the device; waits for a free buffer."""
        buffer = self._buffers((size, *batch[0].shape)).get()
        n = len(batch)
        fill(buffer.host.numpy(), batch)
        with torch.cuda.stream(self._copies):
            buffer.device.copy_(buffer.host, non_blocking=True)
            buffer.is_ready.record(self._copies)
        return Staged(n, buffer.device, buffer)

    def run(self, row: int, staged: Staged) -> npt.NDArray[Any]:
        """Run a staged batch; returns when its output is back."""
        buffer: _Buffer = staged.buffer
        shape = tuple(staged.inputs.shape)
        try:
            with torch.inference_mode(), torch.cuda.stream(self._compute):
                self._compute.wait_event(buffer.is_ready)
                buffer.output.copy_(self._launch(row, shape, staged.inputs), non_blocking=True)
                buffer.is_done.record(self._compute)
            buffer.is_done.synchronize()  # without the interpreter's lock
            return buffer.output[: staged.n].numpy().copy()
        finally:
            self._buffers(shape).put(buffer)

    def discard(self, staged: Staged) -> None:
        """Take the buffer back."""
        self._buffers(tuple(staged.inputs.shape)).put(staged.buffer)

    def warm_up(self) -> None:
        """Capture the graphs, and run eagerly once what has none."""
        with torch.cuda.device(self._device):
            self._warm_up()

    def _warm_up(self) -> None:
        rows, sizes = range(len(self._supernet.subnets)), self._sizes or (1,)
        shapes = [(size, *query) for size in sizes for query in self._shapes]
        for shape in shapes:
            self._buffers(shape)  # now, because pinning takes milliseconds, and a batch must not wait for it
        if self._uses_graphs and self._sizes:
            captured = evenly(len(rows), MAX_GRAPH_SUBNETS)
            self._capture(captured, self._sizes[:MAX_GRAPH_SIZES])
        for size, *query in shapes:
            for row in rows:
                if (row, (size, *query)) not in self._graphs:
                    self.run(row, self.stage(self._zeros(query), size))
        torch.cuda.synchronize(self._device)

    def _launch(self, row: int, shape: _Shape, inputs: torch.Tensor) -> torch.Tensor:
        graph = self._graphs.get((row, shape))
        if graph is None:
            actuate(self._supernet, row)
            return self._forward(inputs)
        self._inputs[shape].copy_(inputs)
        graph.graph.replay()
        return graph.output

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return answer(self._kind, self._supernet(model_input(self._kind, inputs, self._dtype)))

    def _capture(self, rows: Sequence[int], sizes: Sequence[int]) -> None:
        self._supernet.pin(rows)
        pool = torch.cuda.graph_pool_handle()
        # Largest first: smaller ones then fit into the memory that the pool already has.
        for shape in sorted(((size, *query) for size in sizes for query in self._shapes), reverse=True):
            self._inputs[shape] = torch.zeros_like(self._new_input(shape))
            for row in rows:
                self._graphs[row, shape] = self._captured(row, self._inputs[shape], pool)

    def _captured(self, row: int, inputs: torch.Tensor, pool: Any) -> _Graph:
        actuate(self._supernet, row)
        with torch.inference_mode(), fusing():
            with torch.cuda.stream(self._compute):
                for _ in range(_WARM_UP_PASSES):
                    self._forward(inputs)
            self._compute.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._compute):
                output = self._forward(inputs)
        return _Graph(graph, output)

    def _buffers(self, shape: _Shape) -> SimpleQueue[_Buffer]:
        if shape not in self._free:
            queue: SimpleQueue[_Buffer] = SimpleQueue()
            for _ in range(N_BUFFERS):
                queue.put(self._new_buffer(shape))
            self._free[shape] = queue
        return self._free[shape]

    def _new_buffer(self, shape: _Shape) -> _Buffer:
        device = self._new_input(shape)
        with torch.cuda.device(self._device):  # pinning initialises the current device, even another one
            host = torch.empty(device.shape, dtype=device.dtype, pin_memory=True)
            spec = self._kind.output_spec
            output = torch.empty((shape[0], *spec.shape), dtype=getattr(torch, spec.dtype), pin_memory=True)
        is_ready, is_done = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        return _Buffer(host, device, output, is_ready, is_done)

    def _new_input(self, shape: _Shape) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, self._kind.input_spec.dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _zeros(self, query: Sequence[int]) -> npt.NDArray[Any]:
        zeros: npt.NDArray[Any] = torch.zeros(
            (1, *query), dtype=getattr(torch, self._kind.input_spec.dtype)
        ).numpy()
        return zeros
