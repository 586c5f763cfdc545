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
        axis: Of the output, along which the first outputs are kept; None if its output stays whole.
    """

    compute: Callable[[Any, ReferenceCall], Any]
    axis: int | None


_references: dict[type[nn.Module], Reference] = {}


def reference(
    kind: type[nn.Module], axis: int | None = None
) -> Callable[[Callable[[Any, ReferenceCall], Any]], Callable[[Any, ReferenceCall], Any]]:
    """Register the decorated function as what layers of type `kind` are to compute."""

    def register(compute: Callable[[Any, ReferenceCall], Any]) -> Callable[[Any, ReferenceCall], Any]:
        _references[kind] = Reference(compute, axis)
        return compute

    return register


def reference_of(layer: nn.Module, operator: nn.Module | None) -> Reference | None:
    """Return a layer's reference: registered for its type, or brought by the operator that it became."""
    found = _references.get(type(layer))
    own = getattr(type(operator), "proof_reference", None)
    return found if own is None else Reference(own, getattr(type(operator), "proof_axis", None))


AXES: dict[type[nn.Module], int] = {nn.Linear: -1, nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4}
"""The axis of the output along which a layer has its outputs."""


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
