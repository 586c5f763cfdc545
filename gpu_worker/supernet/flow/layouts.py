"""What torch's calls do to the layout of a tensor: which channels of the whole network's each axis holds.

A layout is a tuple of pieces (n, whole): the first n of a piece of `whole` channels. A piece of which nothing
is missing is (n, n). Axes are counted from the last, -1, so that they stay when a tensor is broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Layout = tuple[tuple[int, int], ...]


class Lost(NamedTuple):
    """In place of a layout: along this axis it is not known which channels there are, since the call `by`."""

    by: str


Tags = dict[int, Layout | Lost]
"""By axis, where something is missing or not known."""


class NeedsWhole(Exception):  # noqa: N818  a request, not an error: the pass is repeated with what is asked for
    """A call whose meaning is known only by what it gives in the whole network."""


def tags_of(tensor: torch.Tensor) -> Tags:
    """Return what a tensor carries."""
    return getattr(tensor, "_superserve_tags", None) or {}


def forget_tags(tensor: torch.Tensor) -> None:
    """Remove what a tensor carries, which refers to those that it came of."""
    for name in [name for name in vars(tensor) if name.startswith("_superserve_")]:
        delattr(tensor, name)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among values and in the tuples, lists and dictionaries among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


class Whole(NamedTuple):
    """The same call in the whole network.

    Attributes:
        shapes: Of what it gave; none if there was no such call.
        args: What it was given after its first argument.
        kwargs: What it was given by name.
    """

    shapes: tuple[tuple[int, ...], ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without_tensors(self) -> Whole:
        """Return it with nothing that keeps numbers."""
        is_plain = next(tensors_in((*self.args, *self.kwargs.values())), None) is None
        return self if is_plain else Whole(self.shapes, (), {})


@dataclass(slots=True)
class Call:
    """One call of a function of torch.

    Attributes:
        name: Of the function.
        args: As it was called.
        kwargs: As it was called.
        given: Its tensors, with what each carried before the call.
        outs: The tensors that it gave.
        whole: The same call in the whole network; None if that pass was not made.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[tuple[torch.Tensor, Tags]]
    outs: list[torch.Tensor]
    whole: Whole | None

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by place or by name; the tensor is in place 0."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def x(self) -> torch.Tensor:
        """The first tensor."""
        return self.given[0][0]

    @property
    def tags(self) -> Tags:
        """What the first tensor carried."""
        return self.given[0][1]

    def whole_shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of an output in the whole network; empty if it is not known.

        Raises:
            NeedsWhole: The whole network was not looked at.
        """
        if self.whole is None:
            raise NeedsWhole
        return self.whole.shapes[number] if self.whole.shapes else ()

    def whole_arg(self, place: int, name: str) -> Any:
        """Return an argument of the same call in the whole network; None if it is not known."""
        self.whole_shape(0)
        assert self.whole is not None, "asked for above"
        args = self.whole.args
        return args[place - 1] if len(args) >= place else self.whole.kwargs.get(name)

    def checked(self, out: torch.Tensor, tags: Tags) -> Tags:
        """Return tags, lost where the pieces are not as many as the whole network's axis has."""
        if self.whole is None or not self.whole.shapes:
            return tags
        shape = self.whole.shapes[next(i for i, one in enumerate(self.outs) if one is out)]
        if len(shape) != out.dim():
            return dict.fromkeys(tags, Lost(self.name))
        return {
            axis: tag if isinstance(tag, Lost) or sum(n for _, n in tag) == shape[axis] else Lost(self.name)
            for axis, tag in tags.items()
        }

    def lost(self) -> list[Tags]:
        """Return for every output that nothing is known of it."""
        before = [tag for _, tags in self.given for tag in tags.values() if isinstance(tag, Lost)]
        lost = before[0] if before else Lost(self.name)
        return [dict.fromkeys(range(-out.dim(), 0), lost) for out in self.outs]

    def axis(self, dim: int) -> int:
        """Return an axis of the first tensor counted from the last."""
        return dim if dim < 0 else dim - self.x.dim()


# --- parts of layouts -----------------------------------------------------------------------


def part_of(layout: Layout | Lost, start: int, n: int, by: str) -> Layout | Lost:
    """Return the layout of n channels from `start` on: whole pieces, or parts of those that miss nothing."""
    if isinstance(layout, Lost):
        return layout
    found, at = [], 0
    for kept, whole in layout:
        low, high = max(start, at), min(start + n, at + kept)
        if low < high:
            if high - low != kept and kept != whole:
                return Lost(by)
            found.append((kept, whole) if high - low == kept else (high - low, high - low))
        at += kept
    return tuple(found)


def slice_of(layout: Layout | Lost, cut: range, whole: range, by: str) -> Layout | Lost:
    """Return the layout of the channels at `cut`, where the whole network takes those at `whole`."""
    if isinstance(layout, Lost):
        return layout
    numbers: list[int] = []  # in the whole network, of each channel that there is
    pieces: list[tuple[int, int]] = []
    start = 0
    for n, size in layout:
        numbers += range(start, start + n)
        kept = sum(number in whole for number in range(start, start + n))
        there = sum(number in whole for number in range(start, start + size))
        if there:
            pieces.append((kept, there))
        start += size
    taken = [numbers[at] for at in cut]
    is_part = taken == [number for number in numbers if number in whole]
    return tuple(pieces) if is_part and whole.step == 1 else Lost(by)


def without_whole(tags: Tags) -> Tags:
    """Return tags without those of axes from which nothing is missing."""
    return {
        axis: tag
        for axis, tag in tags.items()
        if isinstance(tag, Lost) or any(n != whole for n, whole in tag)
    }


def moved(tags: Tags, order: Sequence[int | None]) -> Tags:
    """Return tags of a tensor whose axes are those numbered `order` of the first, None for a new one."""
    return {
        place - len(order): tags[axis]
        for place, axis in enumerate(order)
        if axis is not None and axis in tags
    }


def scaled(layout: Layout | Lost, times: int) -> Layout | Lost:
    """Return the layout with each channel so many times, one after the other."""
    return layout if isinstance(layout, Lost) else tuple((n * times, whole * times) for n, whole in layout)
