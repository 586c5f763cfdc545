"""The proof can fail: each planted fault of the slicer is caught, in a supernet that is proved without it.

A mutant wraps a method of the slicer and spoils what it returns, as a slip in that method would.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gpu_worker.proof.absence import ProofError
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.attention import SlicedAttention
from gpu_worker.supernet.operators import (
    LayerSelect,
    Parameters,
    Prepared,
    SlicedLayerNorm,
    Statistics,
    Switched,
    WeightSlice,
)
from gpu_worker.supernet.supernet import Supernet
from superserve.subnet import Subnet
from tests.gpu_worker.proof.models import IMAGES, WORDS, convolutional, encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    Spoil = Callable[[Any, Any, tuple[Any, ...]], Any]


def off_by_one(_layer: Any, found: Parameters, _args: Any) -> Parameters:
    """Outputs 1 to n in place of 0 to n - 1."""
    return Parameters(found.weight.roll(-1, 0), found.bias)


def one_output_less(_layer: Any, found: Parameters, _args: Any) -> Parameters:
    """The last output that is kept is lost."""
    return Parameters(found.weight[:-1], None if found.bias is None else found.bias[:-1])


def last_inputs(layer: Any, found: Parameters, args: Any) -> Parameters:
    """The last inputs of the whole layer in place of the first."""
    n = len(found.weight)
    return found if layer.weight.shape[1] == 1 else Parameters(layer.weight[:n, -args[0] :], found.bias)


def wrong_bias(layer: Any, found: Parameters, _args: Any) -> Parameters:
    """The end of the bias."""
    return Parameters(found.weight, None if found.bias is None else layer.bias[-len(found.bias) :])


def wrong_group(layer: Any, found: Parameters, _args: Any) -> Parameters:
    """Each group of a convolution uses the next one's weights."""
    weight = found.weight.roll(1, 0) if getattr(layer, "groups", 1) > 1 else found.weight
    return Parameters(weight, found.bias)


def mean_for_variance(_supernet: Any, found: Prepared, _args: Any) -> Prepared:
    """Mean and variance change places."""
    swapped = [
        Statistics(one.variance, one.mean.abs()) if isinstance(one, Statistics) else one
        for one in found.settings
    ]
    return Prepared(found.row, tuple(swapped))


def statistics_of_the_next_norm(_supernet: Any, found: Prepared, _args: Any) -> Prepared:
    """Two norms that are equally wide use each other's statistics."""
    settings = list(found.settings)
    places = [i for i, one in enumerate(settings) if isinstance(one, Statistics)]
    for a, b in itertools.pairwise(places):
        if settings[a].mean.shape == settings[b].mean.shape:
            settings[a], settings[b] = settings[b], settings[a]
    return Prepared(found.row, tuple(settings))


def no_statistics(_supernet: Any, found: Prepared, _args: Any) -> Prepared:
    """The layer's own statistics in place of the subnet's."""
    bare = [None if isinstance(one, Statistics) else one for one in found.settings]
    return Prepared(found.row, tuple(bare))


def next_subnet(supernet: Any, found: Prepared, args: Any) -> Prepared:
    """The row after the one that was asked for."""
    return (
        found
        if args[0] + 1 >= len(supernet.subnets)
        else Prepared(found.row, tuple(supernet._rows[args[0] + 1]))
    )


def wrong_head(layer: Any, found: Any, _args: Any) -> Any:
    """The values of each head go to the next one."""
    value = Parameters(found.value.weight.roll(layer.head_dim, 0), found.value.bias)
    return found._replace(value=value)


def keys_for_queries(_layer: Any, found: Any, _args: Any) -> Any:
    """The second third of a fused projection in place of the first."""
    return found._replace(query=found.key, key=found.query, value=found.query)


def last_heads_out(layer: Any, found: Any, _args: Any) -> Any:
    """The output projection uses the last heads."""
    width = found.out.weight.shape[1]
    return found._replace(out=Parameters(layer.out_proj.weight[:, -width:], found.out.bias))


def unscaled(_layer: Any, found: torch.Tensor, args: Any) -> torch.Tensor:
    """A norm over fewer features forgets scale and shift."""
    x = args[0]
    return found if x.shape[-1] == 16 else torch.nn.functional.layer_norm(x, x.shape[-1:])


def wrong_block(stage: Any, found: Any, args: Any) -> Any:
    """One block more than was asked for: the last."""
    args[1][stage.blocks[-1].switch_place] = True
    return found


MUTANTS: list[tuple[type, str, Spoil, Callable[[], Supernet]]] = [
    (WeightSlice, "slice_in_use", off_by_one, convolutional),
    (WeightSlice, "slice_in_use", off_by_one, encoder),
    (WeightSlice, "slice_in_use", one_output_less, convolutional),
    (WeightSlice, "slice_in_use", last_inputs, convolutional),
    (WeightSlice, "slice_in_use", last_inputs, encoder),
    (WeightSlice, "slice_in_use", wrong_bias, convolutional),
    (WeightSlice, "slice_in_use", wrong_group, convolutional),
    (Supernet, "prepared", mean_for_variance, convolutional),
    (Supernet, "prepared", statistics_of_the_next_norm, convolutional),
    (Supernet, "prepared", no_statistics, convolutional),
    (Supernet, "prepared", next_subnet, encoder),
    (SlicedAttention, "heads_in_use", wrong_head, encoder),
    (SlicedAttention, "heads_in_use", keys_for_queries, encoder),
    (SlicedAttention, "heads_in_use", last_heads_out, encoder),
    (SlicedLayerNorm, "forward", unscaled, encoder),
    (LayerSelect, "choose", wrong_block, convolutional),
]


def example(build: Callable[[], Supernet]) -> torch.Tensor:
    """Return a random batch."""
    return torch.randn(
        IMAGES if build is convolutional else WORDS, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize(
    ("owner", "name", "spoil", "build"), MUTANTS, ids=lambda one: getattr(one, "__name__", one)
)
def test_a_mutant_of_the_slicer_is_caught(
    owner: type, name: str, spoil: Spoil, build: Callable[[], Supernet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof fails; the supernet does not run into an error of its own by which all would notice."""
    supernet, method = build(), getattr(owner, name)

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return spoil(self, method(self, *args, **kwargs), args)

    monkeypatch.setattr(owner, name, spoiled)
    with pytest.raises(ProofError, match=r"deviates|has shape|fails in place"):
        prove(supernet, example(build), most=8, checks_resident=False)


def test_a_block_that_gives_zeros_when_it_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The declaration is its input."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.switch_cursor.settings[self.switch_place]:
            return torch.zeros_like(args[0])
        return super(Switched, self).__call__(*args, **kwargs)

    monkeypatch.setattr(Switched, "__call__", call, raising=False)
    with pytest.raises(ProofError, match=r"deviates|fails in place"):
        prove(convolutional(), example(convolutional), most=8, checks_resident=False)


def test_statistics_of_another_subnet_that_is_as_wide_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subnets that differ in depth alone have norms of the same widths."""
    supernet, prepared = convolutional(), Supernet.prepared
    hosted = [Subnet(f"{depth}", {"d": [depth], "w": [0.5] * 4}) for depth in (2, 3)]

    def swapped(self: Any, row: int) -> Prepared:
        own, other = prepared(self, row), prepared(self, len(self.subnets) - 1 - row)
        settings = [
            b if isinstance(a, Statistics) and isinstance(b, Statistics) else a
            for a, b in zip(own.settings, other.settings, strict=True)
        ]
        return Prepared(row, tuple(settings))

    prove(supernet, example(convolutional), subnets=hosted, checks_resident=False)
    monkeypatch.setattr(Supernet, "prepared", swapped)
    with pytest.raises(ProofError, match="deviates"):
        prove(supernet, example(convolutional), subnets=hosted, checks_resident=False)


@pytest.mark.parametrize("build", [convolutional, encoder])
def test_without_a_mutant_it_holds(build: Callable[[], Supernet]) -> None:
    """Subnets of every size and depth equal the masked whole network to rounding."""
    proof = prove(build(), example(build), most=8)

    assert len(proof.subnets) >= 6
    assert proof.n_layers > 60
    assert proof.deviation < 1e-12


def test_slices_of_weights_that_were_replaced_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slicer that keeps what it sliced once answers by old weights: the supernet is compared as it is."""
    supernet, method = convolutional(), WeightSlice.slice_in_use
    kept: dict[Any, Parameters] = {}

    def stale(self: Any, inputs: int) -> Parameters:
        key = self, self.cursor.settings[self.place], inputs
        if key not in kept:
            kept[key] = method(self, inputs)
        return kept[key]

    monkeypatch.setattr(WeightSlice, "slice_in_use", stale)
    prove(supernet, example(convolutional), most=3)
    for parameter in supernet.parameters():
        parameter.data = torch.randn_like(parameter)

    with pytest.raises(ProofError, match="weights that have been replaced"):
        prove(supernet, example(convolutional), most=3)
