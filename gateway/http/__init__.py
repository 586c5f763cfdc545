"""HTTP/1.1 in front of the protocol: requests out of bytes, answers in order, and which request means what.

`exchange` is pure: one connection's bytes in, requests out, answers back in the requests' order. `server` is
asyncio's side of it: sockets, timers, a limit on connections. `routes` says what a request asks for, and
`openapi` describes it. No web framework: on the hot path each costs more than all of this.

Imports `gateway.v2` and `gateway.calls`. Data: bytes -> Exchange -> HttpRequest -> Routes -> HttpAnswer ->
bytes.
"""
