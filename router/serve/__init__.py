"""The live router: sockets and the poll loop around the core, and the log by which its decisions replay.

Imports `router.core` and `router.report`. Data: frames -> `wire.decode` -> events -> `RouterCore` ->
actions -> `directives` -> `wire.encode` -> frames. Nothing is decided here.
"""
