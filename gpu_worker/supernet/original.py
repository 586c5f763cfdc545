"""What insertion remembers of a model: how it was, and what was declared of it.

`gpu_worker.proof` compares a supernet with it. It is taken before insertion changes anything, and it is
small: a copy of the modules whose parameters and buffers are on the meta device, without data.
"""

from __future__ import annotations

import copy
import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpu_worker.supernet.insertion import Elastic, Stage


@dataclass(frozen=True, slots=True)
class DeclaredStage:
    """Blocks that may be left out.

    Attributes:
        blocks: Their paths, in order.
        skipped: What a block that is left out gives: "input", "zero", or a function of its arguments.
    """

    blocks: tuple[str, ...]
    skipped: str | Callable[..., Any] = "input"


@dataclass(frozen=True, slots=True)
class DeclaredSize:
    """A size that subnets choose.

    Attributes:
        layers: Paths of the layers that have it.
        parts: Sizes of the parts that the outputs consist of, each of which keeps its first ones; or how many
            equal ones there are. A size counts the outputs of the smallest.
    """

    layers: tuple[str, ...]
    parts: int | tuple[int, ...] = 1


@dataclass(frozen=True, slots=True)
class Original:
    """A model as it was before insertion.

    Attributes:
        model: A copy without data; None if it cannot be copied.
        why_not: The reason then; else "".
        stages: What was declared, in the order of a subnet's depths.
        sizes: What was declared, by name.
    """

    model: nn.Module | None
    why_not: str
    stages: tuple[DeclaredStage, ...]
    sizes: Mapping[str, DeclaredSize]

    def __deepcopy__(self, memo: dict[int, Any]) -> Original:
        """Return itself: nothing changes it."""
        return self


def original_of(model: nn.Module, stages: Sequence[Stage], elastic: Sequence[Elastic]) -> Original:
    """Copy a model that insertion is about to change; or note why no copy could stand for it.

    Args:
        model: As it is before insertion.
        stages: As insertion was given them, and has checked.
        elastic: The same.
    """
    declared = tuple(
        DeclaredStage(_blocks(model, stage), getattr(stage, "skipped", "input")) for stage in stages
    )
    sizes = {size.name: DeclaredSize(_layers(model, size), _parts(size)) for size in elastic}
    blocks = {path for stage in declared for path in stage.blocks}
    layers = {path for size in sizes.values() for path in size.layers}
    why_not = _goes_around(model, blocks, layers)
    found = None
    if not why_not:
        found, why_not = _without_data(model)
    return Original(found, why_not, declared, sizes)


def _blocks(model: nn.Module, stage: Stage) -> tuple[str, ...]:
    if not isinstance(stage.blocks, str):
        return tuple(stage.blocks)
    prefix = f"{stage.blocks}." if stage.blocks else ""
    return tuple(f"{prefix}{name}" for name, _ in model.get_submodule(stage.blocks).named_children())


def _layers(model: nn.Module, size: Elastic) -> tuple[str, ...]:
    paths = [path for path, _ in model.named_modules()]
    return tuple(path for pattern in size.layers for path in paths if fnmatch.fnmatchcase(path, pattern))


def _parts(size: Elastic) -> int | tuple[int, ...]:
    parts: int | Sequence[int] = getattr(size, "parts", 1)
    return parts if isinstance(parts, int) else tuple(parts)


def _goes_around(model: nn.Module, blocks: set[str], layers: set[str]) -> str:
    """Return what in a model would run past the classes that insertion changes, judged by type; else ""."""
    changed = {*blocks, *layers}
    for path, module in model.named_modules():
        where = path or type(module).__name__
        if is_compiled(module):
            return (
                f"{where}: compiled code was made of the module before and may run instead of it: insert "
                "into the plain module (`_orig_mod` of a compiled one)"
            )
        if path in changed and isinstance(module, torch.jit.ScriptModule):
            return f"{where}: expected a plain module, got a scripted one"
        is_traced = isinstance(module, torch.fx.GraphModule)
        if is_traced and any(block == path or not path or block.startswith(f"{path}.") for block in blocks):
            return (
                f"{where}: a module traced by torch.fx calls the layers of its blocks and not the blocks, "
                "so that none can be left out: insert into the plain module"
            )
        if "forward" in vars(module):
            return (
                f"{where}: its forward was replaced on the instance and may run instead of the changed "
                "class's: insert first (accelerate: remove_hook_from_module; torch.compile: insert into "
                "the plain module)"
            )
    return ""


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` has wrapped a module, or replaced its forward or its call."""
    # By name: importing torch._dynamo takes a second, and who compiled something has imported it.
    return (
        any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _without_data(model: nn.Module) -> tuple[nn.Module | None, str]:
    """Return a copy on the meta device, or why there can be none."""
    try:
        memo: dict[int, Any] = {
            id(tensor): _empty(tensor) for tensor in (*model.parameters(), *model.buffers())
        }
        return copy.deepcopy(model, memo), ""
    except Exception as error:  # noqa: BLE001  a user's module may refuse to be copied in any way
        return None, f"the model cannot be copied: {type(error).__name__}: {error}"


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
