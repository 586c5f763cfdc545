"""Calls that look at the same numbers in another shape: views, indices, divisions along an axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.supernet.flow.layouts import Lost, moved, part_of, slice_of, without_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpu_worker.supernet.flow.layouts import Call, Layout, Tags


def reshaped(call: Call) -> list[Tags]:
    """For view, reshape, flatten and unflatten: axes that are merged and divided."""
    before, after = tuple(call.x.shape), tuple(call.outs[0].shape)
    if 0 in before:
        return call.lost()
    tags: Tags = {}
    for ins, outs in groups_of(before, after):
        cut = [axis for axis in ins if axis - len(before) in call.tags]
        if not cut:
            continue
        at = cut[0]
        tag = call.tags[at - len(before)]
        if len(cut) > 1 or isinstance(tag, Lost):
            lost = tag if isinstance(tag, Lost) else Lost(call.name)
            tags |= {out - len(after): lost for out in outs}
            continue
        if (len(ins), len(outs)) == (1, 1):
            tags[outs[0] - len(after)] = tag
            continue
        inner = math.prod(before[axis] for axis in ins if axis > at)
        outer = math.prod(before[axis] for axis in ins if axis < at)
        flat = tuple((n * inner, whole * inner) for n, whole in tag) * outer
        for axis, found in _cut_up(call, flat, outs).items():
            tags[axis - len(after)] = found
    return [tags]


def groups_of(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the axes of two shapes of equally many numbers, in the smallest groups of equal products."""
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [i] if i < len(before) else [], [j] if j < len(after) else []
        while (n := math.prod(before[a] for a in ins)) != (m := math.prod(after[a] for a in outs)):
            if n < m:
                ins.append(ins[-1] + 1 if ins else i)
            else:
                outs.append(outs[-1] + 1 if outs else j)
        i, j = i + len(ins), j + len(outs)
        yield ins, outs


def _cut_up(call: Call, flat: Layout, outs: Sequence[int]) -> Tags:
    """Return the layouts of the axes into which one is divided, by where the whole network's differ."""
    after = call.outs[0].shape
    if len(outs) == 1:
        return {outs[0]: flat}
    whole = call.whole_shape(0)
    differ = [axis for axis in outs if len(whole) == len(after) and whole[axis] != after[axis]]
    if len(differ) == 1:
        (at,) = differ
        inner = math.prod(after[axis] for axis in outs if axis > at)
        size = after[at] * inner
        outer = math.prod(after[axis] for axis in outs if axis < at)
        parts = {part_of(flat, number * size, size, call.name) for number in range(outer)}
        part = parts.pop()
        if not parts and not isinstance(part, Lost) and not any(n % inner or w % inner for n, w in part):
            return {at: tuple((n // inner, w // inner) for n, w in part)}
    return {axis: Lost(call.name) for axis in outs}


def divided(call: Call) -> list[Tags]:
    """For chunk, split and the like: outputs that lie side by side along an axis."""
    axis = call.axis(call.arg(2, "dim", 0))
    if axis not in call.tags:
        return [dict(call.tags) for _ in call.outs]
    found, start, whole_start = [], 0, 0
    for number, out in enumerate(call.outs):
        shape = call.whole_shape(number)
        tags = dict(call.tags)
        n, whole = out.shape[axis], shape[axis] if shape else 0
        cut, of_whole = range(start, start + n), range(whole_start, whole_start + whole)
        tags[axis] = slice_of(tags[axis], cut, of_whole, call.name)
        start, whole_start = start + n, whole_start + whole
        found.append(without_whole(tags))
    return found


def unbound(call: Call) -> list[Tags]:
    """For unbind: one output for each place of an axis, which is gone."""
    axis = call.axis(call.arg(1, "dim", 0))
    if axis in call.tags:
        return call.lost()
    return [moved(call.tags, [a for a in range(-call.x.dim(), 0) if a != axis]) for _ in call.outs]


def indexed(call: Call) -> list[Tags]:
    """For x[...]: integers and slices move axes; tensors in front leave the last axes as they are."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(one, torch.Tensor | list) for one in index):
        n_indexed = sum(one.dim() if _is_mask(one) else 1 for one in index)
        last = call.x.dim() - n_indexed
        if any(one is None or one is Ellipsis for one in index) or any(axis < -last for axis in call.tags):
            return call.lost()
        return [dict(call.tags)]
    index = _full(index, call.x.dim())
    order: list[int | None] = []
    tags, axis = dict(call.tags), -call.x.dim()
    for place, one in enumerate(index):
        if one is None:
            order.append(None)
            continue
        if axis in tags and one != slice(None):
            given = call.whole_arg(1, "")
            same = (
                _full(given if isinstance(given, tuple) else (given,), call.x.dim())
                if given is not None
                else ()
            )
            tags[axis] = _at(call, axis, one, same[place] if len(same) == len(index) else None)
        if isinstance(one, slice):
            order.append(axis)
        elif isinstance(tags.get(axis), Lost):
            return call.lost()
        axis += 1
    return [without_whole(moved(tags, order))]


def _is_mask(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.dtype == torch.bool


def _full(index: tuple[Any, ...], n_axes: int) -> tuple[Any, ...]:
    """Return an index with a slice for each axis that it leaves out."""
    n_given = sum(one is not None and one is not Ellipsis for one in index)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    return (*index[:at], *[slice(None)] * (n_axes - n_given), *index[at + 1 :])


def _at(call: Call, axis: int, one: Any, whole: Any) -> Layout | Lost:
    """Return the layout of a part of an axis; `whole` is the index of the whole network's."""
    tag = call.tags[axis]
    if isinstance(tag, Lost) or type(one) is not type(whole) or not isinstance(one, slice | int):
        return Lost(call.name)
    sizes = call.x.shape[axis], sum(size for _, size in tag)
    cut, of_whole = (range(size)[index] for size, index in zip(sizes, (one, whole), strict=True))
    if isinstance(cut, int) or isinstance(of_whole, int):
        cut, of_whole = range(cut, cut + 1), range(of_whole, of_whole + 1)
    return slice_of(tag, cut, of_whole, call.name)


def narrowed(call: Call) -> list[Tags]:
    """For narrow: a length of an axis from a start."""
    axis = call.axis(call.arg(1, "dim"))
    tags = dict(call.tags)
    if axis in tags:
        start, n = call.arg(2, "start"), call.arg(3, "length")
        whole_start, whole_n = call.whole_arg(2, "start"), call.whole_arg(3, "length")
        is_known = all(isinstance(one, int) for one in (start, n, whole_start, whole_n))
        tags[axis] = (
            slice_of(
                tags[axis], range(start, start + n), range(whole_start, whole_start + whole_n), call.name
            )
            if is_known
            else Lost(call.name)
        )
    return [without_whole(tags)]
