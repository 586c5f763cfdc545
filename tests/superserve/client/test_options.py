"""Any real number is an option, whatever its type; what is none is refused by name."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.client.options import (
    checked_accuracy,
    checked_bound,
    checked_priority,
    checked_slo,
    checked_wait,
)
from superserve.errors import InvalidQueryError, UsageError

MS = 1_000_000
NOWHERE = "tcp://127.0.0.1:1"
NUMBERS: list[Any] = [
    int, float, Decimal, Fraction, np.array, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16,
    np.uint32, np.uint64, np.float16, np.float32, np.float64, np.longdouble,
]  # fmt: skip
NO_NUMBERS: list[Any] = [
    "5", None, [5], 1j, np.array([5, 6]), np.timedelta64(5, "ms"), np.timedelta64(5, "ns"), np.complex64(5),
    np.array("5"), Decimal("sNaN"), math.nan, object(),
]  # fmt: skip


def name_of(value: Any) -> str:
    """Return a test's name for a type or a value."""
    return value.__name__ if callable(value) else f"{type(value).__name__}-{value!s:.9}"


def plain(value: float) -> float:
    """Return a number that is Python's own, or fail: `np.int32` would wrap around further on."""
    assert type(value) in (int, float)
    return value


@pytest.mark.parametrize("number", NUMBERS, ids=name_of)
def test_any_real_number_is_taken_alike(number: Any) -> None:
    """What comes of it is a plain number of the same value."""
    assert plain(checked_slo(number(100))) == 100 * MS
    assert plain(checked_accuracy(number(75))) == 75
    assert plain(checked_priority(number(3))) == 3
    assert plain(checked_bound("max_bytes", number(100))) == 100
    assert plain(checked_wait("timeout", number(5))) == 5


@pytest.mark.parametrize("number", NUMBERS, ids=name_of)
def test_the_client_takes_any_real_number(number: Any) -> None:
    """Its queries carry plain numbers, and waits and bounds hold."""
    client = Client(NOWHERE, max_outstanding=number(1), max_bytes=number(9), connect_timeout_s=number(0))
    future = client.submit(b"image", slo_ms=number(100), min_accuracy=number(75), priority=number(3))

    assert plain(future.deadline_ns) - future.submitted_ns == 100 * MS
    assert (plain(future.min_accuracy), plain(future.priority)) == (75, 3)
    with pytest.raises(TimeoutError):
        future.result(number(0))
    assert future.exception(number(20)) is not None
    client.close()


@pytest.mark.parametrize("number", NUMBERS, ids=name_of)
def test_the_asyncio_client_takes_any_real_number(number: Any) -> None:
    """As the other one does."""

    async def main() -> None:
        client = AsyncClient(
            NOWHERE, max_outstanding=number(1), max_bytes=number(9), connect_timeout_s=number(9)
        )
        future = client.submit(b"image", slo_ms=number(100), min_accuracy=number(75), priority=number(3))
        assert plain(future.deadline_ns) - future.submitted_ns == 100 * MS
        assert (plain(future.min_accuracy), plain(future.priority)) == (75, 3)
        assert future.cancel()
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("number", "ms"),
    [
        (np.int32(3000), 3000),
        (np.int32(2148), 2148),
        (np.uint32(5000), 5000),
        (np.float16(72), 72),
        (True, 1),
    ],
)
def test_an_slo_never_wraps_around(number: Any, ms: int) -> None:
    """Milliseconds become nanoseconds in Python's numbers, not in those of 32 bits or less."""
    assert checked_slo(number) == ms * MS


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1], ids=name_of)
def test_what_is_no_number_is_no_option_of_a_query(value: Any) -> None:
    """Each is refused as an InvalidQueryError that names the field."""
    for check, name in (
        (checked_slo, "slo_ms"),
        (checked_accuracy, "min_accuracy"),
        (checked_priority, "priority"),
    ):
        with pytest.raises(InvalidQueryError, match=f"^{name}: expected"):
            check(value)


@pytest.mark.parametrize("option", ["max_outstanding", "max_bytes", "connect_timeout_s"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=name_of)
@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_what_is_no_number_is_no_option_of_a_client(client_class: Any, option: str, value: Any) -> None:
    """It is refused at once, not when a query meets the bound or the wait begins."""
    with pytest.raises(UsageError, match=f"^{option}: expected"):
        client_class(NOWHERE, **{option: value})


def test_a_wait_that_is_no_duration_is_refused() -> None:
    """None waits for the end, as for every future; a negative wait has passed already."""
    client = Client(NOWHERE)
    future = client.submit(b"image", slo_ms=50)

    for timeout in ("1", [1], math.nan):
        with pytest.raises(UsageError, match="timeout: expected seconds"):
            future.result(timeout)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(TimeoutError):
        future.result(-1)
    assert future.exception(math.inf) is not None
    client.close()
