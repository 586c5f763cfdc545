"""An inference request: from its JSON and binary tensors, checked, as rows that are queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from gateway.v2.served import INPUT, OUTPUT
from gateway.v2.tensors import check_tensor, checked_shape, raw_of_json, rows_of
from gateway.v2.verdicts import TOO_LARGE, GatewayError, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.v2.served import ServedModel

MAX_ROWS = 4_096
"""Most rows of one request: each is a query of its own."""
_MAX_ID = 1_024
_MAX_KNOWN, _MAX_KNOWN_BYTES = 256, 2_048
_WHERE = f"input {INPUT!r}"
_SHARED = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


class InferRequest(NamedTuple):
    """What a caller wants inferred.

    Attributes:
        model: The served model.
        id: The caller's; "" if it gave none.
        rows: The queries' payloads, views of the request's body.
        parameters: Of the whole request.
        is_binary: Whether the output goes back as raw bytes.
    """

    model: ServedModel
    id: str
    rows: list[memoryview]
    parameters: Mapping[str, Any]
    is_binary: bool


class RequestHead(NamedTuple):
    """A request without its tensor's bytes, checked against the model.

    Attributes:
        id: The caller's.
        parameters: Of the whole request.
        is_binary: Whether the output goes back as raw bytes.
        datatype: Of the input.
        shape: Of the input, with the batch axis.
        size: Bytes that follow the JSON; None if `data` holds the tensor.
        data: As in the JSON.
    """

    id: str
    parameters: Mapping[str, Any]
    is_binary: bool
    datatype: str
    shape: tuple[int, ...]
    size: int | None
    data: Any


class RequestReader:
    """Reads HTTP bodies for one model.

    Callers send the same JSON again and again before tensors that differ, so what a JSON says is kept.

    Args:
        model: The served model.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self._known: dict[bytes, RequestHead] = {}

    def read(self, body: bytes | bytearray | memoryview, json_length: int | None) -> InferRequest:
        """Return the request in a body.

        Args:
            body: JSON, then the binary tensors.
            json_length: Of `Inference-Header-Content-Length`; None if all of the body is JSON. With 0 all
                of it is the input's raw bytes.

        Raises:
            GatewayError: It is malformed, or not what the model takes.
        """
        view, model = memoryview(body), self.model
        if json_length is None:
            head = _head(view, model)
            rows = _rows(head, view[:0], model)
            return InferRequest(model, head.id, rows, head.parameters, head.is_binary)
        if json_length > len(view):
            raise invalid(
                f"inference-header-content-length: expected at most {len(view)}, the body's length, "
                f"got {json_length}"
            )
        if json_length == 0:
            return InferRequest(model, "", _raw_rows(view, model), {}, is_binary=False)
        text = bytes(view[:json_length])
        found = self._known.get(text)
        if found is None:
            found = _head(text, model)
            if found.size is not None and json_length <= _MAX_KNOWN_BYTES:
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                self._known[text] = found
        rows = _rows(found, view[json_length:], model)
        return InferRequest(model, found.id, rows, found.parameters, found.is_binary)


def _head(text: bytes | memoryview, model: ServedModel) -> RequestHead:
    """Return what a request's JSON says."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise invalid(f"body: expected JSON: {error}") from None
    if not isinstance(document, dict):
        raise invalid(f"body: expected a JSON object, got {type(document).__name__}")
    parameters = parameters_of("parameters", document)
    check_supported(parameters)
    tensor = _only(document.get("inputs"), "inputs", INPUT, required=True)
    assert tensor is not None, "it is required"
    request_id = document.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > _MAX_ID:
        raise invalid(f"id: expected a string of at most {_MAX_ID} characters")
    wanted = _only(document.get("outputs"), "outputs", OUTPUT, required=False)
    is_binary = _flag("parameters.binary_data_output", parameters.get("binary_data_output"), default=False)
    if wanted is not None:
        asked = parameters_of(OUTPUT, wanted)
        check_output(asked)
        is_binary = _flag("output: parameters.binary_data", asked.get("binary_data"), default=is_binary)
    datatype, shape, size = _tensor(tensor, model)
    return RequestHead(request_id, parameters, is_binary, datatype, shape, size, tensor.get("data"))


def check_supported(parameters: Mapping[str, Any]) -> None:
    """Refuse what changes a request's meaning and is not supported here: sequences of stateful models."""
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise invalid("parameters.sequence_id: stateful sequences are not supported")


def check_output(parameters: Mapping[str, Any]) -> None:
    """Refuse a requested output that cannot be given: classes by name, or shared memory."""
    for name in ("classification", *_SHARED):
        if parameters.get(name):
            raise invalid(f"{OUTPUT}: parameters.{name}: not supported; the whole tensor is given")


def parameters_of(where: str, holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of a request, an input or an output; {} if there are none."""
    found = holder.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise invalid(f"{where}: expected parameters as an object, got {type(found).__name__}")
    return found


def checked_count(count: int) -> None:
    """Refuse a request with too many rows."""
    if count > MAX_ROWS:
        raise GatewayError(TOO_LARGE, f"{INPUT}: expected at most {MAX_ROWS} rows, got {count}")


def _only(tensors: Any, where: str, name: str, *, required: bool) -> dict[str, Any] | None:
    """Return the only tensor of a list, which must have this name; None if it may be missing, and is."""
    if not required and (tensors is None or tensors == []):
        return None
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise invalid(f"{where}: expected a list of one tensor, {name!r}")
    if tensors[0].get("name") != name:
        raise invalid(f"{where}: expected the tensor {name!r}, got {tensors[0].get('name')!r:.100}")
    return tensors[0]


def _flag(where: str, value: Any, *, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"{where}: expected true or false, got {value!r:.40}")
    return value


def _tensor(tensor: dict[str, Any], model: ServedModel) -> tuple[str, tuple[int, ...], int | None]:
    """Return the input's datatype, shape, and how many bytes follow the JSON, checked."""
    shape = checked_shape(_WHERE, tensor.get("shape"))
    check_tensor(_WHERE, tensor.get("datatype"), shape, model.takes)
    checked_count(shape[0])
    parameters = parameters_of(_WHERE, tensor)
    for name in _SHARED:
        if name in parameters:
            raise invalid(f"{_WHERE}: parameters.{name}: not supported; send the tensor's bytes")
    size = parameters.get("binary_data_size")
    if size is None and "data" not in tensor:
        raise invalid(f"{_WHERE}: expected data, or parameters.binary_data_size and binary data")
    if size is not None and "data" in tensor:
        raise invalid(f"{_WHERE}: expected data or binary_data_size, got both")
    if size is not None and (type(size) is not int or size < 0):
        raise invalid(f"{_WHERE}: binary_data_size: expected the tensor's bytes, got {size!r:.40}")
    return str(tensor["datatype"]), shape, size


def _rows(head: RequestHead, binary: memoryview, model: ServedModel) -> list[memoryview]:
    """Return the input's rows."""
    if head.size is None:
        if len(binary):
            raise invalid(f"body: {len(binary)} bytes follow the JSON, which gives no binary_data_size")
        binary = raw_of_json(_WHERE, head.datatype, head.shape, head.data)
    elif head.size != len(binary):
        raise invalid(
            f"{_WHERE}: binary_data_size: expected {len(binary)}, the bytes after the JSON, got {head.size}"
        )
    return rows_of(_WHERE, head.datatype, head.shape, binary, model.takes)


def _raw_rows(view: memoryview, model: ServedModel) -> list[memoryview]:
    """Return the rows of a body that is nothing but the input: for a model of any bytes it is one query."""
    spec = model.takes
    if spec is None:
        return [view]
    count, rest = divmod(len(view), spec.n_bytes)
    if rest or not count:
        raise invalid(f"body: expected a multiple of {spec.n_bytes} bytes, one input each, got {len(view)}")
    checked_count(count)
    return [view[i * spec.n_bytes : (i + 1) * spec.n_bytes] for i in range(count)]
