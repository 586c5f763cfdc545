"""Connections: sockets that never block, ZeroMQ's and plain ones, keys, handshakes, and one session on each.

Imports `superserve.wire`, errors and clock. Every ZeroMQ socket, in any role, is used through `sockets`, and
every key file is read through `keys`. `stream` is a ROUTER on plain sockets, and `zmtp` what it says there.
"""
