"""Insert SubNetAct's operators into an ordinary model.

    supernet = insert(
        model,
        stages=[Stage("layers", rule=spread_blocks)],
        elastic=[Elastic("heads", ("layers.*.self_attn",)), Elastic("hidden", ("layers.*.linear1",))],
    )

The stages define which blocks a subnet may leave out, the elastic sizes which layers may keep fewer
outputs. Everything else follows from the activations: see `gpu_worker.supernet.operators`. The model is
changed in place; its parameters stay, and so do their names in its state dict.

Source: SuperServe (NSDI '25), appendix A.1.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from gpu_worker.supernet.control import (
    Control,
    Controls,
    ControlSpace,
    Entry,
    Sizes,
    first_blocks,
    sliced_size,
)
from gpu_worker.supernet.operators import (
    Cursor,
    ElasticOperator,
    LayerSelect,
    Operator,
    Prepared,
    Skip,
    Skipped,
    Switched,
    switched,
)
from gpu_worker.supernet.original import original_of
from gpu_worker.supernet.recognition import (
    Layer,
    Named,
    elastic_names,
    is_elastic_kind,
    layers_in,
    operator_of,
    passes_channels,
)
from gpu_worker.supernet.supernet import Supernet
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DepthRule = Callable[[int, int], tuple[int, ...]]
"""From a depth and the number of blocks to the blocks that run."""

_FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of which a subnet runs some.

    Attributes:
        blocks: The path of the container that holds them, or the path of each.
        rule: Which ones run at a depth; the first ones, or `spread_blocks` for transformers.
        least: Smallest depth.
        skipped: What a block that is left out gives: "input", its first argument, where the block itself adds
            its input; "zero", zeros like it, where the caller adds (`x = x + block(x)`); or a function of the
            block's arguments.
    """

    blocks: str | Sequence[str]
    rule: DepthRule = first_blocks
    least: int = 1
    skipped: Skipped = "input"


@dataclass(frozen=True, slots=True)
class Elastic:
    """A size that subnets choose: the outputs of some layers, or the heads of attention layers.

    Or what a layer of `gpu_worker.supernet.operators.chosen` counts: a kernel's size, or an image's pixels.

    Attributes:
        name: Of the size, unique; control tuples give sizes in the order they are declared.
        layers: Paths of the layers that have it, or patterns such as "stages.0.*.conv1". All have as
            many outputs, and a residual stream's layers share one size.
        fractions: What a search draws from, ascending; anything between its ends may be asked for.
        multiple_of: Kept outputs are rounded up to a multiple of this.
        parts: How many equal parts the outputs of each layer consist of, or the size of each part; every
            part is cut alike. 3 for one layer that projects to queries, keys and values, 2 for a gate and
            what it gates. Fractions are of the smallest part, and larger ones are multiples of it.
    """

    name: str
    layers: Sequence[str]
    fractions: tuple[float, ...] = _FRACTIONS
    multiple_of: int = 1
    parts: int | Sequence[int] = 1


class Inserted(NamedTuple):
    """What insertion found: the operators in the order of their settings, and who chooses.

    Attributes:
        cursor: What they all read.
        operators: Of the whole model.
        stages: The switches of each stage.
        sizes: The layers of each elastic size, by name.
        defaults: The whole model's settings; SubnetNorm's are None.
    """

    cursor: Cursor
    operators: tuple[Operator, ...]
    stages: tuple[LayerSelect, ...]
    sizes: Mapping[str, tuple[ElasticOperator, ...]]
    defaults: tuple[Any, ...]


def insert(
    model: nn.Module,
    *,
    stages: Sequence[Stage] = (),
    elastic: Sequence[Elastic] = (),
    controls: Controls | None = None,
) -> Supernet:
    """Turn `model` into a supernet, in place.

    Args:
        model: Any module. Its weights should have been trained for this, or subnets guess.
        stages: What depth chooses from.
        elastic: What width chooses from.
        controls: The control tuples; by default {"d": a depth for each stage, "w": a fraction for
            each elastic size}, without the key that would be empty.

    Raises:
        ConfigError: Naming the path that is not there, or the layer that cannot be elastic;
            the model is unchanged then.
    """
    blocks = [_blocks(model, stage) for stage in stages]
    layers = {size.name: _layers(model, size) for size in elastic}
    _check_once(elastic, layers)
    found = layers_in(model, [layer.module for named in layers.values() for layer in named])
    parts = {size.name: _parts(size, layers[size.name]) for size in elastic}
    full = {size.name: _n_outputs(size.name, layers[size.name], parts[size.name]) for size in elastic}
    if controls is None:
        controls = default_controls(stages, [len(stage) for stage in blocks], elastic, full)
    original = original_of(model, stages, elastic)
    with _unchanged_on_error(model):
        inserted = _insert(model, found, zip(blocks, stages, strict=True), layers, parts)
        supernet = Supernet(model, inserted, controls)
    supernet.original = original
    return supernet


def default_controls(
    stages: Sequence[Stage], n_blocks: Sequence[int], elastic: Sequence[Elastic], full: Mapping[str, int]
) -> Controls:
    """Return the control tuples {"d": depths, "w": fractions} of stages and elastic sizes."""
    entries: dict[str, tuple[Entry, ...]] = {}
    if stages:
        entries["d"] = tuple(
            Entry(f"stage {m}", tuple(range(stage.least, n + 1)))
            for m, (stage, n) in enumerate(zip(stages, n_blocks, strict=True))
        )
    if elastic:
        entries["w"] = tuple(Entry(f"size {size.name}", size.fractions, is_open=True) for size in elastic)

    def sizes(control: Control) -> Sizes:
        kept = tuple(
            stage.rule(depth, n)
            for stage, n, depth in zip(stages, n_blocks, control.get("d", ()), strict=True)
        )
        outputs = {
            size.name: _rounded(sliced_size(fraction, full[size.name]), size.multiple_of, full[size.name])
            for size, fraction in zip(elastic, control.get("w", ()), strict=True)
        }
        return Sizes(kept, outputs)

    return Controls(ControlSpace(entries), sizes)


def _rounded(n: int, multiple: int, most: int) -> int:
    return min(most, -(-n // multiple) * multiple)


# --- what was named -------------------------------------------------------------------------


def _blocks(model: nn.Module, stage: Stage) -> list[tuple[Named, ...]]:
    """Return a stage's blocks, each as the modules that are called for it: itself, or a list's members."""
    if stage.skipped not in ("input", "zero") and not callable(stage.skipped):
        raise ConfigError(
            f'stage {stage.blocks}: skipped: expected "input", "zero" or a function, got {stage.skipped!r}'
        )
    if isinstance(stage.blocks, str):
        found = _children(model, stage.blocks)
    else:
        found = [_named(model, path, "stage") for path in stage.blocks]
    return [_called(block, stage) for block in found]


def _children(model: nn.Module, path: str) -> list[Named]:
    container = _named(model, path, "stage").module
    prefix = f"{path}." if path else ""
    found = [Named(f"{prefix}{name}", child) for name, child in container.named_children()]
    if not isinstance(container, nn.Sequential | nn.ModuleList) or not found:
        raise ConfigError(
            f"stage {path}: expected a Sequential or ModuleList with blocks, "
            f"got {type(container).__name__}; or give the path of each block"
        )
    return found


def _called(block: Named, stage: Stage) -> tuple[Named, ...]:
    """Return the modules that a caller calls for a block."""
    path, module = block
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return (block,)
    if stage.skipped == "input":
        raise ConfigError(
            f"stage {stage.blocks}: {path} is a {type(module).__name__}, which is never called itself: "
            'give skipped="zero" if the caller adds what each of its members returns, '
            "or a function of their arguments"
        )
    members = [Named(f"{path}.{name}", child) for name, child in module.named_children()]
    return tuple(called for member in members for called in _called(member, stage))


def _layers(model: nn.Module, size: Elastic) -> list[Named]:
    if isinstance(size.layers, str):
        raise ConfigError(f"size {size.name}: layers: expected a list of paths, got the text {size.layers!r}")
    found: list[Named] = []
    for pattern in size.layers:
        matches = [Named(p, m) for p, m in model.named_modules() if fnmatch.fnmatchcase(p, pattern)]
        if not matches:
            raise ConfigError(f"size {size.name}: layers: no module of the model is called {pattern!r}")
        found += matches
    return found


def _named(model: nn.Module, path: str, what: str) -> Named:
    try:
        return Named(path, model.get_submodule(path))
    except AttributeError as error:
        raise ConfigError(f"{what} {path}: expected the path of a module: {error}") from error


def _check_once(elastic: Sequence[Elastic], layers: Mapping[str, list[Named]]) -> None:
    if len(layers) < len(elastic):
        raise ConfigError(f"elastic: expected unique names, got {[size.name for size in elastic]}")
    owners: dict[int, str] = {}
    for name, found in layers.items():
        for path, module in ((layer.path, layer.module) for layer in found):
            _check_elastic(name, path, module)
            other = owners.setdefault(id(module), name)
            if other != name:
                raise ConfigError(f"size {name}: {path} has the size {other} already")


def _check_elastic(size: str, path: str, module: nn.Module) -> None:
    kind = operator_of(module, path)
    if not is_elastic_kind(kind):
        raise ConfigError(
            f"size {size}: {path}: expected one of {elastic_names()}, got {type(module).__name__}"
            f"{_reason(module)}"
        )
    if getattr(module, "groups", 1) > 1 and not passes_channels(kind):
        raise ConfigError(
            f"size {size}: {path}: a convolution with groups keeps those that its input fills: "
            "make the layer before it elastic"
        )


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return ", with max_norm, which would shorten whole vectors"
    if isinstance(module, nn.RNNBase):
        return " with proj_size"
    return ", whose forward is its own" if type(module).__mro__[1] is not nn.Module else ""


def _parts(size: Elastic, layers: Sequence[Named]) -> tuple[int, ...]:
    """Return the sizes of the parts of a size's layers; empty for one part."""
    if size.parts == 1:
        return ()
    for path, module in layers:
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            raise ConfigError(f"size {size.name}: {path}: parts: a {type(module).__name__} has its own")
    counts = {_outputs_of(layer.module) for layer in layers}
    if isinstance(size.parts, int):
        if size.parts < 1 or any(n % size.parts for n in counts):
            raise ConfigError(
                f"size {size.name}: parts: expected a number that divides {sorted(counts)} outputs, "
                f"got {size.parts}"
            )
        return (max(counts) // size.parts,) * size.parts
    parts = tuple(size.parts)
    least = min(parts, default=0)
    if least < 1 or counts != {sum(parts)} or any(part % least for part in parts):
        raise ConfigError(
            f"size {size.name}: parts: expected multiples of the smallest that add up to {sorted(counts)} "
            f"outputs, got {list(parts)}"
        )
    return parts


def _n_outputs(size: str, layers: Iterable[Named], parts: tuple[int, ...]) -> int:
    counts = {layer.path: _outputs_of(layer.module) for layer in layers}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"size {size}: expected layers with equally many outputs, got {counts}")
    return min(parts) if parts else next(iter(counts.values()))


def _outputs_of(module: nn.Module) -> int:
    for name in (
        "elastic_size",
        "num_heads",
        "hidden_size",
        "embedding_dim",
        "out_channels",
        "out_features",
        "nf",
    ):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise AssertionError("every layer whose outputs can be chosen has one of these")


# --- changing the model ---------------------------------------------------------------------


@contextlib.contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its class and everything that it held back if the block raises."""
    before = [(module, type(module), _held(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, held in before:
            module.__class__ = cls
            module.__dict__.clear()
            for name, value, content in held:
                if content is not None:
                    value.clear()
                    value.update(content)
                module.__dict__[name] = value
        raise


def _held(module: nn.Module) -> list[tuple[str, Any, dict[Any, Any] | None]]:
    """Return a module's attributes, and what is in its dictionaries of parameters, modules and hooks."""
    return [
        (name, value, dict(value) if isinstance(value, dict) else None)
        for name, value in module.__dict__.items()
    ]


def _insert(
    model: nn.Module,
    found: Sequence[Layer],
    blocks: Iterable[tuple[Sequence[tuple[Named, ...]], Stage]],
    layers: Mapping[str, Sequence[Named]],
    parts: Mapping[str, tuple[int, ...]],
) -> Inserted:
    cursor, settings = Cursor(Prepared(0, ())), _Settings()
    operators = []
    for layer in found:
        layer.module.__class__ = cast("type[nn.Module]", layer.cls)
        operator = cast("Operator", layer.module)
        operators.append(operator)
        operator.attach(cursor, settings.add(None), layer.path)
    sizes = {
        name: tuple(cast("ElasticOperator", layer.module) for layer in named)
        for name, named in layers.items()
    }
    of_size = {id(layer): parts[name] for name, chosen in sizes.items() for layer in chosen}
    for operator in operators:
        if isinstance(operator, ElasticOperator):
            operator.consist_of(of_size.get(id(operator), ()))
            settings.entries[operator.place] = operator.n_outputs
    _stop_fused_kernels(model)
    stages = tuple(_selected(stage, called, cursor, settings) for called, stage in blocks)
    cursor.settings = tuple(settings.entries)  # for a layer that is called outside a pass
    return Inserted(cursor, tuple(operators), stages, sizes, cursor.settings)


def _stop_fused_kernels(model: nn.Module) -> None:
    """Have torch's encoder call its layers: its fused kernels take the whole weights of all of them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # It would pass padded batches to its layers as nested tensors, which only the kernels take.
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the activation has no fused kernel: read for nothing else


def _selected(
    stage: Stage, blocks: Sequence[tuple[Named, ...]], cursor: Cursor, settings: _Settings
) -> LayerSelect:
    skip, heads = Skip(stage.skipped), []
    for called in blocks:
        place = settings.add(True)
        for path, module in called:
            if isinstance(module, Switched):
                raise ConfigError(f"stage {stage.blocks}: {path} is a block of a stage already")
            try:
                changed = switched(module, cursor, place, path, skip)
            except TypeError as error:
                raise ConfigError(f"stage {stage.blocks}: {path}: cannot be left out: {error}") from error
        heads.append(changed)
    return LayerSelect(tuple(heads))


@dataclass(slots=True)
class _Settings:
    entries: list[Any] = field(default_factory=list)

    def add(self, value: object) -> int:
        self.entries.append(value)
        return len(self.entries) - 1
