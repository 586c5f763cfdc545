"""`/v1/rerank`: how well documents fit a query, in the form that Jina's and Cohere's APIs share.

Source: Cohere API reference, "Rerank"; Jina's has the same fields. Beyond them a body may have `parameters`
(timeout, priority, min_accuracy), and the answer's `parameters` say how it was served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from gateway.text.asks import checked_number, checked_rows, checked_text, terms_parameters
from gateway.v2.verdicts import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.text.asks import TokenModel
    from gateway.v2.answer import InferAnswer


class RerankAsk(NamedTuple):
    """What a body asks for.

    Attributes:
        query: The text that documents are to fit.
        documents: Their texts; each is a query of its own with the same deadline.
        top_n: How many of the best are returned.
        has_documents: Whether their texts go back too.
        parameters: On which terms.
    """

    query: str
    documents: Sequence[str]
    top_n: int
    has_documents: bool
    parameters: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """How many queries that are."""
        return len(self.documents)


def rerank_ask(document: Mapping[str, Any], model: TokenModel) -> RerankAsk:
    """Return what a body asks of a model.

    Raises:
        GatewayError: A field is missing or is not what it should be; the model embeds single texts.
    """
    if not model.is_pairs:
        raise invalid(f"model {model.name!r} embeds single texts: expected a POST to /v1/embeddings")
    if model.width > 2:
        raise invalid(f"model {model.name!r}: expected one label, or two, to rank by; it has {model.width}")
    given = document.get("documents")
    if not isinstance(given, list):
        raise invalid(f"documents: expected a list, got {type(given).__name__}")
    documents = [_text(f"documents[{i}]", one) for i, one in enumerate(checked_rows("documents", given))]
    top_n = document.get("top_n")
    has_documents = document.get("return_documents", False)
    if not isinstance(has_documents, bool):
        raise invalid(f"return_documents: expected true or false, got {has_documents!r:.40}")
    return RerankAsk(
        checked_text("query", document.get("query")),
        documents,
        len(documents) if top_n is None else min(checked_number("top_n", top_n, 2**31), len(documents)),
        has_documents,
        terms_parameters(document),
    )


def _text(where: str, given: Any) -> str:
    """Return a document's text: a string, or the `text` of an object."""
    if isinstance(given, dict):
        return checked_text(f"{where}.text", given.get("text"))
    return checked_text(where, given)


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Return the scores of logits (n, 1) or (n, 2), from 0 to 1: of two labels the second's probability."""
    margins = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    return np.asarray(1 / (1 + np.exp(-np.clip(margins.astype(np.float64), -500, 500))))


def rerank_body(ask: RerankAsk, answer: InferAnswer, n_tokens: int) -> bytes:
    """Return the answer's JSON: the best documents first, of equal ones the first.

    Args:
        ask: What was asked.
        answer: The model's.
        n_tokens: Of all pairs, special ones too.
    """
    scores = scores_of(np.stack([np.asarray(row, np.float32).reshape(-1) for row in answer.rows]))
    best = np.argsort(-scores, kind="stable")[: ask.top_n]
    results = [
        {"index": int(i), "relevance_score": float(scores[i])}
        | ({"document": {"text": ask.documents[i]}} if ask.has_documents else {})
        for i in best
    ]
    body = {
        "model": answer.request.model.name, "results": results, "usage": {"total_tokens": n_tokens},
        "parameters": answer.parameters,
    }  # fmt: skip
    return orjson.dumps(body)
