"""`python -m gateway`: serve the Open Inference Protocol in front of a router, or make a caller's token."""

from __future__ import annotations

import hashlib
import logging
import secrets
from pathlib import Path
from typing import Any

import click

from gateway.calls.settings import LOOPBACK, GatewaySettings
from gateway.serve.process import GRPC, HTTP, run_process
from gateway.serve.watcher import Watcher
from gateway.text.tokens import Tokens
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.command import plain_errors
from superserve.roles.processes import die_with_parent

_PORT = click.IntRange(0, 65_535)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LOG = "%(asctime)s %(name)s %(levelname)s %(message)s"


@click.group(invoke_without_command=True)
@click.option(
    "--connect", help="The router's client endpoint.  [default: of the cluster that runs on this machine]"
)
@click.option("--keys", help="A client key, for a router with keys.")
@click.option("--model", help="The model's name in requests.  [default: the supernet's]")
@click.option("--default-slo-ms", type=float, help="For requests without a deadline.  [default: refuse them]")
@click.option(
    "--tokenizer", type=_FILE, help="The model's tokenizer.json: serve /v1/embeddings and /v1/rerank."
)
@click.option("--address", default=LOOPBACK, show_default=True, help="Where to listen.")
@click.option("--http-port", type=_PORT, default=8000, show_default=True, help="0 is any free port.")
@click.option("--no-http", is_flag=True, help="Serve gRPC only.")
@click.option("--grpc-port", type=_PORT, help="Serve gRPC here; 0 is any free port.  [default: off]")
@click.option(
    "--http-processes", type=click.IntRange(1, 256), default=1, show_default=True, help="They share the port."
)
@click.option(
    "--grpc-processes", type=click.IntRange(1, 256), default=1, show_default=True, help="They share the port."
)
@click.option("--tls-cert", type=_FILE, help="The server's certificate chain, PEM.")
@click.option("--tls-key", type=_FILE, help="Its key, PEM.")
@click.option("--client-ca", type=_FILE, help="Take only callers whose certificate one of these has signed.")
@click.option("--callers", type=_FILE, help="A file of callers with their tokens, certificates and rates.")
@click.option("--security", type=click.Choice(["none"]), help="none: open to other machines without callers.")
@click.option(
    "--max-body-bytes", type=click.IntRange(1, 1 << 30), default=64 << 20, show_default=True,
    help="Of one request.",
)  # fmt: skip
@click.option(
    "--max-connections", type=click.IntRange(1), default=16_384, show_default=True, help="Of one process."
)
@click.option(
    "--head-timeout-s", type=click.FloatRange(0.1), default=10.0, show_default=True, help="For a head."
)
@click.option(
    "--body-timeout-s", type=click.FloatRange(0.1), default=60.0, show_default=True, help="For a body."
)
@click.option(
    "--idle-timeout-s", type=click.FloatRange(0.1), default=300.0, show_default=True,
    help="How long an idle connection is kept.",
)  # fmt: skip
@click.option(
    "--drain-notice-s", type=click.FloatRange(0, 600), default=0.5, show_default=True,
    help="On SIGTERM, how long it says not ready and still takes requests.",
)  # fmt: skip
@click.option(
    "--drain-s", type=click.FloatRange(0, 600), default=10.0, show_default=True,
    help="How long answers may take after that.",
)  # fmt: skip
@click.option("--metrics-port", type=_PORT, help="Serve /metrics here; 0 is any free port.  [default: off]")
@click.option("--metrics-address", default=LOOPBACK, show_default=True, help="Where /metrics listens.")
@click.pass_context
@plain_errors()
def cli(context: click.Context, /, **given: Any) -> None:
    """Serve the Open Inference Protocol (KServe v2) over HTTP and gRPC, in front of a router."""
    if context.invoked_subcommand is not None:
        return
    die_with_parent()
    logging.basicConfig(format=_LOG, level=logging.INFO)
    settings = _settings(given)
    settings.check()
    if settings.tokenizer is not None:
        Tokens(Path(settings.tokenizer)).close()  # what is wrong with it is said here, once
    port = given["metrics_port"]
    metrics = None if port is None else (given["metrics_address"], port)
    Watcher(settings, metrics).run()


def _settings(given: dict[str, Any]) -> GatewaySettings:
    """Return the settings that the options give.

    Raises:
        ConfigError: No router is named, and no cluster runs on this machine.
    """
    connect = given["connect"]
    if connect is None:
        try:
            connect = local.client_endpoint()
        except ConfigError as error:
            raise ConfigError(f"{error}; or give --connect tcp://HOST:PORT of a router") from error
    texts: dict[str, Any] = {name: None if (one := given[name]) is None else str(one)
             for name in (
                 "keys", "model", "tokenizer", "tls_cert", "tls_key", "client_ca", "callers")}  # fmt: skip
    if texts["keys"] is None:
        texts["keys"] = local.remembered_keys(str(connect)) or None
    same = {
        name: given[name]
        for name in ("default_slo_ms", "grpc_port", "max_body_bytes", "max_connections", "drain_s")
    }
    return GatewaySettings(
        connect=str(connect) if "://" in str(connect) else f"tcp://{connect}",
        address=str(given["address"]),
        http_port=None if given["no_http"] else given["http_port"],
        n_http=given["http_processes"],
        n_grpc=given["grpc_processes"],
        head_s=given["head_timeout_s"],
        body_s=given["body_timeout_s"],
        idle_s=given["idle_timeout_s"],
        notice_s=given["drain_notice_s"],
        is_open=given["security"] == "none",
        **texts,
        **same,
    )


@cli.command("process", hidden=True)
@click.argument("protocol", type=click.Choice([HTTP, GRPC]))
@click.argument("row", type=int)
@click.argument("settings")
@plain_errors()
def process_command(protocol: str, row: int, settings: str) -> None:
    """Serve as one process of a gateway; the watcher starts it."""
    die_with_parent()
    logging.basicConfig(format=_LOG, level=logging.INFO)
    run_process(GatewaySettings.from_json(settings), protocol, row)


@cli.command("token")
@click.argument("name")
@plain_errors()
def token_command(name: str) -> None:
    """Make a token for the caller NAME: prints it, and the line for the file of callers."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    click.echo(f"token: {token}")
    click.echo(f"{name} token:{digest}")
