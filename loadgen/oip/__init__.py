"""Servers that speak the Open Inference Protocol as targets of a run, over HTTP or gRPC: ours, and others'.

The schedule, the clock, the honesty rules and the result file are those of `loadgen.live`. Here are only the
ways in which a query leaves and its answer comes back, one message each.

Imports `loadgen.live` and `loadgen.results`. Data: URL -> TargetModel -> RequestMaker -> target -> records.
"""
