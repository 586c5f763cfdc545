"""A text request under way: its texts become token ids in a thread, and those queries at the router."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway.text.embeddings import EmbeddingsAsk, embeddings_ask, embeddings_body
from gateway.text.rerank import RerankAsk, rerank_ask, rerank_body
from gateway.v2.request import InferRequest
from gateway.v2.verdicts import BROKEN, CALLER_GONE, GatewayError
from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from gateway.calls.backend import Backend, InferCall
    from gateway.text.asks import TokenModel
    from gateway.text.tokens import TokenRows, Tokens
    from gateway.v2.answer import InferAnswer
    from gateway.v2.served import ServedModel
    from gateway.v2.terms import Terms

    Done = Callable[[bytes | SuperServeError], None]

EMBEDDINGS, RERANK = "embeddings", "rerank"


def ask_of(kind: str, document: Mapping[str, Any], model: TokenModel) -> EmbeddingsAsk | RerankAsk:
    """Return what a body asks of a model.

    Raises:
        GatewayError: It asks for nothing that the model gives.
    """
    return embeddings_ask(document, model) if kind == EMBEDDINGS else rerank_ask(document, model)


class TextCall:
    """A request.

    Args:
        backend: The way to the router.
        tokens: The model's tokenizer.
        terms: On which terms its queries run.
        arrived_ns: When it arrived.
        done: Called once, with the answer's JSON or the error; not after `cancel`.
    """

    __slots__ = (
        "_arrived_ns",
        "_ask",
        "_backend",
        "_done",
        "_inner",
        "_is_ended",
        "_n_tokens",
        "_terms",
        "_tokens",
    )

    def __init__(
        self, backend: Backend, tokens: Tokens, ask: EmbeddingsAsk | RerankAsk, terms: Terms, arrived_ns: int,
        done: Done,
    ) -> None:  # fmt: skip
        self._backend = backend
        self._tokens = tokens
        self._ask = ask
        self._terms = terms
        self._arrived_ns = arrived_ns
        self._done = done
        self._inner: InferCall | None = None
        self._is_ended = False
        self._n_tokens = 0

    def start(self, served: ServedModel, model: TokenModel) -> None:
        """Begin; in a running event loop."""
        ask, tokens = self._ask, self._tokens

        def encoded() -> TokenRows:
            if isinstance(ask, RerankAsk):
                return tokens.pairs(ask.query, ask.documents, model)
            return tokens.ids(ask.ids, model) if ask.ids else tokens.texts(ask.texts, model)

        future = asyncio.get_running_loop().run_in_executor(tokens.pool, encoded)
        future.add_done_callback(lambda one: self._encoded(served, one))

    def cancel(self) -> None:
        """The caller is gone: its queries end at the router too, and count as cancelled."""
        if self._inner is not None:
            self._inner.cancel()
        elif not self._is_ended:
            self._is_ended = True
            self._backend.ended(CALLER_GONE, self._arrived_ns)

    def _encoded(self, served: ServedModel, future: asyncio.Future[TokenRows]) -> None:
        if future.cancelled():  # the process ends
            return
        error = future.exception()
        if self._is_ended:
            return
        if error is not None:
            # A defect of the tokenizer costs this request its answer, and no more.
            self._is_ended = True
            self._backend.ended(BROKEN, self._arrived_ns)
            self._done(GatewayError(BROKEN, f"the tokenizer failed: {error}"))
            return
        try:
            rows, self._n_tokens = future.result()
            request = InferRequest(served, "", rows, self._ask.parameters, is_binary=False)
            self._inner = self._backend.infer(request, self._terms, self._arrived_ns, self._answered)
        except SuperServeError as refused:
            self._is_ended = True
            self._done(refused)

    def _answered(self, outcome: InferAnswer | SuperServeError) -> None:
        self._is_ended = True
        if isinstance(outcome, SuperServeError):
            self._done(outcome)
        elif isinstance(self._ask, RerankAsk):
            self._done(rerank_body(self._ask, outcome, self._n_tokens))
        else:
            self._done(embeddings_body(self._ask, outcome, outcome.subnets, self._n_tokens))
