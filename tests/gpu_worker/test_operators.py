"""The three operators, each by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpu_worker.operators import (
    Cursor,
    LayerSelect,
    SubnetNorm,
    WeightSliceConv2d,
    WeightSliceLinear,
    first_blocks,
    sliced_size,
)


class Add(nn.Module):
    """A block that adds a constant, so that a sum tells which blocks ran."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the amount."""
        return x + self.amount


def values(tensor: torch.Tensor) -> set[float]:
    """Return the different values in a tensor."""
    return set(tensor.flatten().tolist())


@given(percent=st.integers(1, 100), size=st.integers(1, 4096))
def test_the_sliced_size_is_the_exact_ceiling(percent: int, size: int) -> None:
    """A width of p hundredths keeps ceil(p * size / 100) channels, whatever floating point makes of it."""
    assert sliced_size(percent / 100, size) == -(-percent * size // 100)


@given(depth=st.integers(0, 12), n_blocks=st.integers(1, 12))
def test_first_blocks_are_the_first(depth: int, n_blocks: int) -> None:
    """The switches that are on come first, and are as many as the depth."""
    switches = first_blocks(min(depth, n_blocks), n_blocks)

    assert list(switches) == sorted(switches, reverse=True)
    assert sum(switches) == min(depth, n_blocks)


def test_layer_select_runs_the_blocks_that_are_on() -> None:
    """Each row of switches runs its own blocks, first ones or not."""
    cursor = Cursor()
    stage = LayerSelect([Add(1), Add(10), Add(100)], cursor)
    stage.host([(True, False, False), (True, True, False), (True, False, True)])
    sums = []
    for row in range(3):
        cursor.row = row
        sums.append(float(stage(torch.zeros(()))))

    assert sums == [1, 11, 101]


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_a_slice_is_a_view_of_the_resident_weights(layer: str) -> None:
    """Every subnet's weight and bias share the resident parameters' storage."""
    cursor = Cursor()
    operator = (
        WeightSliceConv2d(4, 8, cursor, kernel_size=3) if layer == "conv" else WeightSliceLinear(4, 8, cursor)
    ).eval()
    operator.host([(3, 2), (8, 4)])
    for row, size in enumerate([(3, 2), (8, 4)]):
        cursor.row = row
        weight, bias = operator.parameters_in_use()
        assert weight.shape[:2] == size
        assert weight.untyped_storage().data_ptr() == operator.weight.untyped_storage().data_ptr()
        if operator.bias is not None:
            assert bias is not None
            assert bias.untyped_storage().data_ptr() == operator.bias.untyped_storage().data_ptr()


def test_a_slice_sees_the_weights_change() -> None:
    """A change to the resident weights is seen through slices made before it."""
    operator = WeightSliceLinear(4, 8, Cursor()).eval()
    operator.host([(3, 2)])
    with torch.no_grad():
        operator.weight.fill_(7)

    assert values(operator.parameters_in_use().weight) == {7}


def test_subnets_of_one_size_share_a_view() -> None:
    """Hosting a size twice makes its view once."""
    cursor = Cursor()
    operator = WeightSliceLinear(4, 8, cursor).eval()
    operator.host([(3, 2), (3, 2)])
    first = operator.parameters_in_use()
    cursor.row = 1

    assert operator.parameters_in_use() is first


def test_training_reaches_the_sliced_weights_only() -> None:
    """A gradient through a slice is zero outside it."""
    operator = WeightSliceLinear(4, 8, Cursor())
    operator.host([(3, 2)])
    operator(torch.ones(5, 2)).sum().backward()

    assert operator.weight.grad is not None
    assert values(operator.weight.grad[:3, :2]) == {5}
    assert operator.weight.grad.count_nonzero() == 6


def test_subnet_norm_uses_the_statistics_of_its_row() -> None:
    """Rows differ in mean and variance and share scale and shift."""
    cursor = Cursor()
    norm = SubnetNorm(3, cursor, epsilon=0.0).eval()
    norm.host([2, 3])
    with torch.no_grad():
        norm.weight.fill_(10)
        norm.bias.fill_(1)
        norm.mean[1] = 2
        norm.variance[1] = 4
    narrow, wide = torch.full((1, 2, 1, 1), 6.0), torch.full((1, 3, 1, 1), 6.0)

    assert values(norm(narrow)) == {61}  # (6 - 0) / 1 * 10 + 1
    cursor.row = 1
    assert values(norm(wide)) == {21}  # (6 - 2) / 2 * 10 + 1


def test_calibration_fills_one_row_only() -> None:
    """Passes in training with a momentum set change the actuated subnet's statistics and no others."""
    cursor = Cursor()
    norm = SubnetNorm(2, cursor)
    norm.host([2, 1])
    cursor.row = 1
    norm.momentum = 1.0
    norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))

    assert norm.mean.tolist() == [[0, 0], [2, 0]]
    assert norm.variance.tolist() == [[1, 1], [2, 1]]  # unbiased


def test_training_without_momentum_leaves_statistics_alone() -> None:
    """Training steps do not disturb statistics: they are calibrated afterwards."""
    norm = SubnetNorm(2, Cursor())
    norm(torch.arange(8.0).view(4, 2, 1, 1))

    assert norm.mean.tolist() == [[0, 0]]
    assert norm.variance.tolist() == [[1, 1]]


def test_hosting_as_many_subnets_again_keeps_statistics() -> None:
    """Statistics survive views being made anew, and start afresh for another number of subnets."""
    norm = SubnetNorm(2, Cursor())
    norm.host([2, 1])
    norm.mean.fill_(5)
    norm.host([2, 1])
    assert values(norm.mean) == {5}

    norm.host([2, 1, 1])
    assert values(norm.mean) == {0}
