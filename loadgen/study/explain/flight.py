"""A flight record, read and indexed: every query with the batches that it was in and its end.

It comes from a router's event log, which is replayed for that; from a running router, page by page; or from
a file that `cluster explain --save` wrote: a line of JSON with the GPUs and profiles, and then the entries.
"""

from __future__ import annotations

import time
from base64 import b64decode
from binascii import Error as BadBase64
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from profiles.table import Profile
from router.report.flight import FlightRecorder
from router.serve.recording import replay
from superserve import wire
from superserve.errors import ConfigError, NoRouterError, WireError
from superserve.files import write_whole
from superserve.net.connection import Connection
from superserve.net.context import new_context
from superserve.net.endpoints import endpoints_of
from superserve.net.keys import peer_keys
from superserve.wire import Kind, Status
from superserve.wire.flight import Missed, RanBatch, SentBatch, Traced, entries_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from router.core import RouterCore
    from router.core.events import Action
    from superserve.status import RouterStatus
    from superserve.wire.flight import Entry, Waiting
    from superserve.wire.traceparent import TraceContext

SCHEMA = 1
_MAGIC = b'{"flight":'
_ALL_BYTES = 1 << 40  # of a record that a replay makes: all of it


@dataclass(slots=True)
class FlownQuery:
    """One query of a record.

    Attributes:
        client: Its client's number on the router.
        query_id: As its client numbers it.
        sent_ns: When it was sent, by the router's estimate of the way.
        arrived_ns: When the router read it.
        deadline_ns: The router's clock.
        floor: The least profile row that it allows.
        priority: Its class.
        batches: Those that it was sent in, by id: several if one was lost or overran.
        missed: Its end if it was not OK; None if it was, or if it had not ended.
    """

    client: int
    query_id: int
    sent_ns: int
    arrived_ns: int
    deadline_ns: int
    floor: int = 0
    priority: int = 0
    batches: list[int] = field(default_factory=list)
    missed: Missed | None = None

    @property
    def name(self) -> str:
        """How `explain` calls it: CLIENT:ID."""
        return f"{self.client}:{self.query_id}"

    @property
    def slack_ns(self) -> int:
        """The time that it had when it was sent."""
        return self.deadline_ns - self.sent_ns


@dataclass(slots=True)
class Flight:
    """A record, indexed.

    Attributes:
        policy: The router's.
        gpus: Name and slot of each GPU.
        profiles: The distinct profiles.
        profile_of: Which one each GPU has.
        batches: By id, in order of dispatch.
        reports: By batch.
        queries: By client and id, in order of arrival.
        traces: By client and id, of those that came with a `traceparent`.
        data: The entries as bytes, for a file.
    """

    policy: str
    gpus: list[tuple[str, int]]
    profiles: list[Profile]
    profile_of: list[int]
    batches: dict[int, SentBatch] = field(default_factory=dict)
    reports: dict[int, RanBatch] = field(default_factory=dict)
    queries: dict[tuple[int, int], FlownQuery] = field(default_factory=dict)
    traces: dict[tuple[int, int], TraceContext] = field(default_factory=dict)
    data: bytes = b""
    _sent: list[SentBatch] = field(default_factory=list)
    _sent_ns: list[int] = field(default_factory=list)
    _arrived_ns: list[int] = field(default_factory=list)
    _ways_ns: dict[int, int] = field(default_factory=dict)
    _n_ways: int = 0

    def profile(self, gpu: int) -> Profile:
        """Return the profile of a GPU."""
        return self.profiles[self.profile_of[gpu] if gpu < len(self.profile_of) else 0]

    def gpu_name(self, gpu: int) -> str:
        """Return a GPU's name as people see it."""
        if gpu >= len(self.gpus):
            return f"GPU {gpu}"
        name, slot = self.gpus[gpu]
        return f"{name}:{slot}"

    def sent_between(self, from_ns: int, until_ns: int) -> list[SentBatch]:
        """Return the batches dispatched from an instant on, until another."""
        if len(self._sent_ns) != len(self.batches):
            self._sent = list(self.batches.values())
            self._sent_ns = [one.dispatched_ns for one in self._sent]
        return self._sent[bisect_left(self._sent_ns, from_ns) : bisect_right(self._sent_ns, until_ns)]

    def n_arrived(self, from_ns: int, until_ns: int) -> int:
        """Return how many queries of the record arrived between two instants."""
        arrived_ns = self._arrivals()
        return bisect_right(arrived_ns, until_ns) - bisect_left(arrived_ns, from_ns)

    def least_way_ns(self, client: int) -> int:
        """Return how long the quickest message of a client took to the router."""
        if self._n_ways != len(self.queries):
            self._n_ways = len(self.queries)
            self._ways_ns = {}
            for query in self.queries.values():
                way_ns = max(0, query.arrived_ns - query.sent_ns)
                self._ways_ns[query.client] = min(way_ns, self._ways_ns.get(query.client, way_ns))
        return self._ways_ns.get(client, 0)

    @property
    def first_arrived_ns(self) -> int:
        """When the first query of the record arrived."""
        return self._arrivals()[0] if self.queries else 0

    def _arrivals(self) -> list[int]:
        if len(self._arrived_ns) != len(self.queries):
            self._arrived_ns = sorted(query.arrived_ns for query in self.queries.values())
        return self._arrived_ns

    def missed(self) -> list[FlownQuery]:
        """Return the queries that did not end OK."""
        return [query for query in self.queries.values() if query.missed is not None]

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries, in order."""
        for entry in entries:
            if isinstance(entry, SentBatch):
                self.batches[entry.batch_id] = entry
                for waiting in entry.queries:
                    for query in self._queries_of(waiting):
                        query.batches.append(entry.batch_id)
            elif isinstance(entry, RanBatch):
                self.reports[entry.batch_id] = entry
            elif isinstance(entry, Traced):
                self.traces[entry.client, entry.query_id] = entry.context
            else:
                for query in self._queries_of(entry.queries):
                    query.missed = entry

    def _queries_of(self, waiting: Waiting) -> Iterator[FlownQuery]:
        for i, (query_id, deadline_ns) in enumerate(zip(waiting.ids, waiting.deadlines_ns, strict=True)):
            key = (waiting.client, query_id)
            known = self.queries.get(key)
            if known is None or known.arrived_ns != waiting.arrived_ns:
                known = self.queries[key] = FlownQuery(
                    waiting.client, query_id, waiting.sent_ns, waiting.arrived_ns, deadline_ns,
                    0 if waiting.floors is None else waiting.floors[i],
                    0 if waiting.classes is None else waiting.classes[i],
                )  # fmt: skip
            yield known

    def find(self, name: str) -> FlownQuery:
        """Return the query of a name: its id, or CLIENT:ID if several clients use that id.

        Raises:
            ConfigError: There is none, or several clients have one.
        """
        client, colon, number = name.rpartition(":")
        if not number.isdecimal() or (colon and not client.isdecimal()):
            raise ConfigError(f"{name!r}: expected a query's id, as in its reply or error, or CLIENT:ID")
        found = [
            query for (of, query_id), query in self.queries.items()
            if query_id == int(number) and (not colon or of == int(client))
        ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(query.name for query in found[:8])
            raise ConfigError(f"query {name}: {len(found)} clients sent one with this id; name one: {names}")
        if not self.queries:
            raise ConfigError(f"query {name}: the record has no query")
        first, last = next(iter(self.queries.values())), next(reversed(self.queries.values()))
        raise ConfigError(
            f"query {name}: not among the {len(self.queries):,} of the record, which runs from "
            f"{first.name} to {last.name}: it may be older"
        )

    def save(self, path: Path) -> None:
        """Write the record to a file that `load_flight` reads."""
        profiles = [one.to_dict() for one in self.profiles]
        head = {"flight": SCHEMA, "policy": self.policy, "gpus": self.gpus, "profiles": profiles}
        head["profile_of"] = self.profile_of
        try:
            write_whole(path, orjson.dumps(head) + b"\n" + self.data)
        except OSError as error:
            raise ConfigError(f"{path}: expected a path that can be written: {error.strerror}") from error


class FlightLog:
    """Makes a flight record of a core's passes: of a replay, or of a simulation.

    Attributes:
        recorder: The router's own.
    """

    def __init__(self) -> None:
        self.recorder = FlightRecorder(_ALL_BYTES)
        self._profiles: list[Profile] = []
        self._of: dict[tuple[str, int], int] = {}

    def note(self, core: RouterCore, actions: list[Action], now_ns: int) -> None:
        """Record a pass."""
        if not actions:
            return
        if len(self._of) < sum(len(peer.workers) for peer in core.peers.values()):
            for worker in core.workers():  # workers that leave later are still those of their batches
                if worker.profile not in self._profiles:
                    self._profiles.append(worker.profile)
                place = self._profiles.index(worker.profile)
                self._of.setdefault((worker.peer.name, worker.slot), place)
        self.recorder.note(core, actions, now_ns)
        self._last = core

    def flight(self, policy: str) -> Flight:
        """Return the record so far."""
        gpus = self.recorder.gpus(self._last) if self._of else []
        data = self.recorder.data()
        found = Flight(policy, gpus, list(self._profiles), [self._of.get(one, 0) for one in gpus], data=data)
        found.add(entries_of(data))
        return found


def load_flight(path: Path) -> Flight:
    """Read a record: a router's event log, a folder with one (`--logs`), or a saved record.

    Raises:
        ConfigError: It is none of these.
    """
    if path.is_dir():
        path = path / "router.jsonl"
    try:
        with path.open("rb") as file:
            is_saved = file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a router's event log or a saved record: {error.strerror}"
        ) from error
    if is_saved:
        return _saved(path)
    log = FlightLog()
    done = replay(path, log.note)
    if done.mismatches:
        raise ConfigError(f"{path}: this version decides differently: {done.mismatches[0][:300]}")
    return log.flight(done.policy)


def _saved(path: Path) -> Flight:
    line, _, data = path.read_bytes().partition(b"\n")
    try:
        head = orjson.loads(line)
        if head["flight"] != SCHEMA:
            raise ConfigError(f"{path}: expected a flight record of schema {SCHEMA}, got {head['flight']!r}")
        found = _flight(head, str(path), data)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}:1: expected a flight record's GPUs and profiles: {error!r}") from error
    except WireError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def _flight(head: dict[str, Any], where: str, data: bytes) -> Flight:
    profiles = [Profile.from_dict(one, where=where) for one in head["profiles"]]
    gpus = [(str(name), int(slot)) for name, slot in head["gpus"]]
    found = Flight(head["policy"], gpus, profiles, [int(one) for one in head["profile_of"]], data=data)
    found.add(entries_of(data))
    return found


# --- a running router -------------------------------------------------------------------------


class FlightReader:
    """Reads a running router's STATUS and flight record, again and again, on one connection; one thread.

    Args:
        endpoint: The router's client endpoint.
        keys: As for `Client`.
    """

    def __init__(self, endpoint: str, keys: str | os.PathLike[str] | None = None) -> None:
        self.endpoint = endpoint
        self._context = new_context()
        self._connection = Connection(endpoint, self._context, peer_keys(keys))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
        self._context.term()

    def ask(
        self, asked: dict[str, Any], timeout_s: float = 2.0
    ) -> tuple[RouterStatus, dict[str, Any] | None]:
        """Return STATUS, and what `FlightRecorder.answer` gives; None from a router that keeps no record.

        Raises:
            NoRouterError: No router answers within `timeout_s`.
            ConfigError: The router has keys, and these are not an operator's.
            WireError: The answer cannot be read.
        """
        connection, status, is_asked = self._connection, None, False
        connection.status = None
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        while status is None and (now_ns := time.monotonic_ns()) < deadline_ns:
            connection.tick(now_ns)
            if connection.epoch is None:
                is_asked = False
            elif not is_asked:
                is_asked = connection.send_control(Kind.STATUS, {"wire": wire.OURS, "flight": asked})
            connection.socket.poll(20)
            for _ in connection.receive():
                pass
            if connection.mismatch is not None:
                break
            status = self._answer(asked)
        if status is None:
            raise NoRouterError(connection.absence)
        if isinstance(status, WireError):
            raise WireError(f"{self.endpoint}: {status}; is it of another version?")
        flight = connection.flight
        if flight is not None and "refused" in flight:
            raise ConfigError(f"{self.endpoint}: {flight['refused']}")
        return status, flight

    def _answer(self, asked: dict[str, Any]) -> RouterStatus | WireError | None:
        """Return the answer to a question; not one to an earlier question, which was given up."""
        connection = self._connection
        status, flight = connection.status, connection.flight
        if status is not None and flight is not None and flight.get("since") != asked.get("since"):
            connection.status = status = None
        return status


def ask_flight(endpoint: str, keys: str | os.PathLike[str] | None = None, *, since: int = -1) -> Flight:
    """Return a running router's record, from a cursor on, -1 being the oldest.

    Raises:
        NoRouterError: No router answers.
        ConfigError: It keeps no record.
    """
    if len(endpoints_of(endpoint)) > 1:
        raise ConfigError(f"{endpoint}: expected one router: each has a record of its own")
    reader = FlightReader(endpoint, keys)
    try:
        pages: list[bytes] = []
        while True:
            status, found = reader.ask({"since": since, "profiles": True})
            if found is None:
                raise ConfigError(
                    f"{endpoint}: this router keeps no flight record: start it with --flight-mb 16"
                )
            pages.append(entries_in(found, endpoint))
            since = found["cursor"]
            if not found["more"]:
                break
        return _flight({**found, "policy": status.router.policy}, endpoint, b"".join(pages))
    finally:
        reader.close()


def ask_flights(endpoint: str, keys: str | os.PathLike[str] | None = None) -> list[tuple[str, Flight]]:
    """Return the records of the routers at an endpoint, or at several with commas, each with its endpoint.

    Of several, one that does not answer is left out.

    Raises:
        NoRouterError: No router answers.
        ConfigError: One keeps no record, or gives it to an operator only.
    """
    endpoints = endpoints_of(endpoint)
    found: list[tuple[str, Flight]] = []
    reasons: list[str] = []
    for one in endpoints:
        try:
            found.append((one, ask_flight(one, keys)))
        except NoRouterError as error:
            reasons.append(str(error))
    if not found:
        raise NoRouterError("; ".join(reasons))
    return found


def check_record(endpoint: str, keys: str | os.PathLike[str] | None = None) -> None:
    """Raise ConfigError if one of the routers at an endpoint answers, but gives us no record."""
    for one in endpoints_of(endpoint):
        reader = FlightReader(one, keys)
        try:
            _, found = reader.ask({})
        except NoRouterError:
            continue
        finally:
            reader.close()
        if found is None:
            raise ConfigError(f"{one}: this router keeps no flight record: start it with --flight-mb 16")


def entries_in(found: dict[str, Any], where: str) -> bytes:
    """Return the entries of an answer, as bytes."""
    try:
        return b64decode(found["entries"], validate=True)
    except (KeyError, TypeError, BadBase64) as error:
        raise WireError(f"{where}: flight.entries: expected base64: {error!r}") from error


def is_output(query: FlownQuery) -> bool:
    """Return whether a query came back with an output, in time or late."""
    return query.missed is None or query.missed.status == Status.LATE
