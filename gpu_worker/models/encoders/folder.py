"""Read a published BERT's folder: its sizes, its tensors' file, and how tokens become one vector.

config.json            Hugging Face's: model_type "bert" and the sizes
model.safetensors      or pytorch_model.bin
modules.json           sentence-transformers': the modules of an encoder in order, each with its folder
1_Pooling/config.json  how it pools
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from gpu_worker.models.encoders.bert import ACTIVATIONS, BertSizes
from superserve.errors import ConfigError
from superserve.fields import shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "config.json"
_TENSORS = ("model.safetensors", "pytorch_model.bin")
_MODULES = "modules.json"
_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}  # older files have a key for each
_OLD = "pooling_mode_"


@dataclass(frozen=True, slots=True)
class Pooling:
    """How an encoder's tokens become one vector.

    Attributes:
        mode: "mean" of all tokens but padding, or "cls", the first.
        normalises: Whether the vector has length 1.
    """

    mode: str = "mean"
    normalises: bool = False


def transformer_folder(folder: Path) -> Path:
    """Return where the transformer of a model lies: the folder itself, or the one that modules.json names."""
    for module in _modules(folder):
        if _kind_of(module) == "Transformer":
            return folder / str(module.get("path", ""))
    return folder


def sizes_of(folder: Path) -> BertSizes:
    """Return the sizes that a folder's config.json states.

    Raises:
        ConfigError: Naming the file and the field that is missing, or not as a BERT has it.
    """
    path = folder / CONFIG
    config = config_of(folder)
    kind = config.get("model_type")
    if kind != "bert":
        raise ConfigError(f"{path}: model_type: expected 'bert', got {shown(kind)}")
    for field, only in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if config.get(field, only) != only:
            raise ConfigError(f"{path}: {field}: expected {only!r}, got {shown(config[field])}")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{path}: hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {shown(activation)}"
        )
    width, n_heads = _count(config, "hidden_size", path), _count(config, "num_attention_heads", path)
    if width % n_heads:
        raise ConfigError(f"{path}: hidden_size: expected a multiple of {n_heads} heads, got {width}")
    epsilon = config.get("layer_norm_eps", 1e-12)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not epsilon > 0:
        raise ConfigError(f"{path}: layer_norm_eps: expected a number above 0, got {shown(epsilon)}")
    return BertSizes(
        n_blocks=_count(config, "num_hidden_layers", path),
        n_heads=n_heads,
        head_size=width // n_heads,
        n_units=_count(config, "intermediate_size", path),
        n_tokens=_count(config, "vocab_size", path),
        max_length=_count(config, "max_position_embeddings", path),
        n_types=_count(config, "type_vocab_size", path, default=2),
        activation=activation,
        epsilon=float(epsilon),
        padding=_count(config, "pad_token_id", path, default=0, least=0),
    )


def config_of(folder: Path) -> Mapping[str, Any]:
    """Return a folder's config.json.

    Raises:
        ConfigError: There is no such folder or file, or the file holds no JSON object.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: expected a model's folder, with {CONFIG} and {' or '.join(_TENSORS)}; "
            "got " + ("a file" if folder.exists() else "nothing")
        )
    return _object(folder / CONFIG)


def tensors_file(folder: Path) -> Path:
    """Return the file of a folder's tensors.

    Raises:
        ConfigError: There is none.
    """
    for name in _TENSORS:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{folder}: expected a file {' or '.join(_TENSORS)} there")


def pooling_of(folder: Path) -> Pooling:
    """Return how an encoder pools; without a modules.json the mean, as sentence-transformers does.

    Raises:
        ConfigError: Naming the file, and the module or the mode that is not served.
    """
    found = Pooling()
    for module in _modules(folder):
        kind = _kind_of(module)
        if kind == "Pooling":
            found = Pooling(_mode(folder / str(module.get("path", "")) / CONFIG))
        elif kind == "Normalize":
            found = Pooling(found.mode, normalises=True)
        elif kind != "Transformer":
            raise ConfigError(
                f"{folder / _MODULES}: expected the modules Transformer, Pooling and Normalize, got {kind}"
            )
    return found


def _mode(path: Path) -> str:
    config = _object(path)
    chosen = config.get("pooling_mode")
    if chosen is None:
        modes = [key.removeprefix(_OLD) for key, on in config.items() if key.startswith(_OLD) and on is True]
        chosen = _POOLINGS.get(modes[0], modes[0]) if len(modes) == 1 else modes
    if chosen not in _POOLINGS.values():
        raise ConfigError(f"{path}: pooling_mode: expected 'mean' or 'cls', got {shown(chosen)}")
    return str(chosen)


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / _MODULES
    if not path.exists():
        return []
    modules = _json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{path}: expected a list of modules, got {shown(modules)}")
    return modules


def _kind_of(module: Mapping[str, Any]) -> str:
    """Return a module's class: versions of sentence-transformers keep the same ones in different places."""
    return str(module.get("type", "")).rpartition(".")[2]


def _object(path: Path) -> Mapping[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {shown(found)}")
    return found


def _json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected a JSON file: {error}") from error


def _count(
    config: Mapping[str, Any], field: str, path: Path, *, default: int | None = None, least: int = 1
) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        got = "nothing" if value is None else shown(value)
        raise ConfigError(f"{path}: {field}: expected a whole number of at least {least}, got {got}")
    return value
