"""What every operator has: a cursor, its place in the settings, its path in the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

    Settings = tuple[Any, ...]


class Cursor:
    """What all operators of one supernet read.

    Attributes:
        settings: What the running forward pass uses, one entry an operator.
        chosen: What the next forward pass will use. Actuation is one store of it, and a pass takes it
            over once, at its start; so no pass is half of one subnet and half of another.
    """

    __slots__ = ("chosen", "settings")

    def __init__(self, chosen: Prepared) -> None:
        self.chosen = chosen
        self.settings = chosen.settings

    @property
    def row(self) -> int:
        """The subnet that the next forward pass runs."""
        return self.chosen.row


class Prepared(NamedTuple):
    """A subnet that is ready to run.

    Attributes:
        row: Of the hosted subnets.
        settings: One entry for each operator.
    """

    row: int
    settings: Settings


class Parameters(NamedTuple):
    """A layer's weight and bias, or a subnet's part of them."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Operator:
    """What every operator has beside its layer: a cursor, its place in the settings, its path."""

    channel_axis: ClassVar[int] = 1
    cursor: Cursor
    place: int
    path: str

    def attach(self, cursor: Cursor, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.cursor, self.place, self.path = cursor, place, path
        self.forget()

    def forget(self) -> None:
        """Drop everything that looks into parameters: they have moved, or changed."""

    # Moving a module to a device or a dtype replaces its parameters.
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[misc]  # an nn.Module's, beside which this is mixed in
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]  # as above
        self.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # as above
        self.forget()  # the views in a deep copy are not views of the copy's parameters


def operators_in(model: nn.Module) -> Iterator[Operator]:
    """Yield every operator of a model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, Operator):
            yield module
