"""Which wire version two peers speak: HELLO and WELCOME agree on one, or the router refuses by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.errors import VersionError, WireError
from superserve.wire.layout import HIGHEST, LOWEST, OURS, Kind
from superserve.wire.messages import Control

if TYPE_CHECKING:
    from typing import Any

_CODE = "version"


def agreed(greeting: Control) -> int:
    """Return the highest wire version that both this release and the sender of a HELLO or STATUS speak.

    The sender of a greeting without a range speaks the version that the greeting is written in.

    Raises:
        VersionError: There is no such version.
        WireError: Its range is malformed.
    """
    theirs = _range(greeting)
    version = min(HIGHEST, theirs[1])
    if version < max(LOWEST, theirs[0]):
        raise VersionError(OURS, theirs, greeting.version)
    return version


def refusal(error: VersionError) -> Control:
    """Return the REFUSED that names both sides' versions, in the version that the peer wrote in."""
    body = {"code": _CODE, "reason": str(error), "wire": list(error.ours)}
    return Control(Kind.REFUSED, body, error.version)


def version_refused(message: Control) -> VersionError | None:
    """Return the error in a REFUSED if it refuses our wire versions; else None.

    A peer that answers in a version that this release does not speak shares no version with it.
    """
    if message.kind is not Kind.REFUSED:
        return None
    is_foreign = not LOWEST <= message.version <= HIGHEST
    if not is_foreign and message.body.get("code") != _CODE:
        return None
    try:
        theirs = _range(message)
    except WireError:
        theirs = (message.version, message.version)
    return VersionError(OURS, theirs, message.version)


def _range(message: Control) -> tuple[int, int]:
    """Return the range of versions that a message's sender states.

    Raises:
        WireError: It is malformed, in a version whose layout this release knows.
    """
    stated: Any = message.body.get("wire")
    if isinstance(stated, list) and len(stated) == 2 and all(type(one) is int for one in stated):
        lowest, highest = stated
        if 1 <= lowest <= highest <= 255:
            return lowest, highest
    if stated is None or not LOWEST <= message.version <= HIGHEST:
        return message.version, message.version
    raise WireError(f"{message.kind.name.lower()}: wire: expected [lowest, highest], got {stated!r}")
