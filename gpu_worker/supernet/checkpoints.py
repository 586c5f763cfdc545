"""Load published checkpoints: safetensors, or .pt without arbitrary code.

Nothing is renamed, cut or left out silently: a tensor that is missing, unknown or of another
shape is an error that names it as the checkpoint does.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from torch import nn

_WRAPPED = "state_dict"  # the key under which published files often keep the tensors


def load_checkpoint(
    model: nn.Module, path: Path, *, published_name: Callable[[str], str] = str, ignored: Collection[str] = ()
) -> None:
    """Fill every parameter and buffer of `model` from a checkpoint.

    Args:
        model: What is filled, in place; its dtypes stay.
        path: A .safetensors file, or what `torch.save` made of a dictionary of tensors, perhaps under
            the key "state_dict".
        published_name: From a name in the model's state dict to the checkpoint's.
        ignored: Names that a checkpoint may have beside those of the model.

    Raises:
        ConfigError: Naming the file, and each tensor that is missing, unknown or misshapen; the model
            is as it was then.
    """
    tensors = read_tensors(path)
    names = {published_name(name): name for name in model.state_dict()}
    own = model.state_dict()
    faults = [
        fault
        for published, name in names.items()
        if (fault := _fault(published, own[name], tensors.get(published))) is not None
    ]
    unknown = sorted(set(tensors) - names.keys() - set(ignored))
    faults += [f"tensor {name}: not one of this supernet's" for name in unknown]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(f"{path}: {'; '.join(faults[:_SHOWN])}{more}")
    model.load_state_dict({name: tensors[published] for published, name in names.items()})


_SHOWN = 5  # faults told in one error; a file of another model has hundreds


def _fault(name: str, own: torch.Tensor, given: torch.Tensor | None) -> str | None:
    if given is None:
        return f"tensor {name}: missing"
    if given.shape != own.shape:
        return f"tensor {name}: expected shape {tuple(own.shape)}, got {tuple(given.shape)}"
    if given.is_floating_point() != own.is_floating_point():
        return f"tensor {name}: expected {own.dtype}, got {given.dtype}"
    return None


def read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Return a file's tensors by name, in host memory.

    Raises:
        ConfigError: If there is no such file, or it holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: expected a safetensors or .pt file of tensors: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get(_WRAPPED), dict):
        content = content[_WRAPPED]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ConfigError(f"{path}: expected a dictionary of tensors, perhaps under {_WRAPPED!r}")
    return {str(name): tensor for name, tensor in content.items()}
