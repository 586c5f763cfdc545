"""The OpenAPI description of the HTTP side, served at /openapi.json."""

from __future__ import annotations

from typing import Any

from gateway.v2.terms import PRIORITY_LEVELS

_NAME = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_STATUSES = {
    "400": "Malformed, or not what the model takes",
    "401": "No known bearer token or certificate",
    "404": "No such path, model or version",
    "405": "Another method is expected",
    "413": "Body or batch too large",
    "415": "Encoded body",
    "429": "The caller's rate is used up",
    "431": "Head too large",
    "500": "The model failed on this query",
    "502": "The worker was lost",
    "503": "Overloaded, draining, or nothing is ready",
    "504": "The deadline passed, or cannot be met",
}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _responses(schema: dict[str, Any] | None, *failures: str, error: str = "Error") -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success"}
    if schema is not None:
        success["content"] = _content(schema)
    always = ("400", "401", "405", "413", "415", "431")
    return {
        "200": success,
        **{
            status: {"description": _STATUSES[status], "content": _content(_reference(error))}
            for status in sorted({*always, *failures})
        },
    }


def _get(summary: str, schema: dict[str, Any] | None, *failures: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(schema, *failures)}}


def _infer() -> dict[str, Any]:
    headers = {
        "superserve-slo-ms": (
            "Time to answer, milliseconds", {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9},
        ),
        "superserve-min-accuracy": (
            "Least accuracy, percent", {"type": "number", "minimum": 0, "maximum": 100},
        ),
        "grpc-timeout": ("Time to answer", {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$"}),
        "x-envoy-expected-rq-timeout-ms": (
            "Time to answer", {"type": "integer", "minimum": 1, "maximum": 10**9},
        ),
        "traceparent": ("W3C trace context", {"type": "string"}),
    }  # fmt: skip
    post = {
        "summary": "Infer: each row of the input is a query, and all have one deadline",
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in headers.items()
        ],
        "requestBody": {"required": True, "content": _content(_reference("InferRequest"))},
        "responses": _responses(_reference("InferResponse"), "404", "429", "500", "502", "503", "504"),
    }
    return {"post": post}


def _tensor(*, is_input: bool) -> dict[str, Any]:
    size = {
        "type": "integer",
        "minimum": 0,
        "description": "Bytes after the JSON, in the order of the tensors",
    }
    properties: dict[str, Any] = {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "parameters": {"type": "object", "properties": {"binary_data_size": size}},
        "data": {"type": "array", "items": {}, "description": "Row-major, nested or flat"},
    }
    required = ["name", "shape", "datatype"]
    if not is_input:
        properties["shape"] = {"type": "array", "items": {"type": "integer", "minimum": 1}}
    return {"type": "object", "required": required, "properties": properties}


def _schemas() -> dict[str, Any]:
    text, number, flag = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
    whole = {"type": "integer", "minimum": 0}
    metadata = {"type": "array", "items": {"type": "object", "required": ["name", "datatype", "shape"]}}
    asked = {
        "timeout": {**whole, "maximum": 10**15, "description": "Time to answer, microseconds; 0 for none"},
        "priority": {**whole, "maximum": PRIORITY_LEVELS, "description": "1 is the highest, 0 none"},
        "min_accuracy": {**number, "minimum": 0, "maximum": 100},
        "binary_data_output": flag,
    }
    served = {
        "subnet": text, "accuracy": number, "is_late": flag, "queued_us": whole, "executing_us": whole,
        "batch_size": whole, "trace_id": text,
    }  # fmt: skip
    return {
        "Error": {"type": "object", "required": ["error"], "properties": {"error": text}},
        "Server": {"type": "object", "required": ["name", "version", "extensions"]},
        "Model": {
            "type": "object", "required": ["name", "versions", "platform", "inputs", "outputs"],
            "properties": {"name": text, "inputs": metadata, "outputs": metadata},
        },
        "Statistics": {"type": "object", "required": ["model_stats"]},
        "Config": {"type": "object", "required": ["name", "max_batch_size", "input", "output"]},
        "Index": {"type": "array", "items": {"type": "object", "required": ["name", "version", "state"]}},
        "InferRequest": {
            "type": "object", "required": ["inputs"],
            "properties": {
                "id": text,
                "parameters": {"type": "object", "properties": asked},
                "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _tensor(is_input=True)},
                "outputs": {
                    "type": "array", "maxItems": 1,
                    "items": {
                        "type": "object", "required": ["name"],
                        "properties": {
                            "name": text,
                            "parameters": {"type": "object", "properties": {"binary_data": flag}},
                        },
                    },
                },
            },
        },
        "InferResponse": {
            "type": "object", "required": ["model_name", "model_version", "outputs"],
            "properties": {
                "model_name": text, "model_version": text, "id": text,
                "parameters": {"type": "object", "properties": served},
                "outputs": {"type": "array", "items": _tensor(is_input=False)},
            },
        },
    }  # fmt: skip


def _text_paths() -> dict[str, Any]:
    """Return the paths for texts."""
    failures = ("404", "429", "500", "502", "503", "504")
    embeddings = {
        "summary": "The vectors of texts, as OpenAI's API has it: each text is a query",
        "requestBody": {"required": True, "content": _content(_reference("EmbeddingsRequest"))},
        "responses": _responses(_reference("Embeddings"), *failures, error="TextError"),
    }
    rerank = {
        "summary": "How well documents fit a query, as Jina's and Cohere's APIs have it",
        "requestBody": {"required": True, "content": _content(_reference("RerankRequest"))},
        "responses": _responses(_reference("Rerank"), *failures, error="TextError"),
    }
    return {
        "/v1/embeddings": {"post": embeddings},
        "/v1/rerank": {"post": rerank},
        "/v2/rerank": {"post": rerank},
    }


def _text_schemas(terms: dict[str, Any]) -> dict[str, Any]:
    text, whole = {"type": "string"}, {"type": "integer", "minimum": 0}
    texts = {"type": "array", "minItems": 1, "items": text}
    some = {**whole, "minimum": 1}
    error = {
        "type": "object", "required": ["message", "type", "code"],
        "properties": {"message": text, "type": text, "code": whole},
    }  # fmt: skip
    return {
        "TextError": {"type": "object", "required": ["error"], "properties": {"error": error}},
        "EmbeddingsRequest": {
            "type": "object", "required": ["input"],
            "properties": {
                "model": text,
                "input": {"anyOf": [text, texts, {"type": "array", "minItems": 1, "items": whole}]},
                "encoding_format": {"enum": ["float", "base64"]},
                "dimensions": some, "parameters": terms,
            },
        },
        "Embeddings": {"type": "object", "required": ["object", "data", "model", "usage"]},
        "RerankRequest": {
            "type": "object", "required": ["query", "documents"],
            "properties": {
                "model": text, "query": text, "documents": texts, "top_n": some,
                "return_documents": {"type": "boolean"}, "parameters": terms,
            },
        },
        "Rerank": {"type": "object", "required": ["results", "model", "usage"]},
    }  # fmt: skip


def description(version: str, *, has_text: bool = False) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description; with the paths for texts, if they are served."""
    paths: dict[str, Any] = {
        "/v2": _get("Server metadata", _reference("Server")),
        "/v2/health/live": _get("Whether the gateway runs", None),
        "/v2/health/ready": _get("Whether a query would reach a GPU", None, "503"),
        "/v2/models/stats": _get("Statistics of every model", _reference("Statistics")),
        "/v2/repository/index": {
            "post": {
                "summary": "The models",
                "requestBody": {"required": False, "content": _content({"type": "object"})},
                "responses": _responses(_reference("Index")),
            }
        },
        "/openapi.json": _get("This description", {"type": "object"}),
    }
    for base, parameters in (
        ("/v2/models/{model}", [_NAME]), ("/v2/models/{model}/versions/{version}", [_NAME, _VERSION]),
    ):  # fmt: skip
        for suffix, item in (
            ("", _get("Metadata", _reference("Model"), "404", "503")),
            ("/ready", _get("Whether a query would reach a GPU", None, "404", "503")),
            ("/config", _get("Configuration", _reference("Config"), "404", "503")),
            ("/stats", _get("Statistics", _reference("Statistics"), "404", "503")),
            ("/infer", _infer()),
        ):
            paths[base + suffix] = {"parameters": parameters, **item}
    schemas = _schemas()
    if has_text:
        schemas |= _text_schemas(schemas["InferRequest"]["properties"]["parameters"])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "SuperServe gateway",
            "version": version,
            "description": "The Open Inference Protocol (KServe v2): docs/gateway.md explains it.",
        },
        "paths": paths | (_text_paths() if has_text else {}),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }
