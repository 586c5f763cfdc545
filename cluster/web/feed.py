"""STATUS and the flight record in, frames out: what has happened since the last one. No clock, no socket."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from cluster.web.frames import (
    MOST_MISSES,
    accuracy_of,
    attainment_of,
    batches_of,
    finding_of,
    miss_of,
    worker_of,
)
from cluster.web.verdict import findings_of
from loadgen.study.explain.flight import Flight
from superserve.clock import MS
from superserve.wire.flight import Missed, RanBatch, SentBatch, entries_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiles.table import Profile
    from superserve.status import EndCounts, RouterStatus
    from superserve.wire.flight import Entry

_KEPT_NS = 3_000 * MS
"""How much of the record is kept to explain misses by: more than any usual slack."""
_A_SECOND = 4  # frames
_MOST_KEPT = 60_000  # entries, whatever their age


class FrameFeed:
    """Makes frames.

    Args:
        name: The cluster's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: RouterStatus | None = None
        self._before_ns = 0
        self._past: deque[RouterStatus] = deque(maxlen=_A_SECOND)
        self._clients: dict[int, tuple[int, int]] = {}
        self._profiles: list[Profile] = []
        self._profile_of: list[int] = []
        self._kept: list[tuple[int, list[Entry]]] = []
        self._flight = Flight("", [], [], [])

    @property
    def is_new(self) -> bool:
        """Whether it has no profiles yet."""
        return not self._profiles

    def reset(self) -> None:
        """Forget everything: another router answers."""
        self.__init__(self._name)  # type: ignore[misc]

    def learn(self, profiles: Sequence[Profile], profile_of: Sequence[int]) -> None:
        """Take the profiles of the GPUs."""
        self._profiles, self._profile_of = list(profiles), list(profile_of)
        self._renew()

    def frame(self, status: RouterStatus, found: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Return the next frame.

        Args:
            status: The latest.
            found: What came with it of the flight record.
            data: Its entries.
        """
        now_ns = int(found["now_ns"])
        entries = list(entries_of(data))
        self._take(entries, now_ns)
        before = self._before
        if before is not None and before.router.epoch != status.router.epoch:
            before = None
            self._past.clear()
        seconds = (now_ns - self._before_ns) / 1e9 if before is not None else 0.0
        frame = {
            **figures_of(self._name, status, self._past[0] if self._past else None),
            **self._rates(status, before, seconds),
            **self._of_entries(entries),
            "t": now_ns / MS,
            "river": found.get("river"),
            "gpus": [f"{name}:{slot}" for name, slot in found["gpus"]],
            "workers": [worker_of(gpu) for gpu in status.workers],
            "clients": self._client_rates(found.get("clients", []), seconds),
        }
        self._before, self._before_ns = status, now_ns
        self._past.append(status)
        return frame

    # --- the record -------------------------------------------------------------------------

    def _take(self, entries: list[Entry], now_ns: int) -> None:
        """Keep the entries of the last seconds, and index them."""
        self._kept.append((now_ns, entries))
        self._flight.add(entries)
        n = sum(len(one) for _, one in self._kept)
        if self._kept[0][0] < now_ns - 2 * _KEPT_NS or n > 2 * _MOST_KEPT:
            while len(self._kept) > 1 and (self._kept[0][0] < now_ns - _KEPT_NS or n > _MOST_KEPT):
                n -= len(self._kept.pop(0)[1])
            self._renew()

    def _renew(self) -> None:
        """Index what is kept again, since an index only grows."""
        gpus = self._flight.gpus
        self._flight = Flight("", gpus, self._profiles, self._profile_of)
        for _, entries in self._kept:
            self._flight.add(entries)

    def _of_entries(self, entries: list[Entry]) -> dict[str, Any]:
        """Return what the new entries add: subnets served, batches run, and misses explained."""
        flight = self._flight
        served: dict[str, int] = {}
        accuracy, n = 0.0, 0
        for entry in entries:
            if isinstance(entry, SentBatch) and flight.profiles:
                row = flight.profile(entry.gpu).subnets[entry.subnet]
                served[row.name] = served.get(row.name, 0) + entry.n
                accuracy, n = accuracy + entry.n * row.accuracy, n + entry.n
        missed = [entry for entry in entries if isinstance(entry, Missed)]
        misses = []
        for entry in missed[-MOST_MISSES:]:
            query = flight.queries.get((entry.queries.client, entry.queries.ids[0]))
            if query is not None and query.missed is not None and flight.profiles:
                misses.append(miss_of(flight, query))
        names = [one.name for one in self._profiles[0].subnets] if self._profiles else []
        return {
            "subnets": served,
            "subnet_names": names,
            "accuracies": [one.accuracy for one in self._profiles[0].subnets] if self._profiles else [],
            "served_accuracy": accuracy / n if n else None,
            "batches": batches_of(flight, [one.batch_id for one in entries if isinstance(one, RanBatch)]),
            "misses": misses,
        }

    def name_gpus(self, gpus: list[tuple[str, int]]) -> None:
        """Take the names of the GPUs, by the index that entries use."""
        self._flight.gpus = gpus

    # --- rates ------------------------------------------------------------------------------

    def _rates(self, status: RouterStatus, before: RouterStatus | None, seconds: float) -> dict[str, Any]:
        """Return rates since the frame before: what arrived, was answered, and was refused, by status."""
        if before is None or seconds <= 0:
            return {"in": 0.0, "ok": 0.0, "missed": {}}
        ended: EndCounts = status.queries.answered.since(before.queries.answered)
        missed = {name: n / seconds for name, n in ended.items() if n and name != "ok"}
        arrived = status.queries.received - before.queries.received
        return {"in": arrived / seconds, "ok": ended.ok / seconds, "missed": missed}

    def _client_rates(self, clients: list[list[int]], seconds: float) -> list[dict[str, Any]]:
        """Return each client's rate and attainment since the frame before, the busiest first."""
        rows: list[dict[str, Any]] = []
        for serial, ok, missed in clients:
            was_ok, was_missed = self._clients.get(serial, (ok, missed))
            more_ok, more_missed = ok - was_ok, missed - was_missed
            n = more_ok + more_missed
            rate = n / seconds if seconds > 0 else 0.0
            total = ok + missed
            row = {"client": serial, "rate": rate, "att": more_ok / n if n else None, "total": total}
            rows.append({**row, "all": ok / total if total else None})
        self._clients = {serial: (ok, missed) for serial, ok, missed in clients}
        return sorted(rows, key=lambda row: (-row["rate"], -row["total"]))


def figures_of(name: str, status: RouterStatus, before: RouterStatus | None) -> dict[str, Any]:
    """Return what a frame says of a STATUS alone; `before` is one of about a second earlier."""
    recent, needed = status.recent, status.workers_needed
    return {
        "cluster": name,
        "policy": status.router.policy,
        "model": None if status.model is None else status.model.supernet,
        "att": [attainment_of(one) for one in (recent.short.answered, recent.long.answered)]
        + [attainment_of(status.queries.answered)],
        "acc": accuracy_of(recent.short),
        "ready": status.workers_ready,
        "needed": needed.as_served,
        "least": needed.at_least,
        "queue": status.queue.length,
        "head": status.queue.head_slack_ms,
        "flight": status.queries.in_flight,
        "findings": [finding_of(one) for one in findings_of(name, status, before)],
    }
