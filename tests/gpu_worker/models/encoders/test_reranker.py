"""Rerankers score at each exit as Hugging Face's parts do, with one head for all exits or one for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.engines.torch_executor import Placement, TorchExecutor, example_input
from gpu_worker.models.kinds import fitted, resident, supernet_kind
from gpu_worker.proof.prove import prove
from superserve.errors import ConfigError, InvalidQueryError
from superserve.subnet import Subnet
from tests.gpu_worker.models.encoders.folders import (
    LENGTH,
    N_BLOCKS,
    classifier,
    hidden_states,
    pairs_of,
    saved_heads,
    token_ids,
)
from tests.gpu_worker.models.encoders.test_sentence import EXACT, served

if TYPE_CHECKING:
    from pathlib import Path

NAME = f"bert-reranker@length={LENGTH}"
LAYOUTS = ("shared", "heads", "exits")


def saved(folder: Path, layout: str, n_labels: int = 1) -> tuple[Any, list[Any]]:
    """Write a reranker; return the model, and a pooler and a classifier for each exit."""
    model = classifier(n_labels)
    if layout == "shared":
        model.save_pretrained(folder)
        return model, [(model.bert.pooler.dense, model.classifier)] * N_BLOCKS
    return model, saved_heads(folder, model, with_poolers=layout == "exits")


@pytest.mark.parametrize("n_labels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_exit_scores_by_its_head(tmp_path: Path, layout: str, n_labels: int) -> None:
    """The first token after each layer, that exit's pooler and classifier; pairs of different length."""
    model, heads = saved(tmp_path, layout, n_labels)
    executor = served(tmp_path, NAME)
    pairs = pairs_of(token_ids())
    hidden = hidden_states(model.bert, pairs[:, 0], pairs[:, 1])

    assert executor.output_spec.shape == (n_labels,)
    for row, (pooler, scorer) in enumerate(heads):
        with torch.no_grad():
            scores = scorer(torch.tanh(pooler(hidden[row + 1][:, 0])))
        np.testing.assert_allclose(executor.execute(row, pairs), scores.numpy(), atol=EXACT)


def test_full_depth_is_the_whole_published_model(tmp_path: Path) -> None:
    """What BertForSequenceClassification returns, and token types count."""
    model, _ = saved(tmp_path, "shared")
    executor, pairs = served(tmp_path, NAME), pairs_of(token_ids())
    ids, types = (torch.from_numpy(pairs[:, i]).long() for i in (0, 1))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=types).logits
    without_types = pairs * np.array([1, 0], np.int32)[:, None]

    np.testing.assert_allclose(executor.execute(N_BLOCKS - 1, pairs), logits.numpy(), atol=EXACT)
    assert np.abs(executor.execute(N_BLOCKS - 1, without_types) - logits.numpy()).max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_exit_is_proved(tmp_path: Path, layout: str) -> None:
    """Layers behind an exit and other exits' heads are bypassed."""
    saved(tmp_path, layout)
    kind = fitted(supernet_kind("bert-reranker@length=16"), str(tmp_path))
    supernet = resident(kind, str(tmp_path))
    found = prove(supernet, example_input(supernet, kind, torch.float32, n=2))

    assert len(found.subnets) == N_BLOCKS


def test_only_the_heads_that_a_subnet_uses_stay(tmp_path: Path) -> None:
    """A worker that hosts one exit frees the layers behind it and the other heads."""
    saved(tmp_path, "exits")
    kind = fitted(supernet_kind(NAME), str(tmp_path))
    whole = resident(kind, str(tmp_path)).memory().shared
    subnet = Subnet("depth-1", {"d": [1]})
    one = TorchExecutor.load(NAME, [subnet], weights=str(tmp_path), placement=Placement(threads=1))

    assert one.memory().shared < whole / 2


def test_token_types_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    """Beside token ids, which are checked by their own number."""
    saved(tmp_path, "shared")
    executor, pairs = served(tmp_path, NAME), pairs_of(token_ids())
    pairs[2, 1, 4] = 2
    with pytest.raises(InvalidQueryError, match="token types: expected 0 to 1, got 2"):
        executor.stage(pairs)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    """As the file calls it."""
    saved(tmp_path, "heads")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifiers.2.bias"]
    save_file(tensors, path)

    with pytest.raises(ConfigError, match=r"model\.safetensors: tensor classifiers\.2\.bias: missing"):
        served(tmp_path, NAME)


def test_a_folder_without_a_classifier_is_no_reranker(tmp_path: Path) -> None:
    """The error names the tensor that tells the number of labels."""
    saved(tmp_path, "shared")
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name.startswith("bert.")}, path)

    with pytest.raises(ConfigError, match=r"tensor classifier\.weight: expected \(labels, 24\), got nothing"):
        served(tmp_path, NAME)
