"""What bodies of text requests ask for, what is wrong with others, and what answers say."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest

from gateway.text.asks import MAX_CHARACTERS, document_of, model_name_of, text_model
from gateway.text.embeddings import embeddings_ask, embeddings_body
from gateway.text.rerank import rerank_ask, rerank_body, scores_of
from gateway.v2.answer import InferAnswer
from gateway.v2.request import InferRequest
from gateway.v2.served import ServedModel
from gateway.v2.verdicts import TOO_LARGE, GatewayError
from superserve.subnet import TensorSpec
from tests.gateway.text.small import EMBEDDER, EMBEDS, RANKER, RANKS

PAIRS = RANKER._replace(width=2)
MANY = RANKER._replace(width=3)


def answered(rows: list[Any], name: str = "embeds") -> InferAnswer:
    """Return a model's answer with these outputs."""
    request = InferRequest(ServedModel(name), "", [], {}, is_binary=False)
    return InferAnswer(request, "FP32", (len(rows), 3), rows, {"subnet": "large"}, ["large"] * len(rows))


def test_which_models_take_texts() -> None:
    """Those of token ids, one text or two; all others say what they take."""
    assert text_model(ServedModel("embeds", EMBEDS.input, EMBEDS.output)) == EMBEDDER
    assert text_model(ServedModel("ranks", RANKS.input, RANKS.output)) == RANKER
    vector = TensorSpec("float32", (3,))
    for takes, gives, got in (
        (None, None, "any bytes"),
        (TensorSpec("float32", (6,)), vector, r"float32 \[6\]"),
        (TensorSpec("int32", (3, 6)), vector, r"int32 \[3, 6\]"),
        (TensorSpec("int32", (6,)), TensorSpec("float32", (3, 2)), r"int32 \[6\]"),
    ):
        with pytest.raises(GatewayError, match=f"token ids.* it takes {got}"):
            text_model(ServedModel("other", takes, gives))


@pytest.mark.parametrize(
    ("given", "texts", "ids"),
    [
        ("a b", ["a b"], []),
        (["a", ""], ["a", ""], []),
        ([4, 5], [], [[4, 5]]),
        ([[4], [5, 6]], [], [[4], [5, 6]]),
    ],
)
def test_inputs(given: Any, texts: list[str], ids: list[list[int]]) -> None:
    """A text, texts, token ids, or several of those."""
    ask = embeddings_ask({"input": given}, EMBEDDER)
    assert (ask.texts, ask.ids, ask.n_rows) == (texts, ids, len(texts) or len(ids))
    assert (ask.is_base64, ask.dimensions, ask.parameters) == (False, 3, {})


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "input: expected a string, or a list of them, got NoneType"),
        ({"input": []}, "input: expected at least one"),
        ({"input": ["a", 1]}, r"input\[1\]: expected a string, got int"),
        ({"input": [[1], "a"]}, r"input\[1\]: expected token ids"),
        ({"input": [-1]}, "input: expected token ids, whole numbers from 0 to 2147483647"),
        ({"input": [True]}, r"input\[0\]: expected a string, got bool"),
        ({"input": [1] * 7}, "input: expected 1 to 6 token ids, got 7"),
        ({"input": [[]]}, r"input\[0\]: expected 1 to 6 token ids, got 0"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: expected 'float' or 'base64'"),
        ({"input": "a", "dimensions": 4}, "dimensions: expected a whole number from 1 to 3, got 4"),
        ({"input": "a", "dimensions": 0}, "dimensions: expected a whole number"),
        ({"input": "a", "parameters": 1}, "parameters: expected parameters as an object"),
    ],
)
def test_wrong_embeddings(body: dict[str, Any], error: str) -> None:
    """Each error names the field and what was expected."""
    with pytest.raises(GatewayError, match=error):
        embeddings_ask(body, EMBEDDER)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"query": "a"}, "documents: expected a list, got NoneType"),
        ({"query": "a", "documents": []}, "documents: expected at least one"),
        ({"query": "a", "documents": [{"title": "b"}]}, r"documents\[0\].text: expected a string"),
        ({"documents": ["b"]}, "query: expected a string, got NoneType"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n: expected a whole number"),
        (
            {"query": "a", "documents": ["b"], "return_documents": 1},
            "return_documents: expected true or false",
        ),
    ],
)
def test_wrong_reranks(body: dict[str, Any], error: str) -> None:
    """Each error names the field and what was expected."""
    with pytest.raises(GatewayError, match=error):
        rerank_ask(body, RANKER)


def test_too_much_is_told_from_wrong() -> None:
    """Too many rows, or a text that is too long, is a 413."""
    for ask in (
        lambda: embeddings_ask({"input": ["a"] * 4_097}, EMBEDDER),
        lambda: embeddings_ask({"input": "a" * (MAX_CHARACTERS + 1)}, EMBEDDER),
        lambda: rerank_ask({"query": "a", "documents": ["b"] * 4_097}, RANKER),
    ):
        with pytest.raises(GatewayError) as caught:
            ask()
        assert caught.value.verdict is TOO_LARGE


def test_each_model_has_its_path() -> None:
    """The error names the other one."""
    with pytest.raises(GatewayError, match="/v1/rerank"):
        embeddings_ask({"input": "a"}, RANKER)
    with pytest.raises(GatewayError, match="/v1/embeddings"):
        rerank_ask({"query": "a", "documents": ["b"]}, EMBEDDER)
    with pytest.raises(GatewayError, match="expected one label, or two, to rank by; it has 3"):
        rerank_ask({"query": "a", "documents": ["b"]}, MANY)


def test_bodies_and_names() -> None:
    """A body is an object of JSON; a model may go without a name."""
    assert document_of(b'{"model": "m"}') == {"model": "m"}
    for body in (b"", b"{", b"[1]"):
        with pytest.raises(GatewayError, match="body: expected"):
            document_of(body)
    assert (model_name_of({}, "one"), model_name_of({"model": "m"}, "one")) == ("one", "m")
    with pytest.raises(GatewayError, match="model: expected a name, got 3"):
        model_name_of({"model": 3}, "one")


def test_vectors_go_back_as_asked_for() -> None:
    """As numbers or as base64; one that is cut has length 1 again; each with its subnet."""
    rows = [np.array([3, 4, 12], np.float32), np.zeros(3, np.float32)]
    whole = json.loads(
        embeddings_body(embeddings_ask({"input": ["a", "b"]}, EMBEDDER), answered(rows), ["x", "y"], 9)
    )
    assert [one["embedding"] for one in whole["data"]] == [[3, 4, 12], [0, 0, 0]]
    assert [(one["object"], one["index"], one["subnet"]) for one in whole["data"]] == [
        ("embedding", 0, "x"), ("embedding", 1, "y"),
    ]  # fmt: skip
    assert (whole["object"], whole["model"]) == ("list", "embeds")
    assert whole["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert whole["parameters"] == {"subnet": "large"}

    ask = embeddings_ask({"input": ["a", "b"], "dimensions": 2, "encoding_format": "base64"}, EMBEDDER)
    cut = json.loads(embeddings_body(ask, answered(rows), ["x", "y"], 9))
    values = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist() for one in cut["data"]]
    assert values == [pytest.approx([0.6, 0.8]), [0, 0]]


def test_scores() -> None:
    """The sigmoid of a logit; of two, the probability of the second."""
    assert scores_of(np.array([[0.0], [1.0], [-800.0]])) == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0])
    assert scores_of(np.array([[1.0, 3.0]])) == pytest.approx([math.exp(3) / (math.exp(1) + math.exp(3))])


def test_the_best_documents_come_first() -> None:
    """Of equal ones the first; as many as asked for, with their texts if asked for."""
    body = {"query": "q", "documents": ["a", {"text": "b"}, "c", "d"], "top_n": 3, "return_documents": True}
    ask = rerank_ask(body, RANKER)
    rows = [np.array([one], np.float32) for one in (0.0, 2.0, 2.0, -1.0)]
    found = json.loads(rerank_body(ask, answered(rows, "ranks"), 21))
    assert [(one["index"], one["document"]["text"]) for one in found["results"]] == [
        (1, "b"),
        (2, "c"),
        (0, "a"),
    ]
    assert found["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert (found["model"], found["usage"]) == ("ranks", {"total_tokens": 21})
    few = rerank_ask({"query": "q", "documents": ["a"], "top_n": 9}, PAIRS)
    assert (few.top_n, few.has_documents) == (1, False)
    assert "document" not in json.loads(rerank_body(few, answered([np.zeros(2)], "ranks"), 1))["results"][0]
