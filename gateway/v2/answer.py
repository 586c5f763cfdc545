"""An inference's answer: the replies of a request's rows as one tensor, with what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from gateway.v2.served import OUTPUT, VERSION
from gateway.v2.tensors import BYTES, WITHOUT_JSON, datatype_of, packed
from gateway.v2.verdicts import BROKEN, GatewayError, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.v2.request import InferRequest
    from gateway.v2.terms import Terms
    from superserve.client import Reply

_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class InferAnswer(NamedTuple):
    """The output of a request.

    Attributes:
        shape: With the batch axis.
        rows: Each row's bytes; for BYTES each element's.
        parameters: How it was served: see `parameters_of_replies`.
        subnets: Which subnet served each row.
    """

    request: InferRequest
    datatype: str
    shape: tuple[int, ...]
    rows: Sequence[Any]
    parameters: dict[str, Any]
    subnets: Sequence[str] = ()

    def raw(self) -> bytes | memoryview:
        """Return the tensor's raw bytes: uncopied if there is one row."""
        if self.datatype == BYTES:
            return packed(self.rows)
        if len(self.rows) == 1:
            only: memoryview = self.rows[0].reshape(-1).view(np.uint8).data
            return only
        return b"".join(self.rows)


def answer_of(request: InferRequest, replies: Sequence[Reply], terms: Terms) -> InferAnswer:
    """Return the answer for the replies of a request's rows, in their order.

    Raises:
        GatewayError: An output is not what the model is known to give.
    """
    spec = request.model.gives
    datatype = datatype_of(spec)
    rows = [reply.output for reply in replies]
    shape: tuple[int, ...] = (len(rows),)
    if datatype == BYTES:
        rows = [one if isinstance(one, bytes) else np.ascontiguousarray(one).tobytes() for one in rows]
    else:
        assert spec is not None, "a datatype other than BYTES has a spec"
        shape = (len(rows), *spec.shape)
        if not all(isinstance(one, np.ndarray) for one in rows):
            raise GatewayError(BROKEN, f"output: expected {spec.n_bytes} bytes ({spec.dtype} {spec.shape})")
    subnets = [reply.subnet for reply in replies]
    return InferAnswer(request, datatype, shape, rows, parameters_of_replies(replies, terms), subnets)


def parameters_of_replies(replies: Sequence[Reply], terms: Terms) -> dict[str, Any]:
    """Return how a request was served; of several rows the least accuracy, and the longest times.

    `subnet` names every subnet that served a row, joined by commas.
    """
    first = replies[0]
    found: dict[str, Any] = {"trace_id": terms.trace_id} if terms.trace_id else {}
    if len(replies) == 1:
        found["subnet"], found["accuracy"] = first.subnet, round(first.accuracy, 4)
        found["is_late"] = first.is_late
        found["queued_us"] = int(first.timeline.queued_ms * 1e3)
        found["executing_us"] = int(first.timeline.executing_ms * 1e3)
        found["batch_size"] = first.batch_size
        return found
    found["subnet"] = ",".join(dict.fromkeys(reply.subnet for reply in replies))
    found["accuracy"] = round(min(reply.accuracy for reply in replies), 4)
    found["is_late"] = any(reply.is_late for reply in replies)
    found["queued_us"] = int(max(reply.timeline.queued_ms for reply in replies) * 1e3)
    found["executing_us"] = int(max(reply.timeline.executing_ms for reply in replies) * 1e3)
    found["batch_size"] = max(reply.batch_size for reply in replies)
    return found


def http_body(answer: InferAnswer) -> tuple[bytes, bytes | memoryview]:
    """Return the JSON of an answer, and the binary tensor that follows it: b"" if the JSON holds the data.

    Raises:
        GatewayError: The output has no JSON form, and was not asked for as binary data.
    """
    request = answer.request
    output: dict[str, Any] = {"name": OUTPUT, "datatype": answer.datatype, "shape": answer.shape}
    binary: bytes | memoryview = b""
    if request.is_binary:
        binary = answer.raw()
        output["parameters"] = {"binary_data_size": len(binary)}
    elif answer.datatype in WITHOUT_JSON:
        raise invalid(f"output: {answer.datatype} has no JSON form: ask for binary data")
    else:
        output["data"] = _json_data(answer)
    body: dict[str, Any] = {"model_name": request.model.name, "model_version": VERSION}
    if request.id:
        body["id"] = request.id
    body["parameters"], body["outputs"] = answer.parameters, [output]
    return orjson.dumps(body, option=_NUMPY), binary


def _json_data(answer: InferAnswer) -> Any:
    """Return the data of an output, flat and row-major; what is no UTF-8 becomes U+FFFD."""
    if answer.datatype == BYTES:
        return [bytes(one).decode(errors="replace") for one in answer.rows]
    rows = [row.reshape(-1) for row in answer.rows]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)
