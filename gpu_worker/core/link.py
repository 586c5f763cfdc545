"""How a worker process stands with its router: states as a table, and the periods of its messages.

    JOINING  -welcomed-> SERVING -lost-> JOINING        lost: refused, silent or unreachable
       +------+--stop----> DRAINING -over-> STOPPED     over: the router's BYE, or time is up

Host and core share these; nothing else restates a period.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from superserve.clock import MS, SECOND

HELLO_EVERY_NS = 200 * MS
"""Time between two HELLOs while no WELCOME has come."""

SILENCE_NS = 2 * SECOND
"""A router not heard for so long may have restarted: say HELLO again, every second or so."""

HEARTBEAT_NS = 100 * MS
"""Time between two PINGs, by which the router knows that this process lives."""

PULL_EVERY_NS = 500 * MS
"""Time between two PULLs that carry gauges; every DONE tells the queue's state besides."""

DRAIN_TIMEOUT_NS = 4 * SECOND
"""How long a drain may take: less than the 5 s after which `processes` kills a role."""

UNHEARD_NS = 600 * MS
"""A drained worker waits for the router's BYE no longer than this: six heartbeats."""


class LinkState(enum.Enum):
    """How this worker stands with the router."""

    JOINING = "joining"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class LinkEvent(enum.Enum):
    """What changes a link."""

    WELCOMED = "welcomed"
    LOST = "lost"  # refused with say-hello, told BYE, or the connection is gone
    STOP = "stop"  # SIGTERM, SIGINT, or a DRAIN that names this worker
    OVER = "over"  # the router's BYE, nobody there, or time is up


TRANSITIONS: dict[tuple[LinkState, LinkEvent], LinkState] = {
    (LinkState.JOINING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.JOINING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.JOINING, LinkEvent.STOP): LinkState.STOPPED,  # no router has given it work
    (LinkState.SERVING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.SERVING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.SERVING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.WELCOMED): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.LOST): LinkState.STOPPED,  # whatever is left is another's now
    (LinkState.DRAINING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.OVER): LinkState.STOPPED,
}
"""A pair that is not here cannot happen, whatever peers send."""


class Gauges(NamedTuple):
    """What a PULL says of the device; NaN where unknown."""

    memory_bytes: int = 0
    utilisation: float = float("nan")
    temperature_c: float = float("nan")
