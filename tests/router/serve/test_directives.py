"""A directive holds the bytes that the clients sent, whichever way they came."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import load_profile
from router.core.edf import Cohort
from router.core.events import Answer, Ran
from router.core.workers import Batch, Peer, Worker
from router.policies.slackfit import SlackFit
from router.serve.directives import directive_of, frames_of, results_of
from superserve import wire
from superserve.wire import VARIED, Directive, DoneRow, Queries, Status

NOW_NS = 10**12
CNN = load_profile("cnn-8gpu-modelled")


@st.composite
def cohorts(draw: st.DrawFn, serial: int, sizes: st.SearchStrategy[int]) -> Cohort:
    """Draw a message of a few queries: packed or framed, of one length or of several."""
    n = draw(st.integers(1, 5))
    is_varied = draw(st.booleans())
    lengths = draw(st.lists(sizes, min_size=n, max_size=n)) if is_varied else [draw(sizes)] * n
    payloads = [bytes([serial * 8 + i]) * length for i, length in enumerate(lengths)]
    is_framed = draw(st.booleans())
    slacks = sorted(draw(st.lists(st.integers(0, 10**9), min_size=n, max_size=n)))
    base_ns = NOW_NS - draw(st.integers(0, 10**7))
    message = Queries(
        1, 0, n, np.arange(n, dtype="<u8").tobytes(), np.array(slacks, "<i8").tobytes(),
        VARIED if is_varied else lengths[0], payloads if is_framed else [b"".join(payloads)], is_framed,
        np.array(lengths, "<u4").tobytes() if is_varied else None,
    )  # fmt: skip
    return Cohort(serial, None, [slack + base_ns for slack in slacks], base_ns, NOW_NS, message=message)


@given(st.data())
def test_a_directive_says_of_each_query_what_its_client_did(data: st.DataObject) -> None:
    """Id, slack left and payload of every query, in the batch's order, survive joining and the wire."""
    sizes = data.draw(st.sampled_from([st.just(64), st.integers(0, 100), st.just(5_000)]))
    stretches = []
    expected = []
    for serial in range(data.draw(st.integers(1, 5))):
        cohort = data.draw(cohorts(serial, sizes))
        n = len(cohort.deadlines_ns)
        lo = data.draw(st.integers(0, n - 1))
        hi = data.draw(st.integers(lo + 1, n))
        stretches.append((cohort, lo, hi))
        lengths = np.frombuffer(cohort.message.lengths or b"", "<u4").tolist()
        for i in range(lo, hi):
            length = lengths[i] if lengths else cohort.message.payload_bytes
            expected.append((i, cohort.deadlines_ns[i] - NOW_NS, bytes([serial * 8 + i]) * length))
    batch = Batch(
        batch_id=7, worker=Worker(Peer(b"w", "w", 1, NOW_NS), 0, CNN, SlackFit(CNN), NOW_NS), subnet=2,
        n=len(expected), stretches=stretches, dispatched_ns=NOW_NS, begin_ns=NOW_NS, profiled_ns=0,
        limit_ns=0,
    )  # fmt: skip

    decoded = wire.decode(wire.encode_directive(directive_of(batch)))

    assert isinstance(decoded, Directive)
    ids = [i for segment in decoded.segments for i in wire.uint64s(segment.ids)]
    payloads = map(bytes, decoded.payload_list())
    assert list(zip(ids, decoded.slack_left_ns().tolist(), payloads, strict=True)) == expected


@given(st.data())
def test_an_answer_alone_is_framed_as_beside_others(data: st.DataObject) -> None:
    """The short way from one answer to its bytes gives the same as the long one, whatever the outputs."""
    cohort = data.draw(cohorts(1, st.just(64)))
    n = len(cohort.deadlines_ns)
    lo = data.draw(st.integers(0, n - 1))
    hi = data.draw(st.integers(lo + 1, n))
    at = data.draw(st.integers(0, 3))
    each = data.draw(st.sampled_from([0, 4, 3_000, 40_000]))
    n_batch = at + hi - lo + data.draw(st.integers(0, 2))
    is_varied = data.draw(st.booleans())
    lengths = np.full(n_batch, each, "<u4").tobytes() if is_varied else None
    output = memoryview(bytes(i % 251 for i in range(n_batch)) * each)
    row = DoneRow(1, 0, 1, 0, n_batch, 5, 6, 1, 0, 0, VARIED if is_varied else each, output, None, lengths)
    ran = None if data.draw(st.booleans()) else Ran(row, 2, n_batch, 71.5, 10, 11, 12)
    ends = [Status.EXPIRED] if ran is None else [Status.OK, Status.LATE, Status.FAILED]
    status = data.draw(st.sampled_from(ends))
    answer = Answer(b"c", cohort, lo, hi, hi - lo, status, 9, ran, at, "why" if ran is None else "")

    short = frames_of(3, answer)

    (results,) = results_of(3, [answer])
    assert list(map(bytes, short)) == list(map(bytes, wire.encode_results(results)))
