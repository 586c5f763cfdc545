"""The commands `profiles advise`, `measure`, `search`, `exits`, `show`, `accuracy` and `calibrate`.

They use torch, which takes seconds to import, so each imports it when it runs.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpu_worker.models.names import BERT_ENCODER, is_known, with_example
from profiles.measuring.declared import subnets_of
from profiles.measuring.measure import (
    Device,
    Measurement,
    Setting,
    measure_supernet,
    save_measurement,
    thinned,
)
from profiles.show import draw_heat_map, flops, flops_unit, print_heat_map
from profiles.table import load_profile, statistics_path
from superserve.clock import MonotonicClock
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.roles.command import plain_errors
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from profiles.measuring.accuracy import MeasuredAccuracy
    from profiles.measuring.find import Found
    from profiles.table import Profile

    OnProgress = Callable[[str, int, int], None]

_NS_PER_S = 1_000_000_000
_WIDTH = 80  # of output that is not a terminal
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_QUICK_ROUNDS = 40  # enough for a median; the tail needs the full number
_QUICK_BUDGET_NS = 6_000_000_000  # with torch's import and the warm-up, under 15 s in all
# Population and generations: a prediction costs microseconds, a measurement most of a second.
_EFFORT_PREDICTED = (100, 40)
_EFFORT_MEASURED = (20, 2)
_REMEASURED_ROUNDS = 50  # the search has chosen the subnets; these are the latencies that the profile keeps
_REMEASURED_BUDGET_NS = 60 * _NS_PER_S  # bounds it on slow devices

_supernet = click.option(
    "--supernet", default="digits", show_default=True, help="A supernet's name, or module:attribute."
)
_example_input = click.option(
    "--example-input",
    metavar="SHAPE:DTYPE",
    help="One query of a module:function that returns a supernet: 3x224x224:float32, or a .npy file.",
)
_out = click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Profile to write."
)
_weights = click.option(
    "--weights",
    metavar="FILE",
    help='A checkpoint, a folder, or "random".  [default: those that come with it]',
)
_examples = click.option(
    "--examples",
    type=_FILE,
    help="Labelled examples to measure accuracy on, an .npz.  [default: the supernet's own]",
)
_device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:<n>.")
_threads = click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")


def _parsed(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        words = f"--batch-sizes: expected whole numbers with commas between, got {text!r}"
        raise click.ClickException(words) from error


_batch_sizes = click.option(
    "--batch-sizes", default="1,2,4,8,16", show_default=True, callback=_parsed, help="Ascending, with commas."
)


@click.command("advise")
@click.argument("module", metavar="MODULE:FUNCTION")
@click.option(
    "--example-input", metavar="SHAPE:DTYPE", required=True,
    help="One input of the module: 3x224x224:float32, or a .npy file.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the supernet to this .py file."
)
@plain_errors(OSError)
def advise_command(module: str, example_input: str, out: Path | None) -> None:
    """Say what of your module can be made elastic, and how.

    MODULE:FUNCTION builds a plain torch module. Each candidate is inserted into a copy of it and proved; what
    fails is named, with the reason.
    """
    from profiles.measuring.advise import advise_on, code_of, lines_of  # noqa: PLC0415  see above

    advice, *place = advise_on(module, example_input, lambda what: click.echo(f"trying {what}", err=True))
    for line in lines_of(advice):
        click.echo(line)
    if advice.proof is None:
        return
    click.echo()
    if out is None:
        click.echo(code_of(advice, *place))
    else:
        write_whole(out, code_of(advice, *place))
        click.echo(f"wrote {out}")
    name = "my_supernet" if out is None else out.stem
    supernet = f"--supernet {name}:supernet --example-input {example_input}"
    click.echo(
        f"{'Save this as my_supernet.py. ' if out is None else ''}Train its subnets together, then search:"
    )
    click.echo(f"  profiles train {supernet} --data MODULE:FUNCTION --epochs 10 --out weights.safetensors")
    click.echo(
        f"  profiles search {supernet} --weights weights.safetensors --examples EXAMPLES.npz "
        "--out profile.json"
    )


@click.command("measure")
@_supernet
@_example_input
@click.option(
    "--family", type=_FILE, help="Measure the ordinary models of this file instead: see docs/families.md."
)
@click.option(
    "--subnets",
    "source",
    metavar="FILE",
    help="Measure the subnets of this profile, or of a list of names, control tuples and accuracies.",
)
@click.option(
    "--at-most", type=click.IntRange(2), help="Measure this many of them, evenly spread.  [default: all]"
)
@_weights
@_device
@_threads
@click.option("--precision", default="auto", show_default=True, help="auto, float32, float16 or bfloat16.")
@click.option("--eager", is_flag=True, help="Capture no CUDA graphs.")
@_batch_sizes
@click.option("--repeats", default=200, show_default=True, help="Times each subnet and size is run.")
@click.option("--quick", is_flag=True, help="Stop after a few seconds; at most 40 repeats.")
@_out
@click.pass_context
@plain_errors(OSError)
def measure_command(
    context: click.Context, /, supernet: str, family: Path | None, batch_sizes: tuple[int, ...], repeats: int,
    quick: bool, out: Path, **given: Any,
) -> None:  # fmt: skip
    """Measure a supernet's subnets, or a family's models, on this machine and write the profile to OUT."""
    setting = Setting(
        batch_sizes=batch_sizes,
        rounds=min(repeats, _QUICK_ROUNDS) if quick else repeats,
        budget_ns=_QUICK_BUDGET_NS if quick else None,
    )
    if family is None:
        source, measurement = _measured_supernet(supernet, setting, out.stem, **given)
    else:
        _only_of_families(context)
        from profiles.measuring.members import measure_family  # noqa: PLC0415  it imports torch

        place = Device(device=given["device"], threads=given["threads"])
        source = str(family)
        measurement = measure_family(family, setting, place, name=out.stem, clock=MonotonicClock())
    save_measurement(measurement, out, source)
    _show(measurement)
    click.echo(f"wrote {out}")


_WITH_FAMILY = ("family", "batch_sizes", "repeats", "quick", "out", "device", "threads")


def _only_of_families(context: click.Context) -> None:
    """Refuse options that mean nothing to a family."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _WITH_FAMILY and source is click.core.ParameterSource.COMMANDLINE:
            option = {"source": "subnets"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"--{option}: expected none beside --family, whose file lists its models")


def _measured_supernet(
    supernet: str, setting: Setting, name: str, *, source: str | None, at_most: int | None, eager: bool,
    example_input: str | None, **device: Any,
) -> tuple[str, Measurement]:  # fmt: skip
    """Return the profile that the subnets came from, and what was measured."""
    supernet = with_example(supernet, example_input)
    kind, shipped = _kind(supernet)
    source = source or shipped
    if source is None:
        raise ConfigError(f"--subnets: {kind} comes without a profile: make one by `profiles search`")
    return source, measure_supernet(
        supernet,
        thinned(subnets_of(source, kind), at_most),
        setting,
        Device(**device, uses_graphs=not eager),
        name=name,
        clock=MonotonicClock(),
    )


def _kind(supernet: str) -> tuple[str, str | None]:
    """Return a supernet's own name, and the profile that it comes with, if any."""
    from gpu_worker.models.kinds import supernet_kind  # noqa: PLC0415  it imports torch

    kind = supernet_kind(supernet)
    return kind.name, kind.profile


def _show(measurement: Measurement) -> None:
    profile = measurement.profile
    click.echo(f"{profile.device}: median / p99 ms by batch size")
    width = max(len(subnet.name) for subnet in profile.subnets)
    sizes = "".join(f"{size:>16}" for size in profile.batch_sizes)
    click.echo(f"{'':{width}}        %{sizes}")
    for subnet in profile.subnets:
        cells = (
            f"{median / 1e6:7.4g} /{p99 / 1e6:6.4g}"
            for median, p99 in zip(subnet.latency_ns, subnet.latency_p99_ns, strict=True)
        )
        click.echo(f"{subnet.name:{width}}  {subnet.accuracy:6.2f}{''.join(cells)}")
    for name in measurement.dropped:
        click.echo(f"left out {name}: one that is at least as accurate is about as fast here, or faster")


@click.command("search")
@_supernet
@_example_input
@_weights
@click.option(
    "--predictor", type=_FILE, help="OFA-ResNet50's accuracy predictor.  [default: accuracy is measured]"
)
@_examples
@click.option(
    "--latency",
    type=click.Choice(["flops", "measured"]),
    default="flops",
    show_default=True,
    help="Fitted to a dozen subnets, or measured for each subnet that is kept, which takes longer.",
)
@_device
@_threads
@_batch_sizes
@click.option("--subnets", "n_subnets", default=32, show_default=True, help="Most subnets to keep.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same search.")
@click.option(
    "--population",
    type=int,
    help=f"[default: {_EFFORT_PREDICTED[0]}, or {_EFFORT_MEASURED[0]} if accuracy is measured]",
)
@click.option(
    "--generations",
    type=int,
    help=f"[default: {_EFFORT_PREDICTED[1]}, or {_EFFORT_MEASURED[1]} if accuracy is measured]",
)
@_out
@plain_errors(OSError)
def search_command(out: Path, latency: str, supernet: str, example_input: str | None, **options: Any) -> None:
    """Search a supernet for its pareto subnets and write them as a profile to OUT."""
    options["supernet"] = with_example(supernet, example_input)
    clock = MonotonicClock()
    started_ns = clock.now_ns()
    with _progress() as on_progress:
        found = _search(out.stem, latency == "measured", on_progress, clock, **options)
    beside = found.write(out)
    took_s = (clock.now_ns() - started_ns) / _NS_PER_S
    _print_found(found, took_s)
    click.echo(f"wrote {out}" + (f" and {beside}" if beside else ""))


def _search(
    name: str,
    is_measured: bool,
    on_progress: OnProgress,
    clock: MonotonicClock,
    *,
    device: str,
    threads: int,
    batch_sizes: tuple[int, ...],
    predictor: Path | None,
    examples: Path | None,
    population: int | None,
    generations: int | None,
    seed: int,
    **wanted: Any,
) -> Found:
    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  see above
    from profiles.measuring.find import Request, find_profile  # noqa: PLC0415  see above
    from profiles.measuring.search import SearchEffort  # noqa: PLC0415  see above

    usual = _EFFORT_MEASURED if predictor is None else _EFFORT_PREDICTED
    request = Request(
        placement=Placement(device=device, threads=threads, batch_sizes=batch_sizes),
        effort=SearchEffort(
            usual[0] if population is None else population,
            usual[1] if generations is None else generations,
            seed,
        ),
        predictor=predictor,
        examples=examples,
        **wanted,
    )
    remeasure = _remeasuring(request.supernet, request.weights, device, threads, clock)
    return find_profile(
        request, name=name, clock=clock, remeasure=remeasure if is_measured else None, on_progress=on_progress
    )


def _remeasuring(
    supernet: str, weights: str | None, device: str, threads: int, clock: MonotonicClock
) -> Callable[[Profile], Measurement]:
    """Return a function that measures every subnet of a profile."""

    def remeasure(profile: Profile) -> Measurement:
        setting = Setting(profile.batch_sizes, _REMEASURED_ROUNDS, _REMEASURED_BUDGET_NS)
        where = Device(device=device, threads=threads, weights=weights)
        return measure_supernet(supernet, profile, setting, where, name=profile.name, clock=clock)

    return remeasure


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Show progress on standard error: bars on a terminal, an occasional line elsewhere."""
    if not sys.stderr.isatty():
        yield _line_of_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield advance


def _line_of_progress(what: str, done: int, total: int) -> None:
    if done * 4 // max(1, total) > (done - 1) * 4 // max(1, total) or done == 0:  # every quarter
        click.echo(f"{what}: {done} of {total}", err=True)


def _print_found(found: Found, took_s: float) -> None:
    profile = found.profile
    rows, sizes = profile.subnets, profile.batch_sizes
    width = max(len(row.name) for row in rows)
    ends = "".join(f"{f'ms at batch {size}':>17}" for size in (sizes[0], sizes[-1]))
    click.echo(f"{'':{width}}       %  {flops_unit(profile)}{ends}")
    for row in rows:
        ends = "".join(f"{latency_ns / 1e6:17.4g}" for latency_ns in (row.latency_ns[0], row.latency_ns[-1]))
        click.echo(f"{row.name:{width}}  {row.accuracy:6.2f}  {flops(row, profile):>6}{ends}")
    for name in found.dropped:
        click.echo(f"left out {name}: a more accurate subnet is about as fast here")
    click.echo(
        f"{len(rows)} pareto subnets, {rows[0].accuracy:.2f} to {rows[-1].accuracy:.2f} %, "
        f"of {found.n_judged} judged, in {took_s:.1f} s"
    )
    click.echo(profile.provenance)


@click.command("exits")
@click.option(
    "--supernet", default=BERT_ENCODER, show_default=True, help="Its name, or module:attribute: one of depth."
)
@_example_input
@_weights
@click.option(
    "--pairs", required=True, type=_FILE, help="Texts to rank, an .npz: see profiles/measuring/exits.py."
)
@_device
@_threads
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="List of subnets to write, for `profiles measure --subnets`.",
)
@plain_errors(OSError)
def exits_command(
    supernet: str,
    example_input: str | None,
    weights: str | None,
    pairs: Path,
    device: str,
    threads: int,
    out: Path,
) -> None:
    """Rank the exits of an encoder or reranker, and write them to OUT.

    An exit's figure is 100 times Spearman's correlation of its scores with full depth's, or with the scores
    that the file of pairs holds.
    """
    import torch  # noqa: PLC0415  see above

    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  see above
    from profiles.measuring.exits import ranked_exits, write_subnets  # noqa: PLC0415  see above

    torch.set_num_threads(threads)
    placement = Placement(device=device, threads=threads)
    exits = ranked_exits(with_example(supernet, example_input), weights, pairs, placement)
    for one in exits:
        note = "" if one.is_kept else "  left out: a shallower exit ranks as well"
        click.echo(f"{one.subnet.name:<10} {one.percent:7.2f}{note}")
    write_subnets(exits, out)
    click.echo(f"wrote {out}")


@click.command("show")
@click.argument("profile")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it to this .svg or .png instead."
)
@plain_errors(OSError)
def show_command(profile: str, picture: Path | None) -> None:
    """Show PROFILE, a shipped profile's name or a file: a heat map of latency."""
    shown = load_profile(profile)
    if picture is not None:
        draw_heat_map(shown, picture)
        click.echo(f"wrote {picture}")
        return
    print_heat_map(shown, Console(width=None if sys.stdout.isatty() else _WIDTH))


@click.command("accuracy")
@click.argument("profile")
@click.option("--supernet", help="Its name, or module:attribute.  [default: the profile's]")
@_example_input
@_weights
@_examples
@_device
@_threads
@plain_errors(OSError)
def accuracy_command(profile: str, **given: Any) -> None:
    """Print how much accuracy SubnetNorm gives each subnet of PROFILE.

    Held-out accuracy with the subnet's own statistics, and with the largest subnet's statistics for all.
    """
    from profiles.measuring.accuracy import accuracy_by_statistics  # noqa: PLC0415  see above

    judged = load_profile(profile)
    rows = accuracy_by_statistics(_measured(judged, **given), _subnets(judged))
    width = max(len(subnet.name) for subnet in judged.subnets)
    click.echo(f"{'':{width}}  {'own statistics':>16}{'those of largest':>20}")
    for subnet, (own, shared) in zip(judged.subnets, rows, strict=True):
        click.echo(f"{subnet.name:{width}}  {own:14.2f} %{shared:18.2f} %")


@click.command("calibrate")
@click.argument("profile")
@click.option("--supernet", help="Its name, or module:attribute.  [default: the profile's]")
@_example_input
@_weights
@_examples
@_device
@_threads
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: beside the profile]")
@plain_errors(OSError)
def calibrate_command(profile: str, out: Path | None, **given: Any) -> None:
    """Gather SubnetNorm's statistics of each subnet of PROFILE, and write them where workers find them."""
    from gpu_worker.supernet.calibration import save_statistics  # noqa: PLC0415  see above

    calibrated = load_profile(profile)
    subnets, judge = _subnets(calibrated), _measured(calibrated, **given)
    statistics = judge.calibrated(subnets)
    if not judge.supernet.norms:
        raise ConfigError("calibrate: expected a supernet with BatchNorm: LayerNorm keeps no statistics")
    judge.supernet.set_statistics(statistics)
    path = out or statistics_path(profile)
    save_statistics(path, judge.supernet, calibrated.supernet, subnets)
    click.echo(f"wrote {path}: statistics of {len(subnets)} subnets")


def _subnets(profile: Profile) -> list[Subnet]:
    return [Subnet(row.name, row.control) for row in profile.subnets]


def _measured(
    profile: Profile,
    supernet: str | None,
    example_input: str | None,
    weights: str | None,
    examples: Path | None,
    device: str,
    threads: int,
) -> MeasuredAccuracy:
    """Return the object that calibrates and measures the supernet of a profile."""
    import torch  # noqa: PLC0415  see above

    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  see above
    from gpu_worker.models.kinds import supernet_kind  # noqa: PLC0415  see above
    from profiles.measuring.accuracy import measured_accuracy  # noqa: PLC0415  see above

    if supernet is None and not is_known(profile.supernet):
        raise ConfigError(
            f"--supernet: expected package.module:attribute: the profile names {profile.supernet!r}, "
            "which does not come with the package"
        )
    kind = supernet_kind(with_example(supernet or profile.supernet, example_input))
    if kind.name != profile.supernet:
        raise ConfigError(f"supernet: expected {profile.supernet}, the profile's, got {kind.name}")
    torch.set_num_threads(threads)
    return measured_accuracy(kind, weights, examples, Placement(device=device, threads=threads))
