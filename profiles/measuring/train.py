"""The command `profiles train`: from a network, and data, to the weights of a supernet."""

from __future__ import annotations

import itertools
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gpu_worker.models.names import with_example
from superserve.errors import ConfigError
from superserve.plugins import load_attribute
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from gpu_worker.models.kinds import SupernetKind
    from gpu_worker.supernet.supernet import Supernet
    from gpu_worker.training.judge import JudgedSubnet
    from gpu_worker.training.recipe import Recipe
    from gpu_worker.training.sandwich import Adapter

_WIDTH = 100  # of output that is not a terminal
_OUT = click.Path(dir_okay=False, path_type=Path)


@click.command("train")
@click.option("--supernet", required=True, metavar="NAME", help="A supernet's name, or module:attribute.")
@click.option(
    "--example-input",
    metavar="SHAPE:DTYPE",
    help="One query of a module:function that returns a supernet: 3x224x224:float32, or a .npy file.",
)
@click.option(
    "--data", required=True, metavar="MODULE:FUNCTION", help="Returns a DataLoader of (inputs, targets)."
)
@click.option(
    "--test-data", metavar="MODULE:FUNCTION", help="The same of other data, to judge subnets by at the end."
)
@click.option(
    "--weights",
    metavar="FILE",
    help='Begin with this checkpoint, or with "random" weights.  [default: those that come with it]',
)
@click.option("--steps", type=click.IntRange(1), help="Batches to learn from.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data, instead of steps.")
@click.option(
    "--loss",
    "objective",
    type=click.Choice(["cross-entropy", "mse", "cosine"]),
    default="cross-entropy",
    show_default=True,
    help="For classes, for numbers, for embeddings.",
)
@click.option("--learning-rate", default=3e-4, show_default=True, help="The highest of the schedule.")
@click.option("--weight-decay", default=0.02, show_default=True, help="Of AdamW.")
@click.option(
    "--drawn", "n_drawn", type=click.IntRange(0), default=2, show_default=True,
    help="Subnets drawn for each batch.",
)  # fmt: skip
@click.option(
    "--distilled", default=0.5, show_default=True, help="Share of the largest's teaching beside the targets."
)
@click.option("--alone", type=click.Choice(["largest", "smallest"]), help="Train one subnet, to compare.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="The same seed gives the same weights on a CPU.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<n>.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of torch.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of products; auto is half precision on CUDA.",
)
@click.option("--checkpoint", type=_OUT, help="Keep the training here.  [default: OUT.training]")
@click.option(
    "--checkpoint-every", "every", type=click.IntRange(1), default=200, show_default=True,
    help="Steps between two writes.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the checkpoint of a training that was interrupted.")
@click.option(
    "--judged",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Subnets to judge, beside both ends.",
)
@click.option("--out", required=True, type=_OUT, help="Weights to write, safetensors.")
@plain_errors(OSError)
def train_command(
    supernet: str, example_input: str | None, data: str, test_data: str | None, weights: str | None,
    out: Path, checkpoint: Path | None, every: int, resume: bool, judged: int, threads: int, device: str,
    **recipe: Any,
) -> None:  # fmt: skip
    """Train a supernet by the sandwich rule and write its weights to OUT.

    For each batch the largest subnet learns from the targets; the smallest and some that are drawn learn from
    the targets and from the largest. Batches without targets teach what the network answered before. Ctrl-C
    keeps the training, and --resume goes on as if it had not been interrupted.
    """
    import torch  # noqa: PLC0415  it takes seconds, and others of these commands need none

    from gpu_worker.training.judge import calibration_inputs, settle  # noqa: PLC0415  as above
    from gpu_worker.training.loop import Keeping, train  # noqa: PLC0415  as above

    torch.set_num_threads(threads)
    where = checkpoint or out.with_name(f"{out.name}.training")
    if where.exists() and not resume:
        raise ConfigError(
            f"{where}: a training that was interrupted is kept here: --resume goes on with it; remove the "
            "file to begin again"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    batches = _loader("--data", data, recipe["seed"])
    tests = None if test_data is None else _loader("--test-data", test_data, recipe["seed"])
    kind, trained, adapter = _trainee(with_example(supernet, example_input), weights, device)
    how = _recipe(batches, trained.device.type, **recipe)
    with _stopping() as stop, _shown(how.steps) as on_step:
        done = train(
            trained, batches, how, adapter=adapter, keeping=Keeping(where, every, resume),
            on_step=on_step, stops=stop.is_asked,
        )  # fmt: skip
    if not done.is_finished:
        _end(stop, done.steps, how.steps, where)
    inputs = calibration_inputs(batches, trained, adapter, how.seed)
    settle(trained, inputs)
    _write(trained, kind, out, how)
    where.unlink(missing_ok=True)
    click.echo(f"wrote {out} after {done.steps} steps")
    _print(_judged(trained, how, tests or batches, inputs, adapter, judged, is_tested=tests is not None), how)


def _loader(option: str, name: str, seed: int) -> Iterable[Any]:
    """Return what a function named on the command line gives: something that yields batches."""
    from gpu_worker.training.recipe import seed_all, seed_of  # noqa: PLC0415  as above

    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{option}: expected module:function, got {name!r}")
    try:
        function = load_attribute(module, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {name}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{option} {name}: expected a function, got {type(function).__name__}")
    seed_all(seed_of(seed, option))
    found = function()
    if not hasattr(found, "__iter__"):
        raise ConfigError(
            f"{option} {name}: expected a function that returns a DataLoader, got {type(found).__name__}"
        )
    iterable: Iterable[Any] = found
    return iterable


def _trainee(name: str, weights: str | None, device: str) -> tuple[SupernetKind, Supernet, Adapter]:
    """Return a supernet's kind, itself on its device, and what lies between data and it."""
    import torch  # noqa: PLC0415  as above

    from gpu_worker.engines.torch_executor import Placement, answer, model_input  # noqa: PLC0415  as above
    from gpu_worker.models.kinds import fitted, resident, supernet_kind  # noqa: PLC0415  as above
    from gpu_worker.training.sandwich import Adapter  # noqa: PLC0415  as above

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = fitted(supernet_kind(name), weights)
    trained = resident(kind, weights)
    layout = {"memory_format": torch.channels_last} if kind.takes_images else {}
    trained.to(Placement(device=device).torch_device(), **layout)  # type: ignore[call-overload]  # missing in the stub
    dtype = getattr(torch, kind.input_spec.dtype)

    def inputs(batch: torch.Tensor) -> torch.Tensor:
        if (
            batch.dim() != 1 + len(kind.input_spec.shape)
            or batch.dtype.is_floating_point != dtype.is_floating_point
        ):
            raise ConfigError(
                f"data: expected inputs as clients send them, {kind.input_spec.dtype} of shape "
                f"(B, {', '.join(map(str, kind.input_spec.shape))}), got {batch.dtype} {tuple(batch.shape)}"
            )
        return model_input(kind, batch, torch.float32)

    def outputs(found: Any) -> torch.Tensor:
        try:
            return answer(kind, found)
        except TypeError as error:
            raise ConfigError(f"{kind.name}: {error}") from error

    return kind, trained, Adapter(inputs, outputs)


def _recipe(
    batches: Any, device: str, *, steps: int | None, epochs: int | None, alone: str | None, precision: str,
    **options: Any,
) -> Recipe:  # fmt: skip
    import torch  # noqa: PLC0415  as above

    from gpu_worker.training.recipe import Recipe  # noqa: PLC0415  as above

    if (steps is None) == (epochs is None):
        raise ConfigError("expected one of --steps and --epochs")
    if steps is None:
        assert epochs is not None, "one of them is given"
        try:
            steps = epochs * len(batches)
        except TypeError as error:
            raise ConfigError("--epochs: the data do not tell their length: expected --steps") from error
    if precision == "auto":
        halves = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        precision = halves if device == "cuda" else "float32"
    return Recipe(steps=steps, subnets=alone or "sandwich", precision=precision, **options)


# --- while it runs ----------------------------------------------------------------------------


class _Stop:
    """Whether a signal has asked to stop, and which."""

    def __init__(self) -> None:
        self.signal = 0

    def is_asked(self) -> bool:
        return self.signal != 0

    def ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt  # the second time: at once
        self.signal = number
        click.echo("stopping after this step; Ctrl-C again stops at once, without keeping it", err=True)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Have Ctrl-C and SIGTERM end the training between two steps, within the block."""
    stop = _Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(stop: _Stop, step: int, steps: int, where: Path) -> NoReturn:
    click.echo(
        f"stopped after step {step} of {steps}, kept in {where}: the same command with --resume goes on",
        err=True,
    )
    sys.exit(128 + stop.signal)


@contextmanager
def _shown(steps: int) -> Iterator[Callable[[int, float], None]]:
    """Show progress on standard error: a bar on a terminal, a line for every tenth elsewhere."""
    if not sys.stderr.isatty():

        def line(step: int, loss: float) -> None:
            if step * 10 // steps > (step - 1) * 10 // steps:
                click.echo(f"step {step} of {steps}: loss {loss:.4g}", err=True)

        yield line
        return
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("training", total=steps, loss="")
        yield lambda step, loss: bars.update(task, completed=step, loss=f"{loss:.4g}")


# --- at the end -------------------------------------------------------------------------------


def _write(trained: Supernet, kind: SupernetKind, out: Path, how: Recipe) -> None:
    """Write the weights by the names that `--weights` takes."""
    import torch  # noqa: PLC0415  as above
    from safetensors.torch import save  # noqa: PLC0415  as above

    from superserve.files import write_whole  # noqa: PLC0415  beside its only use

    tensors = {
        kind.published_name(name): tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in trained.model.state_dict().items()
    }
    notes = {"supernet": kind.name, "torch": str(torch.__version__)}
    notes |= {name: str(value) for name, value in how.as_dict().items()}
    write_whole(out, save(tensors, metadata=notes))


def _judged(
    trained: Supernet,
    how: Recipe,
    batches: Iterable[Any],
    inputs: Sequence[Any],
    adapter: Adapter,
    n_drawn: int,
    *,
    is_tested: bool,
) -> list[JudgedSubnet]:
    from gpu_worker.training.judge import CALIBRATION_BATCHES, ends_and_some, judge  # noqa: PLC0415  as above

    subnets = ends_and_some(trained, n_drawn, how.seed)
    if how.subnets != "sandwich":
        subnets = [subnet for subnet in subnets if subnet.name == how.subnets]
    if not is_tested:
        click.echo("judged on data that it learned from: give --test-data for others")
        batches = list(itertools.islice(batches, CALIBRATION_BATCHES))
    return judge(trained, subnets, batches, how, adapter=adapter, inputs=inputs)


def _print(rows: Sequence[JudgedSubnet], how: Recipe) -> None:
    table = Table("subnet", "control tuple", box=box.SIMPLE_HEAD)
    table.add_column(how.learnt().unit, justify="right")
    for row in rows:
        control = "  ".join(f"{key} {_short(values)}" for key, values in (row.subnet.control or {}).items())
        table.add_row(row.subnet.name, control, f"{row.score:.4g}")
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _short(values: Sequence[Any]) -> str:
    """Return a list of a control tuple; of a long one that is all alike only one entry."""
    if len(values) > 1 and len(set(values)) == 1:
        return f"{len(values)} x {values[0]:g}"
    return f"[{', '.join(f'{value:g}' for value in values)}]"
