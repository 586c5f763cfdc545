"""Which layers become which operators, and which modules cannot be followed.

A subclass of torch's layer that has no forward of its own becomes what the layer becomes, and so do layers
with parametrized weights. Others are recognised by what they hold, and norms are tried out. What may answer
wrong without an error is refused; what is left as it is fails by its shapes as soon as it is given a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from gpu_worker.supernet.attention import SlicedAttention
from gpu_worker.supernet.operators import (
    ElasticOperator,
    Operator,
    Switched,
    chosen,
    norms,
    recurrent,
    slices,
)
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

OPERATORS: Mapping[type[nn.Module], type[Operator]] = {
    nn.Conv1d: slices.WeightSliceConv1d,
    nn.Conv2d: slices.WeightSliceConv2d,
    nn.Conv3d: slices.WeightSliceConv3d,
    nn.ConvTranspose1d: slices.WeightSliceConvTranspose1d,
    nn.ConvTranspose2d: slices.WeightSliceConvTranspose2d,
    nn.ConvTranspose3d: slices.WeightSliceConvTranspose3d,
    nn.Linear: slices.WeightSliceLinear,
    nn.Embedding: slices.WeightSliceEmbedding,
    nn.MultiheadAttention: SlicedAttention,
    nn.RNN: recurrent.SlicedRNN,
    nn.LSTM: recurrent.SlicedLSTM,
    nn.GRU: recurrent.SlicedGRU,
    nn.LayerNorm: norms.SlicedLayerNorm,
    nn.RMSNorm: norms.SlicedRMSNorm,
    nn.GroupNorm: norms.SlicedGroupNorm,
    nn.InstanceNorm1d: norms.SlicedInstanceNorm1d,
    nn.InstanceNorm2d: norms.SlicedInstanceNorm2d,
    nn.InstanceNorm3d: norms.SlicedInstanceNorm3d,
    nn.PReLU: norms.SlicedPReLU,
    nn.BatchNorm1d: norms.SubnetNorm1d,
    nn.BatchNorm2d: norms.SubnetNorm2d,
    nn.BatchNorm3d: norms.SubnetNorm3d,
    nn.SyncBatchNorm: norms.SubnetNormSync,
}
"""What each layer becomes; an embedding only if it is elastic."""

_KNOWN: Mapping[type[nn.Module], type[Operator]] = {**chosen.CHOSEN, **OPERATORS}
"""These, and before them the package's own layers."""

_OWN_METHODS = ("forward", "_conv_forward", "forward_impl", "_output_padding", "_apply_instance_norm")
"""What a subclass must not redefine, so that its layer's operator computes what it does."""


class Named(NamedTuple):
    """A module and its path in the model."""

    path: str
    module: nn.Module


class Layer(NamedTuple):
    """A layer and the class that it will have."""

    path: str
    module: nn.Module
    cls: type[Operator]


def layers_in(model: nn.Module, elastic: Collection[nn.Module]) -> list[Layer]:
    """Return the layers of a model that become operators, each once; the model is as it was.

    Args:
        model: Any module.
        elastic: Layers that subnets choose the outputs of.

    Raises:
        ConfigError: Naming the first module that cannot be followed, and why.
    """
    found: list[Layer] = []
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Operator | Switched):
            raise ConfigError(f"{path}: the model is a supernet already")
        _refuse(module, path)
        if isinstance(module, nn.MultiheadAttention):
            inside.update(id(child) for child in module.modules() if child is not module)
        cls = None if id(module) in inside else operator_of(module, path)
        if cls is None or (issubclass(cls, slices.WeightSliceEmbedding) and module not in elastic):
            continue
        if "forward" in module.__dict__:
            raise ConfigError(
                f"{path}: its forward was replaced on the instance, by hooks of accelerate or by hand, "
                "and would go around the operator: remove that before insertion"
            )
        found.append(Layer(path, module, cls))
    return found


def operator_of(module: nn.Module, path: str) -> type[Operator] | None:
    """Return the class that a layer will have; None if it stays as it is.

    Raises:
        ConfigError: The layer has what its operator cannot do.
    """
    operator = _recognised(module)
    if operator is None:
        return None
    if isinstance(module, nn.MultiheadAttention):
        SlicedAttention.check(module, path)
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise ConfigError(
            f"{path}: an InstanceNorm with track_running_stats uses statistics of the whole network in every "
            "subnet: expected one without"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None
    if isinstance(module, nn.RNNBase) and module.proj_size:
        return None
    return operator if issubclass(operator, type(module)) else _mixed(operator, type(module))


def _recognised(module: nn.Module) -> type[Operator] | None:
    cls = type(module)
    if cls in _KNOWN:
        return _KNOWN[cls]
    for base, operator in _KNOWN.items():
        if isinstance(module, base) and all(
            getattr(cls, name, None) is getattr(base, name, None) for name in _OWN_METHODS
        ):
            return operator
    if isinstance(module, _BatchNorm):
        return norms.SubnetNormOwn
    if is_transposed_linear(module):
        return slices.WeightSliceTransposedLinear
    return norms.SlicedOwnNorm if is_norm(module) else None


_mixtures: dict[tuple[type, type], type[Operator]] = {}


def _mixed(operator: type[Operator], cls: type[nn.Module]) -> type[Operator]:
    """Return the class of a layer whose own class is `cls`, with the operator before it."""
    if (operator, cls) not in _mixtures:
        _mixtures[operator, cls] = type(f"Elastic{cls.__name__}", (operator, cls), {})
    return _mixtures[operator, cls]


def is_elastic_kind(cls: type[Operator] | None) -> bool:
    """Return whether subnets can choose the outputs of such a layer."""
    return cls is not None and issubclass(cls, ElasticOperator)


def passes_channels(cls: type[Operator] | None) -> bool:
    """Return whether subnets choose something else of such a layer than its outputs."""
    return cls is not None and issubclass(cls, ElasticOperator) and cls.passes_channels


def elastic_names() -> str:
    """Return the names of the layers that can be elastic."""
    return ", ".join(
        cls.__name__
        for cls, operator in (*OPERATORS.items(), *chosen.CHOSEN.items())
        if issubclass(operator, ElasticOperator)
    )


# --- by what they hold ----------------------------------------------------------------------


def _vectors(module: nn.Module) -> dict[str, nn.Parameter] | None:
    """Return the parameters of a module that holds nothing else; None if it does."""
    held = {name: value for name, value in module._parameters.items() if value is not None}
    return None if module._modules or module._buffers or not held else held


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's Conv1D: a linear layer with its weight as (in, out)."""
    held = _vectors(module)
    if type(module).__name__ != "Conv1D" or held is None or set(held) != {"weight", "bias"}:
        return False
    weight, bias = held["weight"], held["bias"]
    return weight.dim() == 2 and bias.shape == weight.shape[1:] and getattr(module, "nf", None) == len(bias)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module of any class is an RMSNorm or a LayerNorm over the last axis, at every width.

    Its class is called a norm and it holds a vector or two. It is tried on random numbers and scales, at its
    own width and at half: so one that divides by its whole width is not taken for a norm of the part.
    """
    held = _vectors(module)
    if "norm" not in type(module).__name__.lower() or held is None or len(held) > 2:
        return False
    sizes = {tuple(value.shape) for value in held.values()}
    if len(sizes) > 1 or len(shape := sizes.pop()) != 1 or shape[0] < 2:
        return False
    if any(value.is_meta for value in held.values()):
        return True  # it has no numbers to try: shapes are all that counts there
    widths = (shape[0], max(1, shape[0] // 2))
    try:
        return any(all(_agrees(module, held, n, kind) for n in widths) for kind in _FORMULAS)
    except (RuntimeError, TypeError, ValueError):
        return False  # it takes something else, or no other width


def _agrees(module: nn.Module, held: Mapping[str, nn.Parameter], n: int, kind: str) -> bool:
    generator = torch.Generator().manual_seed(n)
    first = next(iter(held.values()))
    values = {name: torch.randn(n, generator=generator).to(first.device, first.dtype) for name in held}
    # Numbers of a size at which the epsilon is nothing, with a mean that a LayerNorm takes away.
    x = (torch.randn(3, n, generator=generator) * 4 + 2).to(first.device, first.dtype)
    with torch.no_grad(), norms.in_place_of(module, cast("dict[str, Any]", values)):
        out = module(x)
    if not isinstance(out, torch.Tensor) or out.shape != x.shape:
        return False
    expected = _formula(kind, x.double(), [value.double() for value in values.values()])
    return bool(torch.allclose(out.double(), expected, rtol=0.02, atol=0.02))


_FORMULAS = ("rms", "rms of 1 + scale", "layer")


def _formula(kind: str, x: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
    scale, *shift = vectors
    if kind == "layer":
        normed = F.layer_norm(x, x.shape[-1:])
    else:
        normed = x * x.square().mean(-1, keepdim=True).rsqrt()
    out = normed * (1 + scale if kind.endswith("scale") else scale)
    return out + shift[0] if shift else out


# --- what is refused ------------------------------------------------------------------------


def _refuse(module: nn.Module, path: str) -> None:
    """Raise ConfigError if a module would keep running the whole without an error."""
    where = path or "the model"
    if isinstance(module, torch.jit.ScriptModule):
        if next(_tensors_of(module), None) is None:
            return
        raise ConfigError(
            f"{where}: is scripted or traced by torch.jit, and its layers cannot be changed: "
            "expected the module that it was made of"
        )
    functions = (module, module.__dict__.get("forward"), type(module).forward)
    if getattr(module, "_compiled_call_impl", None) is not None or any(map(_is_compiled, functions)):
        raise ConfigError(
            f"{where}: is compiled by torch.compile, and what is compiled keeps the sizes of one subnet: "
            "expected the module that was compiled"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ConfigError(f"{where}: is lazy and has no sizes yet: run the model once before insertion")


def _is_compiled(function: object) -> bool:
    return "_torchdynamo_orig_callable" in getattr(function, "__dict__", {})


def _tensors_of(module: nn.Module) -> Any:
    yield from module.parameters()
    yield from module.buffers()
