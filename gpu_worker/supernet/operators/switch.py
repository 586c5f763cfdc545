"""LayerSelect: blocks that a subnet may leave out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from gpu_worker.supernet.operators.base import Cursor

Skipped = Literal["input", "zero"] | Callable[..., Any]
"""What a block that is left out gives: its first argument, zeros like it, or what a function of its arguments
returns."""


class LayerSelect:
    """The boolean switches of one stage's blocks.

    Each block keeps its place in the model, and becomes a `Switched` block. A block that is a ModuleList is
    never called: each of its members becomes one, with one switch for all.
    """

    def __init__(self, blocks: tuple[Switched, ...]) -> None:
        self.blocks = blocks

    def choose(self, kept: tuple[int, ...], settings: list[Any]) -> None:
        """Write into `settings` that the blocks numbered `kept` run and no others do."""
        for number, block in enumerate(self.blocks):
            settings[block.switch_place] = number in kept


class _Answer(NamedTuple):
    """What a block returns when it runs, as far as one has to know to stand in for it.

    Attributes:
        kind: Its type.
        n: How many values a tuple or list has.
        fault: Why nothing can stand in for it, or nothing.
    """

    kind: type
    n: int
    fault: str


def _answer(out: object) -> _Answer:
    if isinstance(out, torch.Tensor):
        return _Answer(torch.Tensor, 1, "")
    if type(out) in (tuple, list):
        rest = cast("Sequence[object]", out)[1:]
        fault = (
            ""
            if all(value is None for value in rest)
            else f"a {type(out).__name__} of {len(rest) + 1} values"
        )
        return _Answer(type(out), len(rest) + 1, fault)
    return _Answer(type(out), 0, f"a {type(out).__name__}")


class Skip:
    """What a stage's blocks give when they are left out.

    What a block returns is seen when one of its class runs: a block that returns (x, None) is replaced by
    (its input, None), and not by its input, of which the caller would take the first row.
    """

    def __init__(self, gives: Skipped) -> None:
        self.gives = gives
        self.answers: dict[type, _Answer] = {}


class Switched:
    """Mixed into a block's own class: runs the block if its switch is on.

    The switch is at the call, around hooks and a `forward` that was set on the instance: the hooks of a block
    that is left out do not run.
    """

    switch_cursor: Cursor
    switch_place: int
    switch_path: str
    switch_first: str
    switch_skip: Skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, or return what stands for it."""
        if not self.switch_cursor.settings[self.switch_place]:
            return self._left_out(args, kwargs)
        out = super().__call__(*args, **kwargs)  # type: ignore[misc]  # the block's own
        if type(self) not in self.switch_skip.answers:
            self.switch_skip.answers[type(self)] = _answer(out)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or return what stands for it, where a caller goes around the call."""
        if self.switch_cursor.settings[self.switch_place]:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the block's own
        return self._left_out(args, kwargs)

    def _left_out(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        flow = self.switch_cursor.flow
        with contextlib.nullcontext() if flow is None else flow.apart(self.switch_path):
            return self._stands(args, kwargs)

    def _stands(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what stands for the block."""
        skip = self.switch_skip
        if callable(skip.gives):
            return skip.gives(*args, **kwargs)
        given = self._first_of(args, kwargs)
        answer = skip.answers.get(type(self))
        if answer is None:
            answer = skip.answers[type(self)] = _answer(self._run_apart(args, kwargs))
        if isinstance(given, tuple | list) and type(given) is answer.kind and len(given) == answer.n:
            if skip.gives == "input":
                return given
            return answer.kind(None if one is None else torch.zeros_like(one) for one in given)
        if answer.fault or not isinstance(given, torch.Tensor):
            what = answer.fault or f"a {answer.kind.__name__} for a {type(given).__name__}"
            raise ConfigError(
                f"{self.switch_path}: returns {what}, for which its first argument cannot stand when it is "
                "left out: give its stage skipped=, a function of the block's arguments"
            )
        flow = self.switch_cursor.flow
        if skip.gives == "zero":
            stands = torch.zeros_like(given)
        else:
            stands = given if flow is None else flow.left_out(self.switch_path, given)
        if answer.kind is torch.Tensor:
            return stands
        return answer.kind((stands, *[None] * (answer.n - 1)))

    def _first_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if args:
            return args[0]
        if self.switch_first in kwargs:
            return kwargs[self.switch_first]
        raise ConfigError(
            f"{self.switch_path}: called without its first argument {self.switch_first!r}, only with "
            f"{', '.join(kwargs) or 'none'}: give its stage skipped=, a function of the block's arguments"
        )

    def _run_apart(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the block though it is left out, to see what kind of thing it returns; nothing counts it.

        Norms gather nothing meanwhile: a subnet is calibrated after its first pass, in which this is done.
        """
        cursor = self.switch_cursor
        before = cursor.settings
        apart = list(before)
        apart[self.switch_place] = True
        cursor.settings = tuple(apart)
        if cursor.flow is not None:
            cursor.flow.is_paused = True
        try:
            with torch.no_grad(), _disable_current_modes():
                return super().forward(*args, **kwargs)  # type: ignore[misc]  # the block's own
        finally:
            cursor.settings = before
            if cursor.flow is not None:
                cursor.flow.is_paused = False


_switched_classes: dict[type[nn.Module], type[nn.Module]] = {}


def switched(block: nn.Module, cursor: Cursor, place: int, path: str, skip: Skip) -> Switched:
    """Change `block` in place into one that its switch, entry `place`, turns on and off."""
    cls = type(block)
    if cls not in _switched_classes:
        _switched_classes[cls] = type(f"Switched{cls.__name__}", (Switched, cls), {})
    first = _first_parameter(block)
    block.__class__ = _switched_classes[cls]
    changed = cast("Switched", block)
    changed.switch_cursor, changed.switch_place, changed.switch_path = cursor, place, path
    changed.switch_first, changed.switch_skip = first, skip
    return changed


def _first_parameter(block: nn.Module) -> str:
    """Return what the block's own forward calls its first argument."""
    names = list(inspect.signature(type(block).forward).parameters)
    return names[1] if len(names) > 1 else ""
