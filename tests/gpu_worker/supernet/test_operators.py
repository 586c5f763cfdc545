"""The operators by themselves: slices, groups, norms, switches, on small cases worked out by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpu_worker.supernet.control import first_blocks, sliced_size, spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import (
    NormCalibration,
    Statistics,
    SubnetNorm,
    WeightSlice,
    WeightSliceLinear,
    operators_in,
)
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet


def values(tensor: torch.Tensor) -> set[float]:
    """Return the different values in a tensor."""
    return set(tensor.flatten().tolist())


def filled(layer: nn.Module, value: float = 1.0) -> nn.Module:
    """Return the layer with every parameter at `value`."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def run(supernet: Supernet, width: float, x: torch.Tensor) -> torch.Tensor:
    """Run with one elastic size at `width`, without gradients."""
    sizes = supernet.controls.sizes_of({"w": [width]})
    settings = list(supernet._inserted.defaults)
    for name, outputs in sizes.outputs.items():
        for layer in supernet._inserted.sizes[name]:
            settings[layer.place] = outputs
    with torch.inference_mode():
        return cast("torch.Tensor", supernet.run_with(tuple(settings), x))


@given(percent=st.integers(1, 100), size=st.integers(1, 4096))
def test_the_sliced_size_is_the_exact_ceiling(percent: int, size: int) -> None:
    """A width of p hundredths keeps ceil(p * size / 100) channels, whatever floating point makes of it."""
    assert sliced_size(percent / 100, size) == -(-percent * size // 100)


@given(depth=st.integers(0, 12), n_blocks=st.integers(1, 12))
def test_first_blocks_are_the_first(depth: int, n_blocks: int) -> None:
    """As many as the depth, from the front, and never more than there are."""
    assert first_blocks(depth, n_blocks) == tuple(range(n_blocks))[:depth]


@given(n_blocks=st.integers(1, 48), data=st.data())
def test_spread_blocks_are_evenly_spread(n_blocks: int, data: st.DataObject) -> None:
    """As many as the depth, the first among them, with gaps that differ by one at most."""
    depth = data.draw(st.integers(1, n_blocks))
    kept = spread_blocks(depth, n_blocks)
    gaps = [after - before for before, after in zip(kept, (*kept[1:], n_blocks), strict=True)]

    assert len(kept) == depth
    assert kept[0] == 0
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("n_skipped", [1, 2, 3, 4, 6])
def test_spread_blocks_are_every_other_where_the_depth_divides(n_skipped: int) -> None:
    """With L divisible by L - D, block n is skipped iff (n + 1) mod (L / (L - D)) = 0, as the paper says."""
    every = 12 // n_skipped
    kept = tuple(n for n in range(12) if (n + 1) % every)

    assert spread_blocks(12 - n_skipped, 12) == kept


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: nn.Linear(4, 8)])
def test_a_slice_is_a_view_of_the_resident_weights(make: type[nn.Module]) -> None:
    """Every subnet's weight and bias share the resident parameters' storage, and see them change."""
    supernet = insert(nn.Sequential(make()), elastic=[Elastic("w", ["0"])])
    (layer,) = operators_in(supernet)
    assert isinstance(layer, WeightSlice)
    run(supernet, 0.25, torch.ones(1, 4) if isinstance(layer, WeightSliceLinear) else torch.ones(1, 4, 5, 5))
    ((key, found),) = layer.slices.items()

    assert key == (2, 4)
    assert found.weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    assert layer.bias is not None
    assert found.bias is not None
    assert found.bias.untyped_storage().data_ptr() == layer.bias.untyped_storage().data_ptr()
    with torch.no_grad():
        layer.weight.fill_(7.0)
    assert values(found.weight) == {7.0}


def test_a_linear_layer_by_hand() -> None:
    """Weights 1 .. 8 in two columns: the first 2 outputs of inputs (1, 10) are 1 + 20 and 3 + 40."""
    layer = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0).view(4, 2))
    supernet = insert(nn.Sequential(layer), elastic=[Elastic("w", ["0"])])

    assert run(supernet, 0.5, torch.tensor([[1.0, 10.0]])).tolist() == [[21, 43]]
    assert run(supernet, 1.0, torch.tensor([[1.0]])).tolist() == [[1, 3, 5, 7]]  # its first input alone


def test_a_depthwise_convolution_follows_its_input() -> None:
    """A 1 x 1 depthwise convolution with weights 1, 2, 3, 4 behind one that keeps 3 of 4 channels."""
    depthwise = nn.Conv2d(4, 4, 1, groups=4, bias=False)
    with torch.no_grad():
        depthwise.weight.copy_(torch.arange(1.0, 5.0).view(4, 1, 1, 1))
    model = nn.Sequential(filled(nn.Conv2d(1, 4, 1, bias=False)), depthwise)
    supernet = insert(model, elastic=[Elastic("w", ["0"])])

    assert run(supernet, 0.75, torch.ones(1, 1, 1, 1)).flatten().tolist() == [1, 2, 3]


def test_a_grouped_convolution_keeps_whole_groups() -> None:
    """Two groups of 2 inputs and 3 outputs: half the channels fill one group, which gives 3 outputs of 2."""
    grouped = filled(nn.Conv2d(4, 6, 1, groups=2, bias=False))
    supernet = insert(
        nn.Sequential(filled(nn.Conv2d(1, 4, 1, bias=False)), grouped), elastic=[Elastic("w", ["0"])]
    )

    assert run(supernet, 0.5, torch.ones(1, 1, 1, 1)).flatten().tolist() == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"1: expected a multiple of 2 inputs, .* up to 4, got 3"):
        run(supernet, 0.75, torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kind", "n_axes"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_every_convolution_gives_the_whole_when_nothing_is_cut(
    kind: type[nn.Conv2d], n_axes: int, mode: Literal["zeros", "reflect", "replicate", "circular"]
) -> None:
    """In one, two and three dimensions, with stride, dilation and every padding, the whole is torch's own."""
    torch.manual_seed(0)
    layer = kind(3, 4, 3, stride=2, padding=2, dilation=2, padding_mode=mode)
    x = torch.randn(2, 3, *[9] * n_axes)
    expected = layer(x)
    supernet = insert(nn.Sequential(layer), elastic=[Elastic("w", ["0"])])

    torch.testing.assert_close(run(supernet, 1.0, x), expected)
    torch.testing.assert_close(run(supernet, 0.5, x), expected[:, :2])


def test_gradients_reach_the_sliced_weights_only() -> None:
    """A gradient through a slice is zero outside it."""
    layer = nn.Linear(4, 8)
    supernet = insert(nn.Sequential(layer), elastic=[Elastic("w", ["0"], fractions=(0.25, 1.0))])
    settings = tuple(2 for _ in supernet._inserted.defaults)
    supernet.run_with(settings, torch.ones(5, 3)).sum().backward()

    assert layer.weight.grad is not None
    assert values(layer.weight.grad[:2, :3]) == {5}
    assert layer.weight.grad.count_nonzero() == 6


def norm_of(channels: int, eps: float = 1e-5) -> tuple[Supernet, SubnetNorm]:
    """Return a supernet that is one BatchNorm, and the norm."""
    supernet = insert(nn.Sequential(nn.BatchNorm2d(channels, eps))).eval()
    return supernet, supernet.norms[0]


def test_subnet_norm_uses_the_statistics_of_its_subnet() -> None:
    """Subnets differ in mean and variance and share scale and shift."""
    supernet, norm = norm_of(3, eps=0.0)
    with torch.no_grad():
        norm.weight.fill_(10)
        norm.bias.fill_(1)
    own = Statistics(torch.full((2,), 2.0), torch.full((2,), 4.0))
    with torch.inference_mode():
        shared = supernet.run_with((None,), torch.full((1, 3, 1, 1), 6.0))
        sliced = supernet.run_with((own,), torch.full((1, 2, 1, 1), 6.0))

    assert values(shared) == {61}  # (6 - 0) / 1 * 10 + 1
    assert values(sliced) == {21}  # (6 - 2) / 2 * 10 + 1


def test_calibration_gathers_the_mean_over_examples() -> None:
    """Two examples of mean 2 and variance 1, then one of 8: mean 4 and variance 2/3; one channel is seen."""
    supernet, _ = norm_of(2)
    seen = NormCalibration(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        for batch in ([1.0, 3.0], [8.0]):
            supernet.run_with((seen,), torch.tensor(batch).view(-1, 1, 1, 1))

    assert (seen.channels, seen.n_examples) == (1, 3)
    assert seen.mean.tolist() == pytest.approx([4, 0])
    assert seen.variance.tolist() == pytest.approx([2 / 3, 1])
    with torch.no_grad(), pytest.raises(ConfigError, match=r"0: expected 1 channels, .* got 2"):
        supernet.run_with((seen,), torch.zeros(1, 2, 1, 1))


def test_training_leaves_statistics_alone() -> None:
    """Training steps normalise by the batch and disturb nothing: statistics are calibrated afterwards."""
    supernet, norm = norm_of(2)
    supernet.train()
    normed = supernet(torch.arange(8.0).view(4, 2, 1, 1))

    assert abs(float(normed.detach().mean())) < 1e-6
    assert cast("torch.Tensor", norm.running_mean).tolist() == [0, 0]
    assert cast("torch.Tensor", norm.running_var).tolist() == [1, 1]


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_follows_an_elastic_width(affine: bool) -> None:
    """Over 2 of 4 features it is torch's own LayerNorm of 2; over all it is itself."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(4, elementwise_affine=affine)
    x, whole = torch.randn(3, 2), torch.randn(3, 4)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    expected = norm(whole).detach()
    weight, bias = (norm.weight[:2], norm.bias[:2]) if affine else (None, None)
    supernet = insert(nn.Sequential(norm))

    for _ in range(2):  # the second time by the views of the first
        with torch.inference_mode():
            torch.testing.assert_close(supernet(x), nn.functional.layer_norm(x, (2,), weight, bias))
            torch.testing.assert_close(supernet(whole), expected)
    torch.testing.assert_close(supernet(x), nn.functional.layer_norm(x, (2,), weight, bias))


class Add(nn.Module):
    """A block that adds a constant, so that the sum shows which blocks ran."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the amount."""
        return x + self.amount


@pytest.mark.parametrize(("depth", "total"), [(1, 1), (2, 11), (3, 111)])
def test_a_switch_that_is_off_gives_back_what_it_was_given(depth: int, total: float) -> None:
    """The first blocks run and no others do; each keeps its class and its attributes."""
    supernet = insert(nn.Sequential(Add(1), Add(10), Add(100)), stages=[Stage("")])
    supernet.host([Subnet("s", {"d": [depth]})])

    assert float(supernet(torch.zeros(()))) == total
    assert [block.amount for block in supernet.model.children() if isinstance(block, Add)] == [1, 10, 100]
