"""Messages between load generators: the coordinator of a run, its agents on other hosts, and senders.

All have one form: the prelude, a JSON object, and a frame for each column that the object names. This is not
the hot path. `decode` refuses these messages, so no router, worker or client accepts one.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import orjson

from superserve.errors import WireError
from superserve.fields import AtLeast, Count, read, shown
from superserve.wire.decode import decode, decode_json, kind_in
from superserve.wire.layout import HIGHEST, MAGIC, PRELUDE, RUN_KINDS, Kind
from superserve.wire.messages import Control, Ping, Pong
from superserve.wire.versions import version_refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superserve.wire.layout import Buffer

RUN_COLUMNS: dict[str, str] = {
    "due_ns": "<i8", "sent_ns": "<i8", "answered_ns": "<i8", "status": "<u1", "subnet": "<u2",
    "batch_size": "<u2", "accuracy": "<f4", "queued_ns": "<i8", "executing_ns": "<i8",
}  # fmt: skip
"""The columns of a run and their NumPy types; the last character is the bytes of an entry."""
MAX_COLUMNS = 64  # a bound on the frames of one message; this release knows nine
Signed = Annotated[int, AtLeast(-(2**63) + 1)]
Column = Any  # a `Buffer`: ZeroMQ chooses which of its types, so there is nothing to check


@dataclass(frozen=True, slots=True)
class RunShare:
    """Coordinator to agent: prepare to send these queries.

    Attributes:
        trace: The trace's name.
        provenance: Where the trace comes from.
        endpoint: The router's client endpoint.
        due_ns: When each query is due, counted from the start, n i64 ns as bytes, ascending.
    """

    kind: ClassVar[Kind] = Kind.RUN_SHARE

    trace: str
    provenance: str
    endpoint: str
    duration_ns: Count
    slo_ns: Count
    grace_ns: Count
    n_senders: Count
    payload_bytes: Count
    seed: Count
    due_ns: Column


@dataclass(frozen=True, slots=True)
class RunReady:
    """Sender or agent to coordinator: ready to start. `name` is a sender's; an agent has none."""

    kind: ClassVar[Kind] = Kind.RUN_READY

    name: str = ""


@dataclass(frozen=True, slots=True)
class RunStart:
    """Coordinator to sender or agent: start. Exactly one of the fields is given.

    Attributes:
        at_ns: For a sender: an instant of the clock that the processes of a host share.
        in_ns: For an agent: the delay from now, because instants do not cross hosts.
    """

    kind: ClassVar[Kind] = Kind.RUN_START

    at_ns: Count | None = None
    in_ns: Signed | None = None


@dataclass(frozen=True, slots=True)
class RunStop:
    """Coordinator to sender or agent: stop.

    Attributes:
        after_ns: Offset from the start at which the schedule ends; None stops at once.
    """

    kind: ClassVar[Kind] = Kind.RUN_STOP

    after_ns: Count | None = None


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Sender or agent to coordinator: how many queries were due, sent and answered so far.

    Attributes:
        rows: How many rows a watched sender has written; None if it is not watched.
        until_ns: These rows include every query that is due before this offset.
    """

    kind: ClassVar[Kind] = Kind.RUN_PROGRESS

    due: Count
    sent: Count
    answered: Count
    name: str = ""
    rows: Count | None = None
    until_ns: Count = 0


@dataclass(frozen=True, slots=True)
class RunReport:
    """Sender or agent to coordinator: the run has ended.

    Attributes:
        subnets: Name and accuracy (percent) of each row of the profile.
        reasons: A reason for each status without output.
        duplicates: Answers beyond the first.
        rows: As in RunProgress; a sender's.
        duration_ns: How much of the trace was offered; an agent's.
        noise_ns: p99.9 of its noise probe; None without a probe.
        columns: Each of RUN_COLUMNS except the due instants, as bytes; an agent's. A sender writes files.
    """

    kind: ClassVar[Kind] = Kind.RUN_REPORT

    subnets: tuple[tuple[str, float], ...]
    reasons: dict[str, str]
    duplicates: Count
    name: str = ""
    rows: Count | None = None
    duration_ns: Count = 0
    noise_ns: Count | None = None
    columns: dict[str, Column] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFailed:
    """Agent to coordinator: it cannot run its share, or the share failed."""

    kind: ClassVar[Kind] = Kind.RUN_FAILED

    why: str


RunMessage = RunShare | RunReady | RunStart | RunStop | RunProgress | RunReport | RunFailed
_MESSAGES: dict[Kind, Any] = {message.kind: message for message in typing.get_args(RunMessage)}


def encode_run(message: RunMessage) -> list[Buffer]:
    """Return the frames of a message between load generators."""
    columns: dict[str, Buffer] = {}
    if isinstance(message, RunShare):
        columns = {"due_ns": message.due_ns}
    elif isinstance(message, RunReport):
        columns = message.columns
    body = {name: getattr(message, name) for name in message.__slots__ if name not in ("due_ns", "columns")}
    body["columns"] = list(columns)
    prelude = PRELUDE.pack(MAGIC, HIGHEST, message.kind, 0, 0)
    return [prelude, orjson.dumps(body), *columns.values()]


def decode_run(frames: Sequence[Buffer]) -> RunMessage | Ping | Pong:
    """Return the message between load generators in `frames`.

    Raises:
        VersionError: Its sender speaks no wire version that this release speaks.
        WireError: The frames break the protocol, or are of another kind.
    """
    kind, _, at = kind_in(frames)
    if kind not in RUN_KINDS:
        message = decode(frames)
        if isinstance(message, Control) and (error := version_refused(message)) is not None:
            raise error
        if not isinstance(message, Ping | Pong):
            raise WireError(f"kind: expected a message between load generators, got {kind.name}")
        return message
    if len(frames[0]) != at:
        raise WireError(f"{kind.name.lower()}: {len(frames[0]) - at} bytes follow the header")
    name, body = kind.name.lower(), decode_json(kind, frames)
    columns = _columns(name, body, frames)
    if kind is Kind.RUN_SHARE and "due_ns" not in columns:
        raise WireError(f"{name}: columns: expected due_ns, got {shown(body['columns'])}")
    found: RunMessage = read(_MESSAGES[kind], {**body, "columns": columns, **columns}, name)
    if isinstance(found, RunStart) and (found.at_ns is None) == (found.in_ns is None):
        raise WireError(f"{name}: at_ns: expected either at_ns or in_ns")
    return found


def _columns(name: str, body: dict[str, Any], frames: Sequence[Buffer]) -> dict[str, Buffer]:
    """Return the known columns, all of the same length."""
    names = body.get("columns")
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise WireError(f"{name}: columns: expected a list of texts, got {shown(names)}")
    if len(set(names)) < len(names) or len(names) > MAX_COLUMNS or len(frames) != 2 + len(names):
        raise WireError(
            f"{name}: columns: expected at most {MAX_COLUMNS} names, each once, and a frame for each, "
            f"got {shown(names)}"
        )
    columns: dict[str, Buffer] = {}
    counts = set()
    for one, frame in zip(names, frames[2:], strict=True):
        if one not in RUN_COLUMNS:
            continue  # of a later release
        columns[one] = memoryview(frame)  # the frame may be ZeroMQ's own object
        n, rest = divmod(len(frame), int(RUN_COLUMNS[one][-1]))
        counts.add(n)
        if rest or len(counts) > 1:
            raise WireError(f"{name}: columns: expected {one} as long as the others, in whole entries")
    return columns
