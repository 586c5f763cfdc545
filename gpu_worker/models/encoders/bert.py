"""BERT in plain torch, with the names that Hugging Face publishes: embeddings, encoder layers and a pooler.

Its layers are those of the supernets that are made of it: DynaBERT, sentence encoders, rerankers.

Source: Devlin et al., "BERT" (NAACL '19).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""What the feed-forward part may use, by Hugging Face's names."""


@dataclass(frozen=True, slots=True)
class BertSizes:
    """The sizes of a BERT; by default those of BERT base.

    Attributes:
        n_blocks: Encoder layers.
        n_heads: Of each block's attention.
        head_size: Features of one head; the model is n_heads * head_size wide.
        n_units: Hidden units of each block's feed-forward part.
        n_tokens: Size of the vocabulary.
        max_length: Tokens of a query, at most.
        n_types: Token types.
        activation: One of `ACTIVATIONS`.
        epsilon: Of the LayerNorms.
        padding: The id of tokens that are padding.
    """

    n_blocks: int = 12
    n_heads: int = 12
    head_size: int = 64
    n_units: int = 3072
    n_tokens: int = 30_522
    max_length: int = 512
    n_types: int = 2
    activation: str = "gelu"
    epsilon: float = 1e-12
    padding: int = 0

    @property
    def width(self) -> int:
        """Features between blocks."""
        return self.n_heads * self.head_size


class Embeddings(nn.Module):
    """Words, positions and token types, summed and normalised."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.n_tokens, sizes.width)
        self.position_embeddings = nn.Embedding(sizes.max_length, sizes.width)
        self.token_type_embeddings = nn.Embedding(sizes.n_types, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=sizes.epsilon)

    def forward(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """Return (B, T, width) for token ids and types, each (B, T); without types all are 0."""
        table = self.token_type_embeddings
        of_types = table.weight[0] if types is None else table(types)
        words = self.word_embeddings(ids) + of_types
        normed: torch.Tensor = self.LayerNorm(words + self.position_embeddings.weight[: ids.shape[1]])
        return normed


class SelfAttention(nn.Module):
    """As many heads as its projections give."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.head_size = sizes.head_size
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key = nn.Linear(sizes.width, sizes.width)
        self.value = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, T, heads * head_size); `mask` (B, 1, 1, T) is added to the scores."""
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = torch.unflatten(x, -1, (-1, self.head_size))
        return heads.transpose(1, 2)  # (B, heads, T, head_size)


class AddNorm(nn.Module):
    """A projection back to the residual stream, the sum, and its LayerNorm."""

    def __init__(self, inputs: int, width: int, epsilon: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=epsilon)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        normed: torch.Tensor = self.LayerNorm(self.dense(x) + residual)
        return normed


class Attention(nn.Module):
    """Self-attention and its way back."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = AddNorm(sizes.width, sizes.width, sizes.epsilon)


class Dense(nn.Module):
    """One linear layer, as an extra level that the published names have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class Block(nn.Module):
    """An encoder layer."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Dense(sizes.width, sizes.n_units)
        self.output = AddNorm(sizes.n_units, sizes.width, sizes.epsilon)
        self.activate = ACTIVATIONS[sizes.activation]

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        x = self.attention.output(self.attention.self(x, mask), x)
        hidden: torch.Tensor = self.output(self.activate(self.intermediate.dense(x)), x)
        return hidden


class Encoder(nn.Module):
    """The blocks."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(sizes) for _ in range(sizes.n_blocks))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        for block in self.layer:
            x = block(x, mask)
        return x


class Bert(nn.Module):
    """Embeddings and encoder, and a pooler if the model has one.

    Attributes:
        padding: The id of tokens that are padding.
    """

    def __init__(self, sizes: BertSizes, *, pools: bool = True) -> None:
        super().__init__()
        self.padding = sizes.padding
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)
        self.pooler = Dense(sizes.width, sizes.width) if pools else None

    def hidden(self, ids: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        """Return the last block's features, (B, T, width), for token ids and types, each (B, T)."""
        x = self.embeddings(ids, types)
        # The lowest number and not minus infinity: a query of padding alone has an answer too.
        lowest = torch.finfo(x.dtype).min
        mask = torch.zeros_like(ids, dtype=x.dtype).masked_fill_(ids == self.padding, lowest)
        found: torch.Tensor = self.encoder(x, mask[:, None, None, :])  # mask (B, 1, 1, T)
        return found

    def forward(self, ids: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        """Return the first token's pooled features, (B, width), for token ids and types, each (B, T)."""
        assert self.pooler is not None, "a model without a pooler calls `hidden`"
        return torch.tanh(self.pooler.dense(self.hidden(ids, types)[:, 0]))


def initialise(model: nn.Module) -> None:
    """Draw the weights of linear layers and embeddings as BERT does."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
