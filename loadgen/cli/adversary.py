"""`loadgen adversary`: evolve workloads on which a policy fails where others do not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.live.environment import environment_of
from loadgen.results.tables import check_outputs, echo, write
from loadgen.study.adversary.evolve import REFERENCES, Question, evolve
from loadgen.study.adversary.worst import lines, to_dict, write_worst
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadgen.study.adversary.evolve import Progress


@click.command("adversary")
@click.option("--policy", default=options.DEFAULT_POLICY, show_default=True, help="Who is to fail.")
@click.option(
    "--against", type=click.Choice(list(REFERENCES)), default="yardstick", show_default=True,
    help="Beside whom: the better of slackfit and of mincost on GPUs a quarter slower; or one alone.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="How long."
)
@click.option(
    "--evaluations", type=click.IntRange(1),
    help="How many workloads, instead of how long: equal seeds then find the same.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search.")
@click.option(
    "--queries", type=click.IntRange(100, 100_000), default=4_000, show_default=True,
    help="Of each workload, about.",
)  # fmt: skip
@click.option(
    "--again", "is_again", is_flag=True,
    help="Each workload comes twice, and the second time counts: what has come once is no surprise.",
)  # fmt: skip
@click.option("--profile", default="cnn-8gpu-modelled", show_default=True, help="Of the GPUs.")
@options.processes
@click.option(
    "--out", "folder", type=options.FOLDER, default=Path("out/adversary"), show_default=True,
    help="Where the worst go, as trace files.",
)  # fmt: skip
@click.option("--json", "json_path", type=options.FILE, help="Write them with their genomes.")
@plain_errors()
def adversary_command(
    policy: str,
    against: str,
    minutes: float,
    evaluations: int | None,
    seed: int,
    queries: int,
    is_again: bool,
    profile: str,
    processes: int | None,
    folder: Path,
    json_path: Path | None,
) -> None:
    """Search for workloads on which a policy attains less than others do, and print the ten worst.

    Rates, spikes, SLOs, floors, GPUs and troubles evolve; each of the worst comes with the command that
    repeats it. See docs/gate.md.
    """
    check_outputs({"--json": json_path})
    make_policy(policy, load_profile(profile))
    question = Question(policy, against, profile, queries, is_again)
    worst = evolve(
        question, seed=seed, is_over=_ending(minutes, evaluations),
        n_processes=processes or len(os.sched_getaffinity(0)), say=_say,
    )  # fmt: skip
    paths = write_worst(folder, question, worst)
    for line in lines(question, worst, paths):
        echo(line)
    if json_path is not None:
        body = to_dict(question, worst, paths) | {"environment": environment_of()}
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())


def _ending(minutes: float, evaluations: int | None) -> Callable[[int], bool]:
    until_s = time.monotonic() + 60 * minutes
    if evaluations is not None:
        return lambda n: n >= evaluations
    return lambda _: time.monotonic() >= until_s


def _say(one: Progress) -> None:
    echo(
        f"  generation {one.generation}: {one.n_evaluations} workloads in {one.n_families} families, "
        f"{one.n_restarts} restarts; the worst is behind by {one.worst:.5f} ({one.family})",
        err=True,
    )
