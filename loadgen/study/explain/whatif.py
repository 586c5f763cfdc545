"""What would have helped: the recorded arrivals through the core again, with one thing changed.

The messages arrive at the instants at which the router read them; the GPUs follow their profiles, as slow as
the record measured each of them. With nothing changed this is the check of the method: it should end as the
record did. It is a simulation: the network's delays and a stalled machine's are not played again.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from loadgen.simulator.links import FAR_NS, Way
from loadgen.simulator.simulate import START_NS, SimSettings, Simulation, uncollected
from router.core.events import QueriesArrived
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError
from superserve.wire import HAS_OUTPUT, Queries, Status

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loadgen.study.explain.flight import Flight, FlownQuery
    from profiles.table import Profile
    from router.core.events import Answer

BEFORE_NS, AFTER_NS = 5 * SECOND, SECOND // 4
"""How much of the record around a query is played: the queue and the estimates have settled by then."""
_NOTICED = 1.05  # a GPU within 5 % of its profile counts as profiled, as the router sees it
_USUAL_WAY_NS = 450_000  # one way and a loop's rest, as the simulator has them
_LINGER_NS = 3 * SECOND


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What is different.

    Attributes:
        gpus: More of the first GPU's kind; negative for fewer.
        policy: Instead of the recorded one; None for that.
        slo_ns: Of the query asked about; all others' deadlines move by as much. None for as recorded.
    """

    gpus: int = 0
    policy: str | None = None
    slo_ns: int | None = None

    @property
    def words(self) -> str:
        """In words, for "would have been in time ..."."""
        parts = []
        if self.gpus:
            plural, way = "s" if abs(self.gpus) > 1 else "", "more" if self.gpus > 0 else "less"
            parts.append(f"with {abs(self.gpus)} GPU{plural} {way}")
        if self.policy is not None:
            parts.append(f"under {self.policy}")
        if self.slo_ns is not None:
            parts.append(f"with an SLO of {self.slo_ns / MS:g} ms")
        return ", ".join(parts) or "as it was"


@dataclass(frozen=True, slots=True)
class PlayedEnd:
    """How a query ended when it was played again.

    Attributes:
        status: As the router saw it; None if there was no end.
        is_in_time: Whether the client had an output by the deadline.
        late_ns: By how much its answer missed the deadline; negative if it did not.
        accuracy: Of the subnet that served it; 0 without an output.
    """

    status: Status | None
    is_in_time: bool
    late_ns: int
    accuracy: float

    @property
    def words(self) -> str:
        """In words."""
        if self.status is None:
            return "no answer"
        if self.status not in HAS_OUTPUT:
            return self.status.name.lower()
        if self.is_in_time:
            return f"in time, {-self.late_ns / MS:.1f} ms before its deadline, at {self.accuracy:.2f} %"
        return f"late by {self.late_ns / MS:.1f} ms"


@dataclass(frozen=True, slots=True)
class Replayed:
    """The result of playing a window again.

    Attributes:
        change: What was different.
        ends: Of each query of the window.
    """

    change: WhatIf
    ends: dict[tuple[int, int], PlayedEnd]

    @property
    def attainment(self) -> float:
        """The share that was in time."""
        return sum(end.is_in_time for end in self.ends.values()) / max(1, len(self.ends))


def window_of(flight: Flight, queries: Iterable[FlownQuery]) -> list[FlownQuery]:
    """Return the queries of the record around some of them, in order of arrival."""
    wanted = list(queries)
    from_ns = min(query.arrived_ns for query in wanted) - BEFORE_NS
    until_ns = max(max(query.deadline_ns, query.arrived_ns) for query in wanted) + AFTER_NS
    found = [query for query in flight.queries.values() if from_ns <= query.arrived_ns <= until_ns]
    return sorted(found, key=lambda query: query.arrived_ns)


def play(
    flight: Flight, window: list[FlownQuery], change: WhatIf, asked: FlownQuery | None = None
) -> Replayed:
    """Play a window of the record again.

    Args:
        flight: The record.
        window: Its queries, in order of arrival.
        change: What is different.
        asked: The query whose SLO `change` states.

    Raises:
        ConfigError: The record has no GPU, the policy is unknown, or no GPU would be left.
    """
    if not flight.profiles or not window:
        raise ConfigError("the record has no GPU or no query: there is nothing to play again")
    gpus = sorted({one.gpu for one in flight.batches.values()} or {0})
    cluster = [flight.profile(gpu) for gpu in gpus]
    if len(cluster) + change.gpus < 1:
        raise ConfigError(f"{change.words}: no GPU is left of {len(cluster)}")
    n_kept = len(cluster) + min(0, change.gpus)
    cluster = cluster[:n_kept] + [cluster[0]] * max(0, change.gpus)
    shift_ns = 0
    if change.slo_ns is not None:
        assert asked is not None, "an SLO is one query's"
        shift_ns = change.slo_ns - asked.slack_ns
    found = Simulation(
        cluster, policy=change.policy or flight.policy, settings=_settings(flight, gpus), seed=1
    )
    for place, gpu in enumerate(gpus[:n_kept]):
        _slow(found, place, slowness_of(flight, gpu))
    client = PlayedClient(window, window[0].arrived_ns, shift_ns, cluster[0])
    found.join(client)
    last_ns = max(client.deadlines_ns)
    with uncollected():
        found.run(last_ns + _LINGER_NS)
    keys = [(query.client, query.query_id) for query in window]
    return Replayed(change, dict(zip(keys, client.ends(), strict=True)))


def slowness_of(flight: Flight, gpu: int) -> float:
    """Return measured over profiled latency of a GPU's batches, in the median; 1 within the noise."""
    ratios = [
        report.executing_ns / sent.profiled_ns
        for batch_id, sent in flight.batches.items()
        if sent.gpu == gpu and (report := flight.reports.get(batch_id)) is not None and sent.profiled_ns
    ]
    ratio = median(ratios) if ratios else 1.0
    return ratio if ratio > _NOTICED or ratio < 1 / _NOTICED else 1.0


def _settings(flight: Flight, gpus: list[int]) -> SimSettings:
    """Return the surroundings: processes as large as recorded, and the way as it was in the median."""
    names = [flight.gpus[gpu][0] for gpu in gpus if gpu < len(flight.gpus)]
    largest = max((names.count(name) for name in set(names)), default=1)
    ways = [
        report.at_ns - sent.dispatched_ns - report.waited_ns - report.executing_ns
        for batch_id, sent in flight.batches.items()
        if (report := flight.reports.get(batch_id)) is not None
    ]
    extra_ns = max(0, int(median(ways)) // 2 - _USUAL_WAY_NS) if ways else 0
    return SimSettings(way=Way(100_000 + extra_ns, 50_000), gpus_per_process=largest)


def _slow(found: Simulation, place: int, factor: float) -> None:
    if factor == 1.0:
        return
    each = found.settings.gpus_per_process
    found.slow(place // each, factor, place % each)


class PlayedClient:
    """A client of the simulator whose messages arrive when the recorded ones did. All clients are one.

    Args:
        window: The queries, in order of arrival.
        zero_ns: The recorded instant at which the simulated trace begins.
        shift_ns: Added to each deadline.
        profile: Of the GPUs; floors are rows of it.

    Attributes:
        key: Its connection.
        next_ns: When its next message arrives.
        deadlines_ns: Of each query, on the simulation's clock.
    """

    def __init__(self, window: list[FlownQuery], zero_ns: int, shift_ns: int, profile: Profile) -> None:
        offset_ns = START_NS - zero_ns
        self.key = 0
        self.deadlines_ns = [query.deadline_ns + offset_ns + shift_ns for query in window]
        self._window = window
        self._offset_ns = offset_ns
        self._shift_ns = shift_ns
        self._accuracies = [subnet.accuracy for subnet in profile.subnets]
        self._at = 0
        self._answers: list[tuple[Status, int, float] | None] = [None] * len(window)
        self.next_ns = window[0].arrived_ns + offset_ns

    @property
    def has_unread(self) -> bool:
        """Return False: each message is read when it arrives."""
        return False

    def may_wait(self, now_ns: int, _deadline_ns: int, _room: int) -> bool:
        """Return whether nothing has arrived: the recorded passes are the simulated ones."""
        return self.next_ns > now_ns

    def arrived(self, now_ns: int) -> list[tuple[int, QueriesArrived]]:
        """Return the messages that have arrived by now."""
        found = []
        while self.next_ns <= now_ns:
            first = self._window[self._at]
            lo = hi = self._at
            while hi < len(self._window) and _is_together(first, self._window[hi]):
                hi += 1
            found.append((now_ns, self._message(lo, hi, now_ns)))
            self._at = hi
            more = hi < len(self._window)
            self.next_ns = self._window[hi].arrived_ns + self._offset_ns if more else FAR_NS
        return found

    def _message(self, lo: int, hi: int, now_ns: int) -> QueriesArrived:
        part = self._window[lo:hi]
        sent_ns = part[0].sent_ns + self._offset_ns
        slacks = np.array([deadline_ns - sent_ns for deadline_ns in self.deadlines_ns[lo:hi]], "<i8")
        floors = classes = None
        if any(query.floor for query in part):
            floors = np.array([self._accuracies[q.floor] if q.floor else 0.0 for q in part], "<f4").tobytes()
        if any(query.priority for query in part):
            classes = bytes(query.priority for query in part)
        queries = Queries(
            1, sent_ns, hi - lo, np.arange(lo, hi, dtype="<u8").tobytes(), slacks.tobytes(), 0, (b"",),
            min_accuracy=floors, priority=classes,
        )  # fmt: skip
        return QueriesArrived(self.key, queries, now_ns - sent_ns)

    def answered(self, answer: Answer, arrives_ns: int) -> None:
        """Take an answer that arrives at `arrives_ns`."""
        accuracy = 0.0 if answer.ran is None else answer.ran.accuracy
        for cohort, lo, hi in answer.stretches:
            for place in memoryview(cohort.message.ids).cast("Q")[lo:hi]:
                if self._answers[place] is None:
                    self._answers[place] = (answer.status, arrives_ns, accuracy)

    def ends(self) -> list[PlayedEnd]:
        """Return how each query ended."""
        found = []
        for answer, deadline_ns in zip(self._answers, self.deadlines_ns, strict=True):
            if answer is None:
                found.append(PlayedEnd(None, False, 0, 0.0))
                continue
            status, at_ns, accuracy = answer
            is_output = status in HAS_OUTPUT
            found.append(PlayedEnd(status, is_output and at_ns <= deadline_ns, at_ns - deadline_ns, accuracy))
        return found


def _is_together(first: FlownQuery, other: FlownQuery) -> bool:
    """Return whether two queries came in one message."""
    return (
        first.client == other.client
        and first.arrived_ns == other.arrived_ns
        and first.sent_ns == other.sent_ns
    )
