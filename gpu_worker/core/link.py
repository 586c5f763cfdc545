"""The link of a worker process to its router: its states as a table, and the periods of its messages.

    JOINING  -welcomed-> SERVING -lost-> JOINING        lost: refused, silent or unreachable
       +------+--stop----> DRAINING -over-> STOPPED     over: the router's BYE, or time is up
    SERVING  -move----> LEAVING -over or lost-> JOINING move: to another router

Host and core share these constants; no other module repeats a period.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from superserve.clock import MS, SECOND

HELLO_EVERY_NS = 200 * MS
"""Time between two HELLOs until a WELCOME comes."""

SILENCE_NS = 2 * SECOND
"""A router that has been silent for this long may have restarted: send HELLO again, about every second."""

HEARTBEAT_NS = 100 * MS
"""Time between two PINGs, which show the router that this process lives."""

PULL_EVERY_NS = 500 * MS
"""Time between two PULLs, which carry gauges; each DONE also has the state of the queue."""

DRAIN_TIMEOUT_NS = 4 * SECOND
"""Longest drain: shorter than the 5 s after which `processes` kills a role."""

UNHEARD_NS = 600 * MS
"""How long a drained worker waits for the router's BYE: six heartbeats."""


class LinkState(enum.Enum):
    """The state of this worker's link to the router."""

    JOINING = "joining"
    SERVING = "serving"
    LEAVING = "leaving"
    DRAINING = "draining"
    STOPPED = "stopped"


class LinkEvent(enum.Enum):
    """What changes a link."""

    WELCOMED = "welcomed"
    LOST = "lost"  # refused with say-hello, a BYE, or the connection is gone
    STOP = "stop"  # SIGTERM, SIGINT, or a DRAIN that names this worker
    MOVE = "move"  # another router has too few GPUs
    OVER = "over"  # the router's BYE, no router there, or time is up


TRANSITIONS: dict[tuple[LinkState, LinkEvent], LinkState] = {
    (LinkState.JOINING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.JOINING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.JOINING, LinkEvent.STOP): LinkState.STOPPED,  # no router has given it work
    (LinkState.SERVING, LinkEvent.WELCOMED): LinkState.SERVING,
    (LinkState.SERVING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.SERVING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.SERVING, LinkEvent.MOVE): LinkState.LEAVING,
    (LinkState.LEAVING, LinkEvent.WELCOMED): LinkState.LEAVING,
    (LinkState.LEAVING, LinkEvent.LOST): LinkState.JOINING,
    (LinkState.LEAVING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.LEAVING, LinkEvent.OVER): LinkState.JOINING,
    (LinkState.DRAINING, LinkEvent.WELCOMED): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.LOST): LinkState.STOPPED,  # the router gives the rest to others
    (LinkState.DRAINING, LinkEvent.STOP): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.OVER): LinkState.STOPPED,
}
"""A pair that is missing here cannot happen, whatever peers send."""


class Gauges(NamedTuple):
    """A device's gauges in a PULL; NaN if unknown."""

    memory_bytes: int = 0
    utilisation: float = float("nan")
    temperature_c: float = float("nan")
