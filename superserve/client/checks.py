"""What a payload has to be before it is sent: the model's dtype and shape, as a buffer in C order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from superserve.errors import InvalidQueryError
from superserve.subnet import TensorSpec

MAX_PAYLOAD_BYTES = 256 << 20
"""A longer frame would end the connection (`superserve.net.sockets.MAX_MESSAGE_BYTES`)."""

_PLAIN_KINDS = "biufc"
"""Kinds of dtype whose arrays expose their buffer directly."""


class _Input(NamedTuple):
    """What the model takes; replaced as a whole, so that no thread sees parts of two models."""

    spec: TensorSpec
    dtype: np.dtype[Any]
    n_bytes: int


class PayloadCheck:
    """Checks payloads against what the model takes, as soon as that is known."""

    def __init__(self) -> None:
        self._input: _Input | None = None

    def learn(self, takes: TensorSpec | None) -> None:
        """Store what the model takes; None is any bytes."""
        self._input = None if takes is None else _Input(takes, np.dtype(takes.dtype), takes.n_bytes)

    def checked(self, payload: Any) -> tuple[Any, int]:
        """Return the payload as a buffer in C order, and its bytes; numeric arrays stay as they are.

        Raises:
            InvalidQueryError: It is not what the model takes.
        """
        if type(payload) is bytes:
            buffer: Any = payload
        elif isinstance(payload, np.ndarray):
            return self._checked_array(payload)
        else:
            buffer = _as_bytes(payload)
        n_bytes = len(buffer)
        expected = self._input
        if expected is not None and n_bytes != expected.n_bytes:
            spec = expected.spec
            raise InvalidQueryError(
                f"input: expected {spec.n_bytes} bytes ({spec.dtype} {spec.shape}), got {n_bytes}"
            )
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise _too_long(n_bytes)
        return buffer, n_bytes

    def _checked_array(self, payload: np.ndarray[Any, Any]) -> tuple[Any, int]:
        dtype = payload.dtype
        expected = self._input
        # Comparing here first: `check` makes two dtypes, and this runs for every query.
        if expected is not None and (dtype != expected.dtype or payload.shape != expected.spec.shape):
            expected.spec.check(payload)
        n_bytes = payload.nbytes
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise _too_long(n_bytes)
        if dtype.kind in _PLAIN_KINDS and payload.flags.c_contiguous:
            return payload, n_bytes
        if dtype.hasobject:
            raise InvalidQueryError("input: expected an array of numbers, got objects")
        return np.ascontiguousarray(payload).reshape(-1).view(np.uint8), n_bytes


def _as_bytes(payload: Any) -> Any:
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise InvalidQueryError(f"input: expected a NumPy array or bytes, got {type(payload).__name__}")
    if isinstance(payload, memoryview) and not payload.c_contiguous:
        raise InvalidQueryError("input: expected bytes in C order, got a memoryview with gaps")
    return payload if isinstance(payload, bytes) else memoryview(payload).cast("B")


def _too_long(n_bytes: int) -> InvalidQueryError:
    return InvalidQueryError(f"input: expected at most {MAX_PAYLOAD_BYTES} bytes, got {n_bytes}")
