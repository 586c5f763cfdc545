"""`loadgen autoscale`: a fleet that follows its load against fixed ones, simulated on one trace."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.results.style import check_installed
from loadgen.results.tables import check_outputs, echo, write
from loadgen.simulator.workloads import MAX_GPUS, parse_cluster
from loadgen.study import autoscale as study
from loadgen.traces.trace import load_trace
from router.policies.registry import make_policy
from router.report.scaler import ScalerSettings
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from pathlib import Path

    from loadgen.traces.trace import Trace


@dataclass(frozen=True, slots=True)
class AskedFleets:
    """What a fleet is simulated on: plain values, which go to other processes."""

    spec: str
    rate_qps: float | None
    duration_s: float | None
    emulate: str
    policy: str
    slo_ns: int
    seed: int

    def trace(self) -> Trace:
        """Return the trace."""
        return load_trace(self.spec, rate_qps=self.rate_qps, duration_s=self.duration_s, seed=self.seed)


@click.command("autoscale")
@options.trace
@options.rate
@options.duration
@click.option(
    "--emulate", default="cnn-8gpu-modelled", show_default=True, metavar="PROFILE[*FACTOR]",
    help="A worker's GPU; PROFILE*100 takes 100 times as long.",
)  # fmt: skip
@click.option("--fixed", "sizes", default="1,2,4,8", show_default=True, metavar="N,...", help="Fixed fleets.")
@click.option("--floor", type=click.IntRange(1), default=1, show_default=True, help="The fewest workers.")
@click.option("--ceiling", type=click.IntRange(1, MAX_GPUS), default=8, show_default=True, help="The most.")
@click.option(
    "--down-after-s", type=click.FloatRange(0.0), default=300.0, show_default=True,
    help="Drain what was not needed for this long.",
)  # fmt: skip
@click.option(
    "--start-s", type=click.FloatRange(0.0, 3_600.0), default=30.0, show_default=True,
    help="What a worker takes to start.",
)  # fmt: skip
@options.policy
@options.slo_ms
@options.seed
@options.processes
@options.json_file
@click.option("--picture", type=options.FILE, help="Write both as a picture, SVG.")
@plain_errors()
def autoscale_command(
    spec: str,
    rate: float | None,
    duration: float | None,
    emulate: str,
    sizes: str,
    floor: int,
    ceiling: int,
    down_after_s: float,
    start_s: float,
    policy: str | None,
    slo_ms: float,
    seed: int,
    processes: int | None,
    json_path: Path | None,
    picture: Path | None,
) -> None:
    """Serve a trace with fixed fleets and with one that follows its load; print GPU-hours and attainment.

    On a virtual clock, with the autoscaler of `cluster autoscale` and the core that serves live.
    """
    check_outputs({"--json": json_path, "--picture": picture})
    if picture is not None:
        check_installed()
    asked = AskedFleets(
        spec, rate, duration, emulate, policy or options.DEFAULT_POLICY, options.slo_ns_of(slo_ms), seed
    )
    make_policy(asked.policy, parse_cluster(f"{emulate}:1")[0])
    scaler = ScalerSettings(floor=floor, ceiling=ceiling, down_after_s=down_after_s)
    fleets = study.fleets(_sizes(sizes), scaler, start_s=start_s)
    trace = asked.trace()
    echo(
        f"{trace.name}: {trace.n:,} queries in {trace.duration_ns / 1e9:.1f} s, {emulate}, SLO {slo_ms:g} ms"
    )
    echo(f"  {trace.provenance}")
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(_run, [asked] * len(fleets), fleets))
    for line in study.lines(found):
        echo(line)
    if json_path is not None:
        body = {"asked": asked, "fleets": [asdict(one) for one in found]}
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2).decode() + "\n")
    if picture is not None:
        from loadgen.study.autoscale_picture import draw  # noqa: PLC0415  it needs matplotlib

        write(picture, draw(trace, found))


def _run(asked: AskedFleets, of: study.ScaledFleet) -> study.Scaled:
    profile = parse_cluster(f"{asked.emulate}:1")[0]
    return study.run(asked.trace(), profile, of, policy=asked.policy, slo_ns=asked.slo_ns, seed=asked.seed)


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--fixed: expected numbers of workers with commas between, got {text!r}")
    sizes = [int(part) for part in text.split(",")]
    if max(sizes) > MAX_GPUS:
        raise ConfigError(f"--fixed: expected at most {MAX_GPUS} workers, got {max(sizes)}")
    return sizes
