"""What the client refuses before it is sent: every bound to the last number, and the words that say so."""

from __future__ import annotations

import threading
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from superserve.client.checks import MAX_PAYLOAD_BYTES
from superserve.client.options import checked_accuracy, checked_priority, checked_slo
from superserve.client.session import Session
from superserve.errors import InvalidQueryError
from superserve.subnet import TensorSpec
from superserve.wire import MAX_SLACK_NS

if TYPE_CHECKING:
    from tests.superserve.client.test_session import FakeQuery

DAY_MS = MAX_SLACK_NS / 1e6
TAKES = TensorSpec("float32", (2, 3))


@pytest.fixture
def session() -> Session[FakeQuery]:
    """Return a session that has not met a router."""
    return Session(threading.RLock(), "no router", max_outstanding=10, max_bytes=1 << 40)


@pytest.mark.parametrize(
    ("slo_ms", "slo_ns"), [(36, 36_000_000), (0.000001, 1), (DAY_MS, MAX_SLACK_NS), (1.5, 1_500_000)]
)
def test_an_slo_is_milliseconds_up_to_a_day(slo_ms: float, slo_ns: int) -> None:
    """Whole and broken ones, the largest included."""
    assert checked_slo(slo_ms) == slo_ns


@pytest.mark.parametrize("slo_ms", [0, -1, DAY_MS + 1, float("inf"), float("nan"), "36", None])
def test_what_is_no_slo_is_refused(slo_ms: Any) -> None:
    """Nothing, less than nothing, more than a day, or no number."""
    with pytest.raises(InvalidQueryError, match="slo_ms: expected milliseconds above 0 and up to a day, got"):
        checked_slo(slo_ms)


@pytest.mark.parametrize("floor", [0, 100, 78.25, np.float32(0.5)])
def test_a_floor_is_a_percentage(floor: float) -> None:
    """From 0 to 100, both included."""
    assert checked_accuracy(floor) == float(floor)


@pytest.mark.parametrize("floor", [-0.01, 100.01, float("nan"), "78", None])
def test_what_is_no_floor_is_refused(floor: Any) -> None:
    """Outside of it, or no number."""
    with pytest.raises(InvalidQueryError, match="min_accuracy: expected 0 to 100 percent, got"):
        checked_accuracy(floor)


@pytest.mark.parametrize("priority", [0, 1, 255])
def test_a_priority_is_a_byte(priority: int) -> None:
    """From 0 to 255, both included."""
    assert checked_priority(priority) == priority


@pytest.mark.parametrize("priority", [-1, 256, 1.5, "high", None])
def test_what_is_no_priority_is_refused(priority: Any) -> None:
    """Outside of it, or no whole number."""
    with pytest.raises(InvalidQueryError, match="priority: expected a class from 0 to 255, got"):
        checked_priority(priority)


def test_bytes_are_taken_as_they_are(session: Session[FakeQuery]) -> None:
    """No copy: the very object, or a view of its memory."""
    payload = b"1234"
    writable = bytearray(b"123456")

    assert session.checked(payload) == (payload, 4)
    assert session.checked(payload)[0] is payload
    buffer, n_bytes = session.checked(writable)
    assert (bytes(buffer), n_bytes) == (b"123456", 6)
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), np.frombuffer(writable, np.uint8))
    _, n_bytes = session.checked(memoryview(array("f", [0.0, 1.0, 2.0])))
    assert n_bytes == 12


@pytest.mark.parametrize("payload", [np.zeros((2, 3), "<f4"), bytes(24), bytearray(24)])
def test_what_the_model_takes_is_taken(session: Session[FakeQuery], payload: Any) -> None:
    """An array of its dtype and shape, or as many bytes."""
    session.learn(TAKES, None, ())

    assert session.checked(payload)[1] == 24


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (bytes(23), r"input: expected 24 bytes \(float32 \(2, 3\)\), got 23"),
        (np.zeros((3, 2), "<f4"), r"input: expected shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((2, 3), "<i4"), "input: expected dtype float32, got int32"),
        ("text", "input: expected a NumPy array or bytes, got str"),
        (memoryview(bytes(48))[::2], "input: expected bytes in C order, got a memoryview with gaps"),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    session: Session[FakeQuery], payload: Any, says: str
) -> None:
    """The message says what was expected."""
    session.learn(TAKES, None, ())
    with pytest.raises(InvalidQueryError, match=says):
        session.checked(payload)


def test_an_array_in_another_order_is_sent_in_c_order(session: Session[FakeQuery]) -> None:
    """Transposed, strided or of an exotic dtype: the bytes are those of a C-ordered copy."""
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    for given in (array.T, array[:, ::2], array.astype("f8")[:1]):
        buffer, n_bytes = session.checked(given)
        assert (
            bytes(np.ascontiguousarray(buffer).view(np.uint8).data) == np.ascontiguousarray(given).tobytes()
        )
        assert n_bytes == given.nbytes
        assert memoryview(buffer).c_contiguous
    stamps = np.array(["2026-01-02"], "datetime64[D]")
    buffer, n_bytes = session.checked(stamps)
    assert (bytes(buffer.data), n_bytes) == (stamps.tobytes(), 8)


def test_an_array_of_objects_is_refused(session: Session[FakeQuery]) -> None:
    """Its bytes are addresses of this process."""
    with pytest.raises(InvalidQueryError, match="input: expected an array of numbers, got objects"):
        session.checked(np.array([object()]))


def test_what_no_frame_may_hold_is_refused(session: Session[FakeQuery]) -> None:
    """The largest frame is taken, one byte more is not: it would end the connection."""
    # Views of one byte, repeated: no memory is spent on them.
    largest = np.broadcast_to(np.uint8(0), (MAX_PAYLOAD_BYTES,))
    assert largest.nbytes == MAX_PAYLOAD_BYTES
    longer = np.broadcast_to(np.uint8(0), (MAX_PAYLOAD_BYTES + 1,))
    with pytest.raises(InvalidQueryError, match=f"expected at most {MAX_PAYLOAD_BYTES} bytes, got"):
        session.checked(longer)
