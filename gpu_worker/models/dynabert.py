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

from torch import nn

from gpu_worker.models.encoders.bert import Bert, BertSizes, initialise
from gpu_worker.supernet.control import Control, Controls, ControlSpace, Entry, Sizes, spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert

if TYPE_CHECKING:
    import torch

    from gpu_worker.supernet.supernet import Supernet

WIDTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class DynaBertArchitecture(BertSizes):
    """The sizes of a BERT and of its classifier.

    Attributes:
        n_classes: Size of the output.
    """

    n_classes: int = 3


MNLI = DynaBertArchitecture()
"""BERT base with the three classes of MNLI."""


class BertClassifier(nn.Module):
    """BERT with a linear classifier, in plain torch."""

    def __init__(self, sizes: DynaBertArchitecture = MNLI) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        self.classifier = nn.Linear(sizes.width, sizes.n_classes)
        initialise(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, n_classes), for tokens (B, 2, T)."""
        ids, types = tokens.unbind(1)
        logits: torch.Tensor = self.classifier(self.bert(ids, types))
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
