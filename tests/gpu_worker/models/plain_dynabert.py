"""A subnet of DynaBERT as a plain BERT classifier, to compare sliced subnets with.

It shares no code with the slicer: ordinary torch layers of the subnet's own sizes,
whose weights are gathered from the published tensors index by index, and attention
written out.

Source: DynaBERT (Hou et al., NeurIPS 2020) over BERT base.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from tests.gpu_worker.models.published import filled, filled_linear, gather

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

N_BLOCKS = 12
N_HEADS = 12
HEAD_SIZE = 64
HIDDEN = N_HEADS * HEAD_SIZE  # 768
N_UNITS = 3072
N_CLASSES = 3
LAYER_NORM_EPS = 1e-12
PADDING_ID = 0


def kept_blocks(depth: int) -> tuple[int, ...]:
    """Return which of the 12 blocks a subnet of this depth runs, spread evenly."""
    return tuple(i * N_BLOCKS // depth for i in range(depth))


def round_to_nearest(size: int, width: float) -> int:
    """Return the features of `size` that a width keeps: as large a share as the nearest number of heads is.

    The width becomes round(12 * width) / 12, and int(that * size) features stay.

    Source: `round_to_nearest` in the published DynaBERT/transformers/modeling_bert.py.
    """
    return int(size * (round(N_HEADS * width) / N_HEADS))


class PlainAttention(nn.Module):
    """Multi-head self-attention over the first heads."""

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.output = output

    def forward(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Attend from every position of `x` (B, T, 768) to where `is_token` (B, T) holds."""
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(HEAD_SIZE)  # (B, heads, T, T)
        # Next to any token's score, the lowest float leaves a masked key a weight of exactly 0;
        # where all are masked, all weigh the same, and none is NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~is_token[:, None, None, :], lowest)
        context = torch.softmax(scores, dim=-1) @ value  # (B, heads, T, 64)
        out: torch.Tensor = self.output(context.transpose(1, 2).flatten(2))
        return out  # (B, T, 768)

    @staticmethod
    def _heads(x: torch.Tensor) -> torch.Tensor:
        n_queries, n_tokens, _ = x.shape
        return x.view(n_queries, n_tokens, -1, HEAD_SIZE).transpose(1, 2)  # (B, heads, T, 64)


class PlainBlock(nn.Module):
    """A post-norm transformer block of fixed size."""

    def __init__(
        self,
        attention: PlainAttention,
        attention_norm: nn.LayerNorm,
        feed_forward: nn.Sequential,
        output_norm: nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = attention_norm
        self.feed_forward = feed_forward
        self.output_norm = output_norm

    def forward(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Run the block on `x` (B, T, 768)."""
        x = self.attention_norm(x + self.attention(x, is_token))
        out: torch.Tensor = self.output_norm(x + self.feed_forward(x))
        return out


class PlainDynaBert(nn.Module):
    """Embeddings, the kept blocks, and the classifier over the first token."""

    def __init__(
        self,
        embeddings: Sequence[nn.Embedding],
        embeddings_norm: nn.LayerNorm,
        blocks: Sequence[PlainBlock],
        head: nn.Sequential,
    ) -> None:
        super().__init__()
        self.words, self.positions, self.token_types = embeddings
        self.embeddings_norm = embeddings_norm
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 3) of token ids and token types (B, 2, T), integers."""
        ids, types = queries.unbind(dim=1)
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(positions) + self.token_types(types)
        x = self.embeddings_norm(x)  # (B, T, 768)
        for block in self.blocks:
            x = block(x, ids != PADDING_ID)
        out: torch.Tensor = self.head(x.select(1, 0))
        return out


def plain_dynabert(tensors: Mapping[str, torch.Tensor], depth: int, widths: Sequence[float]) -> nn.Module:
    """Return a subnet as a plain network in eval mode.

    Args:
        tensors: The published tensors, by name.
        depth: Blocks kept of the 12.
        widths: Share of heads and of hidden units that a block uses, by its position among
            all 12.

    Returns:
        A network from integers (B, 2, T), token ids and token types, to logits (B, 3); a
        token id of 0 is padding, which nothing attends to.
    """
    assert len(widths) == N_BLOCKS
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    head = nn.Sequential(
        filled_linear(tensors, "bert.pooler.dense", inputs=HIDDEN, outputs=HIDDEN),
        nn.Tanh(),
        filled_linear(tensors, "classifier", inputs=HIDDEN, outputs=N_CLASSES),
    )
    return PlainDynaBert(
        [_embedding(tensors[f"bert.embeddings.{name}.weight"]) for name in names],
        _layer_norm(tensors, "bert.embeddings.LayerNorm"),
        [_block(tensors, position, widths[position]) for position in kept_blocks(depth)],
        head,
    ).eval()


def _block(tensors: Mapping[str, torch.Tensor], position: int, width: float) -> PlainBlock:
    name = f"bert.encoder.layer.{position}"
    heads_wide, units = round_to_nearest(HIDDEN, width), round_to_nearest(N_UNITS, width)
    query, key, value = (
        filled_linear(tensors, f"{name}.attention.self.{part}", inputs=HIDDEN, outputs=heads_wide)
        for part in ("query", "key", "value")
    )
    output = filled_linear(tensors, f"{name}.attention.output.dense", inputs=heads_wide, outputs=HIDDEN)
    feed_forward = nn.Sequential(
        filled_linear(tensors, f"{name}.intermediate.dense", inputs=HIDDEN, outputs=units),
        nn.GELU(approximate="none"),
        filled_linear(tensors, f"{name}.output.dense", inputs=units, outputs=HIDDEN),
    )
    return PlainBlock(
        PlainAttention(query, key, value, output),
        _layer_norm(tensors, f"{name}.attention.output.LayerNorm"),
        feed_forward,
        _layer_norm(tensors, f"{name}.output.LayerNorm"),
    )


def _embedding(weight: torch.Tensor) -> nn.Embedding:
    rows, columns = weight.shape
    return filled(nn.Embedding(rows, columns, device="meta"), {"weight": gather(weight, (rows,))})


def _layer_norm(tensors: Mapping[str, torch.Tensor], name: str) -> nn.LayerNorm:
    layer = nn.LayerNorm(HIDDEN, eps=LAYER_NORM_EPS, device="meta")
    return filled(layer, {part: gather(tensors[f"{name}.{part}"], (HIDDEN,)) for part in ("weight", "bias")})
