"""gRPC messages to inference requests, and answers back. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gateway.rpc.messages import message
from gateway.v2.request import MAX_ROWS, InferRequest, check_output, check_supported, checked_count
from gateway.v2.served import INPUT, OUTPUT, VERSION
from gateway.v2.tensors import BYTES, DTYPES, check_tensor, checked_shape, packed, rows_of
from gateway.v2.verdicts import invalid

if TYPE_CHECKING:
    from gateway.v2.answer import InferAnswer
    from gateway.v2.served import ServedModel

InferResponse: Any = message("ModelInferResponse")
StreamResponse: Any = message("ModelStreamInferResponse")

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip
_WHERE = f"input {INPUT!r}"


def plain(parameters: Any) -> dict[str, Any]:
    """Return a map of InferParameter as plain values."""
    found = {}
    for name, one in parameters.items():
        kind = one.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(one, kind)
    return found


def request_of(wanted: Any, model: ServedModel) -> InferRequest:
    """Return the request in a ModelInferRequest.

    Raises:
        GatewayError: It is malformed, or not what the model takes.
    """
    if len(wanted.inputs) != 1 or wanted.inputs[0].name != INPUT:
        raise invalid(
            f"inputs: expected the tensor {INPUT!r} alone, got {[one.name for one in wanted.inputs][:8]}"
        )
    if len(wanted.outputs) > 1 or any(one.name != OUTPUT for one in wanted.outputs):
        raise invalid(f"outputs: expected {OUTPUT!r} or none, got {[one.name for one in wanted.outputs][:8]}")
    parameters = plain(wanted.parameters)
    check_supported(parameters)
    for one in wanted.outputs:
        check_output(plain(one.parameters))
    tensor = wanted.inputs[0]
    if "shared_memory_region" in tensor.parameters:
        raise invalid(f"{_WHERE}: parameters.shared_memory_region: not supported; send the tensor's bytes")
    shape = checked_shape(_WHERE, list(tensor.shape))
    check_tensor(_WHERE, tensor.datatype, shape, model.takes)
    checked_count(shape[0])
    raw = _raw(wanted, tensor, shape)
    return InferRequest(
        model,
        wanted.id,
        rows_of(_WHERE, tensor.datatype, shape, raw, model.takes),
        parameters,
        is_binary=True,
    )


def _raw(wanted: Any, tensor: Any, shape: tuple[int, ...]) -> memoryview:
    """Return the tensor's bytes: from `raw_input_contents`, or from `contents`; never from both."""
    given = [field.name for field, _ in tensor.contents.ListFields()]
    raw = wanted.raw_input_contents
    if len(raw):
        if given:
            raise invalid(f"{_WHERE}: expected contents or raw_input_contents, got both")
        if len(raw) != 1:
            raise invalid(f"raw_input_contents: expected one, as there is one input, got {len(raw)}")
        return memoryview(raw[0])
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise invalid(f"{_WHERE}: {tensor.datatype} has no contents: expected raw_input_contents")
    if given != [field]:
        raise invalid(f"{_WHERE}: contents: expected {field} for {tensor.datatype}, got {given}")
    values = getattr(tensor.contents, field)
    if tensor.datatype == BYTES:
        return memoryview(packed(list(values)))
    found = np.array(values)
    cast = found.astype(DTYPES[tensor.datatype])
    if found.dtype.kind in "iu" and not np.array_equal(cast, found):
        raise invalid(f"{_WHERE}: contents: expected elements in the range of {tensor.datatype}")
    if len(values) != int(np.prod(shape)):
        raise invalid(f"{_WHERE}: contents: expected {int(np.prod(shape))} elements, got {len(values)}")
    return cast.view(np.uint8).data


def response_of(answer: InferAnswer) -> Any:
    """Return the ModelInferResponse of an answer; its tensor is raw."""
    request = answer.request
    response = InferResponse(
        model_name=request.model.name, model_version=VERSION, id=request.id,
        outputs=[{"name": OUTPUT, "datatype": answer.datatype, "shape": answer.shape}],
        raw_output_contents=[bytes(answer.raw())],
    )  # fmt: skip
    for name, value in answer.parameters.items():
        parameter = response.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = value
    return response


def config_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration as the message has it: without what it does not know."""
    return {
        **{name: config[name] for name in ("name", "platform", "backend", "dynamic_batching", "parameters")},
        "max_batch_size": MAX_ROWS,
        "input": [{name: one[name] for name in ("name", "data_type", "dims")} for one in config["input"]],
        "output": config["output"],
    }


def statistics_of(statistics: dict[str, Any]) -> dict[str, Any]:
    """Return statistics as the message has them: it knows no cancelled requests."""
    models = []
    for one in statistics["model_stats"]:
        spans = {name: span for name, span in one["inference_stats"].items() if name != "cancel"}
        models.append({**{k: v for k, v in one.items() if k != "batch_stats"}, "inference_stats": spans})
    return {"model_stats": models}
