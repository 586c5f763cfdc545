"""The live router: sockets and the poll loop around the core, and the log by which its decisions replay.

Imports `router.core` and `router.report`. `loop` waits and lets the core decide; `client_side` and
`worker_side` each own a socket and its peers, and `side` is their common part. Data: frames -> `wire.decode`
-> a side -> events -> `RouterCore` -> actions -> `directives` -> `wire.encode` -> frames. Nothing is decided
here.
"""
