"""A training on disk: all that its further steps depend on, in one file that is written whole or not at all.

The file is what `torch.save` makes of a dictionary of tensors, numbers and text, and is read without running
code from it.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.supernet.checkpoints import UNREADABLE
from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_worker.training.sandwich import Sandwich

_SCHEMA = 1


@dataclass(slots=True)
class Position:
    """Where a training is.

    Attributes:
        step: Steps done.
        epoch: Times that the data were gone through.
        batch: Batches of this epoch done.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0


def keep(path: Path, sandwich: Sandwich, position: Position) -> None:
    """Write a training's state.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    content = {
        "superserve_training": _SCHEMA,
        "recipe": sandwich.recipe.as_dict(),
        "began": sandwich.began,
        "position": {"step": position.step, "epoch": position.epoch, "batch": position.batch},
        "state": sandwich.state(),
    }
    file = io.BytesIO()
    torch.save(content, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.getvalue())


def go_on(path: Path, sandwich: Sandwich) -> Position:
    """Restore a training's state, and return where it is.

    Raises:
        ConfigError: Naming the file, and the field of the recipe, or what else is not what it began with.
    """
    content = _read(path, sandwich.supernet.device)
    recipe, own = content["recipe"], sandwich.recipe.as_dict()
    for name in own.keys() | recipe.keys():
        if own.get(name) != recipe.get(name):
            raise ConfigError(
                f"{path}: {name}: the training that it holds began with {recipe.get(name)!r}, expected that, "
                f"got {own.get(name)!r}"
            )
    if content["began"] != sandwich.began:
        raise ConfigError(
            f"{path}: the training that it holds began with other weights, or is of another supernet: "
            "expected the same supernet and the same weights as at its start"
        )
    try:
        sandwich.restore(content["state"])
        return Position(**content["position"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: expected a training's checkpoint: {_line(error)}") from error


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    what = f"{path}: expected a training's checkpoint"
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no checkpoint of a training to go on with") from error
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise ConfigError(f"{what}: {_line(error)}") from error
    if not isinstance(content, dict) or content.get("superserve_training") != _SCHEMA:
        raise ConfigError(f"{what} of schema {_SCHEMA}")
    missing = {"recipe", "began", "position", "state"} - content.keys()
    if missing:
        raise ConfigError(f"{what}: {min(missing)}: missing")
    return content


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
