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

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from gpu_worker.supernet.attention import SlicedAttention
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
    LayerSelect,
    Operator,
    Prepared,
    SlicedLayerNorm,
    SubnetNorm1d,
    SubnetNorm2d,
    SubnetNorm3d,
    Switched,
    WeightSlice,
    WeightSliceConv1d,
    WeightSliceConv2d,
    WeightSliceConv3d,
    WeightSliceLinear,
    switched,
)
from gpu_worker.supernet.original import original_of
from gpu_worker.supernet.supernet import Supernet
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OPERATORS: Mapping[type[nn.Module], type[Operator]] = {
    nn.Conv1d: WeightSliceConv1d,
    nn.Conv2d: WeightSliceConv2d,
    nn.Conv3d: WeightSliceConv3d,
    nn.Linear: WeightSliceLinear,
    nn.MultiheadAttention: SlicedAttention,
    nn.LayerNorm: SlicedLayerNorm,
    nn.BatchNorm1d: SubnetNorm1d,
    nn.BatchNorm2d: SubnetNorm2d,
    nn.BatchNorm3d: SubnetNorm3d,
}
"""What each layer becomes. Subclasses stay as they are, because their forward may do anything."""

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
    """

    blocks: str | Sequence[str]
    rule: DepthRule = first_blocks
    least: int = 1


@dataclass(frozen=True, slots=True)
class Elastic:
    """A size that subnets choose: the outputs of some layers, or the heads of attention layers.

    Attributes:
        name: Of the size, unique; control tuples give sizes in the order they are declared.
        layers: Paths of the layers that have it, or patterns such as "stages.0.*.conv1". All have as
            many outputs, and a residual stream's layers share one size.
        fractions: What a search draws from, ascending; anything between its ends may be asked for.
        multiple_of: Kept outputs are rounded up to a multiple of this.
    """

    name: str
    layers: Sequence[str]
    fractions: tuple[float, ...] = _FRACTIONS
    multiple_of: int = 1


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
    sizes: Mapping[str, tuple[WeightSlice | SlicedAttention, ...]]
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
    full = {size.name: _n_outputs(size.name, layers[size.name]) for size in elastic}
    if controls is None:
        controls = default_controls(stages, [len(found) for found in blocks], elastic, full)
    original = original_of(model, stages, elastic)
    inserted = _insert(model, blocks, layers)
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


@dataclass(frozen=True, slots=True)
class _Named:
    path: str
    module: nn.Module


def _blocks(model: nn.Module, stage: Stage) -> list[_Named]:
    if not isinstance(stage.blocks, str):
        return [_named(model, path, "stage") for path in stage.blocks]
    container = _named(model, stage.blocks, "stage").module
    found = [_Named(f"{stage.blocks}.{name}", child) for name, child in container.named_children()]
    if not isinstance(container, nn.Sequential | nn.ModuleList) or not found:
        raise ConfigError(
            f"stage {stage.blocks}: expected a Sequential or ModuleList with blocks, "
            f"got {type(container).__name__}; or give the path of each block"
        )
    return found


def _layers(model: nn.Module, size: Elastic) -> list[_Named]:
    if isinstance(size.layers, str):
        raise ConfigError(f"size {size.name}: layers: expected a list of paths, got the text {size.layers!r}")
    found: list[_Named] = []
    for pattern in size.layers:
        matches = [_Named(p, m) for p, m in model.named_modules() if fnmatch.fnmatchcase(p, pattern)]
        if not matches:
            raise ConfigError(f"size {size.name}: layers: no module of the model is called {pattern!r}")
        found += matches
    return found


def _named(model: nn.Module, path: str, what: str) -> _Named:
    try:
        return _Named(path, model.get_submodule(path))
    except AttributeError as error:
        raise ConfigError(f"{what} {path}: expected the path of a module: {error}") from error


def _check_once(elastic: Sequence[Elastic], layers: Mapping[str, list[_Named]]) -> None:
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
    kind = OPERATORS.get(type(module))
    if kind is None or not issubclass(kind, WeightSlice | SlicedAttention):
        names = ", ".join(
            cls.__name__ for cls, op in OPERATORS.items() if issubclass(op, WeightSlice | SlicedAttention)
        )
        raise ConfigError(f"size {size}: {path}: expected one of {names}, got {type(module).__name__}")
    if getattr(module, "groups", 1) > 1:
        raise ConfigError(
            f"size {size}: {path}: a convolution with groups keeps those that its input fills: "
            "make the layer before it elastic"
        )


def _n_outputs(size: str, layers: Iterable[_Named]) -> int:
    counts = {layer.path: _outputs_of(layer.module) for layer in layers}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"size {size}: expected layers with equally many outputs, got {counts}")
    return next(iter(counts.values()))


def _outputs_of(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    return len(cast("nn.Linear", module).weight)


# --- changing the model ---------------------------------------------------------------------


def _insert(
    model: nn.Module, blocks: Sequence[Sequence[_Named]], layers: Mapping[str, Sequence[_Named]]
) -> Inserted:
    found = _convertible(model)
    cursor, settings = Cursor(Prepared(0, ())), _Settings()
    operators = []
    for layer in found:
        cls = OPERATORS[type(layer.module)]
        layer.module.__class__ = cast("type[nn.Module]", cls)
        operator = cast("Operator", layer.module)
        whole = operator.n_outputs if isinstance(operator, WeightSlice | SlicedAttention) else None
        operator.attach(cursor, settings.add(whole), layer.path)
        operators.append(operator)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            # It would pass padded batches to its layers as nested tensors, which only its fused kernels take.
            module.use_nested_tensor = False
    stages = tuple(
        LayerSelect(tuple(switched(block.module, cursor, settings.add(True)) for block in stage))
        for stage in blocks
    )
    sizes = {
        name: tuple(cast("WeightSlice | SlicedAttention", layer.module) for layer in named)
        for name, named in layers.items()
    }
    cursor.settings = tuple(settings.entries)  # for a layer that is called outside a pass
    return Inserted(cursor, tuple(operators), stages, sizes, cursor.settings)


@dataclass(slots=True)
class _Settings:
    entries: list[Any] = field(default_factory=list)

    def add(self, value: object) -> int:
        self.entries.append(value)
        return len(self.entries) - 1


def _convertible(model: nn.Module) -> list[_Named]:
    """Return the layers that become operators, each once; the model is as it was."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Operator | Switched):
            raise ConfigError(f"{path}: the model is a supernet already")
        if type(module) not in OPERATORS:
            continue
        if isinstance(module, nn.MultiheadAttention):
            SlicedAttention.check(module, path)
        found.append(_Named(path, module))
    return found
