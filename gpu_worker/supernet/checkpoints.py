"""Load published checkpoints: safetensors, or .pt without arbitrary code.

Nothing is cut or left out silently: a tensor that is missing, unknown or of another shape is an error that
names it as the checkpoint does. Only a prefix that all names share and the model's do not have is removed,
such as the `module.` of DistributedDataParallel or the `_orig_mod.` of torch.compile.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from superserve.errors import ConfigError
from superserve.files import in_place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from torch import nn

UNREADABLE = (
    OSError, SafetensorError, RuntimeError, ValueError, EOFError,
    # Of torch, for text that begins like a pickle.
    AttributeError, IndexError, KeyError, TypeError, struct.error,
)  # fmt: skip
"""What reading a file raises that is no checkpoint, beside `pickle.UnpicklingError`."""

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
    own = model.state_dict()
    names = {published_name(name): name for name in own}
    tensors = _unprefixed(read_tensors(path), names.keys() | set(ignored))
    faults = [
        fault
        for published, name in names.items()
        if (fault := _fault(published, own[name], tensors.get(published))) is not None
    ]
    unknown = sorted(set(tensors) - names.keys() - set(ignored))
    faults += [f"tensor {name}: not one of this supernet's" for name in unknown]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(f"{path}: {'; '.join(faults[:_SHOWN])}{more}; its tensors are {_listed(tensors)}")
    model.load_state_dict({name: tensors[published] for published, name in names.items()})


_SHOWN = 5  # faults named in one error; a file of another model has hundreds


def _unprefixed(tensors: Mapping[str, torch.Tensor], known: Collection[str]) -> Mapping[str, torch.Tensor]:
    """Return tensors without the prefixes, up to a dot, that all names share and no known name has."""
    if not any(name in known for name in tensors):
        bare = tensors
        while len(beginnings := {name.partition(".")[0] for name in bare}) == 1 and all(
            "." in n for n in bare
        ):
            prefix = f"{beginnings.pop()}."
            bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
            if any(name in known for name in bare):
                return bare
    return tensors


def _listed(names: Collection[object]) -> str:
    """Return the first names of a file, and how many more there are."""
    shown = ", ".join(f"{name!s:.80}" for name in list(names)[:_SHOWN])
    return f"{shown}, and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "none"


def _fault(name: str, own: torch.Tensor, given: torch.Tensor | None) -> str | None:
    if given is None:
        return f"tensor {name}: missing"
    if given.shape != own.shape:
        return f"tensor {name}: expected shape {tuple(own.shape)}, got {tuple(given.shape)}"
    if given.is_floating_point() != own.is_floating_point():
        return f"tensor {name}: expected {own.dtype}, got {given.dtype}"
    if given.layout != torch.strided or given.is_meta:
        what = "one without data" if given.is_meta else f"{given.layout}"
        return f"tensor {name}: expected a dense tensor, got {what}"
    # Else every answer would be NaN, and nothing would say so.
    if given.is_floating_point() and bool(given.isnan().any()):
        return f"tensor {name}: expected numbers, got NaN in {int(given.isnan().sum())} of {given.numel()}"
    return None


def shape_of(path: Path, name: str) -> tuple[int, ...] | None:
    """Return the shape of a checkpoint's tensor called `name`, after any prefix; None if there is none.

    Raises:
        ConfigError: As `read_tensors` does.
    """
    shapes = shapes_in(path)
    return next((shape for key, shape in shapes.items() if key == name or key.endswith(f".{name}")), None)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name.

    Raises:
        ConfigError: As `read_tensors` does.
    """
    try:
        with path.open("rb") as file:
            is_safetensors = _is_safetensors(path, file.read(64))
        if is_safetensors:  # its sizes stand at its beginning
            with safe_open(path, framework="pt") as tensors:
                return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118  it is no dictionary
        return {key: tuple(tensor.shape) for key, tensor in read_tensors(path).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: expected a safetensors or .pt file of tensors: {_plain(error)}"
        ) from error


def read_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """Return a file's tensors by name, in host memory.

    Raises:
        ConfigError: If there is no such file, or it holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if other := in_place_of(start):
                raise ConfigError(f"{path}: expected a safetensors or .pt file of tensors, got {other}")
            if _is_safetensors(path, start):
                return load_file(path)
            # The open file: by a path, torch goes by its name.
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path}: expected a safetensors or .pt file of tensors: {_refused(path)}"
        ) from error
    except UNREADABLE as error:
        reason = _plain(error)
        raise ConfigError(f"{path}: expected a safetensors or .pt file of tensors: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get(_WRAPPED), dict):
        content = content[_WRAPPED]
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ConfigError(
            f"{path}: expected a dictionary of tensors, perhaps under {_WRAPPED!r}, got {_kind(content)}"
        )
    return {str(name): tensor for name, tensor in content.items()}


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Tell which of the two formats a file has by what it holds: names say something else now and then."""
    if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip file or a bare pickle
        return False
    return path.suffix == ".safetensors" or start[8:9] == b"{"


def _refused(path: Path) -> str:
    """Return which classes a file refers to that torch refuses to make: making one may run any code.

    Torch's own message is left out, because it advises to load the file anyway.
    """
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
        found = []  # not a file of torch, or one older than its zip format
    if not found:
        return "it is none that torch.save writes of tensors"
    return (
        f"it holds objects of {', '.join(sorted(found)[:_SHOWN])}, which are not loaded: "
        f"save the model's state_dict() alone"
    )


def _plain(error: Exception) -> str:
    """Return an error's first line, without the codes that colour a terminal."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
    if isinstance(error, SafetensorError) and "not fully covered" in line:
        return "it is cut off, or goes on behind its last tensor"
    return line


def _kind(content: Any) -> str:
    """Return what a file contains instead of tensors, in words."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dictionary with {_listed(content.keys())}"
