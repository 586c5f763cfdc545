"""Numbers that are given once, and fixed parts that never shrink."""

from __future__ import annotations

from superserve import wire
from superserve.wire import Kind
from superserve.wire.layout import HEADERS, key_of


def test_kinds_and_statuses_keep_their_numbers() -> None:
    """A number once given is never given to another kind or status."""
    assert [kind.value for kind in Kind] == list(range(1, 23))
    assert [status.name for status in wire.STATUSES] == [
        *("OK", "LATE", "EXPIRED", "INFEASIBLE", "OVERLOADED"),
        *("FAILED", "WORKER_LOST", "INVALID", "CANCELLED", "DRAINING"),
    ]


def test_headers_are_as_long_as_the_specification_says() -> None:
    """A field that is taken away, or put between others, is a new version."""
    assert {kind.name: header.size for kind, header in HEADERS.items()} == {
        "QUERIES": 24,
        "RESULTS": 20,
        "CANCEL": 12,
        "PULL": 16,
        "DIRECTIVE": 32,
        "DONE": 16,
        "PING": 8,
        "PONG": 16,
    }


def test_messages_are_looked_up_by_their_first_four_bytes() -> None:
    """Magic, version and kind, little-endian."""
    assert key_of(Kind.QUERIES, 2).to_bytes(4, "little") == b"SS\x02\x03"
