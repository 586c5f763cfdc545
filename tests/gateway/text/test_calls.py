"""Text requests on a client that a test answers: rows, terms, names, cancellation and what fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from gateway.calls.access import KnownCaller
from gateway.text.tokens import Tokens
from superserve.errors import OverloadedError
from tests.gateway.fakes import DIGITS, FakeClient, reply
from tests.gateway.test_routes import DIGEST, TOKEN, Door
from tests.gateway.text.small import CLS, EMBEDS, PAD, RANKS, SEP, A, tokenizer_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from superserve.hello import ModelSpec

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    """Return the small tokenizer."""
    one = Tokens(tokenizer_file(tmp_path))
    yield one
    one.close()


async def asked(door: Door, path: str, n_rows: int, body: dict[str, Any], **headers: str) -> Any:
    """Send a request, wait until it is answered or its queries are submitted; return what is under way."""
    headers.setdefault("superserve_slo_ms", "1000")
    call = door.ask("POST", path, orjson.dumps(body), **headers)
    while call is not None and len(door.client.submitted) < n_rows and not door.answers:
        await asyncio.sleep(0)
    return call


def door_of(tmp_path: Path, model: ModelSpec | None, tokens: Tokens | None, **more: Any) -> Door:
    """Return routes to a model of texts."""
    return Door(tmp_path, FakeClient(model, **more.pop("client", {})), tokens=tokens, **more)


def test_an_embedding(tmp_path: Path, tokens: Tokens) -> None:
    """The query is the text's ids, on the body's terms; the answer says how it was served."""
    door = door_of(tmp_path, EMBEDS, tokens)
    body = {
        "input": "a",
        "model": "embeds",
        "user": "me",
        "parameters": {"timeout": 500_000, "min_accuracy": 75},
    }
    asyncio.run(asked(door, EMBEDDINGS, 1, body))
    (sent,) = door.client.submitted
    assert sent.payload == np.array([CLS, A, SEP, PAD, PAD, PAD], np.int32).tobytes()
    assert sent.min_accuracy == 75
    assert 0 < sent.slo_ms < 500
    assert not door.answers

    door.client.answer(np.array([1, 2, 3], np.float32), is_late=True)
    status, answer = door.last
    assert status == 200
    assert answer["data"] == [{"object": "embedding", "index": 0, "embedding": [1, 2, 3], "subnet": "large"}]
    assert answer["usage"]["prompt_tokens"] == 3
    assert (answer["parameters"]["is_late"], answer["parameters"]["accuracy"]) == (True, 80.0)
    assert door.backend.board.sum("status_200") == 1


def test_a_rerank(tmp_path: Path, tokens: Tokens) -> None:
    """Each document is a query; `model` may be left out."""
    door = door_of(tmp_path, RANKS, tokens)
    asyncio.run(asked(door, "/v2/rerank", 2, {"query": "a", "documents": ["b", "c"]}))
    for one, logit in zip(door.client.submitted, (1, 2), strict=True):
        one.future.set_result(reply(np.array([logit], np.float32)))
    status, answer = door.last
    assert (status, [one["index"] for one in answer["results"]]) == (200, [1, 0])
    assert answer["usage"]["total_tokens"] == 2 * 5


@pytest.mark.parametrize(
    ("model", "path", "body", "status", "error"),
    [
        (EMBEDS, EMBEDDINGS, {"input": "a", "model": "other"}, 404, "this gateway serves 'embeds'"),
        (None, EMBEDDINGS, {"input": "a", "model": "embeds"}, 503, "no worker has joined yet"),
        (None, EMBEDDINGS, {"input": "a"}, 503, "no worker has joined yet"),
        (DIGITS, EMBEDDINGS, {"input": "a"}, 400, "expected one of token ids"),
        (EMBEDS, RERANK, {"query": "a", "documents": ["b"]}, 400, "/v1/embeddings"),
        (EMBEDS, EMBEDDINGS, {}, 400, "input: expected"),
    ],
)
def test_what_is_refused_at_once(
    tmp_path: Path,
    tokens: Tokens,
    model: ModelSpec | None,
    path: str,
    body: dict[str, Any],
    status: int,
    error: str,
) -> None:
    """Nothing is submitted."""
    door = door_of(tmp_path, model, tokens)
    asyncio.run(asked(door, path, 1, body))
    assert door.last[0] == status
    found = door.last[1]["error"]
    assert error in found["message"]
    assert (found["code"], found["type"]) == (
        status,
        "server_error" if status >= 500 else "invalid_request_error",
    )
    assert not door.client.submitted


def test_without_a_tokenizer_the_option_is_named(tmp_path: Path) -> None:
    """There is no such path then, in the description neither."""
    door = door_of(tmp_path, EMBEDS, None)
    asyncio.run(asked(door, EMBEDDINGS, 1, {"input": "a"}))
    assert door.last[0] == 404
    assert "--tokenizer" in door.last[1]["error"]["message"]
    door.ask("GET", "/openapi.json")
    assert EMBEDDINGS not in door.last[1]["paths"]


def test_the_description_has_the_paths(tmp_path: Path, tokens: Tokens) -> None:
    """And every schema that they name."""
    door = door_of(tmp_path, EMBEDS, tokens)
    door.ask("GET", "/openapi.json")
    description = door.last[1]
    assert {EMBEDDINGS, RERANK, "/v2/rerank"} <= set(description["paths"])
    text = orjson.dumps(description).decode()
    named = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert named <= set(description["components"]["schemas"])
    door.ask("GET", EMBEDDINGS)
    assert door.last[0] == 405


def test_a_refusal_of_the_router_is_the_answer(tmp_path: Path, tokens: Tokens) -> None:
    """After the texts were read; it is counted once."""
    client = {"refusal": OverloadedError("full"), "refuse_from": 0}
    door = door_of(tmp_path, EMBEDS, tokens, client=client)
    asyncio.run(asked(door, EMBEDDINGS, 1, {"input": "a"}))
    assert door.last[0] == 503
    assert door.backend.board.sum("status_503") == 1


def test_callers_pay_for_each_text(tmp_path: Path, tokens: Tokens) -> None:
    """As they do for each row."""
    door = door_of(tmp_path, EMBEDS, tokens, callers={f"token:{DIGEST}": KnownCaller("me", 2.0)})
    bearer = {"authorization": f"Bearer {TOKEN}"}
    asyncio.run(asked(door, EMBEDDINGS, 2, {"input": ["a", "b"]}, **bearer))
    asyncio.run(asked(door, EMBEDDINGS, 3, {"input": ["a", "b"]}, **bearer))
    assert door.last[0] == 429
    assert len(door.client.submitted) == 2
    asyncio.run(asked(door, EMBEDDINGS, 3, {"input": "a"}))
    assert door.last[0] == 401


def test_a_caller_who_leaves(tmp_path: Path, tokens: Tokens) -> None:
    """Before its texts are read nothing is submitted; after that its queries are cancelled. Both count."""
    door = door_of(tmp_path, EMBEDS, tokens)

    async def leave() -> None:
        early = door.ask("POST", EMBEDDINGS, b'{"input": "a"}', superserve_slo_ms="1000")
        assert early is not None
        early.cancel()
        late = await asked(door, EMBEDDINGS, 1, {"input": ["a", "b"]})
        late.cancel()

    asyncio.run(leave())
    assert len(door.client.submitted) == 2
    assert all(one.future.cancelled() for one in door.client.submitted)
    assert door.backend.board.sum("cancelled_n") == 2
    assert not door.answers


def test_a_tokenizer_that_fails_costs_one_request(
    tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a 500, and the next request an answer."""
    door = door_of(tmp_path, EMBEDS, tokens)

    def fail(*_: object) -> None:
        raise ValueError("odd text")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "texts", fail)
        asyncio.run(asked(door, EMBEDDINGS, 1, {"input": "a"}))
    assert door.last[0] == 500
    assert door.last[1]["error"]["message"] == "the tokenizer failed: odd text"
    door.answers.clear()
    asyncio.run(asked(door, EMBEDDINGS, 1, {"input": "a"}))
    assert len(door.client.submitted) == 1
