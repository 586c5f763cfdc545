"""Marks for absent elements: which elements of which tensors a subnet does not have.

A mark is a boolean for each element of a *storage*. All views of a storage look into the same marks through
their own strides, so a view has the right marks without a rule, and a write through a view is seen by all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)
_FUSED = (
    "if this is a fused layer (q, k, v; gate, up), declare its parts: Elastic(..., parts=N); if two sizes "
    "meet, give them one name"
)


class ProofError(ConfigError):
    """A supernet that answers wrong, or of which that cannot be judged."""


class UnsliceableError(ProofError):
    """The model combines what a subnet has with what it does not have: no slicing is right."""


class UnjudgedError(ProofError):
    """The oracle has no rule for what the model does with a cut size."""


def caller() -> str:
    """Return file and line of the model's code that runs now; neither torch's nor the slicer's own."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        is_ours = name.startswith(_HERE) and "/models/" not in name
        if not (name.startswith((_TORCH, "<")) or is_ours):
            return f"{name}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "an unknown line"


class _Marked(NamedTuple):
    cut: torch.Tensor  # (elements of the storage,)
    itemsize: int
    sizes: set[str]
    keeps: torch.Tensor  # so that its address is not used again


class Marks:
    """The absent elements of all tensors in one pass."""

    def __init__(self) -> None:
        self._marked: dict[int, _Marked] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor's absent elements, of its shape; None if there are none."""
        found = self._marked.get(address(tensor))
        if found is None or not tensor.numel():
            return None
        if tensor.element_size() != found.itemsize:
            raise UnjudgedError(f"{caller()}: a tensor that was cut is reinterpreted as {tensor.dtype}")
        cut = found.cut.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        return cut if bool(cut.any()) else None

    def touches(self, tensor: torch.Tensor) -> bool:
        """Return whether it was made of a layer's outputs of which some are absent, even if it is whole."""
        return address(tensor) in self._marked

    def touch(self, tensor: torch.Tensor, sizes: set[str]) -> _Marked:
        """Note that a tensor was made of a layer's outputs of which some are absent, even if it is whole."""
        storage = tensor.untyped_storage()
        held = self._marked.get(storage.data_ptr())
        if held is None:
            n = storage.nbytes() // tensor.element_size()
            held = _Marked(torch.zeros(n, dtype=torch.bool), tensor.element_size(), set(), tensor)
            self._marked[storage.data_ptr()] = held
        held.sizes.update(sizes)
        return held

    def sizes(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        """Return the names of the elastic sizes by which elements of these tensors are absent."""
        found: set[str] = set()
        for tensor in tensors:
            held = self._marked.get(address(tensor))
            if held is not None:
                found |= held.sizes
        return found

    def put(self, tensor: torch.Tensor, cut: torch.Tensor | None, sizes: set[str]) -> None:
        """Replace the marks of a tensor's elements; `cut` broadcasts to its shape, None marks nothing."""
        held = self._marked.get(address(tensor))
        if held is None:
            if cut is None or not bool(cut.any()):
                return
            held = self.touch(tensor, sizes)
        view = held.cut.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        if 0 in tensor.stride():  # an expanded output: each element is written once
            view = view[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
            cut = None if cut is None else _first_of(cut.expand(tensor.size()), tensor.stride())
        if cut is None:
            view.fill_(value=False)
        else:
            view.copy_(cut.expand(view.size()))
        held.sizes.update(sizes)


def _first_of(cut: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return cut[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]


def address(tensor: torch.Tensor) -> int:
    """Return where the tensor's storage lies: what all its views share."""
    return tensor.untyped_storage().data_ptr()


def joined(marks: Marks, tensors: Iterable[torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    """Return what is absent where elements of these tensors are combined one by one into `shape`.

    Raises:
        UnsliceableError: Present elements would be combined with absent ones of another tensor.
    """
    tensors = list(tensors)
    found: torch.Tensor | None = None
    for tensor in tensors:
        cut = marks.of(tensor)
        if cut is None:
            # A part of a fused output that has all it needs, beside one that has not.
            if not marks.touches(tensor) or tensor.shape != shape:
                continue
            cut = torch.zeros(shape, dtype=torch.bool)
        cut = cut.expand(shape)
        if found is not None and not torch.equal(found, cut):
            raise mismatch(marks.sizes(tensors), "combines", int((found ^ cut).sum()), cut.numel())
        found = cut
    return found


def mismatch(sizes: Iterable[str], verb: str, n: int, of: int) -> UnsliceableError:
    """Return the error for present elements that meet absent ones."""
    return UnsliceableError(
        f"{caller()}: with {_named(sizes)} cut, an operation {verb} elements that are kept with elements "
        f"that are cut ({n} of {of}): {_FUSED}"
    )


def _named(sizes: Iterable[str]) -> str:
    names = ", ".join(repr(name) for name in sorted(set(sizes)))
    return f"size {names}" if names else "a size"
