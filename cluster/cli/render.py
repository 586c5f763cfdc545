"""`cluster render`: a hosts file as what another engine takes, and `cluster keys secrets` for its keys."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from superserve.errors import ConfigError
from superserve.net.keys import ROUTER_KEY
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.engines.text import Rendered

ENGINES = ("compose", "kubernetes", "slurm", "systemd")
"""Those of `cluster.engines.registry`, which takes half a second to import."""


@click.command()
@click.argument("engine", type=click.Choice(ENGINES))
@click.argument("hosts_file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path),
    help="Write files into this folder, keys among them.  [default: print, without keys]",
)  # fmt: skip
@click.option("--image", default="superserve", show_default=True, help="The image of containers.")
@plain_errors()
def render(engine: str, hosts_file: Path, out: Path | None, image: str) -> None:
    """Print what ENGINE takes to run the cluster of HOSTS_FILE.

    Missing keys are made, as `cluster up` does.
    """
    from cluster.engines.containers import USER, RenderOptions  # noqa: PLC0415  it takes pydantic's import
    from cluster.engines.describe import describe  # noqa: PLC0415
    from cluster.engines.registry import RENDERERS  # noqa: PLC0415
    from cluster.spec.hostkeys import complete  # noqa: PLC0415
    from cluster.spec.hosts import load_hosts  # noqa: PLC0415

    for path in complete(load_hosts(hosts_file)):
        click.echo(f"made {path}", err=True)
    # Files of root are handed to the image's user; anybody else's containers run as that user.
    owner = (USER, USER) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    files = RENDERERS[engine](describe(hosts_file), RenderOptions(image, owner))
    if out is not None:
        hand_over = owner if engine == "compose" and os.geteuid() == 0 else None
        for path in write(out, files, hand_over):
            click.echo(f"wrote {path}")
        return
    shown = [file for file in files if not file.is_secret and not file.is_beside]
    for file in shown:
        click.echo((f"# {file.name}\n" if len(shown) > 1 else "") + file.text.rstrip("\n"))
        if len(shown) > 1 and file is not shown[-1]:
            click.echo()
    if len(shown) < len(files):
        click.echo("some files, keys among them, are not shown: --out DIR writes all", err=True)


def write(folder: Path, files: Sequence[Rendered], owner: tuple[int, int] | None = None) -> list[Path]:
    """Write files below a folder, each whole or not at all, and return their paths.

    What an earlier call listed beside a router's secret, and is no longer among the files, is removed: a peer
    that was revoked must not stay on a list.

    Args:
        folder: Made if it is not there.
        files: Secrets get mode 0600.
        owner: User and group of what others read; None for the caller's own.

    Raises:
        ConfigError: A file cannot be written.
    """
    paths = [folder / file.name for file in files]
    try:
        for path, file in zip(paths, files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, file, owner if file.is_beside else None)
        for ring in [path.parent for path in paths if path.name == ROUTER_KEY]:
            for stale in set(ring.rglob("*.pub")) - set(paths):
                stale.unlink()
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    return paths


def _write(path: Path, file: Rendered, owner: tuple[int, int] | None) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if file.is_secret else 0o644)
        with os.fdopen(fd, "w", encoding="utf-8") as opened:
            opened.write(file.text)
        if owner is not None:
            os.chown(partial, *owner)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def secrets(folder: Path, name: str) -> None:
    """Print a folder of keys as Secrets of Kubernetes; refuse a terminal, on which they would stay."""
    from cluster.engines.kubesecrets import secrets_of  # noqa: PLC0415  it takes YAML's import
    from cluster.engines.text import yaml_text  # noqa: PLC0415

    if sys.stdout.isatty():
        raise ConfigError("expected a pipe or a file for secrets, not a terminal: try `| kubectl apply -f -`")
    click.echo(yaml_text(*secrets_of(name, folder)), nl=False)
