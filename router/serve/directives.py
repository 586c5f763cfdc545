"""From the core's actions to the wire's messages: which bytes a stretch of a cohort is."""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from router.serve.memories import NO_READS
from superserve.wire import (
    GATHER_BYTES,
    MAX_QUERIES,
    VARIED,
    Directive,
    Group,
    Results,
    Segment,
    SharedPayloads,
    Status,
    encode_outputs,
    encode_results,
    lengths_of,
    pack_queued_us,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from router.core.edf import Cohort, Stretch
    from router.core.events import Answer
    from router.core.workers import Batch
    from router.serve.memories import ClientMemory, WorkerReads
    from superserve.wire import Buffer, DoneRow, Queries

_LATE = int(Status.LATE)  # an IntEnum compares at half the speed


def directive_of(batch: Batch, reads: WorkerReads = NO_READS) -> Directive:
    """Return the DIRECTIVE of a batch; payloads that are not small are forwarded as the clients sent them.

    Those in memory are copied into frames, unless `reads` shows that the worker sees them there.
    """
    now_ns, stretches, worker = batch.dispatched_ns, batch.stretches, batch.worker
    each = stretches[0][0].message.payload_bytes
    if len(stretches) > 1 and each * batch.n < GATHER_BYTES and _are_alike(stretches, each):
        segments = [_joined(stretches, batch.n, each, now_ns)]
    else:
        segments = [_segment(cohort, lo, hi, now_ns, reads) for cohort, lo, hi in stretches]
    return Directive(worker.peer.epoch, batch.batch_id, worker.slot, batch.subnet, batch.n, segments)


def _are_alike(stretches: list[Stretch], each: int) -> bool:
    for cohort, _, _ in stretches:
        queries: Queries = cohort.message
        if queries.payload_bytes != each or queries.framed:
            return False
    return True


def _joined(stretches: list[Stretch], n: int, each: int, now_ns: int) -> Segment:
    """Return one segment for many small stretches: they share a frame anyway, and each segment costs 2 us."""
    ids: list[Buffer] = []
    payloads: list[Buffer] = []
    deadlines_ns: list[int] = []
    for cohort, lo, hi in stretches:
        queries: Queries = cohort.message
        if hi - lo == queries.n:
            ids.append(queries.ids)
            payloads.append(queries.payloads[0])
            deadlines_ns += cohort.deadlines_ns
        else:
            ids.append(queries.ids[8 * lo : 8 * hi])
            payloads.append(memoryview(queries.payloads[0])[each * lo : each * hi])
            deadlines_ns += cohort.deadlines_ns[lo:hi]
    slacks = array("q", [deadline_ns - now_ns for deadline_ns in deadlines_ns]).tobytes()
    return Segment(n, each, True, 0, b"".join(ids), slacks, (b"".join(payloads),))


def _segment(cohort: Cohort, lo: int, hi: int, now_ns: int, reads: WorkerReads) -> Segment:
    queries: Queries = cohort.message
    elapsed_ns = now_ns - cohort.base_ns
    payloads: Sequence[Buffer]
    shared: SharedPayloads | None = None
    if queries.shared is not None:
        payloads, shared = _elsewhere(queries, lo, hi, reads)
    elif queries.framed:
        payloads = queries.payloads[lo:hi]
    elif hi - lo == queries.n:
        payloads = queries.payloads
    else:
        start, end = _span(queries.payload_bytes, queries.lengths, lo, hi)
        payloads = (memoryview(queries.payloads[0])[start:end],)
    lengths = None if queries.lengths is None else queries.lengths[4 * lo : 4 * hi]
    return Segment(
        hi - lo, queries.payload_bytes, not queries.framed, elapsed_ns,
        queries.ids[8 * lo : 8 * hi], queries.slacks[8 * lo : 8 * hi], payloads, lengths, shared,
    )  # fmt: skip


def _elsewhere(
    queries: Queries, lo: int, hi: int, reads: WorkerReads
) -> tuple[Sequence[Buffer], SharedPayloads | None]:
    """Return payloads that lie in a client's memory, as copies, or where a worker reads them."""
    shared = queries.shared
    assert shared is not None, "the caller looked"
    memory: ClientMemory = shared.source
    places = shared.places[16 * lo : 16 * hi]
    if reads.sees(memory):
        return (), SharedPayloads(memory.number, places)
    lengths = None if queries.lengths is None else queries.lengths[4 * lo : 4 * hi]
    return memory.payloads(places, lengths_of(hi - lo, queries.payload_bytes, lengths)), None


def _span(each: int, lengths: Buffer | None, lo: int, hi: int) -> tuple[int, int]:
    """Return the range of queries lo to hi in a buffer with all of them end to end."""
    if each != VARIED:
        return each * lo, each * hi
    assert lengths is not None, "VARIED without a column of lengths"
    ends = [0, *accumulate(np.frombuffer(lengths, "<u4").tolist())]
    return ends[lo], ends[hi]


def frames_of(epoch: int, answer: Answer) -> list[Buffer]:
    """Return the frames of the RESULTS with one answer."""
    ran = answer.ran
    if ran is not None and answer.more is None and answer.status <= _LATE:
        row, n = ran.row, answer.n
        each = row.output_bytes
        if row.lengths is None and n * each < GATHER_BYTES:
            ids: Buffer = answer.cohort.message.ids
            lo, at = answer.lo, answer.at
            if 8 * n != len(ids):
                ids = ids[8 * lo : 8 * (lo + n)]
            output = memoryview(row.output)[each * at : each * (at + n)]
            return encode_outputs(
                epoch, n, answer.status, ran.subnet, ran.batch_size, ran.accuracy, answer.queued_ns,
                ran.to_start_ns, ran.executing_ns, ran.returning_ns, ids, each, output,
            )  # fmt: skip
    return encode_results(Results(epoch, [group_of(answer)]))


def results_of(epoch: int, answers: Sequence[Answer]) -> Iterator[Results]:
    """Yield the RESULTS with `answers`, all of one client; more than one only above the wire's limit."""
    groups: list[Group] = []
    n = 0
    for answer in answers:
        group = group_of(answer)
        if n + group.count > MAX_QUERIES:
            yield Results(epoch, groups)
            groups, n = [], 0
        groups.append(group)
        n += group.count
    yield Results(epoch, groups)


def group_of(answer: Answer) -> Group:
    """Return an answer as a group of RESULTS."""
    queries: Queries = answer.cohort.message
    count = answer.n
    ids: Buffer = queries.ids[8 * answer.lo : 8 * answer.hi]
    queued_us: Buffer | None = None
    if answer.more is not None:
        ids, queued_us = _merged(answer)
    ran = answer.ran
    if ran is None:
        reason = answer.reason.encode()
        return Group(
            count, answer.status, 0, 0, 0.0, answer.queued_ns, 0, 0, 0, ids, 0, reason, None, queued_us
        )
    each, output, lengths = _outputs(ran.row, answer.at, answer.at + count)
    return Group(
        count, answer.status, ran.subnet, ran.batch_size, ran.accuracy,
        answer.queued_ns, ran.to_start_ns, ran.executing_ns, ran.returning_ns,
        ids, each, output, lengths, queued_us,
    )  # fmt: skip


def _merged(answer: Answer) -> tuple[bytes, bytes]:
    """Return ids and waits of an answer with several stretches, which arrived at different instants."""
    ids, waits = [], []
    dispatched_ns = answer.cohort.arrived_ns + answer.queued_ns
    for cohort, lo, hi in answer.stretches:
        ids.append(cohort.message.ids[8 * lo : 8 * hi])
        waits.append(pack_queued_us(dispatched_ns - cohort.arrived_ns) * (hi - lo))
    return b"".join(ids), b"".join(waits)


def _outputs(row: DoneRow, lo: int, hi: int) -> tuple[int, Buffer, Buffer | None]:
    """Return the bytes of each output, the outputs and their lengths, of queries lo to hi of a batch."""
    lengths = None if row.lengths is None else row.lengths[4 * lo : 4 * hi]
    if hi - lo == row.n:
        return row.output_bytes, row.output, lengths
    start, end = _span(row.output_bytes, row.lengths, lo, hi)
    return row.output_bytes, memoryview(row.output)[start:end], lengths
