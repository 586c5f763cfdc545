"""Admission: what becomes of queries as they arrive, are cancelled, or lose their client."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

import numpy as np

from router.core.edf import ANSWERED, QUEUED, Cohort, state_stretches
from router.core.events import CancelAsked, ClientJoined, ClientLeft, DrainRouter, QueriesArrived
from router.core.state import MS, ClientState, CoreState
from superserve.wire import Status

if TYPE_CHECKING:
    import numpy.typing as npt

    from profiles.table import Profile
    from superserve.wire import Queries

_F32_ERROR = 2.0**-18
"""How far above what was meant a percentage sent as f32 may lie: half of its spacing from 64 to 128."""


class Admission(CoreState):
    """Takes events of clients into account."""

    def _client_joined(self, event: ClientJoined, now_ns: int) -> None:
        before = self.clients.get(event.client)
        if before is not None and before.session != event.session:
            self._client_left(ClientLeft(event.client), now_ns)
        client = self._sessions.get(event.session)
        if client is None:
            self._client_serial += 1
            client = ClientState(event.client, event.session, self._client_serial)
            self._sessions[event.session] = client
        elif client.key is not None:
            self.clients.pop(client.key, None)
        client.key = event.client
        self.clients[event.client] = client

    def _client_left(self, event: ClientLeft, _now_ns: int) -> None:
        client = self.clients.pop(event.client, None)
        if client is None:
            return
        client.key = None
        del self._sessions[client.session]
        for cohort in tuple(client.cohorts.values()):
            for lo, hi in tuple(state_stretches(cohort, 0, len(cohort.states), QUEUED)):
                self.queue.forget(cohort, lo, hi)
                self._close(cohort, lo, hi, Status.CANCELLED)

    def _queries_arrived(self, event: QueriesArrived, now_ns: int) -> None:
        client, queries = self.clients[event.client], event.queries
        n = queries.n
        base_ns = now_ns - event.transit_ns
        if client.sample_transit(event.transit_ns, now_ns) and now_ns - self._sampled_ns >= MS:
            self._sampled_ns = now_ns
            self._transits.add(max(0, event.transit_ns))
        self._serial += 1
        slacks_ns = queries.slack_ns()
        deadlines_ns = [slack_ns + base_ns for slack_ns in slacks_ns]
        cohort = Cohort(
            self._serial, client, deadlines_ns, base_ns, now_ns, classes=queries.priority, message=queries
        )
        if self._demand is not None:
            self._demand.arrived(slacks_ns)
        if queries.resubmitted and client.cohorts:
            self._admit_unknown(client, cohort)
            return
        self.received += n
        self._admit(client, cohort, [(0, n)])

    def _admit_unknown(self, client: ClientState, cohort: Cohort) -> None:
        """Admit what the client sends again, except what is still on its way to an answer."""
        ids = _ids(cohort.message)
        known = np.zeros(len(ids), dtype=bool)
        for other in client.cohorts.values():
            waiting = np.frombuffer(other.states, np.uint8) != ANSWERED
            known |= np.isin(ids, _ids(other.message)[waiting])
        cohort.live = int((~known).sum())
        self.received += cohort.live
        for i in np.flatnonzero(known).tolist():
            cohort.states[i] = ANSWERED
        self._admit(client, cohort, list(state_stretches(cohort, 0, len(cohort.states), QUEUED)))

    def _admit(self, client: ClientState, cohort: Cohort, stretches: list[tuple[int, int]]) -> None:
        n_bytes = cohort.message.n_bytes()
        self.payload_bytes_in += n_bytes
        refusal = self._refusal(cohort.message, n_bytes)
        if refusal is not None:
            for lo, hi in stretches:
                self._refuse(cohort, lo, hi, *refusal)
            return
        if stretches:
            # Before any of its queries can end: the last to end gives the bytes back.
            client.cohorts[cohort.serial] = cohort
            cohort.n_bytes = n_bytes
            self.held_bytes += n_bytes
        for lo, hi in stretches:
            self._admit_stretch(cohort, lo, hi)

    def _admit_stretch(self, cohort: Cohort, lo: int, hi: int) -> None:
        bound = self.settings.max_queries
        end = min(hi, lo + max(0, bound - len(self.queue) - self.in_flight))
        if end > lo:
            if cohort.message.min_accuracy is None:
                self.queue.push(cohort, lo, end)
            else:
                cohort.floors = self._floors(cohort, lo, end)
                self._push_open(cohort, lo, end)
        if end < hi:
            reason = f"the router holds {bound} queries of at most {bound} (--max-queries): try again later"
            self._refuse(cohort, end, hi, Status.OVERLOADED, reason)

    def _push_open(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Queue what `_floors` left open; a floor that no subnet reaches was refused there."""
        for start, end in tuple(state_stretches(cohort, lo, hi, QUEUED)):
            self.queue.push(cohort, start, end)

    def _refusal(self, queries: Queries, n_bytes: int) -> tuple[Status, str] | None:
        settings = self.settings
        if self.draining:
            return Status.DRAINING, "the router is draining: send to another, or try again later"
        expected, got = self.payload_bytes, queries.payload_bytes
        if expected is not None and expected != got:
            sizes = "payloads of differing lengths" if queries.lengths is not None else f"{got} bytes"
            return Status.INVALID, f"payload: the model takes {expected} bytes a query, got {sizes}"
        if self.held_bytes + n_bytes > settings.max_bytes:
            reason = f"the router holds {self.held_bytes} payload bytes of at most {settings.max_bytes}"
            return Status.OVERLOADED, f"{reason} (--max-bytes): try again later"
        return None

    def _floors(self, cohort: Cohort, lo: int, hi: int) -> list[int] | None:
        """Turn accuracies asked for into profile rows; refuse those that no subnet reaches."""
        column = cohort.message.min_accuracy
        profile = self._reference_profile()
        if column is None or profile is None:
            return cohort.floors
        floors = cohort.floors or [0] * len(cohort.deadlines_ns)
        for i, accuracy in enumerate(np.frombuffer(column, "<f4")[lo:hi].tolist(), lo):
            if cohort.states[i] != QUEUED:
                continue
            row = None if isnan(accuracy) else profile.floor_row(accuracy - _F32_ERROR)
            if row is None:
                best = profile.subnets[-1].accuracy
                reason = f"min_accuracy: the most accurate subnet has {best} %, asked for {accuracy:.2f}"
                self._refuse(cohort, i, i + 1, Status.INVALID, reason)
            else:
                floors[i] = row
        return floors if any(floors) else cohort.floors

    def _floor_waiting(self) -> None:
        """Give queries that came before the first profile the floors that they asked for."""
        for client in self._sessions.values():
            for cohort in tuple(client.cohorts.values()):
                live = cohort.live
                cohort.floors = self._floors(cohort, 0, len(cohort.states))
                self.queue.forget(cohort, 0, live - cohort.live)

    def _reference_profile(self) -> Profile | None:
        return next(iter(self._policies.values()))[0] if self._policies else None

    def _cancel_asked(self, event: CancelAsked, now_ns: int) -> None:
        client = self.clients.get(event.client)
        if client is None:
            return
        wanted = np.frombuffer(event.ids, "<u8")
        for cohort in tuple(client.cohorts.values()):
            for i in np.flatnonzero(np.isin(_ids(cohort.message), wanted)).tolist():
                self._cancel_one(cohort, i, now_ns)

    def _cancel_one(self, cohort: Cohort, i: int, now_ns: int) -> None:
        if cohort.states[i] == ANSWERED:
            return
        self._leave_state(cohort, i)
        self._refuse(cohort, i, i + 1, Status.CANCELLED, "cancelled by the client", now_ns)

    def _drain_router(self, _event: DrainRouter, _now_ns: int) -> None:
        self.draining = True


def _ids(queries: Queries) -> npt.NDArray[np.uint64]:
    return np.frombuffer(queries.ids, "<u8")
