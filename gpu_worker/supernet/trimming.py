"""Drop from a supernet what no hosted subnet uses, as far as a trace proves it.

Every hosted subnet runs, the first and the last on several inputs. If the model looks at a number in one of
these passes, what runs may depend on the input: then all run on several. A layer is cut only if

- it runs in each of these passes whose subnet has its blocks on, and in no other, always at one width;
- its parameters are its own: no other module has them, nothing computes them, and nothing but the layer
  itself reads them while the model runs.

Any other layer stays whole: an expert that the routing of these inputs did not reach, a tied embedding, a
spectral norm's weight, a projection that its parent multiplies by hand. In the end all subnets run again,
and if one answers otherwise than before, everything is put back.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_worker.supernet.operators import Operator, SubnetNorm, Switched, WeightSlice, operators_in
from gpu_worker.supernet.operators.slices import WeightSliceEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import nn

    from gpu_worker.supernet.operators.base import Settings
    from gpu_worker.supernet.supernet import Supernet

_LOG = logging.getLogger(__name__)

Cuttable = WeightSlice | SubnetNorm
Key = tuple[int, int]
"""Outputs and inputs of a slice; a norm's outputs are its inputs."""

_SHOWN = 5  # layers named in one log line
_TOLERANCE = 1e-3  # relative: another slice may take another kernel, which adds up in another order

# What tells nothing of a tensor's numbers or sizes: models ask a layer for it, to convert something else.
_HARMLESS = frozenset(
    {"device", "dtype", "grad", "is_cuda", "is_floating_point", "is_meta", "is_quantized", "layout"}
    | {"is_complex", "is_nested", "is_sparse", "requires_grad"}
    # The supernet itself looks whether a parameter has moved or was written.
    | {"_version", "data_ptr", "is_inference"}
)

_LOOKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of torch's operations such as `item`, on which a branch depends, and `nonzero`."""

_TAKEN_OUT = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})
"""What takes numbers out of a tensor without an operation."""


class Trimmed(NamedTuple):
    """What a trim did.

    Attributes:
        n_cut: Layers that are smaller now.
        whole: By path, why a layer that could have been cut was not.
    """

    n_cut: int
    whole: Mapping[str, str]


def trim(supernet: Supernet, examples: Sequence[torch.Tensor]) -> Trimmed:
    """Cut every layer to what the hosted subnets use of it, as far as `examples` prove it.

    Args:
        supernet: Changed in place.
        examples: Inputs of the model, unlike each other: what depends on an input shall show.
    """
    layers = [op for op in operators_in(supernet.model) if isinstance(op, Cuttable)]
    rows = [supernet.prepared(row).settings for row in range(len(supernet.subnets))]
    around = _surroundings(supernet.model)
    if not any(_may_shrink(layer, around[layer], rows) for layer in layers):
        return Trimmed(0, {})
    try:
        trace = _trace(supernet, layers, rows, examples)
    except Exception as error:  # noqa: BLE001  the model's, of any kind
        _LOG.warning("not trimmed: the model cannot be traced: %s: %s", type(error).__name__, error)
        return Trimmed(0, {})
    reasons = _left_whole(supernet.model, layers, around, trace)
    keys = {layer: trace.keys(layer) for layer in layers if layer not in reasons}
    smaller = {layer: used for layer, used in keys.items() if _shrinks(layer, used)}
    n_cut = _cut(smaller, lambda: trace.is_repeated(supernet, examples))
    whole = {
        layer.path: why
        for layer, why in reasons.items()
        if _may_shrink(layer, around[layer], rows) or _shrinks(layer, trace.keys(layer))
    }
    if whole:
        named = "; ".join(f"{path}: {why}" for path, why in list(whole.items())[:_SHOWN])
        more = f"; and {len(whole) - _SHOWN} more" if len(whole) > _SHOWN else ""
        _LOG.info("trim leaves these layers whole: %s%s", named, more)
    return Trimmed(n_cut, whole)


def _module(layer: Cuttable) -> nn.Module:
    """Return a layer as the torch module beside which its operator is mixed in."""
    return cast("nn.Module", layer)


# --- what could be gained ---------------------------------------------------------------------


def _surroundings(model: nn.Module) -> dict[Operator, list[tuple[int, ...]]]:
    """Return the switches around each operator: one row for each place that it has in the model."""
    found: dict[Operator, list[tuple[int, ...]]] = defaultdict(list)

    def walk(module: nn.Module, switches: tuple[int, ...]) -> None:
        if isinstance(module, Switched):
            switches = (*switches, module.switch_place)
        if isinstance(module, Operator):
            found[module].append(switches)
        for child in module.children():
            walk(child, switches)

    walk(model, ())
    return found


def _is_on(around: Sequence[tuple[int, ...]], settings: Settings) -> bool:
    return any(all(settings[switch] for switch in switches) for switches in around)


def _may_shrink(layer: Cuttable, around: Sequence[tuple[int, ...]], rows: Sequence[Settings]) -> bool:
    """Return whether no subnet runs a layer, or none keeps all its outputs, as the settings alone tell."""
    on = [settings for settings in rows if _is_on(around, settings)]
    if not on or not isinstance(layer, WeightSlice):
        return not on
    most: int = max(settings[layer.place] for settings in on)
    return most < layer.n_outputs


def _shrinks(layer: Cuttable, used: Collection[Key]) -> bool:
    outputs, inputs = _largest(used)
    if isinstance(layer, WeightSliceEmbedding):
        return bool(used) and outputs < layer.n_outputs  # its inputs are a length of text
    if isinstance(layer, SubnetNorm):
        return inputs < layer.num_features and not (layer.is_joined and used)
    if outputs < layer.n_outputs:
        return True
    # A convolution's weight has the inputs of one group, a transposed one's all.
    n_inputs = layer.n_inputs * (getattr(layer, "groups", 1) if layer.in_axis == 1 else 1)
    return inputs < n_inputs and not (layer.is_joined and used)


def _largest(used: Collection[Key]) -> Key:
    return max((key[0] for key in used), default=0), max((key[1] for key in used), default=0)


# --- the trace --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Pass:
    """One run of one subnet.

    Attributes:
        row: The subnet's.
        settings: The subnet's.
        widths: Of the inputs of each layer that ran.
        output: What the model returned.
    """

    row: int
    settings: Settings
    widths: dict[Operator, set[int]]
    output: Any


@dataclass(slots=True)
class _Trace:
    """What the passes showed.

    Attributes:
        passes: All of them; first each subnet's on the first example.
        read: Layers whose parameters something else has read.
        looks: Whether the model looked at a number.
    """

    passes: list[_Pass] = field(default_factory=list)
    read: set[Operator] = field(default_factory=set)
    looks: bool = False

    def keys(self, layer: Cuttable) -> set[Key]:
        """Return the slices of a layer that ran."""
        return {
            (one.settings[layer.place] if isinstance(layer, WeightSlice) else width, width)
            for one in self.passes
            for width in one.widths.get(layer, ())
        }

    def is_repeated(self, supernet: Supernet, examples: Sequence[torch.Tensor]) -> bool:
        """Return whether every subnet answers the first example as it did."""
        return all(
            _are_alike(_run(supernet, one.settings, examples[0]), one.output)
            for one in self.passes[: len(supernet.subnets)]
        )


def _trace(
    supernet: Supernet, layers: Sequence[Cuttable], rows: Sequence[Settings], examples: Sequence[torch.Tensor]
) -> _Trace:
    for settings in rows:  # a subnet's first pass follows its channels, and may run other things for that
        _run(supernet, settings, examples[0])
    trace = _Trace()
    for op in operators_in(supernet.model):
        op.forget()  # a cached slice would hide that the parameter is read
    running: set[Operator] = set()
    seen: dict[Operator, set[int]] = {}

    def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, Operator), "hooks are on operators alone"
        running.add(layer)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        seen.setdefault(layer, set()).add(given.shape[layer.channel_axis])

    def end(layer: nn.Module, _args: object, _output: object) -> None:
        assert isinstance(layer, Operator), "hooks are on operators alone"
        running.discard(layer)

    owners = {
        id(parameter): layer
        for layer in layers
        for parameter in _module(layer)._parameters.values()
        if parameter is not None
    }
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_module(layer).register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(_module(layer).register_forward_hook(end, always_call=True).remove)

        def run(row: int, example: torch.Tensor) -> None:
            nonlocal seen
            seen = {}
            with _Reads(owners, running, trace), _Looks(trace):
                output = _run(supernet, rows[row], example)
            trace.passes.append(_Pass(row, rows[row], seen, output))

        for row in range(len(rows)):
            run(row, examples[0])
        ends = {0, len(rows) - 1}
        for row, example in itertools.product(sorted(ends), examples[1:]):
            run(row, example)
        if trace.looks:
            for row, example in itertools.product(range(len(rows)), examples[1:]):
                if row not in ends:
                    run(row, example)
    return trace


class _Reads(TorchFunctionMode):
    """Notes the layers whose parameters are read while the layer itself does not run."""

    def __init__(self, owners: Mapping[int, Operator], running: set[Operator], trace: _Trace) -> None:
        super().__init__()
        self._owners, self._running, self._trace = owners, running, trace

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_harmless(func):
            for value in tree_leaves((args, kwargs)):
                layer = self._owners.get(id(value))
                if layer is not None and layer not in self._running:
                    self._trace.read.add(layer)
        if getattr(func, "__name__", "") in _TAKEN_OUT:
            self._trace.looks = True
        return func(*args, **kwargs)


class _Looks(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes whether the model looks at a number, or makes a shape of numbers."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _LOOKING.isdisjoint(func.tags):
            self._trace.looks = True
        with self:  # what `bool` does is an operation without a tag, made of one with it
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def _is_harmless(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return name in _HARMLESS


def _run(supernet: Supernet, settings: Settings, example: torch.Tensor) -> Any:
    """Run a subnet; a model that draws random numbers draws the same ones each time."""
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return supernet.run_with(settings, example)


def _are_alike(found: Any, expected: Any) -> bool:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    return len(tree_leaves(found)) == len(tree_leaves(expected)) and all(_is_near(*pair) for pair in pairs)


def _is_near(found: Any, expected: Any) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return type(found) is type(expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not found.is_floating_point():
        return True  # a class number flips where two logits are nearly equal
    scale = float(expected.abs().nan_to_num().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)


# --- what stays whole -------------------------------------------------------------------------


def _left_whole(
    model: nn.Module,
    layers: Sequence[Cuttable],
    around: Mapping[Operator, Sequence[tuple[int, ...]]],
    trace: _Trace,
) -> dict[Cuttable, str]:
    """Return the layers of which the trace does not prove what is unused, each with the reason."""
    storages = Counter(
        tensor.untyped_storage().data_ptr()
        for tensors in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        for _, tensor in tensors
    )
    # One layer in two places is listed twice there, and its parameters are still its own.
    places = {layer: len(around[layer]) for layer in layers}
    found = {}
    for layer in layers:
        why = _not_its_own(layer, storages, places[layer]) or (
            "its parameters are read from outside it"
            if layer in trace.read
            else _not_followed(layer, around, trace)
        )
        if why is not None:
            found[layer] = why
    return found


def _not_its_own(layer: Cuttable, storages: Mapping[int, int], n_places: int) -> str | None:
    module = _module(layer)
    if "weight" not in module._parameters or "forward" in vars(layer):
        return "its weight is computed, or its forward replaced"
    if module._forward_pre_hooks or module._forward_hooks:
        return "it has hooks"
    for parameter in module._parameters.values():
        if parameter is None or not parameter.numel():
            continue
        storage = parameter.untyped_storage()
        if storages[storage.data_ptr()] > n_places:
            return "other modules have its parameters too"
        if storage.nbytes() > parameter.numel() * parameter.element_size():
            return "its parameters are part of a larger tensor"
    return None


def _not_followed(
    layer: Cuttable, around: Mapping[Operator, Sequence[tuple[int, ...]]], trace: _Trace
) -> str | None:
    widths: dict[int, set[int]] = defaultdict(set)  # by subnet
    for one in trace.passes:
        ran = one.widths.get(layer)
        if (ran is not None) != _is_on(around[layer], one.settings):
            return "it does not run on every input" if ran is None else "it runs outside its blocks"
        widths[one.row] |= ran or set()
    return "its width depends on the input" if any(len(seen) > 1 for seen in widths.values()) else None


# --- cutting ----------------------------------------------------------------------------------


def _cut(used: Mapping[Cuttable, set[Key]], is_repeated: Callable[[], bool]) -> int:
    """Cut the layers and return how many; put them back, and return 0, if an answer changes."""
    before = [(layer, _copied(layer)) for layer in used]
    for layer, keys in used.items():
        if isinstance(layer, WeightSlice):
            layer.trim(keys)
        else:
            layer.trim(_largest(keys)[1])
    try:
        is_right, why = is_repeated(), "an answer changed"
    except Exception as error:  # noqa: BLE001  the model's, of any kind
        is_right, why = False, f"{type(error).__name__}: {error}"
    if is_right:
        return len(used)
    _LOG.warning("not trimmed: the model depends on sizes that were cut: %s", why)
    for layer, attributes in before:
        vars(layer).clear()
        vars(layer).update(attributes)
        layer.renew()
    return 0


def _copied(layer: Cuttable) -> dict[str, Any]:
    """Return a layer's attributes: the same tensors, in dictionaries of their own."""
    return {
        name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()
    }
