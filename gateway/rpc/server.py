"""The gRPC service on grpcio's asyncio server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import json_format

from gateway.rpc.mapping import StreamResponse, config_of, plain, request_of, response_of, statistics_of
from gateway.rpc.messages import SERVICE, methods
from gateway.v2.describe import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from gateway.v2.request import MAX_ROWS
from gateway.v2.served import found_model
from gateway.v2.terms import terms_of
from gateway.v2.verdicts import verdict_of
from superserve.errors import ConfigError, SuperServeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.calls.access import Access, KnownCaller
    from gateway.calls.backend import Backend
    from gateway.calls.settings import GatewaySettings
    from gateway.v2.answer import InferAnswer

log = logging.getLogger(__name__)

MAX_STREAMED = 1_024
"""Most requests of one stream without an answer; then it is not read."""
_HEAD_BYTES = 32_768
_OPEN = ("ServerLive", "ServerReady")
"""For probes, which have no token."""
_S = 1_000_000_000


class InferenceService:
    """The methods of the service; a method's name is the protocol's.

    Args:
        backend: The way to the router.
        access: Who may call.
        version: Of the server, in its metadata.
    """

    def __init__(self, backend: Backend, access: Access, version: str) -> None:
        self._backend = backend
        self._access = access
        self._version = version

    async def answer(self, name: str, make: Any, request: Any, context: Any) -> Any:
        """Answer a unary method with a message of the class `make`."""
        try:
            caller = None if name in _OPEN else self._caller(context)
            if name == "ModelInfer":
                response = await self._infer(request, caller, context, context.time_remaining())
            else:
                response = json_format.ParseDict(self._described(name, request), make())
        except SuperServeError as error:
            verdict = verdict_of(error)
            self._backend.board.count_status(verdict.http)
            await context.abort(grpc.StatusCode[verdict.grpc], str(error))
        except asyncio.CancelledError:  # the caller is gone
            self._backend.board.count_status(499)
            raise
        self._backend.board.count_status(200)
        return response

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answer a stream's requests, each when it has ended; `id` tells which one it was."""
        try:
            caller = self._caller(context)
        except SuperServeError as error:
            await context.abort(grpc.StatusCode[verdict_of(error).grpc], str(error))
        answers: asyncio.Queue[Any] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_STREAMED)
        tasks: set[asyncio.Task[None]] = set()

        async def one(request: Any) -> None:
            answers.put_nowait(await self._streamed(request, caller, context))
            room.release()

        async def read() -> None:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(one(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
            answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (response := await answers.get()) is not None:
                yield response
        finally:
            reader.cancel()
            for task in list(tasks):
                task.cancel()

    async def _streamed(self, request: Any, caller: KnownCaller, context: Any) -> Any:
        # A stream's own deadline bounds the stream: a request of it brings its time in `parameters.timeout`.
        try:
            response = StreamResponse(infer_response=await self._infer(request, caller, context, None))
        except SuperServeError as error:
            self._backend.board.count_status(verdict_of(error).http)
            response = StreamResponse(error_message=str(error))
            response.infer_response.id = request.id
        else:
            self._backend.board.count_status(200)
        return response

    def _caller(self, context: Any) -> KnownCaller:
        names = context.auth_context().get("x509_common_name", ())
        return self._access.caller(
            _metadata(context).get("authorization"), names[0].decode("utf-8", "replace") if names else None
        )

    async def _infer(
        self, wanted: Any, caller: KnownCaller | None, context: Any, left_s: float | None
    ) -> Any:
        backend, arrived_ns = self._backend, time.monotonic_ns()
        model = found_model(backend.model, wanted.model_name, wanted.model_version)
        parsed = request_of(wanted, model)
        given_ns = () if left_s is None else (int(left_s * _S),)
        metadata = _metadata(context)
        metadata.pop("grpc-timeout", None)  # `left_s` is what is left of it
        terms = terms_of(
            plain(wanted.parameters), metadata, given_ns=given_ns, default_ns=backend.default_slo_ns
        )
        if caller is not None:
            self._access.admit(caller, len(parsed.rows), arrived_ns)
        ended: asyncio.Future[InferAnswer] = asyncio.get_running_loop().create_future()

        def done(outcome: InferAnswer | SuperServeError) -> None:
            if ended.done():
                return
            if isinstance(outcome, SuperServeError):
                ended.set_exception(outcome)
            else:
                ended.set_result(outcome)

        call = backend.infer(parsed, terms, arrived_ns, done)
        backend.board.add("in_flight")
        try:
            return response_of(await ended)
        finally:
            backend.board.add("in_flight", -1)
            call.cancel()  # nothing, unless the caller is gone

    def _described(self, name: str, request: Any) -> dict[str, Any]:
        """Return what a method without inference answers, as the message's fields."""
        backend = self._backend
        if name == "ServerLive":
            return {"live": True}
        if name == "ServerReady":
            return {"ready": backend.is_ready}
        if name == "ServerMetadata":
            return server_metadata(self._version)
        if name == "RepositoryIndex":
            models = repository_index(backend.model, is_ready=backend.is_ready)
            return {"models": [one for one in models if one["state"] == "READY" or not request.ready]}
        if name == "ModelStatistics" and not request.name:
            model = backend.model
            return {} if model is None else statistics_of(model_statistics(model, backend.board.totals()))
        model = found_model(backend.model, request.name, request.version)
        if name == "ModelReady":
            return {"ready": backend.is_ready}
        if name == "ModelMetadata":
            return model_metadata(model)
        if name == "ModelConfig":
            return {"config": config_of(model_config(model, MAX_ROWS))}
        assert name == "ModelStatistics", "the service has no further method"
        return statistics_of(model_statistics(model, backend.board.totals()))


def _metadata(context: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in context.invocation_metadata():
        if isinstance(value, str):
            # As for HTTP: two of them are malformed, and neither is taken.
            found[name] = f"{found[name]}, {value}" if name == "traceparent" and name in found else value
    return found


def handlers(service: InferenceService) -> Any:
    """Return the service's methods as grpcio takes them."""
    found: dict[str, Any] = {}
    for name, (takes, gives, is_stream) in methods().items():
        codec = {"request_deserializer": takes.FromString, "response_serializer": gives.SerializeToString}
        if is_stream:
            found[name] = grpc.stream_stream_rpc_method_handler(service.stream, **codec)
            continue

        async def unary(request: Any, context: Any, name: str = name, gives: Any = gives) -> Any:
            return await service.answer(name, gives, request, context)

        found[name] = grpc.unary_unary_rpc_method_handler(unary, **codec)
    return grpc.method_handlers_generic_handler(SERVICE, found)


def _credentials(settings: GatewaySettings) -> Any:
    assert settings.tls_cert is not None, "TLS is on"
    assert settings.tls_key is not None, "the key comes with it"
    pair = (Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes())
    ca = None if settings.client_ca is None else Path(settings.client_ca).read_bytes()
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


async def open_grpc(
    settings: GatewaySettings, backend: Backend, access: Access, version: str
) -> Callable[[], Awaitable[object]]:
    """Serve gRPC; return what drains it.

    Raises:
        ConfigError: The port is taken.
    """
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),  # gRPC's own is 4 MB
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _HEAD_BYTES),
        ("grpc.max_connection_idle_ms", int(settings.idle_s * 1e3)),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((handlers(InferenceService(backend, access, version)),))
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    where = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_cert is None:
            server.add_insecure_port(where)
        else:
            server.add_secure_port(where, _credentials(settings))
    except RuntimeError as error:
        raise ConfigError(f"{where}: cannot listen: {error}") from error
    await server.start()

    async def drain() -> None:
        await asyncio.sleep(settings.notice_s)
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop(settings.drain_s)  # takes no new calls; those under way have this long

    return drain
