"""Traces: when queries are due. Made from specs, read from Azure's files, cut, scaled and saved.

Imports nothing of loadgen. Data: a file or a spec -> `Trace`, instants in nanoseconds from the start.
"""
