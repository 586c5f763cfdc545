"""Which queries have ended, of a record that is still being written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadgen.study.explain.flight import Flight
from superserve.wire.flight import Missed, RanBatch

if TYPE_CHECKING:
    from loadgen.study.explain.flight import FlownQuery
    from profiles.table import Profile
    from superserve.wire.flight import Entry

_KEPT = 6
"""Least readings that are kept to tell what stood before a query: at four a second, more than most slacks."""


_MOST_TRACES = 20_000
_MANY = 5_000  # entries: with fewer, forgetting is not worth its time


class EndedQueries:
    """Takes the record's entries as they come, and gives the queries that have ended.

    A query that ran ended OK if its batch's report is there and no miss follows it. Misses come with the
    report or right after, so what a reading's reports say is given with the next reading.

    Args:
        profiles: The distinct profiles.
        profile_of: Which one each GPU has.
        one_in: Of the queries that ended OK and came without a `traceparent`, one in this many is given.

    All that missed are given. A query that ended OK with a `traceparent` is given if its caller records the
    trace, and only then.
    """

    def __init__(self, profiles: list[Profile], profile_of: list[int], one_in: int = 100) -> None:
        self.flight = Flight("", [], profiles, profile_of)
        self._one_in = one_in
        self._readings: list[list[Entry]] = []
        self._reported: list[int] = []

    def take(self, entries: list[Entry], gpus: list[tuple[str, int]]) -> list[FlownQuery]:
        """Add a reading's entries; return the queries that have ended by now and were not given before."""
        self._readings.append(entries)
        self.flight.gpus = gpus
        self.flight.add(entries)
        ended = self._in_time()
        self._reported = [entry.batch_id for entry in entries if isinstance(entry, RanBatch)]
        for entry in entries:
            if isinstance(entry, Missed):
                keys = [(entry.queries.client, query_id) for query_id in entry.queries.ids]
                ended += [self.flight.queries[key] for key in keys]
        if len(self._readings) > 2 * _KEPT and sum(map(len, self._readings)) > _MANY:
            self._forget()
        return ended

    def rest(self) -> list[FlownQuery]:
        """Return what the last reading's reports say."""
        ended, self._reported = self._in_time(), []
        return ended

    def _in_time(self) -> list[FlownQuery]:
        found = []
        for batch_id in self._reported:
            sent = self.flight.batches.get(batch_id)
            for waiting in () if sent is None else sent.queries:
                for query_id in waiting.ids:
                    if self._is_sampled(waiting.client, query_id):
                        query = self.flight.queries[waiting.client, query_id]
                        if query.missed is None:
                            found.append(query)
        return found

    def _is_sampled(self, client: int, query_id: int) -> bool:
        context = self.flight.traces.get((client, query_id)) if self.flight.traces else None
        return query_id % self._one_in == 0 if context is None else context.is_sampled

    def _forget(self) -> None:
        flight = self.flight
        self._readings = self._readings[-_KEPT:]
        self.flight = Flight("", flight.gpus, flight.profiles, flight.profile_of)
        # A context is read when its query arrives, which may wait for longer than the readings are kept.
        self.flight.traces = dict(list(flight.traces.items())[-_MOST_TRACES:])
        for entries in self._readings:
            self.flight.add(entries)
