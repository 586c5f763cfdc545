"""The reference of the gateway: a bare ASGI application under uvicorn that gives the body back."""

from __future__ import annotations

import socket
import sys
from typing import Any

from superserve.roles.processes import announce_ready, die_with_parent


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request with its own body."""
    assert scope["type"] == "http", "nothing else is spoken"
    parts = []
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            break
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/octet-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve() -> None:
    """Serve until killed; announces {"port": ..}."""
    import uvicorn  # noqa: PLC0415  an extra

    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(4_096)
    announce_ready({"port": sock.getsockname()[1]})
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", http="httptools", loop="uvloop"
    )
    uvicorn.Server(config).run(sockets=[sock])


def main() -> int:
    """Serve as a role: end with the process that started it."""
    die_with_parent()
    serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
