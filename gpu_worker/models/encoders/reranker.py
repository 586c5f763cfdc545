"""A reranker (cross-encoder) with an exit after each layer.

A subnet's control tuple is {"d": [layers that run]}: the first ones, and the head of the last of these. One
query is (2, T): token ids of both texts, and their token types. The answer is the logits of the labels; a
reranker has one.

Three layouts of published tensors are read, told apart by their names:

    shared  bert.pooler.dense, classifier                one head for all exits: BertForSequenceClassification
    heads   bert.pooler.dense, classifiers.K             a classifier for each exit, as PABEE's
    exits   bert.encoder.highway.K.{pooler.dense,classifier}, and for the last layer bert.pooler.dense and
            classifier                                   a pooler and a classifier for each exit, as DeeBERT's

A shared head was trained on the last layer alone: its earlier exits score badly unless the model was trained
with exits.

Source: Nogueira and Cho, "Passage Re-ranking with BERT" (2019); Zhou et al., "BERT Loses Patience" (NeurIPS
'20); Xin et al., "DeeBERT" (ACL '20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.models.encoders.bert import Bert, BertSizes, Dense, initialise
from gpu_worker.supernet.control import Control, Controls, ControlSpace, Entry, Sizes, first_blocks
from gpu_worker.supernet.insertion import Stage, insert

if TYPE_CHECKING:
    from collections.abc import Collection

    from gpu_worker.supernet.supernet import Supernet

SHARED, HEADS, EXITS = "shared", "heads", "exits"


@dataclass(frozen=True, slots=True)
class RerankerSizes:
    """The sizes of a reranker.

    Attributes:
        bert: Those of its BERT.
        n_labels: Scores of a query.
        layout: `SHARED`, `HEADS` or `EXITS`.
    """

    bert: BertSizes
    n_labels: int = 1
    layout: str = SHARED


MINILM_RERANKER = RerankerSizes(BertSizes(n_blocks=6, n_heads=12, head_size=32, n_units=1536))
"""The sizes of ms-marco-MiniLM-L6-v2, for random weights."""


class ExitHead(nn.Module):
    """What scores at one exit. A subnet runs the head of its last layer and leaves out the others."""

    def __init__(self, sizes: RerankerSizes, *, pools: bool) -> None:
        super().__init__()
        width = sizes.bert.width
        self.pooler = Dense(width, width) if pools else None
        self.classifier = nn.Linear(width, sizes.n_labels)

    def forward(self, _scores: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return scores (B, n_labels) for features (B, width), in place of those of another exit.

        Left out, a head gives back its first argument: the scores that it is given.
        """
        if self.pooler is not None:
            features = torch.tanh(self.pooler.dense(features))
        found: torch.Tensor = self.classifier(features)
        return found


class Reranker(nn.Module):
    """A BERT with a classifier, or with one for each exit, in plain torch."""

    def __init__(self, sizes: RerankerSizes) -> None:
        super().__init__()
        self.pools = sizes.layout != EXITS
        self.n_labels = sizes.n_labels
        self.bert = Bert(sizes.bert, pools=self.pools)
        n_heads = 1 if sizes.layout == SHARED else sizes.bert.n_blocks
        self.heads = nn.ModuleList(ExitHead(sizes, pools=not self.pools) for _ in range(n_heads))
        initialise(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, n_labels), for tokens (B, 2, T)."""
        ids, types = tokens.unbind(1)
        features = self.bert(ids, types) if self.pools else self.bert.hidden(ids, types)[:, 0]
        scores = features.new_zeros(len(features), self.n_labels)
        for head in self.heads:
            scores = head(scores, features)
        return scores


def reranker(sizes: RerankerSizes = MINILM_RERANKER) -> Supernet:
    """Return the supernet with random weights, hosting the whole."""
    model, layers = Reranker(sizes), Stage("bert.encoder.layer")
    if sizes.layout == SHARED:
        return insert(model, stages=[layers])
    return insert(model, stages=[layers, Stage("heads")], controls=_controls(sizes.bert.n_blocks))


def _controls(n_blocks: int) -> Controls:
    def sizes_of(control: Control) -> Sizes:
        depth = control["d"][0]
        return Sizes((first_blocks(depth, n_blocks), (depth - 1,)), {})

    depths = Entry("stage 0", tuple(range(1, n_blocks + 1)))
    return Controls(ControlSpace({"d": (depths,)}), sizes_of)


# --- published names ------------------------------------------------------------------------


def layout_of(names: Collection[str]) -> str:
    """Return the layout that a file's tensors have."""
    if any(name.startswith("classifiers.") for name in names):
        return HEADS
    return EXITS if any(".highway." in name for name in names) else SHARED


def classifier_of(layout: str) -> str:
    """Return the name of a tensor whose first size is the number of labels."""
    return "classifiers.0.weight" if layout == HEADS else "classifier.weight"


def published_name(sizes: RerankerSizes, name: str) -> str:
    """Return what a tensor of the model is called in a published file."""
    if not name.startswith("heads."):
        return name
    _, number, rest = name.split(".", 2)
    if sizes.layout == HEADS:
        return f"classifiers.{number}.{rest.removeprefix('classifier.')}"
    if sizes.layout == EXITS and int(number) < sizes.bert.n_blocks - 1:
        return f"bert.encoder.highway.{number}.{rest}"
    return f"bert.{rest}" if rest.startswith("pooler.") else rest


def ignored_names(sizes: RerankerSizes) -> tuple[str, ...]:
    """Return what a published file may hold beside the model: position ids, and DeeBERT's last exit."""
    last = f"bert.encoder.highway.{sizes.bert.n_blocks - 1}"
    parts = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
    unused = [f"{last}.{part}" for part in parts] if sizes.layout == EXITS else []
    return ("bert.embeddings.position_ids", *unused)
