"""Emulated GPUs do nothing that a real one could not, and real ones fail no query but the one at fault."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.core.batches import FULL
from gpu_worker.core.played import PlayedGpu
from gpu_worker.core.queue import CAPACITY, MAX_OUTSTANDING
from gpu_worker.serve.compute import ComputeGpu, run_batch
from gpu_worker.serve.emulated import emulated_gpus, outcome_of
from profiles.table import load_profile
from superserve.clock import MS, SECOND
from superserve.subnet import TensorSpec
from superserve.wire import VARIED, Directive, Done, Segment, Status, decode, encode_done
from tests.clock import VirtualClock

if TYPE_CHECKING:
    from gpu_worker.core.batches import EndedBatch


PROFILE = load_profile("cnn-8gpu-modelled")
WAIT_S = 60.0  # reached only when something is broken


class Step(NamedTuple):
    """One step: time passes, then a batch comes if there is credit, then the worker polls."""

    gap_ns: int
    slot: int
    subnet: int
    slacks_ns: tuple[int, ...]
    looks: bool


SLACKS = st.integers(-5 * MS, 60 * MS)
STEPS = st.lists(
    st.builds(
        Step,
        gap_ns=st.integers(0, 30 * MS),
        slot=st.integers(0, 2),
        subnet=st.integers(0, PROFILE.n_subnets - 1),
        slacks_ns=st.lists(SLACKS, min_size=1, max_size=16).map(tuple),
        looks=st.booleans(),
    ),
    max_size=40,
)


def directive(
    batch_id: int, subnet: int, slacks_ns: tuple[int, ...], payloads: list[bytes] | None = None, slot: int = 0
) -> Directive:
    """Return a directive of one segment, a frame a query."""
    n = len(slacks_ns)
    payloads = payloads or [b"x"] * n
    sizes = np.array([len(payload) for payload in payloads], "<u4")
    is_uniform = bool((sizes == sizes[0]).all())
    segment = Segment(
        count=n,
        payload_bytes=int(sizes[0]) if is_uniform else VARIED,
        packed=False,
        elapsed_ns=0,
        ids=np.arange(n, dtype="<u8").tobytes(),
        slacks=np.array(slacks_ns, "<i8").tobytes(),
        payloads=payloads,
        lengths=None if is_uniform else sizes.tobytes(),
    )
    return Directive(1, batch_id, slot, subnet, n, [segment])


class Played(NamedTuple):
    """What a play gave: reports with the instant they were made, batches and when they came."""

    reports: list[tuple[int, EndedBatch]]
    sent: dict[int, tuple[int, Directive]]


def play(steps: list[Step]) -> Played:
    """Play `steps` against three GPUs as a router that keeps to its credit, then let all end."""
    gpus = emulated_gpus(PROFILE, 3)
    reports: list[tuple[int, EndedBatch]] = []
    sent: dict[int, tuple[int, Directive]] = {}
    now_ns = 1_000
    for batch_id, step in enumerate(steps, start=1):
        now_ns += step.gap_ns
        if gpus.report(step.slot, now_ns).credit > 0:
            batch = directive(batch_id, step.subnet, step.slacks_ns, slot=step.slot)
            sent[batch_id] = (now_ns, batch)
            assert gpus.submit(batch, now_ns) is None
        if step.looks:
            reports += [(now_ns, report) for report in gpus.finish_due(now_ns)]
    while (due_ns := gpus.next_event_ns()) is not None:
        now_ns = max(now_ns, due_ns)
        reports += [(now_ns, report) for report in gpus.finish_due(now_ns)]
    assert gpus.is_idle()
    return Played(reports, sent)


@given(STEPS)
def test_every_batch_is_reported_once_in_order_and_no_two_overlap(steps: list[Step]) -> None:
    """Each GPU is first in, first out, runs one batch at a time, and loses none."""
    played = play(steps)

    assert sorted(report.row.batch_id for _, report in played.reports) == sorted(played.sent)
    for slot in range(3):
        mine = [report for _, report in played.reports if report.row.slot == slot]
        assert [r.row.batch_id for r in mine] == sorted(r.row.batch_id for r in mine)
        for before, after in itertools.pairwise(mine):
            received_ns, _ = played.sent[after.row.batch_id]
            assert after.started_ns == max(received_ns, before.ended_ns)


@given(STEPS)
def test_no_batch_is_quicker_than_its_profile_or_reported_early(steps: list[Step]) -> None:
    """A batch of n queries that ran takes the profiled time of n, and its end is reported after it."""
    for now_ns, report in play(steps).reports:
        profiled_ns = PROFILE.latency_ns(report.subnet, report.n_run) if report.n_run else 0
        assert report.ended_ns - report.started_ns == profiled_ns == report.row.executing_ns
        assert now_ns >= report.ended_ns


@given(STEPS)
def test_exactly_what_has_expired_when_it_starts_is_refused(steps: list[Step]) -> None:
    """A query runs if it has slack left as its batch starts; the others take no time of the GPU."""
    played = play(steps)

    for _, report in played.reports:
        received_ns, batch = played.sent[report.row.batch_id]
        waited_ns = report.started_ns - received_ns
        assert report.row.waited_ns == waited_ns >= 0
        expected = [Status.OK if left_ns > waited_ns else Status.EXPIRED for left_ns in batch.slack_left_ns()]
        assert list(report.row.statuses or bytes(batch.n)) == expected
        assert report.n_run == expected.count(Status.OK)


@given(STEPS)
def test_reports_stay_within_their_bounds_and_pass_the_wire(steps: list[Step]) -> None:
    """Credit and what is held never exceed the capacity, and DONE can hold whatever is reported."""
    rows = [report.row for _, report in play(steps).reports]

    for row in rows:
        assert 0 <= row.credit <= CAPACITY
        assert row.credit + row.held <= CAPACITY
        assert row.running_for_ns >= 0
        assert (row.running_batch > 0) or not row.held
        assert row.last_batch >= row.batch_id
    if rows:
        assert decode(encode_done(Done(1, rows))) == Done(1, rows)


def test_a_held_batch_follows_at_once_however_late_the_loop_is() -> None:
    """Two batches received together end back to back, even without a poll in between."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    one_ns = PROFILE.latency_ns(0, 1)
    for batch_id in (1, 2):
        assert gpu.submit(directive(batch_id, 0, (SECOND,)), 0) is None

    assert gpu.report(one_ns // 2)[1:] == (1, 1, 2, 1, one_ns // 2)
    first, second = gpu.finish_due(SECOND)
    assert (first.ended_ns, second.started_ns, second.ended_ns) == (one_ns, one_ns, 2 * one_ns)


def test_forgotten_batches_never_start_and_the_running_one_ends() -> None:
    """A new epoch finds the GPU busy with what it had begun, and nothing else."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    for batch_id in (1, 2):
        gpu.submit(directive(batch_id, 0, (SECOND,)), 0)

    assert gpu.forget_held() == 1
    assert gpu.report(0) == (CAPACITY - 1, 0, 1, 0, 0, 0)
    assert [report.row.batch_id for report in gpu.finish_due(SECOND)] == [1]
    assert gpu.next_event_ns is None


def test_a_gpu_refuses_what_no_credit_ever_allowed() -> None:
    """The queue is bounded, whatever the router sends."""
    gpu = PlayedGpu(PROFILE, outcome_of)

    taken = [gpu.submit(directive(batch_id, 0, (SECOND,)), 0) for batch_id in range(1, 40)]
    assert taken == [None] * MAX_OUTSTANDING + [FULL] * (39 - MAX_OUTSTANDING)


class Doubler:
    """An executor that doubles its inputs; some inputs, and batches too large, make it raise."""

    input_spec = TensorSpec("float32", (2,))
    output_spec = TensorSpec("float32", (2,))

    def __init__(self, *, fits: int = 1_000, error: type[Exception] = MemoryError) -> None:
        self.sizes: list[int] = []
        self._fits = fits
        self._error = error

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return `batch` twice over, plus `subnet`."""
        self.sizes.append(len(batch))
        if len(batch) > self._fits:
            raise self._error(f"{len(batch)} do not fit")
        if (batch < 0).any():
            raise ValueError("negative: größer als 0 expected")
        doubled: npt.NDArray[Any] = 2 * batch + np.float32(subnet)
        return doubled


def payload(value: float) -> bytes:
    """Return a query of two numbers."""
    return np.full(2, value, "<f4").tobytes()


def ends(outcome: Any, n: int) -> list[tuple[Status, bytes]]:
    """Return how each of `n` queries ended, and its output or reason."""
    statuses = [Status(byte) for byte in outcome.statuses or bytes(n)]
    sizes = [outcome.output_bytes] * n
    if outcome.lengths is not None:
        sizes = np.frombuffer(outcome.lengths, "<u4").tolist()
    at = np.cumsum([0, *sizes]).tolist()
    return [
        (status, bytes(outcome.output[start:end]))
        for status, start, end in zip(statuses, at, at[1:], strict=False)
    ]


def test_a_sound_batch_runs_whole() -> None:
    """The usual case is one call of the model, and outputs of one size, end to end."""
    executor = Doubler()
    outcome = run_batch(executor, directive(1, 3, (SECOND,) * 3, [payload(i) for i in range(3)]), 0)

    assert executor.sizes == [3]
    assert outcome.statuses is None
    assert np.frombuffer(outcome.output, "<f4").tolist() == [3, 3, 5, 5, 7, 7]


def test_a_packed_segment_is_run_where_it_lies() -> None:
    """Payloads that came end to end are seen in the same order as those in frames of their own."""
    batch = directive(1, 0, (SECOND,) * 3, [payload(i) for i in range(3)])
    apart = run_batch(Doubler(), batch, 0)
    (segment,) = batch.segments
    segment.packed, segment.payloads = True, [b"".join(segment.payloads)]

    assert run_batch(Doubler(), batch, 0) == apart


@given(st.lists(st.sampled_from(["good", "bad", "short", "expired"]), min_size=1, max_size=12))
def test_each_query_ends_as_it_deserves(kinds: list[str]) -> None:
    """One bad query of a batch is FAILED, wrong ones INVALID, late ones EXPIRED; the rest are OK."""
    payloads = [{"bad": payload(-1), "short": b"abc"}.get(kind, payload(1)) for kind in kinds]
    slacks = tuple(1 * MS if kind == "expired" else SECOND for kind in kinds)
    outcome = run_batch(Doubler(), directive(1, 1, slacks, payloads), 2 * MS)

    expected = {
        "good": (Status.OK, payload(3)),
        "bad": (Status.FAILED, "ValueError: negative: größer als 0 expected".encode()),
        "short": (Status.INVALID, b"payload: expected 8 bytes (float32 (2,)), got 3"),
        "expired": (Status.EXPIRED, b"expired on the way: no slack was left after 2.00 ms at the worker"),
    }
    assert ends(outcome, len(kinds)) == [expected[kind] for kind in kinds]


def test_out_of_memory_halves_the_batch_before_it_blames_a_query() -> None:
    """A batch that does not fit is run in pieces that do, and every query is answered."""
    executor = Doubler(fits=3)
    outcome = run_batch(executor, directive(1, 0, (SECOND,) * 8, [payload(i) for i in range(8)]), 0)

    assert executor.sizes == [8, 4, 2, 2, 4, 2, 2]
    assert outcome.statuses is None
    assert np.frombuffer(outcome.output, "<f4")[::2].tolist() == [2 * i for i in range(8)]


def test_a_query_that_does_not_fit_alone_fails_by_name() -> None:
    """When nothing fits, every query learns of the memory."""
    outcome = run_batch(Doubler(fits=0), directive(1, 0, (SECOND,) * 2, [payload(1)] * 2), 0)

    assert ends(outcome, 2) == [(Status.FAILED, b"MemoryError: 1 do not fit")] * 2


class Gate(Doubler):
    """An executor that runs nothing until the test opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.open = threading.Event()

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Wait for the test, then double."""
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return super().execute(subnet, batch)


def test_the_compute_thread_reports_in_order_while_its_owner_goes_on() -> None:
    """A running batch blocks nothing; a forgotten batch does not run; credit follows."""
    clock, gate, woken = VirtualClock(), Gate(), threading.Semaphore(0)
    gpu = ComputeGpu(gate, PROFILE, clock, woken.release)
    gpu.start()
    try:
        for batch_id in (1, 2):
            assert gpu.submit(directive(batch_id, 0, (SECOND,), [payload(1)]), clock.now_ns()) is None
        assert gate.entered.wait(WAIT_S)
        clock.advance(MS)
        assert gpu.report(0, clock.now_ns()) == (0, 1, 1, 2, 1, MS)
        assert gpu.finish_due(clock.now_ns()) == []
        assert gpu.forget_held() == 1
        gate.open.set()
        assert woken.acquire(timeout=WAIT_S)
        assert woken.acquire(timeout=WAIT_S)
        (first,) = gpu.finish_due(clock.now_ns())
    finally:
        gate.open.set()
        gpu.close()

    assert (first.row.statuses, first.n_run, first.row.credit) == (None, 1, CAPACITY)
    assert gate.sizes == [1]
    assert gpu.is_idle()
