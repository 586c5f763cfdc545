"""What a request asks for: from method and path to an answer, or to an inference under way."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote

import orjson

from gateway.calls.access import ANYONE
from gateway.http.exchange import HttpAnswer, failure
from gateway.http.openapi import description
from gateway.text.asks import document_of, model_name_of, text_model
from gateway.text.calls import EMBEDDINGS, RERANK, TextCall, ask_of
from gateway.v2.answer import http_body
from gateway.v2.describe import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from gateway.v2.request import MAX_ROWS, RequestReader
from gateway.v2.served import found_model
from gateway.v2.terms import terms_of
from gateway.v2.verdicts import (
    NOT_FOUND,
    RETRY_AFTER_S,
    UNKNOWN_CALLER,
    WRONG_METHOD,
    GatewayError,
    invalid,
    verdict_of,
)
from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.calls.access import Access, KnownCaller
    from gateway.calls.backend import Backend, CallUnderWay, InferCall
    from gateway.http.exchange import HttpRequest
    from gateway.text.tokens import Tokens
    from gateway.v2.answer import InferAnswer

    Answered = Callable[[HttpAnswer], None]

log = logging.getLogger(__name__)

BINARY = "application/octet-stream"
_LENGTH = "inference-header-content-length"
_RETRY = ("retry-after", str(RETRY_AFTER_S))
_BEARER = ("www-authenticate", "Bearer")
_MAX_TARGETS = 256
_TEXT_PATHS = {"/v1/embeddings": EMBEDDINGS, "/v1/rerank": RERANK, "/v2/rerank": RERANK}
_NO_TOKENIZER = "no tokenizer: start the gateway with --tokenizer FILE, the model's tokenizer.json"
_OPEN = ("/v2/health/live", "/v2/health/ready")
"""For probes, which have no token."""


class Routes:
    """Answers requests.

    Args:
        backend: The way to the router.
        access: Who may call.
        version: Of the server, in its metadata.
        tokens: The model's tokenizer, for requests with texts; None refuses them.
    """

    def __init__(self, backend: Backend, access: Access, version: str, tokens: Tokens | None = None) -> None:
        self._backend = backend
        self._access = access
        self._tokens = tokens
        self._reader: RequestReader | None = None
        self._targets: dict[bytes, tuple[str, str]] = {}
        self._paths: dict[str, tuple[str, Callable[[], HttpAnswer]]] = {
            "/v2": ("GET", lambda: _json(server_metadata(version))),
            "/v2/health/live": ("GET", lambda: _health(is_well=True)),
            "/v2/health/ready": ("GET", lambda: _health(is_well=backend.is_ready)),
            "/v2/repository/index": ("POST", self._index),
            "/v2/models/stats": ("GET", self._statistics),
            "/openapi.json": ("GET", lambda: _json(description(version, has_text=tokens is not None))),
        }

    def check_caller(self, request: HttpRequest, common_name: str | None) -> None:
        """Refuse a caller who is not known, before the body has come.

        Raises:
            GatewayError: They are not known.
        """
        if not self._access.is_open:
            self._access.caller(request.headers.get("authorization"), common_name)

    def handle(
        self, request: HttpRequest, common_name: str | None, answered: Answered
    ) -> CallUnderWay | None:
        """Answer a request by `answered`: at once, or when its inference has ended.

        Args:
            request: Complete.
            common_name: Of the caller's verified certificate.
            answered: Takes the answer, once.

        Returns:
            The inference under way, to cancel it; None if the answer was given.
        """
        try:
            found = self._handle(request, common_name, answered)
        except SuperServeError as error:
            failed = _text_failed if _path_of(request.target) in _TEXT_PATHS else _failed
            answered(self._counted(failed(error)))
            return None
        if isinstance(found, HttpAnswer):
            answered(self._counted(found))
            return None
        return found

    def _counted(self, answer: HttpAnswer) -> HttpAnswer:
        self._backend.board.count_status(answer.status)
        return answer

    def _handle(
        self, request: HttpRequest, common_name: str | None, answered: Answered
    ) -> HttpAnswer | CallUnderWay:
        known = self._targets.get(request.target)
        if known is not None and request.method == "POST":  # nearly always
            caller = ANYONE
            if not self._access.is_open:
                caller = self._access.caller(request.headers.get("authorization"), common_name)
            return self._infer(request, known[0], known[1], caller, answered)
        path = _path_of(request.target)
        caller = ANYONE
        if path not in _OPEN:
            caller = self._access.caller(request.headers.get("authorization"), common_name)
        if (fixed := self._paths.get(path)) is not None:
            _check_method(request.method, fixed[0])
            return fixed[1]()
        if (kind := _TEXT_PATHS.get(path)) is not None:
            _check_method(request.method, "POST")
            return self._text(request, kind, caller, answered)
        name, version, what = _model_path(path)
        if what == "infer":
            _check_method(request.method, "POST")
            if len(self._targets) < _MAX_TARGETS:
                self._targets[request.target] = name, version
            return self._infer(request, name, version, caller, answered)
        found_model(self._backend.model, name, version)
        _check_method(request.method, "GET")
        return self._about_model(what)

    def _infer(
        self, request: HttpRequest, name: str, version: str, caller: KnownCaller, answered: Answered
    ) -> InferCall:
        backend, headers = self._backend, request.headers
        model = found_model(backend.model, name, version)
        reader = self._reader
        if reader is None or reader.model is not model:
            reader = self._reader = RequestReader(model)
        parsed = reader.read(request.body, _json_length(headers.get(_LENGTH)))
        terms = terms_of(parsed.parameters, headers, default_ns=backend.default_slo_ns)
        if caller is not ANYONE:
            self._access.admit(caller, len(parsed.rows), time.monotonic_ns())

        def done(outcome: InferAnswer | SuperServeError) -> None:
            answered(self._counted(_answer(outcome)))

        return backend.infer(parsed, terms, request.arrived_ns, done)

    def _text(self, request: HttpRequest, kind: str, caller: KnownCaller, answered: Answered) -> TextCall:
        backend = self._backend
        if self._tokens is None:
            raise GatewayError(NOT_FOUND, _NO_TOKENIZER)
        document = document_of(request.body)
        served = found_model(
            backend.model, model_name_of(document, "" if backend.model is None else backend.model.name)
        )
        model = text_model(served)
        ask = ask_of(kind, document, model)
        terms = terms_of(ask.parameters, request.headers, default_ns=backend.default_slo_ns)
        if caller is not ANYONE:
            self._access.admit(caller, ask.n_rows, time.monotonic_ns())

        def done(outcome: bytes | SuperServeError) -> None:
            answer = (
                _text_failed(outcome) if isinstance(outcome, SuperServeError) else HttpAnswer(200, outcome)
            )
            answered(self._counted(answer))

        call = TextCall(backend, self._tokens, ask, terms, request.arrived_ns, done)
        call.start(served, model)
        return call

    def _index(self) -> HttpAnswer:
        return _json(repository_index(self._backend.model, is_ready=self._backend.is_ready))

    def _statistics(self) -> HttpAnswer:
        model = self._backend.model
        if model is None:
            return _json({"model_stats": []})
        return _json(model_statistics(model, self._backend.board.totals()))

    def _about_model(self, what: str) -> HttpAnswer:
        model = self._backend.model
        assert model is not None, "it was found"
        if what == "ready":
            return _health(is_well=self._backend.is_ready)
        if what == "config":
            return _json(model_config(model, MAX_ROWS))
        if what == "stats":
            return self._statistics()
        return _json(model_metadata(model))


def _path_of(target: bytes) -> str:
    path = target.partition(b"?")[0].decode("latin-1")
    return path[:-1] if len(path) > 1 and path.endswith("/") else path


def _model_path(path: str) -> tuple[str, str, str]:
    """Return the model's name, its version and what is asked of it, from `/v2/models/M[/versions/V][/WHAT]`.

    Raises:
        GatewayError: The path is none of this protocol's.
    """
    parts = path.split("/")
    if parts[:3] == ["", "v2", "models"] and len(parts) >= 4 and parts[3]:
        name, rest, version = unquote(parts[3]), parts[4:], ""
        if rest[:1] == ["versions"] and len(rest) >= 2 and rest[1]:
            version, rest = unquote(rest[1]), rest[2:]
        if not rest:
            return name, version, ""
        if rest[0] in ("ready", "config", "stats", "infer") and len(rest) == 1:
            return name, version, rest[0]
    raise GatewayError(NOT_FOUND, f"{path!r:.200}: not found; /openapi.json lists what there is")


def _check_method(method: str, expected: str) -> None:
    if method != expected and not (method == "HEAD" and expected == "GET"):
        raise GatewayError(WRONG_METHOD, f"expected {expected}, got {method:.20}")


def _json_length(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise invalid(f"{_LENGTH}: expected the JSON's length in bytes, got {text!r:.40}")
    return int(text)


def _json(body: object) -> HttpAnswer:
    return HttpAnswer(200, orjson.dumps(body))


def _health(*, is_well: bool) -> HttpAnswer:
    return HttpAnswer(200, b"") if is_well else failure(503, "not ready")


def _answer(outcome: InferAnswer | SuperServeError) -> HttpAnswer:
    """Return an inference's answer as HTTP has it."""
    if isinstance(outcome, SuperServeError):
        return _failed(outcome)
    try:
        body, binary = http_body(outcome)
    except SuperServeError as error:
        return _failed(error)
    if not outcome.request.is_binary:
        return HttpAnswer(200, body)
    return HttpAnswer(200, body, BINARY, ((_LENGTH, str(len(body))),), binary)


def _failed(error: SuperServeError) -> HttpAnswer:
    verdict = verdict_of(error)
    headers = ((_RETRY,) if verdict.is_transient else ()) + ((_BEARER,) if verdict is UNKNOWN_CALLER else ())
    if verdict is WRONG_METHOD:
        headers += (("allow", str(error).split()[1].rstrip(",")),)
    return failure(verdict.http, str(error), *headers)


def _text_failed(error: SuperServeError) -> HttpAnswer:
    """Return an error in the form of OpenAI's API: its clients show no other."""
    failed = _failed(error)
    kind = "server_error" if failed.status >= 500 else "invalid_request_error"
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": failed.status}}
    return failed._replace(body=orjson.dumps(body))
