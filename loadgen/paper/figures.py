"""Two of the paper's figures, simulated: what an actuation delay costs, and the range of throughput.

    python -m loadgen.paper.figures --maf FILE --out docs

Writes actuation-ablation.svg and throughput-accuracy.svg, with the figures as JSON beside each, and
prints them. The simulator's machine is the calm one; the GPUs are the modelled profile's.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadgen import options
from loadgen.results.style import MUTED, RC, RUNS, check_installed
from loadgen.results.tables import check_writable, write
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.study.compare import MAF_QPS
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matplotlib.axes import Axes

    from profiles.table import Profile

DELAYS_MS = (0.0, 1.0, 10.0, 100.0)
"""Actuation delays of the ablation: none, this system's budget, and the time to load a model."""

RATES_QPS = tuple(range(1_000, 18_001, 500))
"""Constant rates of the range."""

ENOUGH = 0.999
"""Attainment at which a rate is sustained."""

N_GPUS = 8
_SIZE_IN = (5.6, 3.0)
_FONT_SIZE = 9.0


@dataclass(frozen=True, slots=True)
class Point:
    """The result of one simulation; `at` is its delay in ms, or its rate in queries a second."""

    at: float
    policy: str
    attainment: float
    accuracy: float | None


def ablation(profile: Profile, trace_spec: str, *, duration_s: float, policy: str) -> Iterator[Point]:
    """Yield what `policy` attains on MAF's arrivals, for each actuation delay."""
    trace = load_trace(trace_spec, rate_qps=MAF_QPS, duration_s=duration_s)
    for delay_ms in DELAYS_MS:
        settings = replace(SimSettings(), actuation_ns=int(delay_ms * MS))
        found = simulate(trace, [profile] * N_GPUS, policy=policy, settings=settings).result
        yield Point(delay_ms, policy, found.slo_attainment or 0.0, found.mean_accuracy)


def throughput_range(profile: Profile, *, duration_s: float, policies: tuple[str, ...]) -> Iterator[Point]:
    """Yield what each policy attains at constant rates, up to the first that it does not sustain."""
    for policy in policies:
        for rate_qps in RATES_QPS:
            trace = load_trace(f"constant:rate={rate_qps}", duration_s=duration_s)
            found = simulate(trace, [profile] * N_GPUS, policy=policy).result
            yield Point(float(rate_qps), policy, found.slo_attainment or 0.0, found.mean_accuracy)
            if (found.slo_attainment or 0.0) < ENOUGH:
                break


def draw_ablation(points: list[Point]) -> Callable[[Axes], None]:
    """Return a function that draws the share of missed SLOs by delay."""

    def draw(axes: Axes) -> None:
        places = range(len(points))
        missed = [max(1.0 - point.attainment, 1e-6) for point in points]
        axes.bar(places, missed, color=RUNS[0], width=0.55)
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 1.5)
        axes.set_xticks(list(places), [f"{point.at:g} ms" for point in points])
        for place, point, share in zip(places, points, missed, strict=True):
            text = "none" if point.attainment == 1.0 else f"{1.0 - point.attainment:.2g}"
            axes.annotate(text, (place, share), (0, 3), textcoords="offset points", ha="center")
        axes.set_xlabel("actuation delay")
        axes.set_ylabel("share of queries that miss their SLO")
        axes.grid(axis="y")

    return draw


def draw_range(points: list[Point]) -> Callable[[Axes], None]:
    """Return a function that draws accuracy by sustained rate: the adaptive line, each fixed subnet's end."""

    def draw(axes: Axes) -> None:
        for place, policy in enumerate(dict.fromkeys(point.policy for point in points)):
            held = [p for p in points if p.policy == policy and p.attainment >= ENOUGH]
            rates = [point.at for point in held]
            accuracies = [point.accuracy or 0.0 for point in held]
            if policy.startswith("fixed:"):
                axes.plot(rates[-1:], accuracies[-1:], "s", color=MUTED, markersize=5)
                is_at_edge = rates[-1] > 0.9 * RATES_QPS[-1]  # its name would cross the frame
                axes.annotate(
                    policy.removeprefix("fixed:"), (rates[-1], accuracies[-1]),
                    (-6, -8) if is_at_edge else (5, 4), textcoords="offset points",
                    ha="right" if is_at_edge else "left", color=MUTED, fontsize=8,
                )  # fmt: skip
            else:
                axes.plot(rates, accuracies, "o-", color=RUNS[place], markersize=3.5, label=policy)
        axes.set_xlabel(f"constant rate, queries/s, held with attainment of {ENOUGH:g} at least")
        axes.set_ylabel("mean accuracy, %")
        axes.margins(y=0.1)  # room for the names at the ends
        axes.set_xlim(0, RATES_QPS[-1])
        axes.legend(frameon=False, loc="lower left")
        axes.grid()

    return draw


def svg_of(draw: Callable[[Axes], None]) -> str:
    """Return a small picture as SVG, the same for the same figures."""
    import io  # noqa: PLC0415  with matplotlib, where a figure is drawn

    import matplotlib as mpl  # noqa: PLC0415  `loadgen` runs without it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(RC | {"font.size": _FONT_SIZE}):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    plain = re.sub(r"\s*<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in plain.splitlines()) + "\n"


def _json(points: list[Point], **more: Any) -> str:
    body = {**more, "points": [asdict(point) for point in points]}
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


@click.command()
@options.maf
@click.option("--profile", "name", default="cnn-8gpu-modelled", show_default=True)
@click.option("--policy", default="slackfit", show_default=True)
@click.option("--duration", type=float, default=60.0, show_default=True, help="Seconds of the MAF runs.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/figures"))
@plain_errors()
def main(maf: str | None, name: str, policy: str, duration: float, out: Path) -> None:
    """Simulate both figures, write them to OUT, and print the results."""
    check_installed()
    check_writable(out / "actuation-ablation.svg", "--out")
    profile = load_profile(name)
    trace = maf or f"maf-like:rate={MAF_QPS:g}"
    delays = list(ablation(profile, trace, duration_s=duration, policy=policy))
    policies = (policy, *(f"fixed:{subnet.name}" for subnet in profile.subnets))
    rates = list(throughput_range(profile, duration_s=duration / 6, policies=policies))
    arrivals = "MAF" if maf is not None else "maf-like"
    click.echo(f"actuation delay, {policy}, {arrivals} at {MAF_QPS:g} q/s, {N_GPUS} GPUs of {name}:")
    for point in delays:
        accuracy = "-" if point.accuracy is None else f"{point.accuracy:.3f} %"
        missed = f"{round((1.0 - point.attainment) * MAF_QPS * duration):,}"
        click.echo(f"  {point.at:>5g} ms  {missed:>8} missed  {point.attainment:.5f}  accuracy {accuracy}")
    click.echo(f"highest constant rate with attainment of {ENOUGH:g}, {N_GPUS} GPUs:")
    for one in policies:
        held = [point for point in rates if point.policy == one and point.attainment >= ENOUGH]
        if held:
            ends = [f"{point.at:,.0f} q/s at {point.accuracy:.2f} %" for point in (held[0], held[-1])]
            click.echo(f"  {one:<18} {' to '.join(ends)}")
    pictures = {"actuation-ablation": (delays, draw_ablation), "throughput-accuracy": (rates, draw_range)}
    for stem, (points, draw) in pictures.items():
        write(out / f"{stem}.svg", svg_of(draw(points)))
        write(out / f"{stem}.json", _json(points, profile=name, gpus=N_GPUS, arrivals=arrivals))


if __name__ == "__main__":
    main(prog_name="python -m loadgen.paper.figures")
