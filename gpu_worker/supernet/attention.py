"""SlicedAttention: an `nn.MultiheadAttention` of which a subnet keeps the first heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.operators import ElasticOperator, Parameters
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gpu_worker.supernet.operators import Cursor


class _Heads(NamedTuple):
    """What some first heads need: three projections in, one out."""

    query: Parameters
    key: Parameters
    value: Parameters
    out: Parameters


class SlicedAttention(ElasticOperator, nn.MultiheadAttention):
    """Multi-head attention over the first heads; its inputs and its output keep their width.

    It takes what `nn.MultiheadAttention` takes. The slices are views of the resident
    projections, made once for each number of heads.
    """

    channel_axis = -1
    follows_inputs = False
    gives_channels = False
    watched = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")

    @classmethod
    def check(cls, attention: nn.MultiheadAttention, path: str) -> None:
        """Raise ConfigError if the layer's heads cannot be separated."""
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ConfigError(f"{path}: expected attention without add_bias_kv and add_zero_attn")

    def attach(self, cursor: Cursor, place: int, path: str) -> None:
        """Become entry `place` of the settings, and stop an encoder layer from using its fused kernel.

        That kernel would use the whole projections, without slicing.
        """
        super().attach(cursor, place, path)
        self._qkv_same_embed_dim = False

    def forget(self) -> None:
        """Drop all slices."""
        self.heads: dict[int, _Heads] = {}

    def _now(self) -> Sequence[Tensor | None]:
        out = self.out_proj._parameters
        return [*super()._now(), out.get("weight"), out.get("bias")]

    def _used(self) -> Sequence[Tensor | None]:
        return [*super()._used(), self.out_proj.weight, self.out_proj.bias]

    @property
    def n_inputs(self) -> int:
        """Features of the queries."""
        return int(self.embed_dim)

    @property
    def n_outputs(self) -> int:
        """Heads of the whole layer."""
        return int(self.num_heads)

    def heads_in_use(self) -> _Heads:
        """Return the actuated subnet's part of the projections."""
        n_heads: int = self.cursor.settings[self.place]
        if torch.is_grad_enabled():
            return self._slice(n_heads)
        self.look()
        if n_heads not in self.heads:
            with torch.no_grad():
                self.heads[n_heads] = self._slice(n_heads)
        return self.heads[n_heads]

    def _slice(self, n_heads: int) -> _Heads:
        width = n_heads * self.head_dim
        joint: Tensor | None = self.in_proj_weight  # None if keys or values have another width than queries
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if joint is None else torch.chunk(joint, 3)
        biases = (None,) * 3 if self.in_proj_bias is None else torch.chunk(self.in_proj_bias, 3)
        query, key, value = (
            Parameters(weight[:width], None if bias is None else bias[:width])
            for weight, bias in zip(weights, biases, strict=True)
        )
        return _Heads(query, key, value, Parameters(self.out_proj.weight[:, :width], self.out_proj.bias))

    def forward(  # torch's own signature
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with the heads in use; the same shapes and masks as `nn.MultiheadAttention`.

        `is_causal` is a hint there, beside a mask, and no hint is needed here: the mask is used.
        """
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        if is_causal and attn_mask is None:
            raise ConfigError(f"{self.path}: is_causal: expected an attn_mask beside it, as torch does")
        heads = self.heads_in_use()
        q, k, v = (
            torch.unflatten(F.linear(tensor, *parameters), -1, (-1, self.head_dim)).transpose(1, 2)
            for tensor, parameters in zip((query, key, value), heads[:3], strict=True)
        )  # each (B, heads, T, head_dim)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            attended, weights = _attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = F.linear(attended.transpose(1, 2).flatten(2), *heads.out)  # (B, T, E)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return both masks as one to be added, broadcastable to (B, heads, T, S)."""
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:  # (B * all heads, T, S): the first heads of each
            mask = torch.unflatten(mask, 0, (-1, self.num_heads))[:, : q.shape[1]]
        padding = _additive(key_padding_mask, q.dtype)
        if padding is None:
            return mask
        padding = padding[:, None, None, :]  # (B, 1, 1, S)
        return padding if mask is None else mask + padding


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as numbers to add; a boolean one is true where attention is forbidden."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attend, and return the weights too, (B, heads, T, S)."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights
