"""DynaBERT: a BERT-base sequence classifier of which depth and width are elastic.

A subnet's control tuple is {"d": [blocks kept, of 12], "w": [a width fraction for each of the 12 blocks]}.
Kept blocks are spread evenly: floor(i * 12 / D). Block k then uses its first h = round(w[k] * 12) heads, and
as large a share of its hidden units, h * 256, as the published code does: off the grid of 1/4, 1/2, 3/4 and 1
a width means the nearest number of heads. Published checkpoints have both sorted by importance.

One query is (2, T) integers: token ids, then token types. Tokens with id 0 are padding.

Source: Hou et al., "DynaBERT" (NeurIPS '20); Devlin et al., "BERT" (NAACL '19). Names are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.control import Control, Controls, ControlSpace, Entry, Sizes, spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

WIDTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class DynaBertArchitecture:
    """The sizes of a BERT.

    Attributes:
        n_blocks: Encoder layers.
        n_heads: Of each block's attention.
        head_size: Features of one head; the model is n_heads * head_size wide.
        n_units: Hidden units of each block's feed-forward part.
        n_tokens: Size of the vocabulary.
        max_length: Tokens of a query, at most.
        n_classes: Size of the output.
    """

    n_blocks: int = 12
    n_heads: int = 12
    head_size: int = 64
    n_units: int = 3072
    n_tokens: int = 30_522
    max_length: int = 512
    n_classes: int = 3

    @property
    def width(self) -> int:
        """Features between blocks."""
        return self.n_heads * self.head_size


MNLI = DynaBertArchitecture()
"""BERT base with the three classes of MNLI."""

_EPSILON = 1e-12


class Embeddings(nn.Module):
    """Words, positions and token types, summed and normalised."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.n_tokens, sizes.width)
        self.position_embeddings = nn.Embedding(sizes.max_length, sizes.width)
        self.token_type_embeddings = nn.Embedding(2, sizes.width)
        self.LayerNorm = nn.LayerNorm(sizes.width, eps=_EPSILON)

    def forward(self, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width) for token ids and types, each (B, T)."""
        words = self.word_embeddings(ids) + self.token_type_embeddings(types)
        normed: torch.Tensor = self.LayerNorm(words + self.position_embeddings.weight[: ids.shape[1]])
        return normed


class SelfAttention(nn.Module):
    """As many heads as its projections give."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
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

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        normed: torch.Tensor = self.LayerNorm(self.dense(x) + residual)
        return normed


class Attention(nn.Module):
    """Self-attention and its way back."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = AddNorm(sizes.width, sizes.width)


class Dense(nn.Module):
    """One linear layer, as an extra level that the published names have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class Block(nn.Module):
    """An encoder layer."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Dense(sizes.width, sizes.n_units)
        self.output = AddNorm(sizes.n_units, sizes.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        x = self.attention.output(self.attention.self(x, mask), x)
        hidden: torch.Tensor = self.output(F.gelu(self.intermediate.dense(x)), x)
        return hidden


class Encoder(nn.Module):
    """The blocks."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(sizes) for _ in range(sizes.n_blocks))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        for block in self.layer:
            x = block(x, mask)
        return x


class Bert(nn.Module):
    """Embeddings, encoder and pooler."""

    def __init__(self, sizes: DynaBertArchitecture) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = Encoder(sizes)
        self.pooler = Dense(sizes.width, sizes.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first token's pooled features, (B, width), for tokens (B, 2, T)."""
        ids, types = tokens.unbind(1)
        x = self.embeddings(ids, types)
        # The lowest number and not minus infinity: a query of padding alone has an answer too.
        mask = torch.zeros_like(ids, dtype=x.dtype).masked_fill_(ids == 0, torch.finfo(x.dtype).min)
        x = self.encoder(x, mask[:, None, None, :])  # mask (B, 1, 1, T)
        return torch.tanh(self.pooler.dense(x[:, 0]))


class BertClassifier(nn.Module):
    """BERT with a linear classifier, in plain torch."""

    def __init__(self, sizes: DynaBertArchitecture = MNLI) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        self.classifier = nn.Linear(sizes.width, sizes.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # BERT's own

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, n_classes), for tokens (B, 2, T)."""
        logits: torch.Tensor = self.classifier(self.bert(tokens))
        return logits


def dynabert_controls(sizes: DynaBertArchitecture = MNLI) -> Controls:
    """Return the control tuples of a BERT of these sizes."""
    blocks = range(sizes.n_blocks)
    space = ControlSpace(
        {
            "d": (Entry("stage 0", tuple(range(1, sizes.n_blocks + 1))),),
            "w": tuple(Entry(f"block {k}", WIDTHS, is_open=True) for k in blocks),
        }
    )

    def sizes_of(control: Control) -> Sizes:
        outputs = {}
        for k, width in enumerate(control["w"]):
            n_heads = max(1, round(width * sizes.n_heads))
            outputs[f"heads {k}"] = n_heads * sizes.head_size
            outputs[f"units {k}"] = n_heads * sizes.n_units // sizes.n_heads
        return Sizes((spread_blocks(control["d"][0], sizes.n_blocks),), outputs)

    return Controls(space, sizes_of)


def dynabert(sizes: DynaBertArchitecture = MNLI) -> Supernet:
    """Return the supernet with random weights, hosting the whole."""
    elastic = []
    for k in range(sizes.n_blocks):
        block = f"bert.encoder.layer.{k}"
        elastic.append(
            Elastic(f"heads {k}", [f"{block}.attention.self.{x}" for x in ("query", "key", "value")])
        )
        elastic.append(Elastic(f"units {k}", [f"{block}.intermediate.dense"]))
    return insert(
        BertClassifier(sizes),
        stages=[Stage("bert.encoder.layer", rule=spread_blocks)],
        elastic=elastic,
        controls=dynabert_controls(sizes),
    )
