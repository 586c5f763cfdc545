"""Traces of what a router did, in the formats of the tools that people use.

    perfetto    a file for ui.perfetto.dev and chrome://tracing
    ended       which queries have ended, of a record that is still being written
    otel        their spans, sent to an OpenTelemetry collector

Reads flight records through `loadgen.study.explain`. Nothing here runs in a router: a reader asks it for its
record, so tracing costs its loop what an answer costs.
"""
