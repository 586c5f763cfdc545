"""Connections: ZeroMQ sockets that never block, keys, handshakes, and one session on one connection.

Imports `superserve.wire`, errors and clock. Everything that touches a ZeroMQ socket, in any role, comes
through `sockets`; everything that reads a key file through `keys`.
"""
