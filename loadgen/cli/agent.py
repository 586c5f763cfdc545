"""`loadgen agent`: send a share of a run from this host."""

from __future__ import annotations

import ipaddress
import signal

import click

from loadgen.live.agent import Agent
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors


@click.command("agent")
@click.option("--listen", default="127.0.0.1:0", show_default=True, metavar="ADDRESS:PORT")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback: anyone there can make it send load.")
@plain_errors()
def agent_command(listen: str, insecure: bool) -> None:
    """Send shares of runs of `loadgen run --generators`, until Ctrl-C or SIGTERM."""
    _check_address(listen, insecure=insecure)
    with Agent(f"tcp://{listen}") as agent:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        click.echo(f"listening at {agent.endpoint.removeprefix('tcp://')}")
        agent.run()


def _check_address(listen: str, *, insecure: bool) -> None:
    """Raise ConfigError unless it is ADDRESS:PORT, on loopback or allowed beyond it."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"--listen: expected ADDRESS:PORT, such as 10.0.0.5:7000, got {listen!r}")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError(f"--listen: expected an address of this host, not a name, got {host!r}") from error
    if not address.is_loopback and not insecure:
        raise ConfigError(
            f"--listen {listen}: anyone who reaches it can make it send load anywhere: "
            "on a network that you trust add --insecure; else use an ssh tunnel to a loopback port"
        )
