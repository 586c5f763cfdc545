"""`cluster keys`: make, list and revoke the keys that clients and workers join a router with."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.cli.render import secrets
from superserve.net import keys
from superserve.roles.command import plain_errors

_ROLE = click.Choice(list(keys.FOLDERS))


@click.group("keys")
@click.option(
    "--out", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("keys"),
    show_default=True, help="The router's folder of keys.",
)  # fmt: skip
@click.pass_context
def keys_command(context: click.Context, folder: Path) -> None:
    """Make and revoke the keys of a cluster. Only their owner can read secrets, and none is overwritten."""
    context.obj = folder


@keys_command.command("make")
@click.pass_obj
@plain_errors()
def make(folder: Path) -> None:
    """Make a router's folder: its key pair, and an operator's key."""
    made = keys.make_ring(folder)
    for path in made:
        click.echo(f"made {path}")
    click.echo(f"The router's machine keeps {folder}: python -m router --keys {folder} ...")
    click.echo(f"An operator takes {folder / 'operator.key'}: export {keys.ENVIRONMENT}=.../operator.key")
    click.echo(f"Next: cluster keys --out {folder} add worker NAME, and add client NAME")


@keys_command.command("add")
@click.argument("role", type=_ROLE)
@click.argument("name")
@click.pass_obj
@plain_errors()
def add(folder: Path, role: str, name: str) -> None:
    """Make a key for a client, a worker's host or an operator, and list it."""
    own, listed = keys.add_peer(folder, role, name)
    click.echo(f"made {own}\nmade {listed}")
    how = "python -m gpu_worker --keys " if role == "worker" else f"export {keys.ENVIRONMENT}="
    click.echo(f"Copy {own} to the {role}'s machine, mode 0600, and remove it here: {how}{own.name}")
    click.echo("A router that runs admits it within a second.")


@keys_command.command("revoke")
@click.argument("name")
@click.pass_obj
@plain_errors()
def revoke(folder: Path, name: str) -> None:
    """Remove a name from the lists: a running router cuts it off within a second."""
    gone = keys.revoke(folder, name)
    for path in gone:
        click.echo(f"removed {path}")


@keys_command.command("secrets")
@click.argument("name")
@click.pass_obj
@plain_errors()
def secrets_command(folder: Path, name: str) -> None:
    """Print the keys as Secrets of Kubernetes, whose names begin with NAME: pipe it to kubectl apply -f -."""
    secrets(folder, name)


@keys_command.command("list")
@click.pass_obj
@plain_errors()
def show(folder: Path) -> None:
    """List who is admitted; exit 1 if a file is malformed."""
    try:
        own = keys.router_keys(folder)
        ring, problems = keys.read_ring(folder)
    except OSError as error:
        raise click.ClickException(f"{folder}: cannot be read: {error.strerror}") from error
    click.echo(f"{'router':<9} {'':<20} {own.public}")
    for role, listed in (("client", ring.clients), ("worker", ring.workers), ("operator", ring.operators)):
        for public, name in sorted(listed.items(), key=lambda item: item[1]):
            click.echo(f"{role:<9} {name:<20} {public}")
    if problems:
        raise click.ClickException("; ".join(problems))
