"""Admission: which clients are connected, and which of the queries that arrive may wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from router.core.edf import ANSWERED, QUEUED, Cohort, state_stretches
from router.core.estimates import RecentQuantiles
from router.core.events import CancelAsked, ClientJoined, ClientLeft, DrainRouter, QueriesArrived
from router.core.ledger import ClientState
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    import numpy.typing as npt

    from router.core.events import CoreSettings, Key
    from router.core.ledger import Ledger
    from superserve.wire import Queries

_SAMPLE_EVERY_NS = MS
"""The transit of all clients is sampled at most this often: one bad moment must not fill the window."""


class Admission:
    """Handles events of clients.

    Args:
        ledger: Where queries are counted and ended.
        settings: The bounds.

    Attributes:
        clients: The connected clients, by connection.
        draining: Whether new queries are refused.
    """

    __slots__ = (
        "_client_serial", "_ledger", "_model", "_sampled_ns", "_serial", "_sessions", "_settings",
        "_transits", "clients", "draining",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, settings: CoreSettings) -> None:
        self.clients: dict[Key, ClientState] = {}
        self.draining = False
        self._ledger = ledger
        self._model = ledger.model
        self._settings = settings
        self._sessions: dict[int, ClientState] = {}
        self._transits = RecentQuantiles([0] * 8)
        self._sampled_ns = 0
        self._serial = 0
        self._client_serial = 0

    # --- clients ----------------------------------------------------------------------------

    def client_joined(self, event: ClientJoined, now_ns: int) -> None:
        """Register a client, or move a known session to a new connection."""
        before = self.clients.get(event.client)
        if before is not None and before.session != event.session:
            # Another application now has this routing id: it must not get the old one's answers.
            self.client_left(ClientLeft(event.client), now_ns)
        client = self._sessions.get(event.session)
        if client is None:
            self._client_serial += 1
            client = ClientState(event.client, event.session, self._client_serial, self._transits)
            self._sessions[event.session] = client
        elif client.key is not None:
            # Its old connection is dead, or replaced.
            self.clients.pop(client.key, None)
        client.key = event.client
        self.clients[event.client] = client

    def client_left(self, event: ClientLeft, _now_ns: int) -> None:
        """Forget a client and end its queued queries."""
        client = self.clients.pop(event.client, None)
        if client is None:
            return
        client.key = None
        del self._sessions[client.session]
        self._ledger.abandon(client)

    def cancel_asked(self, event: CancelAsked, now_ns: int) -> None:
        """End the queries that a client cancels; unknown ids are ignored."""
        client = self.clients.get(event.client)
        if client is None:
            return
        wanted = np.frombuffer(event.message.ids, "<u8")
        for cohort in tuple(client.cohorts.values()):
            for i in np.flatnonzero(np.isin(_ids(cohort.message), wanted)).tolist():
                self._ledger.cancel(cohort, i, now_ns)

    def drain(self, _event: DrainRouter, _now_ns: int) -> None:
        """Refuse new queries from now on."""
        self.draining = True

    def retune(self, settings: CoreSettings) -> None:
        """Take other bounds, for queries that arrive from now on."""
        self._settings = settings

    # --- queries ----------------------------------------------------------------------------

    def queries_arrived(self, event: QueriesArrived, now_ns: int) -> None:
        """Queue a message's queries, or refuse them."""
        client, queries = self.clients[event.client], event.queries
        # A client's slack counts from sending, so the time under way, buffers included, is used up.
        base_ns = now_ns - event.transit_ns
        if client.sample_transit(event.transit_ns, now_ns) and now_ns - self._sampled_ns >= _SAMPLE_EVERY_NS:
            self._sampled_ns = now_ns
            self._transits.add(max(0, event.transit_ns))
        self._serial += 1
        slacks_ns = queries.slack_ns()
        deadlines_ns = [slack_ns + base_ns for slack_ns in slacks_ns]
        cohort = Cohort(
            self._serial, client, deadlines_ns, base_ns, now_ns, classes=queries.priority, message=queries
        )
        demand = self._model.demand
        if demand is not None:
            demand.arrived(slacks_ns, now_ns)
        if queries.resubmitted and client.cohorts:
            self._admit(client, cohort, self._unknown(client, cohort))
        else:
            self._admit(client, cohort, [(0, queries.n)])

    def _unknown(self, client: ClientState, cohort: Cohort) -> list[tuple[int, int]]:
        """Return the stretches of a resubmission that are not already queued or in flight."""
        ids = _ids(cohort.message)
        known = np.zeros(len(ids), dtype=bool)
        for other in client.cohorts.values():
            waiting = np.frombuffer(other.states, np.uint8) != ANSWERED
            known |= np.isin(ids, _ids(other.message)[waiting])
        cohort.live = int((~known).sum())
        for i in np.flatnonzero(known).tolist():
            cohort.states[i] = ANSWERED  # this copy: the query ends with its first copy
        return list(state_stretches(cohort, 0, len(cohort.states), QUEUED))

    def _admit(self, client: ClientState, cohort: Cohort, stretches: list[tuple[int, int]]) -> None:
        ledger, queries = self._ledger, cohort.message
        n_bytes = queries.n_bytes()
        # Before any query is refused: received must never be less than answered.
        ledger.receive(cohort.live, n_bytes)
        refusal = self._refusal(queries, n_bytes)
        if refusal is not None:
            for lo, hi in stretches:
                ledger.refuse(cohort, lo, hi, *refusal)
            return
        if stretches:
            ledger.hold(client, cohort, n_bytes)
        for lo, hi in stretches:
            self._admit_stretch(cohort, lo, hi)

    def _admit_stretch(self, cohort: Cohort, lo: int, hi: int) -> None:
        # Checked for each message, not for each query: only a message that crosses the bound is split.
        bound, queue, ledger = self._settings.max_queries, self._model.queue, self._ledger
        end = min(hi, lo + max(0, bound - len(queue) - ledger.in_flight))
        if end > lo:
            if cohort.message.min_accuracy is None:
                queue.push(cohort, lo, end)
            else:
                cohort.floors = self._floors(cohort, lo, end)
                self._push_open(cohort, lo, end)
        if end < hi:
            reason = f"the router holds {bound} queries of at most {bound} (--max-queries): try again later"
            ledger.refuse(cohort, end, hi, Status.OVERLOADED, reason)

    def _push_open(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Queue what `_floors` left QUEUED; it has refused queries whose floor no subnet reaches."""
        for start, end in tuple(state_stretches(cohort, lo, hi, QUEUED)):
            self._model.queue.push(cohort, start, end)

    def _refusal(self, queries: Queries, n_bytes: int) -> tuple[Status, str] | None:
        settings, held_bytes = self._settings, self._ledger.held_bytes
        if self.draining:
            return Status.DRAINING, "the router is draining: send to another, or try again later"
        expected, got = self._model.payload_bytes, queries.payload_bytes
        if expected is not None and expected != got:
            sizes = "payloads of differing lengths" if queries.lengths is not None else f"{got} bytes"
            return Status.INVALID, f"payload: the model takes {expected} bytes a query, got {sizes}"
        if held_bytes + n_bytes > settings.max_bytes:
            reason = f"the router holds {held_bytes} payload bytes of at most {settings.max_bytes}"
            return Status.OVERLOADED, f"{reason} (--max-bytes): try again later"
        return None

    # --- floors -----------------------------------------------------------------------------

    def _floors(self, cohort: Cohort, lo: int, hi: int) -> list[int] | None:
        """Turn requested accuracies into profile rows; refuse those that no subnet reaches."""
        column = cohort.message.min_accuracy
        profile = self._model.reference
        if column is None or profile is None:
            return cohort.floors
        floors = cohort.floors or [0] * len(cohort.deadlines_ns)
        for i, row in enumerate(self._model.floor_rows(column, lo, hi), lo):
            if cohort.states[i] != QUEUED:
                continue
            if row is None:
                asked = np.frombuffer(column, "<f4")[i]
                best = profile.subnets[-1].accuracy
                reason = f"min_accuracy: the most accurate subnet has {best} %, asked for {asked:.2f}"
                self._ledger.refuse(cohort, i, i + 1, Status.INVALID, reason)
            else:
                floors[i] = row
        return floors if any(floors) else cohort.floors

    def floor_waiting(self) -> None:
        """Give queries that arrived before the first profile their floors."""
        for client in self._sessions.values():
            for cohort in tuple(client.cohorts.values()):
                live = cohort.live
                cohort.floors = self._floors(cohort, 0, len(cohort.states))
                self._model.queue.forget(cohort, 0, live - cohort.live)


def _ids(queries: Queries) -> npt.NDArray[np.uint64]:
    return np.frombuffer(queries.ids, "<u8")
