"""LayerSelect: blocks that a subnet may leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gpu_worker.supernet.operators.base import Cursor


class LayerSelect:
    """The boolean switches of one stage's blocks.

    Each block keeps its place in the model, and becomes a `Switched` block: where its switch
    is off, it gives back its first argument.
    """

    def __init__(self, blocks: tuple[Switched, ...]) -> None:
        self.blocks = blocks

    def choose(self, kept: tuple[int, ...], settings: list[Any]) -> None:
        """Write into `settings` that the blocks numbered `kept` run and no others do."""
        for number, block in enumerate(self.blocks):
            settings[block.switch_place] = number in kept


class Switched:
    """Mixed into a block's own class: runs the block if its switch is on."""

    switch_cursor: Cursor
    switch_place: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or return `x` as it is."""
        if self.switch_cursor.settings[self.switch_place]:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # the block's own
        return x


_switched_classes: dict[type[nn.Module], type[nn.Module]] = {}


def switched(block: nn.Module, cursor: Cursor, place: int) -> Switched:
    """Change `block` in place into one that its switch, entry `place`, turns on and off."""
    cls = type(block)
    if cls not in _switched_classes:
        _switched_classes[cls] = type(f"Switched{cls.__name__}", (Switched, cls), {})
    block.__class__ = _switched_classes[cls]
    changed = cast("Switched", block)
    changed.switch_cursor, changed.switch_place = cursor, place
    return changed
