"""`loadgen advise`: how many GPUs a load needs, under which policy, and at what accuracy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.live.environment import environment_of
from loadgen.results.style import check_installed
from loadgen.results.tables import check_outputs, echo, write
from loadgen.study.advise.sizing import MOST_GPUS, SizingQuestion, best_of, check_question, size, words_of
from loadgen.traces.trace import Trace, open_source, trace_of
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from pathlib import Path

_DRAWN_S = 10.0


@click.command("advise")
@click.option("--profile", required=True, help="Of each GPU: a shipped profile's name, or a file.")
@options.trace
@options.rate
@click.option(
    "--duration", type=float, help="Seconds of the trace.  [default: 10; a recorded one as a whole]"
)
@options.slo_ms
@click.option("--attainment", type=click.FloatRange(0, 1, min_open=True), default=0.999, show_default=True)
@click.option(
    "--policy", "policies", multiple=True,
    help=f"Compare these.  [default: {options.DEFAULT_POLICY} and slackfit]",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Do not try the answer again with other arrivals.")
@options.seed
@options.json_file
@click.option("--picture", type=options.FILE, help="Write attainment and accuracy over GPUs, SVG.")
@plain_errors()
def advise_command(
    profile: str,
    spec: str,
    rate: float | None,
    duration: float | None,
    slo_ms: float,
    attainment: float,
    policies: tuple[str, ...],
    once: bool,
    seed: int,
    json_path: Path | None,
    picture: Path | None,
) -> None:
    """Say how many GPUs a load needs, by simulation: before you buy or rent them.

    For each policy: the fewest GPUs that give the attainment, and what accuracy more of them give. Exit 1 if
    none do.
    """
    check_outputs({"--json": json_path, "--picture": picture})
    if picture is not None:
        check_installed()
    device = load_profile(profile)
    policies = policies or (options.DEFAULT_POLICY, "slackfit")
    for policy in policies:
        make_policy(policy, device)
    question = SizingQuestion(
        device, attainment, options.slo_ns_of(slo_ms), _traces(spec, rate, duration, seed, once=once)
    )
    check_question(question)
    if question.least_gpus > MOST_GPUS:
        raise ConfigError(f"--rate: {question.least_gpus:,} GPUs at least, expected at most {MOST_GPUS:,}")
    echo(f"{question.traces[0].name}: {question.traces[0].provenance}")
    answers = [size(question, policy, echo) for policy in policies]
    for line in words_of(question, answers):
        echo(line)
    if json_path is not None:
        body = {
            "schema": 1, "trace": spec, "profile": device.name, "attainment": attainment, "slo_ms": slo_ms,
            "answers": [
                {
                    "policy": one.policy, "gpus": None if one.least is None else one.least.gpus,
                    "runs": [run.to_dict() for run in one.runs],
                }
                for one in answers
            ],
            "environment": environment_of(cluster=f"simulated: {profile}", seed=seed),
        }  # fmt: skip
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    if picture is not None:
        from loadgen.study.advise.picture import draw  # noqa: PLC0415  it needs matplotlib

        write(picture, draw(answers, attainment))
    if best_of(answers) is None:
        sys.exit(1)


def _traces(
    spec: str, rate: float | None, duration: float | None, seed: int, *, once: bool
) -> tuple[Trace, ...]:
    """Return the load, and once more with other arrivals unless the trace has its own."""
    source = open_source(spec, rate_qps=rate)
    is_drawn = not isinstance(source, Trace)
    if duration is None and is_drawn:
        duration = _DRAWN_S
    seeds = (seed,) if once or not is_drawn else (seed, seed + 1)
    found = tuple(trace_of(source, spec, rate_qps=rate, duration_s=duration, seed=one) for one in seeds)
    if not all(trace.n for trace in found):
        raise ConfigError(f"--trace {spec}: expected one query at least")
    return found
