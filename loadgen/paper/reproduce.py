"""`make reproduce`: the paper's results made again, as figures, pictures and a page.

    python -m loadgen.paper.reproduce --maf FILE

Simulations first, on every processor; then the live runs, one after the other. OUT/results.json has every
figure, by experiment, with where, when and how it was made. It grows as results come, so that `--only` adds
to it; the page is written from it. `--page docs` writes docs/results.md and its pictures.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadgen import options
from loadgen.live.environment import environment_of
from loadgen.paper import experiments, live_experiments
from loadgen.paper.experiments import POLICIES, ExperimentEffort
from loadgen.paper.figures import svg_of
from loadgen.paper.page import page
from loadgen.paper.pictures import pictures
from loadgen.results.style import check_installed
from loadgen.results.tables import check_writable, write
from superserve.files import write_whole
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    Experiment = Callable[[ExperimentEffort], dict[str, Any]]
    LiveExperiment = Callable[[ExperimentEffort, str], dict[str, Any]]

# Experiments that simulate cell by cell use every processor themselves.
WIDE: dict[str, Experiment] = {
    "maf": experiments.maf_cnn,
    "transformer": experiments.maf_transformer,
    "bursty": experiments.bursty,
    "accelerating": experiments.accelerating,
    "policies": experiments.policy_space,
}
NARROW: dict[str, Experiment] = {
    "scaling": experiments.scaling,
    "range": experiments.rate_range,
    "actuation": experiments.actuation,
    "faults": experiments.faults,
    "dynamics": experiments.dynamics,
}
LIVE: dict[str, LiveExperiment] = {
    "live_maf": live_experiments.maf_live,
    "live_faults": live_experiments.faults_live,
    "live_bursty": live_experiments.bursty_live,
}
NAMES = (*WIDE, *NARROW, *LIVE)
_SEEDS = 2  # the second shows whether a difference is luck


def reproduce(
    effort: ExperimentEffort, names: tuple[str, ...], keep: Callable[[str, dict[str, Any]], None]
) -> None:
    """Run the named experiments, and pass each one's figures to `keep` as they come."""
    for name, experiment in WIDE.items():
        if name in names:
            keep(name, experiment(effort))
    narrow = [name for name in NARROW if name in names]
    with ProcessPoolExecutor(effort.n_processes) as pool:
        ends = {name: pool.submit(NARROW[name], effort) for name in narrow}
        for name, end in ends.items():
            keep(name, end.result())
    for name, live in LIVE.items():
        if name in names:
            keep(name, {policy: live(effort, policy) for policy in POLICIES})


def say(what: str) -> None:
    """Print progress, from any process."""
    click.echo(f"  {time.strftime('%H:%M:%S')}  {what}", err=True)


def load(path: Path) -> dict[str, Any]:
    """Return the figures so far; none if the file does not exist."""
    if not path.exists() or not path.stat().st_size:
        return {"schema": 1, "made": {}}
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise click.ClickException(f"{path}: expected the figures of an earlier run: {error}") from error
    return found


@click.command()
@options.maf
@click.option("--only", "only", multiple=True, type=click.Choice(NAMES), help="These alone; repeatable.")
@click.option("--quick", is_flag=True, help="A tenth of each duration, and one seed: a trial run.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/reproduce"))
@click.option(
    "--page", "folder", type=click.Path(file_okay=False, path_type=Path),
    help="Where results.md and its pictures go.  [default: OUT]",
)  # fmt: skip
@plain_errors()
def main(maf: str | None, only: tuple[str, ...], quick: bool, out: Path, folder: Path | None) -> None:
    """Make the paper's results again, and write them as figures, pictures and a page."""
    path, folder = out / "results.json", folder or out
    effort = ExperimentEffort(
        maf, len(os.sched_getaffinity(0)), 1 if quick else _SEEDS, 0.1 if quick else 1.0, say
    )
    check_installed()
    check_writable(path, "--out")
    check_writable(folder / "results.md", "--page")
    found = load(path) if only else load(Path(os.devnull))
    began_s = last_s = time.monotonic()
    how = {"environment": environment_of(), "has_maf": maf is not None, "share": effort.share}

    def keep(name: str, figures: dict[str, Any]) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        found[name] = figures
        found["made"][name] = how | {"took_s": now_s - last_s}
        last_s = now_s
        write_whole(path, orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    reproduce(effort, only or NAMES, keep)
    click.echo(f"  written          {path}")
    for stem, draw in pictures(found).items():
        write(folder / f"{stem}.svg", svg_of(draw))
    write(folder / "results.md", page(found))
    click.echo(f"  took             {(time.monotonic() - began_s) / 60:.1f} minutes")


if __name__ == "__main__":
    main(prog_name="python -m loadgen.paper.reproduce")
