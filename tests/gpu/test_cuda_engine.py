"""A resident supernet on a CUDA device: the same answers as on the CPU, by graphs and without."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpu_worker.engines.cuda_engine import MAX_GRAPH_SUBNETS
from gpu_worker.engines.torch_executor import HALF_TOLERANCE, Placement, TorchExecutor
from profiles.table import load_profile, statistics_path
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    import numpy.typing as npt

SIZES = (1, 4, 16)
DIGITS = [Subnet(row.name, row.control) for row in load_profile("digits-cpu").subnets]


def executor(name: str, subnets: list[Subnet], device: str = "cuda", **options: Any) -> TorchExecutor:
    """Return a warmed-up executor; digits with its shipped weights, the others with random ones."""
    is_digits = name == "digits"
    found = TorchExecutor.load(
        name,
        subnets,
        weights=None if is_digits else "random",
        statistics=statistics_path("digits-cpu") if subnets is DIGITS else None,
        placement=Placement(device=device, batch_sizes=SIZES, **options),
    )
    found.warm_up()
    return found


def some_of(name: str, n: int) -> list[Subnet]:
    """Return the smallest, the largest and random subnets of a supernet, `n` in all."""
    from gpu_worker.models.kinds import KINDS  # noqa: PLC0415  it needs no device, but time

    with torch.device("meta"):
        space = KINDS[name].build().controls.space
    rng = np.random.default_rng(0)
    controls = [space.smallest, *(space.random(rng) for _ in range(n - 2)), space.largest]
    return [Subnet(f"s{i}", control) for i, control in enumerate(controls)]


def queries(one: TorchExecutor, n: int) -> npt.NDArray[Any]:
    """Return random queries."""
    spec, rng = one.input_spec, np.random.default_rng(1)
    if np.issubdtype(np.dtype(spec.dtype), np.integer):
        return rng.integers(0, 2 if spec.shape[0] == 2 else 256, (n, *spec.shape)).astype(spec.dtype)
    return rng.standard_normal((n, *spec.shape)).astype(spec.dtype)


def relative(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the relative error of all outputs together."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["digits", "ofa-resnet50", "dynabert"])
@pytest.mark.parametrize("uses_graphs", [True, False])
def test_the_device_answers_as_the_cpu_does(name: str, uses_graphs: bool) -> None:
    """Every subnet at every size, full or padded, in float32."""
    subnets = DIGITS if name == "digits" else some_of(name, 4)
    here = executor(name, subnets, "cpu")
    there = executor(name, subnets, precision="float32", uses_graphs=uses_graphs)
    for n in (1, 3, 16):
        batch = queries(here, n)
        for row in range(len(subnets)):
            assert relative(there.execute(row, batch), here.execute(row, batch)) < 5e-3


@pytest.mark.parametrize("name", ["digits", "ofa-resnet50", "dynabert"])
def test_half_precision_holds_where_it_is_chosen(name: str) -> None:
    """`auto` settles on float16 only where logits stay within the tolerance of float32's."""
    subnets = DIGITS if name == "digits" else some_of(name, 3)
    chosen = executor(name, subnets)
    full = executor(name, subnets, precision="float32")
    batch = queries(full, 16)
    errors = [relative(chosen.execute(row, batch), full.execute(row, batch)) for row in (0, len(subnets) - 1)]

    assert chosen.precision in ("float16", "float32")
    assert max(errors) < 2 * HALF_TOLERANCE


def test_graphs_and_eager_subnets_mix() -> None:
    """More subnets than graphs: those without one run eagerly, and answers depend on neither."""
    subnets = some_of("digits", MAX_GRAPH_SUBNETS + 4)
    graphs = executor("digits", subnets, precision="float32")
    eager = executor("digits", subnets, precision="float32", uses_graphs=False)
    batch = queries(graphs, 3)
    for row in [*range(len(subnets)), 0, 5]:
        assert relative(graphs.execute(row, batch), eager.execute(row, batch)) < 1e-4


def test_a_batch_is_staged_while_another_runs() -> None:
    """Two threads, one that stages and one that runs: every answer is its own batch's."""
    one = executor("digits", DIGITS, precision="float32")
    batches = [queries(one, 1 + i % 16) + np.float32(i) for i in range(200)]
    expected = [one.execute(i % len(DIGITS), batch) for i, batch in enumerate(batches)]
    staged: list[Any] = []
    is_there = threading.Semaphore(0)

    def stage_all() -> None:
        for batch in batches:
            staged.append(one.stage(batch))
            is_there.release()

    thread = threading.Thread(target=stage_all)
    thread.start()
    for i, wanted in enumerate(expected):
        assert is_there.acquire(timeout=30)
        np.testing.assert_allclose(one.run(i % len(DIGITS), staged[i]), wanted, rtol=1e-3, atol=1e-3)
    thread.join()


def test_discarded_batches_give_their_buffers_back() -> None:
    """More are staged and discarded than there are buffers, and the next one still runs."""
    one = executor("digits", DIGITS)
    for _ in range(10):
        one.discard(one.stage(queries(one, 4)))
        with pytest.raises(ConfigError, match="subnet: expected a row"):
            one.run(len(DIGITS), one.stage(queries(one, 4)))

    assert one.execute(0, queries(one, 4)).shape == (4, 10)


def test_memory_is_shared_by_all_subnets() -> None:
    """The device holds the weights once, whatever is hosted: 32 subnets cost little more than one."""
    alone = executor("ofa-resnet50", some_of("ofa-resnet50", 2)[1:], uses_graphs=False, packed_bytes=0)
    many = executor("ofa-resnet50", some_of("ofa-resnet50", 32), uses_graphs=False, packed_bytes=0)

    assert many.memory().device < 1.1 * alone.memory().device
