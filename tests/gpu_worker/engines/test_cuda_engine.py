"""The engine's own logic, with streams, events and pinned memory played on the CPU.

What CUDA itself does is shown by `tests/gpu`, which needs a device.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpu_worker.engines import cuda_engine
from gpu_worker.engines.cuda_engine import CudaEngine
from gpu_worker.engines.torch_executor import Placement
from gpu_worker.models.encoders.bert import BertSizes
from gpu_worker.models.encoders.sentence import sentence_encoder
from gpu_worker.models.kinds import KINDS, resident, supernet_kind
from profiles.table import evenly, load_profile
from superserve.subnet import Subnet, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

SUBNETS = [Subnet(row.name, row.control) for row in load_profile("digits-cpu").subnets]
N_BUFFERS = cuda_engine.N_BUFFERS


class FakeStream:
    """Does everything at once, and in order."""

    def __init__(self, _device: object = None) -> None:
        self.waited_for: list[FakeEvent] = []

    def wait_event(self, event: FakeEvent) -> None:
        """Note what was waited for; it must have been recorded."""
        assert event.is_recorded
        self.waited_for.append(event)

    def synchronize(self) -> None:
        """Nothing is under way."""


class FakeEvent:
    """Is recorded, or not."""

    def __init__(self) -> None:
        self.is_recorded = False

    def record(self, _stream: FakeStream) -> None:
        """Remember it."""
        self.is_recorded = True

    def synchronize(self) -> None:
        """It must have been recorded."""
        assert self.is_recorded


class FakeGraph:
    """Runs the pass again, as a captured one would."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        self.n = 0


@pytest.fixture
def _fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put fakes in the places of what needs a driver."""
    real_empty = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **rest: Any) -> torch.Tensor:
        assert isinstance(pin_memory, bool)
        return real_empty(*args, **rest)

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch, "empty", empty)


def engine_of(*sizes: int, uses_graphs: bool = False) -> CudaEngine:
    """Return an engine with the digits supernet, in host memory."""
    supernet = resident(KINDS["digits"], None)
    supernet.host(SUBNETS)
    placement = Placement(batch_sizes=sizes, uses_graphs=uses_graphs)
    return CudaEngine(supernet, KINDS["digits"], placement, torch.float32)


def plain(row: int, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what a plain pass gives."""
    supernet = resident(KINDS["digits"], None)
    supernet.host(SUBNETS)
    with torch.inference_mode():
        output: np.ndarray[Any, Any] = supernet.run_with(
            supernet.prepared(row).settings, torch.from_numpy(batch)
        ).numpy()
    return output


def queries(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random images."""
    return np.random.default_rng(seed).standard_normal((n, 1, 20, 20)).astype(np.float32)


@pytest.mark.usefixtures("_fake_cuda")
def test_a_staged_batch_answers_as_a_plain_pass() -> None:
    """Padding is zeros, also where a larger batch lay before, and is trimmed from the answer."""
    engine = engine_of(4)
    for seed, n in enumerate((4, 2, 3, 1)):
        batch = queries(n, seed)
        staged = engine.stage(batch, 4)
        assert not staged.inputs[n:].any()
        np.testing.assert_allclose(engine.run(2, staged), plain(2, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fake_cuda")
def test_queries_that_lie_apart_answer_as_one_array() -> None:
    """As they come from the wire: large payloads in frames of their own, each read-only."""
    engine = engine_of(4)
    batch = queries(3)
    apart = [np.frombuffer(query.tobytes(), query.dtype).reshape(query.shape) for query in batch]
    staged = engine.stage(apart, 4)

    assert not staged.inputs[3:].any()
    np.testing.assert_allclose(engine.run(1, staged), plain(1, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fake_cuda")
def test_every_way_out_gives_the_buffer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After runs, failures and discards, as many batches can wait as there are buffers."""
    engine = engine_of(2)

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("the device is on fire")

    for _ in range(3):
        engine.run(0, engine.stage(queries(2), 2))
        engine.discard(engine.stage(queries(2), 2))
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_launch", fail)
            with pytest.raises(RuntimeError, match="on fire"):
                engine.run(0, engine.stage(queries(2), 2))

    assert engine._buffers((2, 1, 20, 20)).qsize() == N_BUFFERS
    staged = [engine.stage(queries(2, seed), 2) for seed in range(N_BUFFERS)]
    assert engine._buffers((2, 1, 20, 20)).empty()
    for seed, one in enumerate(staged):
        np.testing.assert_allclose(engine.run(1, one), plain(1, queries(2, seed)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fake_cuda")
def test_graphs_are_captured_for_each_subnet_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sizes come first; a limited number of rows and sizes get a graph, others run eagerly."""
    monkeypatch.setattr(cuda_engine, "MAX_GRAPH_SUBNETS", 3)
    monkeypatch.setattr(cuda_engine, "MAX_GRAPH_SIZES", 2)
    engine = engine_of(1, 2, 4, uses_graphs=True)
    captured: list[tuple[int, int]] = []

    def capture(row: int, inputs: torch.Tensor, pool: object) -> cuda_engine._Graph:
        assert pool == "pool"
        captured.append((row, len(inputs)))
        output = torch.zeros(len(inputs), 10)

        def replay() -> None:
            output.copy_(engine._supernet.run_with(engine._supernet.prepared(row).settings, inputs))

        return cuda_engine._Graph(FakeGraph(replay), output)  # type: ignore[arg-type]  # a fake

    monkeypatch.setattr(engine, "_captured", capture)
    engine.warm_up()

    assert captured == [(row, size) for size in (2, 1) for row in evenly(len(SUBNETS), 3)]
    for size in (1, 2, 4):
        for row in range(len(SUBNETS)):
            found = engine.run(row, engine.stage(queries(1), size))
            np.testing.assert_allclose(found, plain(row, queries(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fake_cuda")
def test_texts_have_buffers_and_graphs_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch runs at its own length, by the graph of that length; the longest ones are captured first."""
    sizes = BertSizes(n_blocks=2, n_heads=2, head_size=4, n_units=8, n_tokens=50, max_length=32)
    kind = replace(
        supernet_kind("bert-encoder@length=32"),
        build=functools.partial(sentence_encoder, sizes),
        output_spec=TensorSpec("float32", (8,)),
    )
    supernet = resident(kind, "random")
    supernet.host([Subnet("half", {"d": [1]}), Subnet("whole", {"d": [2]})])
    engine = CudaEngine(supernet, kind, Placement(batch_sizes=(2,)), torch.float32)
    replayed: list[tuple[int, ...]] = []

    def capture(row: int, inputs: torch.Tensor, _pool: object) -> cuda_engine._Graph:
        output = torch.zeros(len(inputs), 8)

        def replay() -> None:
            replayed.append((row, *inputs.shape))
            output.copy_(supernet.run_with(supernet.prepared(row).settings, inputs))

        return cuda_engine._Graph(FakeGraph(replay), output)  # type: ignore[arg-type]  # a fake

    monkeypatch.setattr(engine, "_captured", capture)
    engine.warm_up()
    ids = np.random.default_rng(0).integers(1, 50, (2, 32)).astype(np.int32)
    with torch.inference_mode():
        for length in (16, 32):
            found = engine.run(1, engine.stage(ids[:, :length], 2))
            settings = supernet.prepared(1).settings
            expected = supernet.run_with(settings, torch.from_numpy(ids[:, :length]))
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)

    assert list(engine._graphs) == [(0, (2, 32)), (1, (2, 32)), (0, (2, 16)), (1, (2, 16))]
    assert replayed == [(1, 2, 16), (1, 2, 32)]
    assert {shape: free.qsize() for shape, free in engine._free.items()} == {(2, 16): 2, (2, 32): 2}
