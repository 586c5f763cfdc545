"""`python -m router`: run the router, or replay a recorded event log."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from router.report.flight import DEFAULT_BYTES
from router.report.metrics import SWITCH_S, RouterMetrics, pages
from router.serve.doors import raise_limit
from router.serve.loop import RouterServer, ServerSettings
from router.serve.recording import Recorder, replay
from router.serve.settings_file import MAX_MARGIN_MS, RouterSettings, SettingsFile
from superserve.errors import ConfigError, SuperServeError
from superserve.roles.command import plain_errors
from superserve.roles.pages import LOOPBACK, serve_pages
from superserve.roles.processes import announce_ready, die_with_parent
from superserve.roles.version import version

_LOOPBACK = "tcp://127.0.0.1:*"


@click.group(invoke_without_command=True)
@click.option("--client-endpoint", default=_LOOPBACK, show_default=True, help="Where clients connect.")
@click.option("--worker-endpoint", default=_LOOPBACK, show_default=True, help="Where workers connect.")
@click.option(
    "--policy",
    default="planfit",
    show_default=True,
    help="planfit, demandfit, slackfit, fixed:<subnet>, maxacc, ...",
)
@click.option(
    "--max-queries", type=click.IntRange(1), default=200_000, show_default=True, help="Queries held, at most."
)
@click.option(
    "--max-bytes",
    type=click.IntRange(1),
    default=2 << 30,
    show_default=True,
    help="Payload bytes held, at most.",
)
@click.option(
    "--margin-ms",
    type=float,
    help="Slack held back for late messages.  [default: by the latest ones measured, 0.1 to 1]",
)
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    help="After a message, look for others without sleeping for this long; takes a whole processor.",
)
@click.option(
    "--metrics-port", type=click.IntRange(0, 65_535),
    help="Serve /metrics to Prometheus here; 0 is any free port.  [default: off]",
)  # fmt: skip
@click.option("--metrics-address", default=LOOPBACK, show_default=True, help="Where /metrics listens.")
@click.option(
    "--keys",
    type=click.Path(file_okay=False, path_type=Path),
    help="Admit only the keys that this folder lists; see `cluster keys`.",
)
@click.option(
    "--router-key", "secret", type=click.Path(dir_okay=False, path_type=Path),
    help="The router's secret, if it is not in that folder: a mounted one.",
)  # fmt: skip
@click.option("--security", type=click.Choice(["none"]), help="none: open to other machines without keys.")
@click.option("--no-shared-memory", is_flag=True, help="Take large payloads only in messages.")
@click.option(
    "--flight-mb", type=click.FloatRange(0, 4096), default=DEFAULT_BYTES / 2**20, show_default=True,
    help="Memory for the record of the last minutes, which `explain` and the live page read; 0 keeps none.",
)  # fmt: skip
@click.option(
    "--settings", "settings_path", type=click.Path(dir_okay=False, path_type=Path),
    help="Policy, margin and bounds from this JSON file instead, which may change while the router runs.",
)  # fmt: skip
@click.option(
    "--routers", type=click.Path(dir_okay=False, path_type=Path),
    help="A file that lists all routers of the cluster, for clients and workers; read again when it changes.",
)  # fmt: skip
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="Write an event log here.")
@click.pass_context
@plain_errors()
def cli(
    context: click.Context,
    client_endpoint: str,
    worker_endpoint: str,
    policy: str,
    max_queries: int,
    max_bytes: int,
    margin_ms: float | None,
    spin_us: int,
    metrics_port: int | None,
    metrics_address: str,
    keys: Path | None,
    secret: Path | None,
    security: str | None,
    no_shared_memory: bool,
    flight_mb: float,
    settings_path: Path | None,
    routers: Path | None,
    record: Path | None,
) -> None:
    """Run the router: one earliest-deadline-first queue for all workers."""
    if context.invoked_subcommand is not None:
        return
    die_with_parent()
    raise_limit()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    if margin_ms is not None and not 0 <= margin_ms <= MAX_MARGIN_MS:  # a FloatRange lets NaN pass
        raise click.ClickException(f"--margin-ms: expected 0 to {MAX_MARGIN_MS:g} ms, got {margin_ms}")
    tuned = RouterSettings(policy, margin_ms, max_queries, max_bytes)
    file = None if settings_path is None else _settings_file(context, settings_path)
    if file is not None:
        tuned = file.settings
    settings = ServerSettings(
        client_endpoint, worker_endpoint, tuned.policy, tuned.core(), keys=keys, secret=secret,
        is_open=security == "none", shared_memory=False if no_shared_memory else None,
        spin_ns=1_000 * spin_us, flight_bytes=int(flight_mb * 2**20), file=file, routers=routers,
    )  # fmt: skip
    metrics = None if metrics_port is None else RouterMetrics()
    _serve(settings, tuned, metrics, f"{metrics_address}:{metrics_port}", record)


def _serve(
    settings: ServerSettings,
    tuned: RouterSettings,
    metrics: RouterMetrics | None,
    metrics_at: str,
    record: Path | None,
) -> None:
    """Announce a router and run it until a signal.

    Args:
        settings: Of its server.
        tuned: What decides, as options or a file have it.
        metrics: What it exports; None for nothing.
        metrics_at: ADDRESS:PORT of the exporter.
        record: Where the event log goes; None for none.
    """
    recorder = None
    with ExitStack() as stack:
        try:
            if settings.keys is not None and settings.is_open:
                raise ConfigError("--keys and --security none: expected one of them, got both")
            if settings.secret is not None and settings.keys is None:
                raise ConfigError("--router-key goes with --keys, the folder with the lists")
            tuned.check("router")
            recorder = None if record is None else Recorder(record, tuned.policy, settings.core)
            if recorder is not None:
                stack.callback(recorder.close)  # also if nothing is served
            server = RouterServer(settings, recorder, metrics)
            for number in (signal.SIGTERM, signal.SIGINT):  # before any peer can know this router
                signal.signal(number, lambda *_: server.stop())
            where = ""
            if metrics is not None:
                address, _, port = metrics_at.rpartition(":")
                exporter = serve_pages(pages(server.core, metrics), address=address, port=int(port))
                where = stack.enter_context(exporter)
                sys.setswitchinterval(SWITCH_S)
            version()  # cached: read the code now, while it is what runs, not in the loop at the first STATUS
            server.open()
            try:
                _announce(server, where)
            except BaseException:
                server.close()  # an open context would wait for its sockets when Python ends
                raise
        except (SuperServeError, OSError):
            if recorder is not None:
                recorder.abandon()
            raise
        server.run()


def _announce(server: RouterServer, metrics: str) -> None:
    """Tell who started this, and the user, where it listens; `metrics` is HOST:PORT of the exporter or ""."""
    ends = {"client": server.client_endpoint, "worker": server.worker_endpoint}
    announce_ready(ends | ({"metrics": metrics} if metrics else {}))
    where = (
        f"clients: {server.client_endpoint}  workers: {server.worker_endpoint}  "
        f"policy: {server.settings.policy}" + (f"  metrics: http://{metrics}/metrics" if metrics else "")
    )
    with contextlib.suppress(OSError):  # a full disk behind stderr, or no reader: it serves all the same
        click.echo(where, err=True)


def _settings_file(context: click.Context, path: Path) -> SettingsFile:
    """Return the settings file; ConfigError if an option says the same."""
    for name in ("policy", "margin_ms", "max_queries", "max_bytes"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')}: expected none beside --settings, which has it")
    return SettingsFile(path)


@cli.command("replay")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@plain_errors()
def replay_command(file: Path) -> None:
    """Pass a recorded event log through a fresh core; exit 1 if it decides differently."""
    result = replay(file)
    for mismatch in result.mismatches:
        click.echo(mismatch)
    same = "differ" if result.mismatches else "are the same"
    click.echo(f"{result.n_events} events replayed: {result.n_directives} directives {same}")
    sys.exit(1 if result.mismatches else 0)
