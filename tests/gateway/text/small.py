"""A tokenizer of three words and the models that go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from gateway.text.asks import TokenModel
from superserve.hello import ModelSpec
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 6
EMBEDS = ModelSpec(TensorSpec("int32", (LENGTH,)), TensorSpec("float32", (3,)), "embeds")
RANKS = ModelSpec(TensorSpec("int32", (2, 8)), TensorSpec("float32", (1,)), "ranks")
EMBEDDER = TokenModel("embeds", LENGTH, "int32", is_pairs=False, width=3)
RANKER = TokenModel("ranks", 8, "int32", is_pairs=True, width=1)
PAD, UNK, CLS, SEP, A, B, C = range(7)


def tokenizer_file(folder: Path) -> Path:
    """Write the tokenizer, without padding or truncation of its own; return its file."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    one = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    path = folder / "tokenizer.json"
    one.save(str(path))
    return path
