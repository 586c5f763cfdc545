"""The router's event log: each event that the core received and all that it dispatched, one JSON line each.

A recorded run replays: the same events at the same instants through a fresh core give the
same directives (`python -m router replay FILE`). Of payloads and outputs only the sizes are
kept, since no decision depends on their content.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from profiles.table import Profile
from router.core import RouterCore
from router.core.events import (
    CancelAsked,
    ClientJoined,
    ClientLeft,
    CoreSettings,
    Dispatch,
    DrainRouter,
    DrainWorker,
    Finished,
    Pulled,
    QueriesArrived,
    Retuned,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.workers import TransitionError
from router.policies.registry import make_policy
from superserve.errors import ConfigError, WireError
from superserve.files import write_all
from superserve.wire import Cancel, Done, DoneRow, Pull, PullRow, Queries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import IO

    from router.core.events import Action, Event
    from router.core.workers import Batch

log = logging.getLogger("router")

SCHEMA = 2
"""Of the log. 2: the messages of workers and clients are in their events whole, as decoded."""
_FLUSH_LINES = 1_000  # one write for this many: a system call for each line would slow the loop


class Recorder:
    """Writes an event log; one thread. Lines gather in memory and are written by the thousand.

    If they cannot be, as on a full disk, recording stops with a message in the router's log. The file then
    ends after the last line that was written whole: serving matters more than recording.
    """

    def __init__(self, path: Path, policy: str, settings: CoreSettings) -> None:
        self._is_new = not path.exists()
        try:
            self._file: IO[bytes] | None = path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: expected a path that can be written: {error.strerror}") from error
        self._path = path
        self._n_bytes = 0
        self._lines: list[bytes] = []
        self._profiles: dict[int, int] = {}
        self._write({"schema": SCHEMA, "policy": policy, "settings": asdict(settings)})

    def event(self, now_ns: int, event: Event) -> None:
        """Record one event as it goes to the core."""
        if self._file is None:
            return
        name = type(event).__name__
        if isinstance(event, WorkerJoined):
            body = {name: getattr(event, name) for name in WorkerJoined.__slots__}
            body["profiles"] = [self._profile(p) for p in event.profiles]
        elif isinstance(event, QueriesArrived):
            body = {
                "client": event.client,
                "transit_ns": event.transit_ns,
                "queries": _queries(event.queries),
            }
        elif isinstance(event, Finished):
            done = event.message
            message = {"epoch": done.epoch, "rows": [_done_row(row) for row in done.rows]}
            body = {"peer": event.peer, "message": message}
        elif isinstance(event, Retuned):
            body = {"policy": event.policy, "settings": asdict(event.settings)}
        elif isinstance(event, Pulled | CancelAsked):
            body = _named(event) | {"message": _named(event.message)}
        else:
            body = _named(event)
        self._write([now_ns, name, body])

    def advance(self, now_ns: int, actions: Sequence[Action]) -> None:
        """Record that the core decided, and what it dispatched."""
        if self._file is None:
            return
        self._write([now_ns, "advance", _dispatches(actions)])

    def close(self) -> None:
        """Write the remaining lines."""
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Close it, and remove the file that was made for a router which never served."""
        self._lines.clear()
        self.close()
        if self._is_new:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _profile(self, profile: Profile) -> int:
        """Write each distinct profile once, as a separate line, and return its number."""
        number = self._profiles.get(id(profile))
        if number is None:
            number = self._profiles[id(profile)] = len(self._profiles)
            self._write([number, "profile", profile.to_dict()])
        return number

    def _write(self, line: Any) -> None:
        self._lines.append(orjson.dumps(line, default=_plain))
        if len(self._lines) >= _FLUSH_LINES:
            self._flush()

    def _flush(self) -> None:
        file, data = self._file, b"\n".join(self._lines) + b"\n"
        self._lines.clear()
        if file is None:
            return
        try:
            write_all(file, data)
            self._n_bytes += len(data)
        except OSError as error:
            log.error("%s: recording stops here: %s", self._path, error.strerror)
            self._file = None
            with contextlib.suppress(OSError):
                file.truncate(self._n_bytes)
            with contextlib.suppress(OSError):
                file.close()


def _named(value: Event | Pull | Cancel) -> dict[str, Any]:
    """Return the fields. asdict would copy, and buffers of received frames cannot be copied."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _plain(value: Any) -> str:
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    raise TypeError(f"cannot record a {type(value).__name__}")


def _queries(queries: Queries) -> dict[str, Any]:
    unread = ("payloads", "shared", "traced")
    body = {name: getattr(queries, name) for name in Queries.__slots__ if name not in unread}
    if queries.shared is not None:
        return body | {"payload_sizes": [queries.n_bytes()]}
    return body | {"payload_sizes": [len(payload) for payload in queries.payloads]}


def _done_row(row: DoneRow) -> dict[str, Any]:
    body = {name: getattr(row, name) for name in DoneRow.__slots__ if name != "output"}
    return body | {"output_size": len(row.output)}


def _dispatches(actions: Sequence[Action]) -> list[Any]:
    return [_batch(action.batch) for action in actions if isinstance(action, Dispatch)]


def _batch(batch: Batch) -> list[Any]:
    worker = batch.worker
    stretches = [[cohort.serial, lo, hi] for cohort, lo, hi in batch.stretches]
    return [batch.batch_id, _name_of(worker.peer.key), worker.slot, batch.subnet, stretches]


def _name_of(key: Any) -> str:
    return bytes(key).hex() if isinstance(key, bytes | memoryview) else str(key)


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of replaying a log.

    Attributes:
        n_events: Events passed to the fresh core.
        n_directives: Directives in the log.
        mismatches: Where the fresh core decided differently, at most ten.
        policy: Under which it was recorded.
    """

    n_events: int
    n_directives: int
    mismatches: tuple[str, ...]
    policy: str = ""


def replay(path: Path, on_pass: Callable[[RouterCore, list[Action], int], None] | None = None) -> Replay:
    """Pass a recorded log through a fresh core and compare every directive.

    Args:
        path: The log.
        on_pass: Receives the core, its actions and the instant after each pass.

    Raises:
        ConfigError: The file is missing or is not an event log.
    """
    policy = ""
    core: RouterCore | None = None
    profiles: list[Profile] = []
    n_events = n_directives = 0
    mismatches: list[str] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if core is None:
            core = _fresh_core(line, where)
            policy = line["policy"]
            continue
        now_ns, name, body = _parts(line, where)
        if name == "profile":
            profiles.append(Profile.from_dict(body, where=where))
        elif name == "advance":
            actions = core.advance(now_ns)
            decided = _dispatches(actions)
            if on_pass is not None:
                on_pass(core, actions, now_ns)
            n_directives += len(body)
            if decided != body and len(mismatches) < 10:
                mismatches.append(f"{path}:{number}: recorded {body}, replayed {decided}")
        else:
            n_events += 1
            event = _event(name, body, profiles, where)
            # An event that broke the protocol raises again; the server went on after it.
            with contextlib.suppress(WireError, TransitionError, ConfigError):
                core.handle(event, now_ns)
    if core is None:
        raise ConfigError(f"{path}: expected an event log, got an empty file")
    core.check()
    return Replay(n_events, n_directives, tuple(mismatches), policy)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _parsed(line, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the log was cut short, as by a kill"
        raise ConfigError(f"{where}: expected a line of JSON: {error}{cut}") from error


def _parts(line: Any, where: str) -> tuple[int, str, Any]:
    match line:
        case [int(now_ns), str(name), (list() | dict()) as body]:
            return now_ns, name, body
        case _:
            raise ConfigError(f"{where}: expected [now_ns, name, body], got {str(line)[:200]}")


def _event(name: str, body: Any, profiles: list[Profile], where: str) -> Event:
    try:
        return _READERS[name](body, profiles)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: no event {name} that this version knows: {error!r}") from error


def _fresh_core(header: Any, where: str) -> RouterCore:
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ConfigError(f"{where}: expected an event log of schema {SCHEMA}")
    try:
        return RouterCore(partial(make_policy, header["policy"]), CoreSettings(**header["settings"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: expected policy and settings of this version: {error!r}") from error


def _read_queries(body: dict[str, Any]) -> Queries:
    columns = ("ids", "slacks", "lengths", "min_accuracy", "priority")
    fields = dict(body)
    sizes = fields.pop("payload_sizes")
    fields |= {name: None if body[name] is None else bytes.fromhex(body[name]) for name in columns}
    return Queries(payloads=[bytes(size) for size in sizes], **fields)


def _read_done_row(body: dict[str, Any]) -> DoneRow:
    fields = dict(body)
    size = fields.pop("output_size")
    for name in ("statuses", "lengths"):
        fields[name] = None if body[name] is None else bytes.fromhex(body[name])
    return DoneRow(output=bytes(size), **fields)


def _read_done(body: dict[str, Any]) -> Done:
    return Done(body["epoch"], [_read_done_row(row) for row in body["rows"]])


def _read_cancel(body: dict[str, Any]) -> Cancel:
    return Cancel(**(body | {"ids": bytes.fromhex(body["ids"])}))


def _read_pull(body: dict[str, Any]) -> Pull:
    return Pull(body["epoch"], [_pull_row(row) for row in body["rows"]])


def _pull_row(body: dict[str, Any]) -> PullRow:
    nan = float("nan")  # JSON has none
    fields: dict[str, Any] = {name: nan if value is None else value for name, value in body.items()}
    return PullRow(**fields)


_READERS: dict[str, Callable[[dict[str, Any], list[Profile]], Event]] = {
    "ClientJoined": lambda b, _: ClientJoined(**b),
    "ClientLeft": lambda b, _: ClientLeft(**b),
    "QueriesArrived": lambda b, _: QueriesArrived(b["client"], _read_queries(b["queries"]), b["transit_ns"]),
    "CancelAsked": lambda b, _: CancelAsked(b["client"], _read_cancel(b["message"])),
    "WorkerJoined": lambda b, p: WorkerJoined(**(b | {"profiles": [p[number] for number in b["profiles"]]})),
    "WorkerHeard": lambda b, _: WorkerHeard(**b),
    "Pulled": lambda b, _: Pulled(b["peer"], _read_pull(b["message"])),
    "Finished": lambda b, _: Finished(b["peer"], _read_done(b["message"])),
    "WorkerLeft": lambda b, _: WorkerLeft(**b),
    "DrainWorker": lambda b, _: DrainWorker(**b),
    "DrainRouter": lambda _b, _p: DrainRouter(),
    "Retuned": lambda b, _: Retuned(
        b["policy"], partial(make_policy, b["policy"]), CoreSettings(**b["settings"])
    ),
}
