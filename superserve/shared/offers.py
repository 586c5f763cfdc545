"""The bodies of SHARE: an offer of a memory, the answer to it, and the end of memories."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError
from superserve.fields import Count, body_of, read

if TYPE_CHECKING:
    from typing import Self

VARIABLE = "SUPERSERVE_SHARED_MEMORY"
"""The environment variable that, at 0, switches shared memory off for clients, routers and workers."""
NONCE_BYTES = 32
_OFFERED, _SEEN = b"offered", b"seen"


def is_allowed(option: bool | None) -> bool:
    """Return whether this process shares payloads: the option, or if it is None the environment's word.

    Raises:
        ConfigError: The environment variable is neither 0 nor 1.
    """
    if option is not None:
        return option
    word = os.environ.get(VARIABLE, "1")
    if word not in ("0", "1"):
        raise ConfigError(f"{VARIABLE}: expected 0 or 1, got {word!r:.100}")
    return word == "1"


def offered_proof(nonce: bytes) -> str:
    """Return the proof in an offer: only who sees the memory can compare it."""
    return hashlib.sha256(_OFFERED + nonce).hexdigest()


def seen_proof(nonce: bytes) -> str:
    """Return the proof in an answer: only who sees the memory can compute it."""
    return hashlib.sha256(_SEEN + nonce).hexdigest()


def is_same(proof: str, expected: str) -> bool:
    """Return whether two proofs are the same, in a time that shows nothing."""
    return hmac.compare_digest(proof.encode(), expected.encode())


@dataclass(frozen=True, slots=True)
class MemoryOffer:
    """Client to router, and router to worker: read payloads from this memory.

    Attributes:
        memory: Its number: the client's own, unique on its connection, or the router's, unique for ever.
        pid: The client's process.
        fd: The memory's file descriptor there.
        n_bytes: Its size.
        proof: `offered_proof` of its nonce.
    """

    memory: Count
    pid: Count
    fd: Count
    n_bytes: Count
    proof: str

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a SHARE that offers a memory.

        Raises:
            WireError: A field is missing or not what it should be.
        """
        return read(cls, body, "share")

    def body(self) -> dict[str, Any]:
        """Return the body of the message."""
        return body_of(self)


@dataclass(frozen=True, slots=True)
class MemoryAnswer:
    """The answer to an offer: `seen` is `seen_proof` of the nonce, or "" from a peer that does not see it."""

    memory: Count
    seen: str = ""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a SHARE that answers an offer.

        Raises:
            WireError: A field is missing or not what it should be.
        """
        return read(cls, body, "share")

    def body(self) -> dict[str, Any]:
        """Return the body of the message."""
        return body_of(self)


@dataclass(frozen=True, slots=True)
class MemoriesGone:
    """Router to worker: nothing will refer to these memories again; close them."""

    gone: tuple[Count, ...]

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a SHARE that ends memories.

        Raises:
            WireError: The numbers are not what they should be.
        """
        return read(cls, body, "share")

    def body(self) -> dict[str, Any]:
        """Return the body of the message."""
        return body_of(self)
