"""The proof before serving, kept in the state folder so that a restart does not repeat it.

A proof is kept under a hash of all that could change it: the code that slices, proves and defines the model,
the names, shapes and a sample of the tensors, what was declared, the subnets and their statistics.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
import sysconfig
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING

import torch

from gpu_worker.proof.absence import ProofError
from gpu_worker.proof.prove import MOST_SUBNETS, prove
from gpu_worker.proof.whole import filled, tensors_of
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.roles.local import state_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_worker.supernet.supernet import Supernet

_LOG = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_FOLDER = ".proofs"
_MOST_KEPT = 100
_STDLIB = Path(sysconfig.get_path("stdlib"))
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
_SAMPLED = 64  # numbers of each tensor: another checkpoint differs in some of them
_PIXELS, _TOKENS = 32, 16
"""An example is cut down to these, if the model takes that: what is sliced does not depend on it."""


def require_proof(supernet: Supernet, example: torch.Tensor) -> None:
    """Prove the hosted subnets, unless that was done before.

    Args:
        supernet: On a CPU, with its weights and statistics, before `trim`.
        example: At least two inputs of the model.

    Raises:
        ProofError: As `gpu_worker.proof.prove.prove` does, with what to do.
    """
    path = _path(fingerprint_of(supernet))
    with contextlib.suppress(OSError):  # not there, or not for this user: then it is made
        if path is not None:
            _LOG.info("proved before: %s", path.read_text("utf-8").strip())
            return
    _LOG.info("proving that subnets answer as their labels say; the next start will not repeat it")
    try:
        proof = prove(
            supernet,
            _small(supernet, example),
            subnets=supernet.subnets,
            most=MOST_SUBNETS,
            checks_resident=False,  # nothing has run on it yet that could be left over
        )
    except ProofError as error:
        raise type(error)(
            f"the supernet is not proved, and is not served: {error}. docs/your-model.md explains the "
            "proof; --unproven serves it all the same"
        ) from error
    _LOG.info("proved: %s", proof)
    if path is not None:
        _keep(path, str(proof))


def fingerprint_of(supernet: Supernet) -> str:
    """Return a hash of what a proof depends on."""
    found = hashlib.blake2b(digest_size=16)
    found.update(torch.__version__.encode())
    for path in _sources(supernet):
        found.update(path.read_bytes())
    for name, tensor in supernet.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_sample(tensor))
    original = supernet.original
    if original is not None:
        found.update(repr((original.why_not, original.stages, sorted(original.sizes.items()))).encode())
    for subnet in supernet.subnets:
        found.update(repr((subnet.name, subnet.control, supernet.controls.sizes_of(subnet.control))).encode())
        held = supernet.statistics.get(subnet.name)
        if held is not None:
            found.update(repr(held.channels).encode())
            found.update(_sample(held.values))
    return found.hexdigest()


def _sources(supernet: Supernet) -> Iterator[Path]:
    """Yield the files that slice, prove, and define the model, and what the user's ones among these use."""
    yield from sorted(_HERE.glob("*.py"))
    yield from sorted((_HERE.parent / "supernet").rglob("*.py"))
    names = {cls.__module__ for module in supernet.model.modules() for cls in type(module).__mro__}
    found = {name: path for name in names if (path := _file_of(name)) is not None}
    left = list(found)
    while left:
        name = left.pop()
        if found[name].is_relative_to(_STDLIB) or any(found[name].is_relative_to(one) for one in _INSTALLED):
            continue  # of a library what defines the model counts, and not all that this imports
        for used in _used_by(sys.modules[name]) - set(found):
            path = _file_of(used)
            if path is not None and not path.is_relative_to(_STDLIB):
                found[used] = path
                left.append(used)
    yield from sorted(set(found.values()))


def _file_of(name: str) -> Path | None:
    """Return a module's file; None for torch's, which its version stands for, and for one without a file."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return None if file is None or name.partition(".")[0] == "torch" else Path(file)


def _used_by(module: ModuleType) -> set[str]:
    """Return the modules that a module's names come from: modules, functions and classes that it holds."""
    values = list(vars(module).values())
    named = {value.__name__ for value in values if isinstance(value, ModuleType)}
    return named | {value.__module__ for value in values if isinstance(value, type | FunctionType)}


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, len(flat) // _SAMPLED)
    return flat[::step].to("cpu", torch.float64).numpy().tobytes()


def _small(supernet: Supernet, example: torch.Tensor) -> torch.Tensor:
    """Return a part of an example that the model takes as well; the example if it takes none."""
    part = example
    if example.dim() == 4 and example.is_floating_point():
        part = example[..., :_PIXELS, :_PIXELS]
    elif example.dim() > 1 and not example.is_floating_point():
        part = example[..., :_TOKENS]
    original = supernet.original
    if part.shape == example.shape or original is None or original.model is None:
        return example
    # The plain model: a sliced layer would take fewer inputs than the whole has.
    plain = filled(original.model, tensors_of(supernet.model)).eval()
    try:
        with torch.no_grad():
            plain(part)
    except Exception:  # noqa: BLE001  a model may refuse a size in any way
        return example
    return part


def _path(fingerprint: str) -> Path | None:
    """Return where a proof is kept; None if there is no folder for it."""
    try:
        return state_folder() / _FOLDER / fingerprint
    except ConfigError:
        return None


def _keep(path: Path, text: str) -> None:
    """Write a proof, and remove the oldest beyond `_MOST_KEPT`; a full disk costs time at a restart."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = sorted(path.parent.iterdir(), key=lambda old: old.stat().st_mtime)
        for old in kept[: max(0, len(kept) + 1 - _MOST_KEPT)]:
            old.unlink(missing_ok=True)
        write_whole(path, f"{text}\n")
    except OSError as error:
        _LOG.warning("the proof is not kept: %s", error)
