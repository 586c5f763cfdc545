"""Messages between load generators: the coordinator of a run, its agents on other hosts, and senders.

All have one form: the prelude, a JSON object, and a frame for each column that the object names. This is not
the hot path. `decode` refuses these messages, so no router, worker or client accepts one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import orjson

from superserve.errors import WireError
from superserve.wire.decode import decode, decode_json, kind_in
from superserve.wire.layout import HIGHEST, MAGIC, PRELUDE, RUN_KINDS, Kind
from superserve.wire.messages import Control, Ping, Pong
from superserve.wire.versions import version_refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from superserve.wire.layout import Buffer

RUN_COLUMNS: dict[str, str] = {
    "due_ns": "<i8", "sent_ns": "<i8", "answered_ns": "<i8", "status": "<u1", "subnet": "<u2",
    "batch_size": "<u2", "accuracy": "<f4", "queued_ns": "<i8", "executing_ns": "<i8",
}  # fmt: skip
"""The columns of a run and their NumPy types; the last character is the bytes of an entry."""
MAX_COLUMNS = 64  # a bound on the frames of one message; this release knows nine
_MOST = 2**63 - 1  # columns are int64


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
    duration_ns: int
    slo_ns: int
    grace_ns: int
    n_senders: int
    payload_bytes: int
    seed: int
    due_ns: Buffer


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

    at_ns: int | None = None
    in_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RunStop:
    """Coordinator to sender or agent: stop.

    Attributes:
        after_ns: Offset from the start at which the schedule ends; None stops at once.
    """

    kind: ClassVar[Kind] = Kind.RUN_STOP

    after_ns: int | None = None


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Sender or agent to coordinator: how many queries were due, sent and answered so far.

    Attributes:
        rows: How many rows a watched sender has written; None if it is not watched.
        until_ns: These rows include every query that is due before this offset.
    """

    kind: ClassVar[Kind] = Kind.RUN_PROGRESS

    due: int
    sent: int
    answered: int
    name: str = ""
    rows: int | None = None
    until_ns: int = 0


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

    subnets: list[tuple[str, float]]
    reasons: dict[str, str]
    duplicates: int
    name: str = ""
    rows: int | None = None
    duration_ns: int = 0
    noise_ns: int | None = None
    columns: Mapping[str, Buffer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFailed:
    """Agent to coordinator: it cannot run its share, or the share failed."""

    kind: ClassVar[Kind] = Kind.RUN_FAILED

    why: str


RunMessage = RunShare | RunReady | RunStart | RunStop | RunProgress | RunReport | RunFailed


def encode_run(message: RunMessage) -> list[Buffer]:
    """Return the frames of a message between load generators."""
    columns: Mapping[str, Buffer] = {}
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
    body = _Body(kind, decode_json(kind, frames))
    return _DECODERS[kind](body, _columns(body, frames))


class _Body:
    """The JSON object of a message; each value is checked when it is read."""

    __slots__ = ("_kind", "_values")

    def __init__(self, kind: Kind, values: dict[str, Any]) -> None:
        self._kind = kind
        self._values = values

    def wrong(self, name: str, expected: str) -> WireError:
        got = repr(self._values.get(name))[:100]
        return WireError(f"{self._kind.name.lower()}: {name}: expected {expected}, got {got}")

    def integer(self, name: str, least: int = 0) -> int:
        value = self._values.get(name)
        if type(value) is not int or not least <= value <= _MOST:
            raise self.wrong(name, f"an integer from {least} on")
        return value

    def integer_or_none(self, name: str, least: int = 0) -> int | None:
        return None if self._values.get(name) is None else self.integer(name, least)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self._values.get(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, "a list of texts")
        return value

    def reasons(self) -> dict[str, str]:
        value = self._values.get("reasons")
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise self.wrong("reasons", "an object of texts")
        return value

    def subnets(self) -> list[tuple[str, float]]:
        value = self._values.get("subnets")
        try:
            return [(str(name), float(accuracy)) for name, accuracy in value or ()]
        except (TypeError, ValueError, OverflowError):
            raise self.wrong("subnets", "pairs of name and accuracy") from None


def _columns(body: _Body, frames: Sequence[Buffer]) -> dict[str, Buffer]:
    """Return the known columns, all of the same length."""
    names = body.texts("columns")
    if len(set(names)) < len(names) or len(names) > MAX_COLUMNS or len(frames) != 2 + len(names):
        raise body.wrong("columns", f"at most {MAX_COLUMNS} names, each once, and a frame for each")
    columns: dict[str, Buffer] = {}
    counts = set()
    for name, frame in zip(names, frames[2:], strict=True):
        if name not in RUN_COLUMNS:
            continue  # of a later release
        columns[name] = memoryview(frame)  # the frame may be ZeroMQ's own object
        n, rest = divmod(len(frame), int(RUN_COLUMNS[name][-1]))
        counts.add(n)
        if rest or len(counts) > 1:
            raise body.wrong("columns", f"{name} as long as the others, in whole entries")
    return columns


def _share(body: _Body, columns: dict[str, Buffer]) -> RunShare:
    if "due_ns" not in columns:
        raise body.wrong("columns", "due_ns")
    return RunShare(
        trace=body.text("trace"),
        provenance=body.text("provenance"),
        endpoint=body.text("endpoint"),
        duration_ns=body.integer("duration_ns"),
        slo_ns=body.integer("slo_ns"),
        grace_ns=body.integer("grace_ns"),
        n_senders=body.integer("n_senders"),
        payload_bytes=body.integer("payload_bytes"),
        seed=body.integer("seed"),
        due_ns=columns["due_ns"],
    )


def _ready(body: _Body, _columns: dict[str, Buffer]) -> RunReady:
    return RunReady(body.text("name"))


def _start(body: _Body, _columns: dict[str, Buffer]) -> RunStart:
    at_ns, in_ns = body.integer_or_none("at_ns"), body.integer_or_none("in_ns", -_MOST)
    if (at_ns is None) == (in_ns is None):
        raise body.wrong("at_ns", "either at_ns or in_ns")
    return RunStart(at_ns, in_ns)


def _stop(body: _Body, _columns: dict[str, Buffer]) -> RunStop:
    return RunStop(body.integer_or_none("after_ns"))


def _progress(body: _Body, _columns: dict[str, Buffer]) -> RunProgress:
    return RunProgress(
        due=body.integer("due"),
        sent=body.integer("sent"),
        answered=body.integer("answered"),
        name=body.text("name"),
        rows=body.integer_or_none("rows"),
        until_ns=body.integer("until_ns"),
    )


def _report(body: _Body, columns: dict[str, Buffer]) -> RunReport:
    return RunReport(
        subnets=body.subnets(),
        reasons=body.reasons(),
        duplicates=body.integer("duplicates"),
        name=body.text("name"),
        rows=body.integer_or_none("rows"),
        duration_ns=body.integer("duration_ns"),
        noise_ns=body.integer_or_none("noise_ns"),
        columns=columns,
    )


def _failed(body: _Body, _columns: dict[str, Buffer]) -> RunFailed:
    return RunFailed(body.text("why"))


_DECODERS: dict[Kind, Callable[[_Body, dict[str, Buffer]], RunMessage]] = {
    Kind.RUN_SHARE: _share,
    Kind.RUN_READY: _ready,
    Kind.RUN_START: _start,
    Kind.RUN_STOP: _stop,
    Kind.RUN_PROGRESS: _progress,
    Kind.RUN_REPORT: _report,
    Kind.RUN_FAILED: _failed,
}
