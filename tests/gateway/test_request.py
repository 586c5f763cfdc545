"""Inference requests: what becomes a query, and what is refused with which words."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.v2.request import MAX_ROWS, InferRequest, RequestReader
from gateway.v2.served import ServedModel
from gateway.v2.tensors import DTYPES, check_tensor, packed, raw_of_json, rows_of
from gateway.v2.verdicts import GatewayError
from superserve.subnet import TensorSpec

MODEL = ServedModel("digits", TensorSpec("float32", (1, 2, 2)), TensorSpec("float32", (3,)))
ANY = ServedModel("any")


def parsed_request(raw: Any, length: int | None, model: ServedModel) -> InferRequest:
    """Read a body twice: what is known from before says the same."""
    reader = RequestReader(model)
    first = reader.read(raw, length)
    again = reader.read(raw, length)
    assert again._replace(rows=[]) == first._replace(rows=[])
    assert [bytes(row) for row in again.rows] == [bytes(row) for row in first.rows]
    return first


def body(**changed: Any) -> dict[str, Any]:
    """Return a request for two rows, with some fields of its input changed; None removes one."""
    tensor = {"name": "input", "shape": [2, 1, 2, 2], "datatype": "FP32", "data": list(range(8)), **changed}
    return {"inputs": [{name: one for name, one in tensor.items() if one is not None}]}


def rows(document: Any, binary: bytes = b"", *, model: ServedModel = MODEL) -> list[bytes]:
    """Return the rows of a request."""
    text = orjson.dumps(document)
    length = len(text) if binary else None
    return [bytes(row) for row in parsed_request(text + binary, length, model).rows]


def test_flat_nested_and_binary_data_are_the_same() -> None:
    """Three ways to say one tensor."""
    array = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    expected = [array[0].tobytes(), array[1].tobytes()]

    assert rows(body()) == expected
    assert rows(body(data=array.tolist())) == expected
    assert rows(body(data=None, parameters={"binary_data_size": 32}), array.tobytes()) == expected


def test_binary_rows_are_views_of_the_body() -> None:
    """Nothing is copied on the way from the socket's buffer to the client."""
    text = orjson.dumps(body(data=None, parameters={"binary_data_size": 32}))
    whole = bytearray(text + bytes(32))
    found = parsed_request(whole, len(text), MODEL)

    whole[len(text)] = 7
    assert found.rows[0][0] == 7


def test_a_body_that_is_only_the_input() -> None:
    """Inference-Header-Content-Length 0: all of the body is raw data."""
    assert [len(row) for row in parsed_request(bytes(48), 0, MODEL).rows] == [16, 16, 16]
    assert [bytes(row) for row in parsed_request(b"hello", 0, ANY).rows] == [b"hello"]
    with pytest.raises(GatewayError, match="multiple of 16"):
        parsed_request(bytes(47), 0, MODEL)


def test_a_model_of_any_bytes_takes_elements_of_bytes() -> None:
    """Each element is a query, in JSON or length-prefixed."""
    asked = {"inputs": [{"name": "input", "shape": [2], "datatype": "BYTES", "data": ["a", "ü"]}]}
    assert rows(asked, model=ANY) == [b"a", "ü".encode()]
    raw = packed([b"", b"xyz"])
    tensor = {
        "name": "input",
        "shape": [2, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(raw)},
    }
    assert rows({"inputs": [tensor]}, raw, model=ANY) == [b"", b"xyz"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "JSON object"),
        ({}, "inputs: expected a list of one tensor"),
        ({"inputs": [1]}, "inputs: expected a list of one tensor"),
        ({"inputs": [{}, {}]}, "inputs: expected a list of one tensor"),
        (body(name="image"), "expected the tensor 'input', got 'image'"),
        (body(datatype="FP64"), "datatype: expected FP32, got 'FP64'"),
        (body(datatype=None), "datatype: expected FP32"),
        (body(shape=None), "shape: expected 1 to 32 sizes"),
        (body(shape=[2, 1, 2, -2]), "sizes of at least 0"),
        (body(shape=[2, 1, 2, 2.0]), "sizes of at least 0"),
        (body(shape=[True, 1, 2, 2]), "sizes of at least 0"),
        (body(shape=[0, 1, 2, 2], data=[]), "at least one row"),
        (body(shape=[2, 2, 2]), r"shape: expected \[-1, 1, 2, 2\]"),
        (body(shape=[1, 1, 2, 2]), "expected 4 elements"),
        (body(shape=[MAX_ROWS + 1, 1, 2, 2]), "at most 4096 rows"),
        (body(data=None), "expected data, or parameters.binary_data_size"),
        (body(data="abc"), "data: expected a list"),
        (body(data=["1"] * 8), "expected elements of FP32"),
        (body(data=[True] * 8), "expected elements of FP32"),
        (body(data=[None] * 8), "expected elements of FP32"),
        (body(data=[1e300] * 8), "in the range of FP32"),
        (body(data=[[1, 2], [3]]), "equally long"),
        (body(data=[{}] * 8), "expected elements of FP32"),
        (body(parameters={"binary_data_size": 0}), "got both"),
        (body(data=None, parameters={"binary_data_size": 32}), "binary_data_size: expected 0"),
        (body(parameters=[]), "parameters as an object"),
        (body(parameters={"shared_memory_region": "r"}), "shared_memory_region: not supported"),
        ({**body(), "outputs": [{"name": "other"}]}, "expected the tensor 'output', got 'other'"),
        ({**body(), "outputs": [{"name": "output", "parameters": {"classification": 3}}]}, "classification"),
        ({**body(), "outputs": [{"name": "output", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({**body(), "parameters": {"sequence_id": 7}}, "sequence"),
        ({**body(), "id": 5}, "id: expected a string"),
    ],
)
def test_what_is_wrong_is_named(document: Any, words: str) -> None:
    """Each refusal names the field and what was expected."""
    with pytest.raises(GatewayError, match=words):
        rows(document)


@pytest.mark.parametrize("length", [33, 31, -1, "32", None])
def test_a_size_that_disagrees_is_refused(length: Any) -> None:
    """binary_data_size is exactly the bytes that follow the JSON."""
    parameters = {"binary_data_size": length}
    with pytest.raises(GatewayError, match="binary"):
        rows(body(data=None, parameters=parameters), bytes(32))


def test_bytes_after_json_that_names_none_are_refused() -> None:
    """A body cannot smuggle a second message."""
    with pytest.raises(GatewayError, match="3 bytes follow"):
        rows(body(), b"abc")


def test_a_length_beyond_the_body_is_refused() -> None:
    """Inference-Header-Content-Length is at most the body's."""
    with pytest.raises(GatewayError, match="expected at most 2"):
        parsed_request(b"{}", 3, MODEL)


@pytest.mark.parametrize("raw", [b"\x05\x00\x00\x00abc", b"\x01", b"\xff\xff\xff\xff", packed([b"a", b"b"])])
def test_elements_of_bytes_that_end_early_or_are_too_many(raw: bytes) -> None:
    """A length is never believed beyond the bytes that came."""
    with pytest.raises(GatewayError):
        rows_of("input", "BYTES", (1,), memoryview(raw), None)


@given(st.sampled_from(sorted(set(DTYPES) - {"FP16", "BOOL"})), st.integers(-300, 2**64 - 1))
def test_integers_are_taken_exactly_or_refused(datatype: str, number: int) -> None:
    """JSON numbers never wrap around."""
    try:
        raw = raw_of_json("input", datatype, (1,), [number])
    except GatewayError:
        dtype = np.dtype(DTYPES[datatype])
        assert dtype.kind in "iu"
        info = np.iinfo(dtype)
        assert not info.min <= number <= info.max
        return
    found = np.frombuffer(raw, DTYPES[datatype])[0]
    assert found == number or datatype in ("FP32", "FP64")


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 220)))
def test_any_bytes_are_a_request_or_a_refusal(raw: bytes, length: int | None) -> None:
    """Nothing but GatewayError comes out of hostile bytes."""
    for model in (MODEL, ANY):
        with contextlib.suppress(GatewayError):
            parsed_request(raw, length, model)


def test_fp16_has_no_json() -> None:
    """As the protocol says."""
    spec = TensorSpec("float16", (2,))
    check_tensor("input", "FP16", (1, 2), spec)
    with pytest.raises(GatewayError, match="no JSON form"):
        raw_of_json("input", "FP16", (1, 2), [1, 2])


def test_what_is_kept_of_a_request_is_bounded() -> None:
    """A caller that sends a new JSON each time does not fill the memory."""
    reader = RequestReader(MODEL)
    for i in range(600):
        text = orjson.dumps({**body(data=None, parameters={"binary_data_size": 32}), "id": str(i)})
        assert reader.read(text + bytes(32), len(text)).id == str(i)
    assert len(reader._known) <= 256


def test_what_is_kept_does_not_hide_a_wrong_size() -> None:
    """The second body of the same JSON is checked like the first."""
    reader = RequestReader(MODEL)
    text = orjson.dumps(body(data=None, parameters={"binary_data_size": 32}))
    reader.read(text + bytes(32), len(text))
    with pytest.raises(GatewayError, match="expected 31"):
        reader.read(text + bytes(31), len(text))
