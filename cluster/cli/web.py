"""`cluster web`: the live page of a cluster, for a browser."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import socket
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.top import endpoint_of
from loadgen.study.explain.flight import check_record
from superserve.errors import ConfigError
from superserve.net.connection import ask_status
from superserve.net.keys import ENVIRONMENT
from superserve.roles import local
from superserve.roles.command import plain_errors
from superserve.roles.local import DEFAULT_NAME
from superserve.roles.processes import announce_ready, die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOPBACK = "127.0.0.1"
_LOG_LINES = 40
_NEEDED = ("starlette", "uvicorn")


@click.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which cluster.")
@click.option("--connect", metavar="HOST:PORT", help="Watch the router of a cluster elsewhere.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8765, show_default=True, help="0 is any free port."
)
@click.option(
    "--host", default=_LOOPBACK, show_default=True, help="Where it listens; beyond loopback with a token."
)
@click.option(
    "--token-file", type=click.Path(dir_okay=False, path_type=Path),
    help="Who has the token in this file may look; it is made if it is missing.",
)  # fmt: skip
@click.option("--keys", envvar=ENVIRONMENT, help="A client's key file, for a router with keys.")
@plain_errors()
def web(
    name: str, connect: str | None, port: int, host: str, token_file: Path | None, keys: str | None
) -> None:
    """Serve the live page until Ctrl-C: whether deadlines are met, why not, and what each GPU does.

    It only asks the router for its STATUS. From elsewhere: ssh -L 8765:127.0.0.1:8765 HOST.
    """
    if missing := [one for one in _NEEDED if importlib.util.find_spec(one) is None]:
        raise ConfigError(f"{', '.join(missing)}: not installed; try: pip install 'superserve[web]'")
    endpoint = endpoint_of(name, connect)
    shown = (local.remembered_keys(endpoint) if keys is None else keys) or ""
    token = "" if token_file is None else token_in(token_file)
    _check_reach(host, token, shown)
    ask_status(endpoint, keys=shown)  # no page of a router that does not answer, or that keeps us out
    check_record(endpoint, shown)
    _serve(name, endpoint, shown, host, port, token)


def _check_reach(host: str, token: str, keys: str) -> None:
    """Refuse to show a cluster to other machines without a token, or one whose router needs no key."""
    if host in (_LOOPBACK, "localhost", "::1"):
        return
    if not token or not keys:
        lacks = "--token-file" if not token else "a router with keys, and --keys"
        raise ConfigError(
            f"--host {host}: other machines could look: expected {lacks}; or leave it on loopback and use "
            "ssh -L"
        )


def token_in(path: Path) -> str:
    """Return the token in a file, which is made, for its owner alone, if it is missing."""
    try:
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a file with a token: {error}") from error
    if len(token) < 16 or not token.isprintable():
        raise ConfigError(f"{path}: expected a token of 16 characters or more, got {len(token)}")
    return token


def _serve(name: str, endpoint: str, keys: str, host: str, port: int, token: str) -> None:
    import uvicorn  # noqa: PLC0415  an optional extra

    from cluster.web.app import page_app  # noqa: PLC0415
    from cluster.web.hub import FrameHub  # noqa: PLC0415

    die_with_parent() if os.environ.get("SUPERSERVE_READY_FD") else None
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # before it is announced: who reads the address may connect at once
        except OSError as error:
            raise ConfigError(f"--port {port}: expected a free port on {host}: {error.strerror}") from error
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        click.echo(f"{address}  (Ctrl-C ends it)")
        announce_ready({"address": address})
        app = page_app(FrameHub(name, endpoint, keys), asyncio.get_running_loop, _logs_of(name), token)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            return  # Ctrl-C is the way to leave


def _logs_of(name: str) -> Callable[[str], str]:
    """Return a function that gives the end of a worker's log, if it is one of this machine."""

    def end_of(worker: str) -> str:
        folder = local.cluster_folder(name)
        known = {path.stem: path for path in folder.glob("*.log")} if folder.is_dir() else {}
        path = known.get(worker)
        if path is None:
            return f"The log of {worker} is not on this machine: cluster logs --name {name} {worker}"
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, maxlen=_LOG_LINES)) or "(empty)"

    return end_of
