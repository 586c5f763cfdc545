"""Costs: against torch's own counter and formulas by hand, and latencies of a device that is known."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gpu_worker.engines.torch_executor import example_input
from gpu_worker.models.digits_supernet import DIGITS
from gpu_worker.models.kinds import KINDS, SupernetKind
from gpu_worker.models.ofa_resnet50 import extracted
from profiles.measuring.flops import (
    Cost,
    CostCounter,
    LatencyModel,
    fit_latency,
    measure_and_fit,
    meta_supernet,
    non_negative,
    relative_errors,
    spread,
)
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.subnet import Subnet, TensorSpec
from tests.clock import VirtualClock
from tests.profiles.measuring.test_accuracy import TINY, TINY_BERT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet

_SEED = 11


def controls(kind: SupernetKind, n: int) -> list[Control]:
    """Return the smallest, the largest and `n` random control tuples."""
    space = meta_supernet(kind).controls.space
    rng = np.random.default_rng(_SEED)
    return [space.smallest, space.largest, *(space.random(rng) for _ in range(n))]


def counted_by_torch(run: Callable[[], object]) -> int:
    """Return the multiply-adds of what `run` computes, by torch's counter."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", KINDS)
def test_multiply_adds_are_torchs_own(name: str) -> None:
    """For each supernet: what is remembered from other subnets is what a whole pass of this one counts."""
    kind = KINDS[name]
    counter, plain = CostCounter(kind), meta_supernet(kind)
    inputs = example_input(plain, kind, torch.float32)
    for control in controls(kind, 6):
        settings = plain.settings_of(Subnet("counted", control))
        expected = counted_by_torch(lambda settings=settings: plain.run_with(settings, inputs))  # type: ignore[misc]  # a lambda's default

        assert counter(control).multiply_adds == expected
        assert counter(control) == counter(control)


def test_a_network_of_a_subnets_own_sizes_costs_the_same() -> None:
    """OFA-ResNet50: a plain network without operators, counted by torch."""
    counter = CostCounter(KINDS["ofa-resnet50"])
    for control in controls(KINDS["ofa-resnet50"], 4):
        with torch.device("meta"):
            plain, images = extracted(control).eval(), torch.empty(1, 3, 224, 224)

        assert counter(control).multiply_adds == counted_by_torch(lambda plain=plain, x=images: plain(x))  # type: ignore[misc]  # a lambda's default


def test_attentions_products_are_counted() -> None:
    """DynaBERT by hand: projections, feed-forward, and two products of tokens with tokens in each block."""
    kind = KINDS["dynabert"]
    counter, tokens, width = CostCounter(kind), 128, 768
    for control in controls(kind, 4):
        depth = control["d"][0]
        kept = [i * 12 // depth for i in range(depth)]
        total = width * width + width * 3  # of one token: pooler and classifier
        for block in kept:
            heads = -(-int(control["w"][block] * 100) * 12 // 100) * 64
            units = int(control["w"][block] * 3072)
            total += tokens * width * (4 * heads + 2 * units) + 2 * tokens * tokens * heads

        assert counter(control).multiply_adds == total


def test_convolutions_are_counted_by_their_positions() -> None:
    """Digits by hand: 9 or 1 products for each pair of channels at each of 400, 100 or 25 positions."""
    kind = KINDS["digits"]
    counter = CostCounter(kind)
    for control in controls(kind, 4):
        widths = [-(-int(w * 1000) * c // 1000) for w, c in zip(control["w"], DIGITS.channels, strict=True)]
        total = 400 * 9 * 1 * widths[0] + widths[-1] * 10
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, control["d"], strict=True)):
            positions = (20 // 2**stage) ** 2
            total += positions * 9 * (before * width + width * width)
            total += positions * before * width if stage else 0  # the shortcut
            total += (depth - 1) * positions * 9 * 2 * width * width
            before = width

        assert counter(control).multiply_adds == total
        assert counter(control).kernels == 2 + sum(2 * depth for depth in control["d"]) + 2


def looking(kind: SupernetKind, *, fails: bool = False) -> SupernetKind:
    """Return a kind whose model reads a number of its input, as masks with `.item()` do."""

    def build() -> Supernet:
        supernet = kind.build()
        plain = supernet.model.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if fails or float(x.sum()) < -1e9:
                raise ValueError("not this one")
            out: torch.Tensor = plain(x)
            return out

        supernet.model.forward = forward
        return supernet

    return replace(kind, build=build)


@pytest.mark.parametrize("kind", [TINY, TINY_BERT], ids=lambda kind: kind.name)
def test_a_model_that_looks_at_numbers_is_counted_on_the_cpu(
    kind: SupernetKind, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs what the same model costs that does not look, attention's products included."""
    with caplog.at_level(logging.INFO):
        counter = CostCounter(looking(kind))
    plain = CostCounter(kind)

    assert "the model does not run on torch's meta device" in caplog.text
    assert counter.supernet.device.type == "cpu"
    for control in controls(kind, 4):
        assert counter(control) == plain(control)


def test_a_model_that_cannot_run_is_refused() -> None:
    """The error gives the model's own."""
    counter = CostCounter(looking(TINY, fails=True))
    with pytest.raises(
        ConfigError, match=r"multiply-adds: the model cannot run .*: ValueError: not this one"
    ):
        counter(counter.supernet.controls.space.largest)


# --- the latency model ----------------------------------------------------------------------

COSTS = [
    Cost(multiply_adds=n * 400_000_000 + (n % 3) * 50_000_000, kernels=20 + n // 2 + n % 4)
    for n in range(1, 13)
]


class KnownDevice:
    """Takes 1 ms, 2 ms a billion multiply-adds of each query and 0.05 ms a kernel, on a virtual clock."""

    def __init__(self, clock: VirtualClock, scale: float = 1.0) -> None:
        self.subnets = tuple(Subnet(f"s{row}", {"d": [row]}) for row in range(len(COSTS)))
        self.input_spec = TensorSpec("float32", (2,))
        self.sizes_seen: set[int] = set()
        self._clock = clock
        self._scale = scale

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Move the clock."""
        cost = COSTS[subnet]
        self.sizes_seen.add(len(batch))
        ms = 1 + 2 * cost.gflops * len(batch) + 0.05 * cost.kernels
        self._clock.advance(round(self._scale * ms * MS))
        return batch


def test_the_fit_finds_what_a_device_does() -> None:
    """Each batch size's coefficients are the device's own, and held-out subnets are met."""
    clock = VirtualClock()
    fitted = measure_and_fit(KnownDevice(clock), COSTS, (1, 2, 4), clock)

    assert fitted.model.batch_sizes == (1, 2, 4)
    for size, row in zip((1, 2, 4), fitted.model.coefficients, strict=True):
        assert row == pytest.approx((1, 2 * size, 0.05), rel=1e-3)
    assert (fitted.median_ratio, fitted.p99_ratio) == (1.0, 1.0)
    assert "fitted to 9 subnets measured at batch sizes 1, 2, 4." in fitted.words
    assert "On 3 further measured subnets the model was 0 % off" in fitted.words
    assert [row["fitted_to"] for row in fitted.raw["subnets"]].count(False) == 3


def test_a_slow_device_is_measured_at_small_batches() -> None:
    """If a batch of 16 takes minutes, the others are extrapolated from the small ones, and marked so."""
    clock = VirtualClock()
    device = KnownDevice(clock, scale=100.0)
    fitted = measure_and_fit(device, COSTS, (1, 2, 4, 8, 16), clock)

    assert device.sizes_seen == {1, 2}
    assert "Batch sizes 4, 8, 16 lie on lines through these." in fitted.words
    assert fitted.model.coefficients[-1] == pytest.approx((100, 3200, 5), rel=1e-3)


@example(rows=np.array([(0, 0, 0, 1), (0, 0, 1, 1), (0, 5.9e-55, 0, 1)]))
@example(rows=np.array([(0, 5e-324, 0, 1), (0, 5e-324, 1, 1), (0, 5e-324, 0, 1)]))
@given(
    rows=st.lists(st.tuples(*[st.floats(0, 100)] * 3, st.floats(0.1, 100)), min_size=3, max_size=12).map(
        np.array
    )
)
def test_no_non_negative_coefficients_fit_better(rows: npt.NDArray[np.float64]) -> None:
    """The optimum's conditions hold: no entry below 0, and no step that keeps to this lowers the error."""
    a, b = rows[:, :3], rows[:, 3]
    x = non_negative(a, b)
    error = np.sum((a @ x - b) ** 2)
    rng = np.random.default_rng(0)

    assert (x >= 0).all()
    for step in (0.1, 1e-3):
        for near in np.maximum(x + step * rng.standard_normal((20, 3)), 0):
            assert np.sum((a @ near - b) ** 2) >= error * (1 - 1e-6) - 1e-9


@given(
    coefficients=st.lists(st.tuples(*[st.floats(0, 50)] * 3), min_size=2, max_size=5),
    extra=st.tuples(st.integers(0, 10**10), st.integers(0, 50)),
)
def test_latency_grows_with_costs_and_batches(
    coefficients: list[tuple[float, ...]], extra: tuple[int, int]
) -> None:
    """P1, and whoever costs no more is never slower, whatever was fitted."""
    model = LatencyModel(tuple(range(1, len(coefficients) + 1)), tuple(coefficients))
    small = Cost(10**9, 20)
    table = model.latency_ms([small, small.plus(Cost(*extra))])

    assert (np.diff(table, axis=1) >= 0).all()
    assert (table[1] >= table[0]).all()


def test_one_size_gives_no_line() -> None:
    """Further batch sizes need two measured ones."""
    model = LatencyModel((1,), ((1.0, 1.0, 1.0),))

    assert model.extended((1,)) == model
    with pytest.raises(ConfigError, match="batch_sizes: expected two that were measured"):
        model.extended((1, 2))


def test_errors_are_relative() -> None:
    """A model that predicts 3 ms for 2 ms has an error of half."""
    model = fit_latency(COSTS, (1,), np.full((len(COSTS), 1), 3.0))

    assert relative_errors(model, COSTS, np.full((len(COSTS), 1), 2.0)) == pytest.approx(0.5)


@example(values=[999.9999999999999, 1000.0, -25.0], n=2)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), n=st.integers(2, 12))
def test_a_spread_holds_the_ends(values: Sequence[float], n: int) -> None:
    """As many places as asked for or there are, each once, ascending, with the least and the greatest."""
    places = spread(values, n)

    assert places == sorted(set(places))
    assert len(places) == min(n, len(values))
    chosen = [values[place] for place in places]
    assert {min(chosen), max(chosen)} == {min(values), max(values)}
