"""The target of a run: its URL, and what its model takes, from its own metadata."""

from __future__ import annotations

import math
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import orjson

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMES = ("http", "grpc")
EXPECTED = "expected http://HOST:PORT/v2/models/M/infer, grpc://HOST:PORT/M or superserve://HOST:PORT"
ITEM_BYTES = {
    "BOOL": 1, "UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "FP16": 2, "BF16": 2, "UINT32": 4, "INT32": 4,
    "FP32": 4, "UINT64": 8, "INT64": 8, "FP64": 8,
}  # fmt: skip
DTYPES = {
    "BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
}  # fmt: skip
_ANY_BYTES = 64
_TIMEOUT_S = 5.0
_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")


@dataclass(frozen=True, slots=True)
class TargetUrl:
    """Where a run's queries go; `path` is HTTP's, and the model's name over gRPC."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TargetModel:
    """What a target's model takes, as it says itself.

    Attributes:
        server: What serves it, in its own words.
        name: The model's.
        input: The input's name.
        datatype: The input's; BYTES takes each payload as an element.
        shape: Of one row, without the batch axis.
        output: The output's name.
        output_dtype: NumPy's name of the output's datatype.
        subnets: Name and accuracy, percent, of each, if the target is ours.
    """

    server: str
    name: str
    input: str
    datatype: str
    shape: tuple[int, ...]
    output: str
    output_dtype: str = "float32"
    subnets: tuple[tuple[str, float], ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Bytes of one query's payload; 64 if any number will do."""
        each = ITEM_BYTES.get(self.datatype)
        return _ANY_BYTES if each is None else each * math.prod(self.shape)


def parsed_url(text: str) -> TargetUrl:
    """Return a target's URL.

    Raises:
        ConfigError: It is none.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    path = parts.path
    is_whole = parts.scheme in SCHEMES and parts.hostname and port and not parts.query
    if parts.scheme == "grpc":
        path = path.strip("/")
    if (
        not is_whole
        or (parts.scheme == "http" and not _PATH.fullmatch(path))
        or not path
        or (parts.scheme == "grpc" and "/" in path)
    ):
        raise ConfigError(f"--target: {EXPECTED}, got {text!r}")
    return TargetUrl(parts.scheme, parts.hostname or "", port or 0, path)


def is_url(target: object) -> bool:
    """Return whether a run's target is a server of the protocol, and not a router."""
    return isinstance(target, str) and target.partition("://")[0] in SCHEMES


def target_model(text: str) -> TargetModel:
    """Ask a target for its metadata.

    Raises:
        ConfigError: It does not answer, or has another kind of model.
    """
    url = parsed_url(text)
    ask = _ask_grpc if url.scheme == "grpc" else _ask_http
    return ask(url)


def _ask_http(url: TargetUrl) -> TargetModel:
    base = url.path.removesuffix("/infer")

    def get(path: str) -> Any:
        where = f"http://{url.netloc}{path}"
        try:
            with urllib.request.urlopen(where, timeout=_TIMEOUT_S) as answer:
                return orjson.loads(answer.read())
        except (OSError, orjson.JSONDecodeError) as error:
            raise ConfigError(f"--target: {where}: expected its metadata: {error}") from error

    config: Any = {}
    metadata = get(base)
    try:
        server = str(get("/v2").get("name", "?"))
        config = get(base + "/config")
    except ConfigError:
        server = "?"  # peers need not have them
    return _model_of(metadata, server, config)


def _ask_grpc(url: TargetUrl) -> TargetModel:
    from google.protobuf import json_format  # noqa: PLC0415  with the `gateway` extra only

    from loadgen.oip.grpc import asker  # noqa: PLC0415  grpcio, too

    with asker(url.netloc, _TIMEOUT_S) as ask:

        def get(method: str, **fields: str) -> Any:
            return json_format.MessageToDict(ask(method, **fields), preserving_proto_field_name=True)

        metadata = get("ModelMetadata", name=url.path)
        server = str(get("ServerMetadata").get("name", "?"))
        config: Any = _quietly(lambda: get("ModelConfig", name=url.path).get("config", {}))
    return _model_of(metadata, server, config)


def _quietly(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except ConfigError:
        return {}


def _model_of(metadata: Any, server: str, config: Any) -> TargetModel:
    try:
        (takes,) = metadata["inputs"]
        gives = metadata["outputs"][0]
        dtype = DTYPES.get(gives["datatype"], "uint8")
        shape = tuple(int(size) for size in takes["shape"])
        found = TargetModel(
            server, str(metadata["name"]), str(takes["name"]), str(takes["datatype"]), shape[1:],
            str(gives["name"]), dtype, _subnets(config),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"--target: expected metadata of a model with one input, got {metadata!r:.300}"
        ) from error
    if shape[:1] != (-1,) or any(size < 1 for size in found.shape):
        raise ConfigError(
            f"--target: expected an input with a batch axis of -1 and fixed sizes, got {list(shape)}"
        )
    return found


def _subnets(config: Any) -> tuple[tuple[str, float], ...]:
    """Return the subnets that our gateway lists in a model's configuration."""
    parameters = config.get("parameters") if isinstance(config, dict) else None
    listed = parameters.get("subnets") if isinstance(parameters, dict) else None
    text = listed.get("string_value", "") if isinstance(listed, dict) else ""
    found = []
    for pair in filter(None, str(text).split(",")):
        name, _, accuracy = pair.rpartition("=")
        try:
            found.append((name, float(accuracy)))
        except ValueError:
            return ()
    return tuple(found)


class RequestMaker:
    """Makes the bytes of requests for a model: what is the same in all of them is made once.

    Args:
        url: The target.
        model: Its model.
        payload_bytes: Bytes of each payload.
    """

    def __init__(self, url: TargetUrl, model: TargetModel, payload_bytes: int) -> None:
        self.model = model
        self._prefix = b""
        if model.datatype == "BYTES":
            self._prefix = payload_bytes.to_bytes(4, "little")
        n_binary = len(self._prefix) + payload_bytes
        tensor = {
            "name": model.input, "shape": [1, *model.shape], "datatype": model.datatype,
            "parameters": {"binary_data_size": n_binary},
        }  # fmt: skip
        wanted = {"name": model.output, "parameters": {"binary_data": True}}
        self._json = orjson.dumps({"inputs": [tensor], "outputs": [wanted]})
        self._head = (
            f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/octet-stream\r\n"
            f"inference-header-content-length: {len(self._json)}\r\n"
            f"content-length: {len(self._json) + n_binary}\r\nsuperserve-slo-ms: "
        ).encode()
        self._n = payload_bytes

    def http(self, payload: bytes | memoryview, slack_ns: int) -> bytes:
        """Return one query as an HTTP request."""
        if len(payload) != self._n:
            raise ConfigError(f"payload: expected {self._n} bytes, got {len(payload)}")
        # A query that is too late already is sent all the same: its load was due.
        slo = b"%.3f\r\n\r\n" % (max(slack_ns, 1_000) / 1e6)
        return b"".join((self._head, slo, self._json, self._prefix, payload))

    def raw(self, payload: bytes | memoryview) -> bytes:
        """Return one query's tensor."""
        return self._prefix + bytes(payload)


def payloads_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return inputs as rows of bytes."""
    whole = np.ascontiguousarray(array)
    return whole.reshape(len(whole), -1).view(np.uint8)
