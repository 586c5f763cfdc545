"""A sentence encoder with an exit after each layer, and an output that may be cut short.

A subnet's control tuple is {"d": [layers that run]}: the first ones. Their output is pooled as the last one's
would be. Models that were trained for it (2D Matryoshka) lose little; others lose more, the earlier the exit.

The output may be cut to its first features and is then normalised again, for models that were trained for it
(Matryoshka). All subnets are cut alike: vectors in an index have one length, and shorter ones save no time.

One query is (T,) token ids, filled up with padding. The vector does not depend on the padding.

Source: Reimers and Gurevych, "Sentence-BERT" (EMNLP '19); Li et al., "2D Matryoshka Sentence Embeddings"
(2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from gpu_worker.models.encoders.bert import Bert, BertSizes, initialise
from gpu_worker.models.encoders.folder import Pooling
from gpu_worker.supernet.insertion import Stage, insert

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

MINILM = BertSizes(n_blocks=6, n_heads=12, head_size=32, n_units=1536)
"""The sizes of all-MiniLM-L6-v2, for random weights."""

MINILM_POOLING = Pooling("mean", normalises=True)

_LEAST_TOKENS = 1e-9  # of a text without any: its vector is zero, and not NaN


class SentenceEncoder(Bert):
    """A BERT whose tokens become one vector, in plain torch."""

    def __init__(self, sizes: BertSizes, pooling: Pooling, dimension: int | None = None) -> None:
        super().__init__(sizes, pools=False)
        self.pooling = pooling
        self.dimension = dimension or sizes.width
        initialise(self)

    def forward(self, ids: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        """Return vectors, (B, dimension), for token ids (B, T)."""
        x = self.hidden(ids, types)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum over tokens
        vectors = x[:, 0] if self.pooling.mode == "cls" else self._mean(x, ids)
        vectors = vectors[:, : self.dimension]
        return F.normalize(vectors, dim=-1) if self.pooling.normalises else vectors

    def _mean(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        is_token = (ids != self.padding)[:, :, None].to(x.dtype)  # (B, T, 1)
        return (x * is_token).sum(1) / is_token.sum(1).clamp(min=_LEAST_TOKENS)


def sentence_encoder(
    sizes: BertSizes = MINILM, pooling: Pooling = MINILM_POOLING, dimension: int | None = None
) -> Supernet:
    """Return the supernet with random weights, hosting the whole; `dimension` cuts the vectors."""
    return insert(SentenceEncoder(sizes, pooling, dimension), stages=[Stage("encoder.layer")])
