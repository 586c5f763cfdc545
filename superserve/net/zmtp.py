"""ZMTP 3, ZeroMQ's protocol on a TCP connection, as far as peers without keys need it: bytes only, no socket.

A connection opens with a greeting of 64 bytes from either side, then READY. After that come frames:

    flags u8 (1 more follow, 2 long, 4 command) | length u8, or u64 big-endian if long | body

Messages are frames up to the first without `more`. A command is PING or PONG; others are ignored.

Source: ZMTP 3.1, https://rfc.zeromq.org/spec/37.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from superserve.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame."""
GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.1, mechanism, as-server 0, filler."""
PEERS_OF_ROUTER = frozenset({b"DEALER", b"REQ", b"ROUTER"})
"""The types of sockets that may talk to a ROUTER."""

_SIGNATURE, _SIGNATURE_END = 0xFF, 0x7F  # the eight bytes between are any
_VERSION_AT, _MECHANISM_AT = 10, 12
_LONG_HEAD = struct.Struct(">BQ")
_U32 = struct.Struct(">I")
_READY, _PING, _PONG = b"\x05READY", b"\x04PING", b"\x04PONG"
_TTL_BYTES = 2
SHORT_HEADS = tuple(bytes((0, n)) for n in range(256))
"""What precedes a short frame that ends its message, by length: indexing costs half of making one."""


def head_of(n_bytes: int, *, more: bool = False, command: bool = False) -> bytes:
    """Return what precedes a frame of this length."""
    flags = (MORE if more else 0) | (COMMAND if command else 0)
    return bytes((flags, n_bytes)) if n_bytes < 256 else _LONG_HEAD.pack(flags | LONG, n_bytes)


def frame_of(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
    """Return a frame."""
    return head_of(len(body), more=more, command=command) + body


def ready(socket_type: bytes) -> bytes:
    """Return the command that follows the greeting."""
    body = _READY
    for name, value in ((b"Socket-Type", socket_type), (b"Identity", b"")):
        body += bytes((len(name),)) + name + _U32.pack(len(value)) + value
    return frame_of(body, command=True)


def check_greeting(greeting: bytes) -> None:
    """Check the other side's greeting.

    Raises:
        WireError: It is none, or of an older protocol, or wants keys.
    """
    if greeting[0] != _SIGNATURE or greeting[9] != _SIGNATURE_END or greeting[_VERSION_AT] < 3:
        raise WireError("greeting: expected that of ZMTP 3")
    mechanism = greeting[_MECHANISM_AT : _MECHANISM_AT + 20].rstrip(b"\0")
    if mechanism != b"NULL":
        raise WireError(f"greeting: expected a peer without keys (NULL), got {mechanism!r}")


def socket_type_of(command: bytes) -> bytes:
    """Return the type of socket that a READY states.

    Raises:
        WireError: It is no READY, or malformed.
    """
    if not command.startswith(_READY):
        raise WireError(f"expected READY, got {command[:8]!r}")
    at = len(_READY)
    while at < len(command):
        name_end = at + 1 + command[at]
        value_at = name_end + _U32.size
        if len(command) < value_at:
            break
        value_end = value_at + _U32.unpack_from(command, name_end)[0]
        if len(command) < value_end:
            break
        if command[at + 1 : name_end].lower() == b"socket-type":
            return command[value_at:value_end]
        at = value_end
    raise WireError("READY: expected a Socket-Type")


def frames_in(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield flags, start, end and length of each frame; the last may be incomplete: then its end is beyond.

    It ends before a frame whose flags and length are not complete.
    """
    at, n = 0, len(data)
    while n - at >= 2:
        flags = data[at]
        if flags & LONG:
            if n - at < _LONG_HEAD.size:
                return
            length = _LONG_HEAD.unpack_from(data, at)[1]
            start = at + _LONG_HEAD.size
        else:
            length = data[at + 1]
            start = at + 2
        at = start + length
        yield flags, start, at, length


def pong_to(command: bytes) -> bytes:
    """Return the answer to a command: PONG with its context to a PING, nothing to others."""
    if not command.startswith(_PING):
        return b""
    return frame_of(_PONG + command[len(_PING) + _TTL_BYTES :], command=True)


PING = frame_of(_PING + bytes(_TTL_BYTES), command=True)
"""A PING without a time to live: the peer answers, and does nothing else."""
