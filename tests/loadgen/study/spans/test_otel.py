"""Spans that a collector receives: each query that missed, one in N others, linked to their batches."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loadgen.simulator.faults import Fault
from loadgen.study.explain.flight import Flight
from loadgen.study.explain.story import story_of
from loadgen.study.spans.ended import EndedQueries
from loadgen.study.spans.otel import SpanSender
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status
from superserve.wire.flight import entries_of, traced_bytes
from superserve.wire.traceparent import TraceContext, packed
from tests.loadgen.study.explain.flown import even, fly, spike

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.wire.flight import Entry

WALL_NS = 1_700_000_000_000_000_000


@contextmanager
def collector(answer: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """Run a collector's stub: give its address and the spans that it has received."""
    received: list[Any] = []

    class Stub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    received.extend(scope.spans)
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def flight() -> Flight:
    """Return the record of a spike of which a part is refused."""
    return fly(spike(120), gpus=2, policy="fixed:cnn-80.16").flight


def ended_of(flight: Flight, size: int, one_in: int) -> tuple[EndedQueries, list[str]]:
    """Read a record in pieces, and return the names of the queries given."""
    entries: list[Entry] = list(entries_of(flight.data))
    ended = EndedQueries(flight.profiles, flight.profile_of, one_in)
    given = []
    for at in range(0, len(entries), size):
        given += ended.take(entries[at : at + size], flight.gpus)
    given += ended.rest()
    return ended, [query.name for query in given]


@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
def test_every_query_is_given_once_when_it_has_ended(flight: Flight, size: int) -> None:
    """However the record is cut into readings, each query comes once."""
    _, names = ended_of(flight, size, 1)

    assert sorted(names) == sorted(query.name for query in flight.queries.values())


@pytest.mark.parametrize("size", [1, 10_000])
def test_a_late_query_is_given_once(size: int) -> None:
    """It is in a report and in a miss."""
    fault = Fault("delay", 200 * MS, "worker:0", 5 * MS, 15 * MS)
    flight = fly(even(500), gpus=2, each=2, slo_ns=16 * MS, faults=[fault]).flight
    late = [query.name for query in flight.missed() if query.missed and query.missed.status == Status.LATE]
    _, names = ended_of(flight, size, 1)

    assert late
    assert sorted(names) == sorted(query.name for query in flight.queries.values())


def test_all_misses_are_given_and_one_in_ten_others(flight: Flight) -> None:
    """Sampling leaves out none that missed."""
    _, names = ended_of(flight, 7, 10)

    missed = {query.name for query in flight.missed()}
    others = {q.name for q in flight.queries.values() if q.missed is None and q.query_id % 10 == 0}
    assert len(missed) > 20
    assert sorted(names) == sorted(missed | others)


def test_a_collector_receives_a_querys_spans(flight: Flight) -> None:
    """The parts are children that lie within the query's span, and running links to the batch's span."""
    queries = list(flight.queries.values())[:80]
    with collector() as (url, spans):
        sender = SpanSender(url, 7, WALL_NS)
        sender.send(flight, queries)
        sender.close()

    assert sender.n_sent == len(spans)
    whole = {span.span_id: span for span in spans if span.name == "query"}
    batches = {span.span_id for span in spans if span.name == "batch"}
    assert len(whole) == len(queries)
    assert batches
    parts = [span for span in spans if span.parent_span_id]
    for part in parts:
        parent = whole[part.parent_span_id]
        assert part.trace_id == parent.trace_id
        assert parent.start_time_unix_nano <= part.start_time_unix_nano
        assert part.end_time_unix_nano <= parent.end_time_unix_nano
        assert [link.span_id in batches for link in part.links] == ([True] if part.name == "running" else [])
    by_id = {
        next(a.value.int_value for a in span.attributes if a.key == "superserve.query_id"): span
        for span in whole.values()
    }
    for query in queries:
        span = by_id[query.query_id]
        took_ns = span.end_time_unix_nano - span.start_time_unix_nano
        assert took_ns == story_of(flight, query).latency_ns
        assert span.start_time_unix_nano == query.sent_ns + WALL_NS
        assert span.status.code == (1 if query.missed is None else 2)


def traced(flight: Flight, contexts: dict[tuple[int, int], TraceContext]) -> Flight:
    """Return a record whose queries came with these contexts."""
    data = b"".join([traced_bytes(*key, packed(context)) for key, context in contexts.items()]) + flight.data
    found = Flight("", flight.gpus, flight.profiles, flight.profile_of, data=data)
    found.add(entries_of(data))
    return found


@pytest.mark.parametrize("flags", [0, 1])
def test_the_caller_decides_whether_a_query_in_time_is_traced(flight: Flight, flags: int) -> None:
    """One that it records always is, one that it does not record never is; those that missed always are."""
    context = TraceContext(bytes(range(16)), b"caller's", flags)
    keys = list(flight.queries)
    own = dict.fromkeys(keys[::2], context)
    _, names = ended_of(traced(flight, own), 7, 1_000_000)

    missed = {query.name for query in flight.missed()}
    asked = {flight.queries[key].name for key in own} if flags else set()
    assert len(missed) > 20
    assert sorted(names) == sorted(missed | asked)


def test_a_context_is_remembered_for_as_long_as_its_query_waits(flight: Flight) -> None:
    """Readings are forgotten meanwhile."""
    context = TraceContext(bytes(range(16)), b"caller's", 1)
    key = next(key for key, query in flight.queries.items() if query.missed is None and query.query_id)
    ended = EndedQueries(flight.profiles, flight.profile_of, 1_000_000)
    ended.take(list(entries_of(traced_bytes(*key, packed(context)))), flight.gpus)
    other = list(entries_of(traced_bytes(7, 1, packed(context)))) * 1_000
    for _ in range(40):
        ended.take(other, flight.gpus)
    given = ended.take(list(entries_of(flight.data)), flight.gpus) + ended.rest()

    assert flight.queries[key].name in [query.name for query in given]


def test_a_query_continues_its_callers_trace(flight: Flight) -> None:
    """Its span is a child of the caller's, in the caller's trace, and so are its parts; others stay apart."""
    context = TraceContext(bytes(range(16)), b"caller's", 1)
    keys = list(flight.queries)[:2]
    flight = traced(flight, {keys[0]: context})
    with collector() as (url, spans):
        sender = SpanSender(url, 7, WALL_NS)
        sender.send(flight, [flight.queries[key] for key in keys])
        sender.close()

    own = [span for span in spans if span.trace_id == context.trace_id]
    (whole,) = [span for span in own if span.name == "query"]
    assert whole.parent_span_id == context.parent_id
    assert {span.parent_span_id for span in own if span is not whole} == {whole.span_id}
    assert len(own) > 3
    (other,) = [span for span in spans if span.name == "query" and span is not whole]
    assert not other.parent_span_id


def test_a_collector_that_refuses_is_named(flight: Flight) -> None:
    """The error has its address."""
    with collector(400) as (url, _):
        sender = SpanSender(url, 7, WALL_NS)
        with pytest.raises(ConfigError, match=f"{url}: the collector did not take"):
            sender.send(flight, list(flight.queries.values())[:2])
        sender.close()
