"""`/v1/embeddings`: the vectors of texts, in the form of OpenAI's API, which embedding clients speak.

Source: OpenAI API reference, "Create embeddings". Beyond it a body may have `parameters` (timeout, priority,
min_accuracy), and the answer says which subnet made each vector.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from gateway.text.asks import checked_number, checked_rows, checked_text, terms_parameters
from gateway.v2.verdicts import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.text.asks import TokenModel
    from gateway.v2.answer import InferAnswer

FLOAT, BASE64 = "float", "base64"


class EmbeddingsAsk(NamedTuple):
    """What a body asks for.

    Attributes:
        texts: Each is a query.
        ids: Token ids instead of texts.
        is_base64: Whether vectors go back as base64 of float32, little-endian.
        dimensions: How many values of each vector; all the model has by default.
        parameters: On which terms.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    is_base64: bool
    dimensions: int
    parameters: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """How many queries that are."""
        return len(self.texts) or len(self.ids)


def embeddings_ask(document: Mapping[str, Any], model: TokenModel) -> EmbeddingsAsk:
    """Return what a body asks of a model.

    Raises:
        GatewayError: A field is missing or is not what it should be; the model ranks pairs.
    """
    if model.is_pairs:
        raise invalid(f"model {model.name!r} ranks pairs of texts: expected a POST to /v1/rerank")
    form = document.get("encoding_format", FLOAT)
    if form not in (FLOAT, BASE64):
        raise invalid(f"encoding_format: expected {FLOAT!r} or {BASE64!r}, got {form!r:.40}")
    dimensions = document.get("dimensions")
    width = model.width if dimensions is None else checked_number("dimensions", dimensions, model.width)
    texts, ids = _inputs(document.get("input"), model)
    return EmbeddingsAsk(texts, ids, form == BASE64, width, terms_parameters(document))


def _inputs(given: Any, model: TokenModel) -> tuple[list[str], list[list[int]]]:
    """Return texts, or token ids: a string, a list of strings, a list of ids, or a list of those."""
    if isinstance(given, str):
        return [checked_text("input", given)], []
    if not isinstance(given, list):
        raise invalid(f"input: expected a string, or a list of them, got {type(given).__name__}")
    checked_rows("input", given)
    if all(type(one) is int for one in given):
        return [], [_ids("input", given, model)]
    if isinstance(given[0], list):
        return [], [_ids(f"input[{i}]", one, model) for i, one in enumerate(given)]
    return [checked_text(f"input[{i}]", one) for i, one in enumerate(given)], []


def _ids(where: str, given: Any, model: TokenModel) -> list[int]:
    most = int(np.iinfo(model.dtype).max)
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one <= most for one in given):
        raise invalid(f"{where}: expected token ids, whole numbers from 0 to {most}")
    if not 1 <= len(given) <= model.length:
        raise invalid(f"{where}: expected 1 to {model.length} token ids, got {len(given)}")
    return given


def embeddings_body(ask: EmbeddingsAsk, answer: InferAnswer, subnets: Sequence[str], n_tokens: int) -> bytes:
    """Return the answer's JSON.

    Args:
        ask: What was asked.
        answer: The model's.
        subnets: Which subnet made each vector: those of two subnets are not to be compared.
        n_tokens: Of all inputs, special ones too.
    """
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(row, ask), "subnet": subnet}
        for i, (row, subnet) in enumerate(zip(answer.rows, subnets, strict=True))
    ]
    body = {
        "object": "list", "data": data, "model": answer.request.model.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}, "parameters": answer.parameters,
    }  # fmt: skip
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _vector(row: Any, ask: EmbeddingsAsk) -> Any:
    """Return a vector as asked for; one that is cut has length 1 again, as OpenAI's have."""
    vector = np.ascontiguousarray(row, "<f4").reshape(-1)
    if ask.dimensions < len(vector):
        vector = vector[: ask.dimensions]
        norm = float(np.linalg.norm(vector))
        vector = vector / np.float32(norm) if norm else vector
    return b64encode(vector.tobytes()).decode() if ask.is_base64 else vector
