"""The flight recorder: bounded pages, cursors, and the queue as a histogram."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING

import pytest

from loadgen.simulator.simulate import SimSettings, Simulation, Workload
from profiles.table import load_profile
from router.report.flight import FlightRecorder, river_of
from superserve.clock import MS
from superserve.wire.flight import Missed, RanBatch, SentBatch, entries_of
from tests.loadgen.study.explain.flown import even, spike

if TYPE_CHECKING:
    from loadgen.traces.trace import Trace
    from router.core.events import Action


def recorded(
    trace: Trace, recorder: FlightRecorder, gpus: int = 2, policy: str = "slackfit", clients: int = 1
) -> Simulation:
    """Simulate a trace with a recorder beside the router."""
    settings = SimSettings(n_clients=clients)
    found = Simulation([load_profile("cnn-8gpu-modelled")] * gpus, policy=policy, settings=settings)
    found.offer(Workload(trace, 36 * MS))

    def note(now_ns: int, actions: list[Action]) -> None:
        recorder.note(found.core, actions, now_ns)

    found.on_pass = note
    found.run()
    return found


@pytest.mark.parametrize(("gpus", "policy"), [(2, "fixed:cnn-80.16"), (1, "slackfit"), (1, "planfit")])
def test_every_query_is_in_it_once(gpus: int, policy: str) -> None:
    """Each query is in one batch or in a miss, every batch has its report, and the counts are the core's."""
    recorder = FlightRecorder(1 << 30)
    core = recorded(spike(300), recorder, gpus, policy, clients=3).core

    entries = list(entries_of(recorder.data()))
    sent = [entry for entry in entries if isinstance(entry, SentBatch)]
    missed = [entry for entry in entries if isinstance(entry, Missed)]
    ids = [(one.client, query_id) for batch in sent for one in batch.queries for query_id in one.ids]
    unsent = [entry.queries for entry in missed if not entry.batch_id]
    refused = [(one.client, query_id) for one in unsent for query_id in one.ids]
    assert len(ids + refused) == len(set(ids + refused)) == 400
    assert refused
    reports = [entry.batch_id for entry in entries if isinstance(entry, RanBatch)]
    assert reports
    assert sorted(reports) == [batch.batch_id for batch in sent]
    ok, lost = (sum(counts) for counts in zip(*recorder.ok_of.values(), strict=True))
    assert set(recorder.ok_of) == {1, 2, 3}
    assert (ok, ok + lost) == (core.answered[0], 400)
    assert sum(len(entry.queries.ids) for entry in missed) == lost


def test_it_is_bounded_and_gives_page_after_page() -> None:
    """With room for three pages the oldest entries go; a reader gets whole entries, and learns of the gap."""
    recorder, all_of_it = FlightRecorder(3_000, page_bytes=1_000), FlightRecorder(1 << 30)
    recorded(even(400), recorder)
    recorded(even(400), all_of_it)

    assert len(recorder.data()) < 4_500 < len(all_of_it.data())
    cursor, data, n_pages, has_more = 0, b"", 0, True
    while has_more:
        page, cursor, has_more = recorder.after(cursor)
        list(entries_of(page))  # each answer is whole entries
        data += page
        n_pages += 1
    assert n_pages == 3
    assert data == recorder.data()
    assert all_of_it.data().endswith(data)
    assert recorder.after(cursor) == (b"", cursor, False)
    assert recorder.after(None) == (b"", cursor, False)
    # A cursor of another life of the router, beyond the end, begins with the oldest.
    assert recorder.after(cursor + 10**9)[0] == recorder.after(0)[0]


def test_an_answer_says_what_was_asked() -> None:
    """Profiles and the river come only if asked for; a cursor comes back."""
    recorder = FlightRecorder(1 << 20)
    core = recorded(even(400), recorder).core

    plain = recorder.answer(core, {"since": -1}, 5)
    assert (plain["now_ns"], plain["since"], plain["more"]) == (5, -1, False)
    assert b64decode(plain["entries"]) == recorder.data()
    assert plain["gpus"] == [["worker:0", 0], ["worker:0", 1]]
    assert not {"profiles", "river"} & set(plain)
    full = recorder.answer(core, {"profiles": True, "river": True}, 5)
    assert full["entries"] == ""
    assert full["profile_of"] == [0, 0]
    assert len(full["profiles"]) == 1
    assert full["clients"] == [[1, 200, 0]]


def test_clients_that_came_first_are_forgotten() -> None:
    """Of five thousand clients the counts of the newest stay."""
    recorder = FlightRecorder(1 << 20)
    for serial in range(1, 5_001):
        recorder._new_client(serial)

    assert len(recorder.ok_of) <= 4_096
    assert 5_000 in recorder.ok_of
    assert 1 not in recorder.ok_of


@pytest.mark.parametrize("policy", ["slackfit", "planfit"])
def test_the_river_counts_who_waits(policy: str) -> None:
    """While a spike waits, the bins hold every query that waits, by the time that is left to it."""
    found = Simulation([load_profile("cnn-8gpu-modelled")], policy=policy)
    found.offer(Workload(spike(300), 36 * MS))
    rivers = []

    def look(now_ns: int, _actions: list[Action]) -> None:
        rivers.append((len(found.core.queue), river_of(found.core, now_ns)))

    found.on_pass = look
    found.run()

    waiting = [(n, river) for n, river in rivers if n > 50]
    assert waiting
    for n, river in rivers:
        assert sum(river["counts"]) == n
    n, river = waiting[0]
    assert river["width_ms"] == 2
    assert river["counts"].index(max(river["counts"])) in (16, 17)  # 36 ms are left, less the way
    assert river["quickest_ms"] > 1
