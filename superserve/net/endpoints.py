"""The endpoints of one or several routers, as applications and command lines give them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from superserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_ROUTERS = 64
"""Most routers that a process connects to: a bound on its sockets, whatever names and routers list."""


def endpoints_of(given: str | Sequence[str], what: str = "endpoint") -> tuple[str, ...]:
    """Return the endpoints in a string, separated by commas, or in a sequence; each once.

    Raises:
        UsageError: There is none, or one is no string.
    """
    parts = given.split(",") if isinstance(given, str) else list(given)
    found: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise UsageError(f"{what}: expected tcp://HOST:PORT, or several, got {part!r:.200}")
        endpoint = part.strip()
        if endpoint and endpoint not in found:
            found.append(endpoint)
    if not found or len(found) > MOST_ROUTERS:
        raise UsageError(f"{what}: expected 1 to {MOST_ROUTERS} of tcp://HOST:PORT, got {given!r:.200}")
    return tuple(found)


def resolved(endpoints: Sequence[str]) -> tuple[str, ...]:
    """Return the endpoints, with a name that has several addresses replaced by these.

    A name with one address stays, because ZeroMQ looks it up again at each reconnection. What cannot be
    looked up stays too: connecting reports it. Only IPv4, which is what the sockets speak.
    """
    found: list[str] = []
    for endpoint in endpoints:
        found += [one for one in _addresses(endpoint) if one not in found]
    return tuple(found[:MOST_ROUTERS])


def _addresses(endpoint: str) -> list[str]:
    scheme, _, rest = endpoint.partition("://")
    name, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not name or ";" in name or name.replace(".", "").isdigit():
        return [endpoint]
    try:
        answers = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return [endpoint]
    addresses = sorted({str(answer[4][0]) for answer in answers})
    return [endpoint] if len(addresses) < 2 else [f"tcp://{address}:{port}" for address in addresses]
