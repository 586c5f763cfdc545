"""The sender keeps its schedule whatever the router does, and charges lateness from the due instant."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from loadgen.live.records import COLUMNS, UNANSWERED, Records, SenderPlan
from loadgen.live.run import summarise
from loadgen.live.sender import BulkTarget, Sender
from loadgen.traces.trace import Trace
from superserve.net.connection import Connection
from superserve.wire import Kind, Queries, Status
from tests.superserve.client.fakes import WAIT_S, FakeRouter, group, poll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from loadgen.results.result import RunResult


MS = 1_000_000
N = 20
SLO_NS = 10 * MS
DUE_NS = np.arange(N, dtype=np.int64) * MS
TRACE = Trace("steps", DUE_NS, N * MS, "made for a test")


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


@contextmanager
def sending(
    router: FakeRouter, folder: Path, *, grace_ns: int = 20_000 * MS
) -> Iterator[tuple[Sender, Callable[[], concurrent.futures.Future[None]]]]:
    """Yield a welcomed sender, and what starts it in a thread of its own."""
    plan = SenderPlan(router.endpoint, SLO_NS, 8, grace_ns, name="sender", folder=str(folder))
    with zmq.Context() as context, concurrent.futures.ThreadPoolExecutor(1) as pool:
        connection = Connection(router.endpoint, context)

        def is_welcome() -> bool:
            connection.tick(time.monotonic_ns())
            assert not list(connection.receive())
            return connection.epoch is not None

        router.serve(is_welcome)
        sender = Sender(BulkTarget(plan, Records(N), connection), DUE_NS)
        start_ns = time.monotonic_ns()
        try:
            yield sender, lambda: pool.submit(sender.run, start_ns, lambda _i: None)
        finally:
            pool.shutdown()
            connection.close()
        for name in ("sent_ns", "answered_ns"):
            column = getattr(sender.records, name)
            column[column >= 0] -= start_ns


def result_of(records: Records) -> RunResult:
    """Return what a run of this one sender would report."""
    columns = {name: getattr(records, name) for name in Records(0).__dict__ if name.endswith("_ns")}
    columns |= {name: getattr(records, name) for name in ("status", "subnet", "batch_size", "accuracy")}
    columns["due_ns"] = DUE_NS
    return summarise(TRACE, SLO_NS, "fake", columns, [("small", 70.0), ("large", 80.0)], None)


def take_all(router: FakeRouter, n: int = N) -> list[Queries]:
    """Return the messages that hold the next n queries."""
    messages: list[Queries] = []
    while sum(message.n for message in messages) < n:
        messages.append(router.expect(Queries))
    return messages


def test_a_router_that_froze_is_charged_for_it_from_the_due_instant(
    router: FakeRouter, tmp_path: Path
) -> None:
    """It calls its answers OK; by our clock every one of them is late, and counts as missed."""
    with sending(router, tmp_path) as (sender, start):
        running = start()
        poll(lambda: sender.n_sent == N)
        time.sleep(2 * SLO_NS / 1e9)  # the freeze itself
        for queries in take_all(router):
            router.answer(queries)
        running.result(WAIT_S)
    result = result_of(sender.records)

    assert result.queries["late"] == result.queries["total"] == N
    assert result.slo_attainment == 0.0
    assert (sender.records.answered_ns - DUE_NS > 2 * SLO_NS).all()
    assert (sender.records.answered_ns[:-1] - sender.records.sent_ns[:-1] > SLO_NS).all()


def test_slack_is_counted_from_the_due_instant(router: FakeRouter, tmp_path: Path) -> None:
    """A query sent late has less than the SLO left, and its slack is that."""
    with sending(router, tmp_path) as (sender, start):
        running = start()
        for queries in take_all(router):
            due_ns = DUE_NS[np.frombuffer(queries.ids, "<i8")]
            late_ns = SLO_NS - np.frombuffer(queries.slacks, "<i8")
            assert (late_ns >= 0).all()
            assert len(set((due_ns + late_ns).tolist())) == 1  # all sent at one instant
            router.answer(queries)
        running.result(WAIT_S)
    assert (sender.records.sent_ns >= DUE_NS).all()


def test_queries_that_could_not_be_sent_are_unsent_and_spoil_the_run(tmp_path: Path) -> None:
    """A router that is gone takes nothing: an open loop does not wait, and counts the queries as unsent."""
    gone = FakeRouter()
    with sending(gone, tmp_path) as (sender, start):
        gone.close()
        target = sender.target
        assert isinstance(target, BulkTarget)
        poll(lambda: not target.connection.send_control(Kind.STATUS))
        start().result(WAIT_S)
    result = result_of(sender.records)

    assert result.queries["unsent"] == N
    assert (result.slo_attainment, result.valid) == (0.0, False)
    assert result.invalid_because == (f"{N} queries stayed unsent",)


def test_queries_without_an_answer_are_unanswered_after_a_grace(router: FakeRouter, tmp_path: Path) -> None:
    """Half are answered; the sender gives the others up and ends."""
    with sending(router, tmp_path, grace_ns=100 * MS) as (sender, start):
        running = start()
        seen: list[Queries] = take_all(router)
        ids = b"".join(bytes(queries.ids) for queries in seen)[: 8 * N // 2]
        router.send_results(group(ids, Status.OK, b"out!"))
        running.result(WAIT_S)
    result = result_of(sender.records)

    assert result.queries["unanswered"] == N // 2
    assert result.queries["ok"] + result.queries["late"] == N // 2


def test_an_answer_beyond_the_first_is_a_duplicate_and_changes_nothing() -> None:
    """Also where one message holds new and old ones."""
    records = Records(4)
    ids = [i.to_bytes(8, "little") for i in range(4)]
    records.take(group(ids[0] + ids[1], Status.OK, b"out!"), 10, keep_outputs=True)
    records.take(group(ids[1] + ids[2], Status.FAILED, b"no"), 20, keep_outputs=True)

    assert (records.n_answered, records.n_duplicates) == (3, 1)
    assert records.answered_ns.tolist() == [10, 10, 20, -1]
    assert records.status.tolist() == [Status.OK, Status.OK, Status.FAILED, UNANSWERED]
    assert records.reasons == {"FAILED": "no"}
    assert records.outputs is not None
    assert records.outputs[1].tobytes() == b"out!"


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True),
            st.sampled_from([Status.OK, Status.LATE, Status.EXPIRED]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_answers_entered_at_once_are_those_entered_one_by_one(
    arrived: list[tuple[list[int], Status, bool]],
) -> None:
    """Whatever ends, repeats or waits a group holds, gathering changes no column and no count."""
    at_once, one_by_one = Records(31), Records(31)
    for now_ns, (indices, status, has_waits) in enumerate(arrived):
        ids = b"".join(i.to_bytes(8, "little") for i in indices)
        answers = group(ids, status, b"out!")
        if has_waits:
            answers.queued_us = np.array(indices, "<u4").tobytes()
        at_once.gather(answers, now_ns)
        one_by_one.take(answers, now_ns, keep_outputs=False)
    at_once.settle(keep_outputs=False)

    for name in COLUMNS:
        assert getattr(at_once, name).tolist() == getattr(one_by_one, name).tolist(), name
    for name in ("n_answered", "n_duplicates", "reasons"):
        assert getattr(at_once, name) == getattr(one_by_one, name)


def test_the_first_answers_import_nothing() -> None:
    """In mid-run an import stops the sender for 8 to 20 ms; what it needs is there before."""
    code = (
        "import sys\n"
        "from loadgen.live.records import Records\n"
        "from superserve.wire import Group\n"
        "records, before = Records(8), set(sys.modules)\n"
        "for i in range(2):\n"
        "    ids = (2 * i).to_bytes(8, 'little') + (2 * i + 1).to_bytes(8, 'little')\n"
        "    records.gather(Group(2, 0, 1, 2, 79.0, 1, 0, 5, 0, ids, 1, b'xx'), 5)\n"
        "    records.settle(keep_outputs=False)\n"
        "assert records.n_answered == 4\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
