"""Plain references: what a cut layer is to compute where masking is not the rule.

Masking explains layers whose subnets use the first outputs and the first inputs. A recurrent cell, a kernel
that is transformed to a smaller one, or a head size that sets a scale has another rule. Such a layer brings a
reference: a plain function, written without the slicer, that computes the whole layer's output for a subnet.

    @reference(nn.LSTM)
    def lstm(layer, call):
        ...  # layer: the plain module at full width; call.kept: of its elastic size, None if it has none
        return output  # as wide as the whole layer's, with anything at what is cut

An operator class may have the same function as its static method `proof_reference` instead.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class ReferenceCall:
    """One call of a layer with a reference.

    Attributes:
        args: As the layer is given them; what is absent is zero.
        kwargs: The same.
        absent: For each tensor of `args`, what of it is absent, a mask of its shape or None.
        kept: Outputs kept of the layer's elastic size; None if it has none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    absent: tuple[torch.Tensor | None, ...]
    kept: int | None


@dataclass(frozen=True, slots=True)
class Reference:
    """What a type of layer is to compute.

    Attributes:
        compute: From the plain layer and a call to the output, as wide as the whole layer's.
        count: From the layer to how many outputs the last axis of what it gives consists of, or a multiple of
            it, each with its first ones kept; None if all that it gives stays whole.
        is_followed: Whether the rules follow what `compute` does, and find out what is absent of its output;
            then it is given its inputs as they are.
    """

    compute: Callable[[Any, ReferenceCall], Any]
    count: Callable[[Any], int] | None
    is_followed: bool = False


_references: dict[type[nn.Module], Reference] = {}


def reference(
    kind: type[nn.Module], count: Callable[[Any], int] | None = None
) -> Callable[[Callable[[Any, ReferenceCall], Any]], Callable[[Any, ReferenceCall], Any]]:
    """Register the decorated function for layers of type `kind`; `count` is that of `Reference`."""

    def register(compute: Callable[[Any, ReferenceCall], Any]) -> Callable[[Any, ReferenceCall], Any]:
        _references[kind] = Reference(compute, count)
        return compute

    return register


def reference_of(layer: nn.Module, operator: nn.Module | None) -> Reference | None:
    """Return a layer's reference: registered for its type, or brought by the operator that it became."""
    own = getattr(type(operator), "proof_reference", None)
    if own is not None:
        is_followed = bool(getattr(type(operator), "proof_is_followed", False))
        return Reference(own, getattr(type(operator), "proof_count", None), is_followed)
    return next((_references[cls] for cls in type(layer).__mro__ if cls in _references), None)


_AXES: dict[type[nn.Module], int] = {
    nn.Linear: -1, nn.Embedding: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4,
    nn.ConvTranspose1d: -2, nn.ConvTranspose2d: -3, nn.ConvTranspose3d: -4,
}  # fmt: skip


def axis_of(layer: nn.Module) -> int | None:
    """Return the axis of a layer's output along which its outputs lie; None if that is not known."""
    known = next((axis for cls, axis in _AXES.items() if isinstance(layer, cls)), None)
    weight = getattr(layer, "weight", None)
    if known is None and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return -1  # a linear layer by another name, such as Hugging Face's Conv1D
    return known


@reference(nn.MultiheadAttention)
def attention(layer: nn.MultiheadAttention, call: ReferenceCall) -> Any:
    """Attend with all heads, and let the output projection use the first `kept` alone."""
    kept = layer.num_heads if call.kept is None else call.kept
    whole = layer.out_proj.weight
    masked = whole.detach().clone()
    masked[:, kept * layer.head_dim :] = 0
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    averages = given.pop("average_attn_weights", True)
    layer.out_proj.weight = nn.Parameter(masked, requires_grad=False)
    try:
        output, weights = type(layer).forward(layer, **cast("Any", given), average_attn_weights=False)
    finally:
        layer.out_proj.weight = whole
    if weights is None:
        return output, None
    heads = weights[..., :kept, :, :]  # (B, kept, T, S), or without B
    return output, heads.mean(-3) if averages else heads


def _hidden(layer: nn.RNNBase) -> int:
    return int(layer.hidden_size)


@reference(nn.RNNBase, _hidden)
def recurrent(layer: nn.RNNBase, call: ReferenceCall) -> Any:
    """Run with all hidden units, of which those that are cut say nothing to any other, in each direction."""
    kept = layer.hidden_size if call.kept is None else call.kept
    directions = 2 if layer.bidirectional else 1
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.startswith("weight_hh"):
                weight[:, kept:] = 0
            elif name.startswith("weight_ih") and "_l0" not in name:
                said = torch.arange(weight.shape[1]) % (weight.shape[1] // directions) < kept
                weight[:, ~said] = 0
    return type(layer).forward(plain, *call.args, **call.kwargs)
