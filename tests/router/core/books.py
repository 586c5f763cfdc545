"""What tests read of the core's books and set of its numbers, so that its parts may move."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from router.core.state import CoreSettings
from superserve.wire import Status

if TYPE_CHECKING:
    from tests.router.core.harness import World


class Books(NamedTuple):
    """The counts of one core.

    Attributes:
        waiting: Queries queued.
        ok_accuracy: Percent, summed over the queries that ended OK.
        executed: Queries in the batches that workers ran.
        lost: Worker processes that died or fell silent.
    """

    received: int
    waiting: int
    in_flight: int
    held_bytes: int
    answered: dict[Status, int]
    ok_accuracy: float
    busy_ns: int
    executed: int
    output_bytes: int
    lost: int
    redispatched: int


def books_of(world: World) -> Books:
    """Return the counts of a world's core."""
    core = world.core
    return Books(
        received=core.received,
        waiting=len(core.queue),
        in_flight=core.in_flight,
        held_bytes=core.held_bytes,
        answered={status: n for status in Status if (n := core.answered[status])},
        ok_accuracy=core.ok_accuracy,
        busy_ns=core.busy_ns,
        executed=core.n_executed,
        output_bytes=core.output_bytes,
        lost=core.n_lost_peers,
        redispatched=core.n_redispatched,
    )


def numbers(**changed: int) -> CoreSettings:
    """Return the core's numbers with some of them changed."""
    return CoreSettings(**changed)
