"""Connections: ZeroMQ sockets that never block, keys, handshakes, and one session on one connection.

Imports `superserve.wire`, errors and clock. Every ZeroMQ socket, in any role, is used through `sockets`, and
every key file is read through `keys`.
"""
