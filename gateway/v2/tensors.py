"""Tensors of the protocol: datatypes, JSON data, raw bytes and BYTES elements, to and from NumPy's.

Raw bytes are little-endian and row-major, as NumPy's are on every machine that this runs on. FP16 and BF16
have no JSON form. An element of BYTES is four bytes of length and then its bytes.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from gateway.v2.verdicts import invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superserve.subnet import TensorSpec

BYTES = "BYTES"
DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
"""The protocol's datatypes and NumPy's; BF16 has none, and no model that takes it."""
DATATYPES = {np.dtype(dtype): datatype for datatype, dtype in DTYPES.items()}
WITHOUT_JSON = ("FP16", "BF16")

MAX_AXES = 32
_MAX_SIZE = 1 << 40
_LENGTH = struct.Struct("<I")


def datatype_of(spec: TensorSpec | None) -> str:
    """Return the datatype of a model's tensor; BYTES if it takes or gives any bytes."""
    if spec is None:
        return BYTES
    return DATATYPES.get(np.dtype(spec.dtype), BYTES)


def shape_of(spec: TensorSpec | None) -> list[int]:
    """Return the shape of a model's tensor with the batch axis, which may have any size."""
    return [-1, *(() if spec is None or datatype_of(spec) == BYTES else spec.shape)]


def checked_shape(where: str, shape: Any) -> tuple[int, ...]:
    """Return a tensor's shape as given.

    Raises:
        GatewayError: It is not a list of sizes.
    """
    if not isinstance(shape, list | tuple) or not 1 <= len(shape) <= MAX_AXES:
        raise invalid(f"{where}: shape: expected 1 to {MAX_AXES} sizes, got {shape!r:.80}")
    if any(type(size) is not int or not 0 <= size < _MAX_SIZE for size in shape):
        raise invalid(f"{where}: shape: expected sizes of at least 0, got {shape!r:.80}")
    return tuple(shape)


def rows_of(
    where: str, datatype: str, shape: tuple[int, ...], raw: memoryview, spec: TensorSpec | None
) -> list[memoryview]:
    """Return the tensor's rows, one for each query, uncopied.

    Args:
        where: Names the tensor in errors.
        datatype: As the request has it; see `check_tensor`.
        shape: With the batch axis.
        raw: The tensor's bytes.
        spec: What one query takes; None for any bytes, as elements of BYTES.

    Raises:
        GatewayError: The bytes are not as many as the shape says, or an element of BYTES ends early.
    """
    if datatype == BYTES:
        return _elements(where, raw, math.prod(shape))
    each = math.prod(shape[1:]) * np.dtype(DTYPES[datatype]).itemsize
    if len(raw) != each * shape[0]:
        raise invalid(
            f"{where}: expected {each * shape[0]} bytes for {datatype} {list(shape)}, got {len(raw)}"
        )
    if spec is not None:
        assert each == spec.n_bytes, "the shape was checked"
    return [raw] if shape[0] == 1 else [raw[i * each : (i + 1) * each] for i in range(shape[0])]


def check_tensor(where: str, datatype: Any, shape: tuple[int, ...], spec: TensorSpec | None) -> None:
    """Refuse a tensor that is not what the model takes, before its data is read.

    Raises:
        GatewayError: The datatype or the shape is not the model's, or there is no row.
    """
    expected = datatype_of(spec)
    if datatype != expected:
        raise invalid(f"{where}: datatype: expected {expected}, got {datatype!r:.40}")
    if shape[0] < 1:
        raise invalid(f"{where}: shape: expected at least one row, got {list(shape)}")
    if expected == BYTES:
        if shape[1:] not in ((), (1,)):
            raise invalid(f"{where}: shape: expected [-1] or [-1, 1], got {list(shape)}")
        return
    assert spec is not None, "a datatype other than BYTES has a spec"
    if shape[1:] != spec.shape:
        raise invalid(f"{where}: shape: expected {shape_of(spec)}, got {list(shape)}")


def raw_of_json(where: str, datatype: str, shape: tuple[int, ...], data: Any) -> memoryview:
    """Return the bytes of a tensor whose data is JSON, nested or flat.

    Raises:
        GatewayError: The data is not of this datatype, or not as much as the shape says.
    """
    if datatype in WITHOUT_JSON:
        raise invalid(f"{where}: {datatype} has no JSON form: expected binary data")
    if not isinstance(data, list):
        raise invalid(f"{where}: data: expected a list, got {type(data).__name__}")
    if datatype == BYTES:
        return _joined(where, shape, data)
    try:
        # NumPy finds the type first: with a dtype given it would also take strings and truncate fractions.
        found = np.array(data)
    except (ValueError, OverflowError):
        raise invalid(f"{where}: data: expected numbers, all lists of an axis equally long") from None
    if found.size != math.prod(shape):
        raise invalid(
            f"{where}: data: expected {math.prod(shape)} elements for {list(shape)}, got {found.size}"
        )
    return _cast(where, datatype, found).view(np.uint8).data


def _cast(where: str, datatype: str, found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(DTYPES[datatype])
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if found.dtype.kind not in allowed:
        raise invalid(f"{where}: data: expected elements of {datatype}, got {found.dtype}")
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(found, dtype)
    if dtype.kind in "iu" and not np.array_equal(cast, found):
        raise invalid(f"{where}: data: expected elements in the range of {datatype}")
    if dtype.kind == "f" and not np.isfinite(cast).all():
        raise invalid(f"{where}: data: expected elements in the range of {datatype}")
    return cast.reshape(-1)


def _joined(where: str, shape: tuple[int, ...], data: list[Any]) -> memoryview:
    """Return elements of BYTES end to end, from strings, flat or in rows of one."""
    flat = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in data]
    if not all(isinstance(one, str) for one in flat):
        raise invalid(f"{where}: data: expected strings")
    if len(flat) != math.prod(shape):
        raise invalid(
            f"{where}: data: expected {math.prod(shape)} elements for {list(shape)}, got {len(flat)}"
        )
    return memoryview(packed([one.encode() for one in flat]))


def packed(elements: Sequence[bytes | memoryview]) -> bytes:
    """Return elements of BYTES as raw bytes."""
    return b"".join([part for one in elements for part in (_LENGTH.pack(len(one)), one)])


def _elements(where: str, raw: memoryview, count: int) -> list[memoryview]:
    found: list[memoryview] = []
    at, n_bytes = 0, len(raw)
    while at < n_bytes:
        if at + 4 > n_bytes:
            raise invalid(f"{where}: element {len(found)}: expected 4 bytes of length, got {n_bytes - at}")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += 4
        if at + length > n_bytes:
            raise invalid(f"{where}: element {len(found)}: expected {length} bytes, got {n_bytes - at}")
        found.append(raw[at : at + length])
        at += length
    if len(found) != count:
        raise invalid(f"{where}: expected {count} elements, got {len(found)}")
    return found
