"""Spans of queries for OpenTelemetry, sent by OTLP over HTTP.

    query                       from sending until the answer is with the client
      to the router, in the queue, to the GPU, behind ..., running, back ...        its parts
    batch                       a trace of its own; each query's `running` links to it

A query that came with a `traceparent` continues that trace: its span is a child of the caller's.
The ids of spans follow from the router's epoch and the query's: who exports a query twice sends one span.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace import Status as SpanStatus
from opentelemetry.trace.status import StatusCode

from loadgen.study.explain.causes import cause_of
from loadgen.study.explain.story import BEFORE, RUNNING, story_of
from superserve.errors import ConfigError
from superserve.roles.version import version

if TYPE_CHECKING:
    from loadgen.study.explain.flight import Flight, FlownQuery
    from loadgen.study.explain.story import Story
    from superserve.wire.flight import SentBatch

_MOST_AT_ONCE = 512


class SpanSender:
    """Makes spans of queries and sends them to a collector.

    Args:
        url: The collector's, such as http://127.0.0.1:4318/v1/traces.
        epoch: The router's, as STATUS has it.
        wall_ns: Added to the router's clock, it gives the time of day.

    Attributes:
        n_sent: Spans that the collector took.
    """

    def __init__(self, url: str, epoch: int, wall_ns: int) -> None:
        self.n_sent = 0
        self._url = url
        self._epoch = epoch
        self._wall_ns = wall_ns
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=5)
        self._resource = Resource.create({"service.name": "superserve-router", "service.version": version()})
        self._scope = InstrumentationScope("superserve", version())

    def send(self, flight: Flight, queries: list[FlownQuery]) -> None:
        """Send the spans of some queries, and of the batches that they ran in.

        Raises:
            ConfigError: The collector does not take them.
        """
        spans: list[ReadableSpan] = []
        batches: dict[int, SentBatch] = {}
        for query in queries:
            story = story_of(flight, query)
            spans += self.query_spans(flight, story)
            if story.batch is not None and story.report is not None:
                batches[story.batch.batch_id] = story.batch
        spans += [self.batch_span(flight, batch) for batch in batches.values()]
        for at in range(0, len(spans), _MOST_AT_ONCE):
            part = spans[at : at + _MOST_AT_ONCE]
            if self._exporter.export(part) is not SpanExportResult.SUCCESS:
                raise ConfigError(f"{self._url}: the collector did not take {len(part)} spans")
            self.n_sent += len(part)

    def close(self) -> None:
        """Close the connection to the collector."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def query_spans(self, flight: Flight, story: Story) -> list[ReadableSpan]:
        """Return the spans of a query: its own first, then those of its parts."""
        query, cause = story.query, cause_of(flight, story)
        caller = _caller_of(flight, query)
        own = self._context(f"query/{query.name}", f"query/{query.name}", caller)
        at_ns = query.sent_ns
        parts = []
        for part in story.parts:
            if part.name == BEFORE:
                continue
            links = []
            if part.name == RUNNING and story.batch is not None:
                links = [Link(self._batch_context(story.batch.batch_id))]
            context = self._context(f"query/{query.name}", f"query/{query.name}/{part.name}", caller)
            more = {"superserve.more": part.more} if part.more else {}
            parts.append(self._span(part.name, context, own, at_ns, at_ns + part.ns, more, links=links))
            at_ns += part.ns
        attributes = {
            "superserve.client": query.client, "superserve.query_id": query.query_id,
            "superserve.status": "" if story.status is None else story.status.name.lower(),
            "superserve.slack_ms": query.slack_ns / 1e6, "superserve.cause": cause.kind.value,
            "superserve.words": cause.words, "superserve.shed": cause.is_shed,
        }  # fmt: skip
        is_fine = query.missed is None
        status = SpanStatus(StatusCode.OK) if is_fine else SpanStatus(StatusCode.ERROR, cause.words)
        whole = self._span(
            "query", own, caller, query.sent_ns, at_ns, attributes, kind=SpanKind.SERVER, status=status
        )
        return [whole, *parts]

    def batch_span(self, flight: Flight, batch: SentBatch) -> ReadableSpan:
        """Return the span of a batch: the time that it ran."""
        report = flight.reports[batch.batch_id]
        row = flight.profile(batch.gpu).subnets[batch.subnet]
        start_ns = batch.dispatched_ns + report.to_start_ns
        attributes = {
            "superserve.gpu": flight.gpu_name(batch.gpu), "superserve.subnet": row.name,
            "superserve.accuracy": row.accuracy, "superserve.queries": batch.n,
            "superserve.profiled_ms": batch.profiled_ns / 1e6, "superserve.batch": batch.batch_id,
        }  # fmt: skip
        context = self._batch_context(batch.batch_id)
        return self._span("batch", context, None, start_ns, start_ns + report.executing_ns, attributes)

    def _span(
        self, name: str, context: SpanContext, parent: SpanContext | None, start_ns: int, end_ns: int,
        attributes: dict[str, Any], *, links: list[Link] | None = None,
        kind: SpanKind = SpanKind.INTERNAL, status: SpanStatus | None = None,
    ) -> ReadableSpan:  # fmt: skip
        return ReadableSpan(
            name=name, context=context, parent=parent, resource=self._resource, attributes=attributes,
            links=links or [], kind=kind, status=status or SpanStatus(StatusCode.UNSET),
            start_time=start_ns + self._wall_ns, end_time=end_ns + self._wall_ns,
            instrumentation_scope=self._scope,
        )  # fmt: skip

    def _batch_context(self, batch_id: int) -> SpanContext:
        return self._context(f"batch/{batch_id}", f"batch/{batch_id}")

    def _context(self, trace: str, span: str, caller: SpanContext | None = None) -> SpanContext:
        trace_id = hashlib.blake2b(f"{self._epoch}/{trace}".encode(), digest_size=16).digest()
        if caller is not None:
            trace_id = caller.trace_id.to_bytes(16, "big")
        span_id = hashlib.blake2b(f"{self._epoch}/{span}".encode(), digest_size=8).digest()
        return SpanContext(
            int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big"), is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )  # fmt: skip


def _caller_of(flight: Flight, query: FlownQuery) -> SpanContext | None:
    """Return the span that a query's `traceparent` names; None if it came without one."""
    traced = flight.traces.get((query.client, query.query_id))
    if traced is None:
        return None
    trace_id, span_id = int.from_bytes(traced.trace_id, "big"), int.from_bytes(traced.parent_id, "big")
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(traced.flags))
