"""What torch's calls do to the layout of a tensor: which channels of the whole network's each axis holds.

A layout is a tuple of pieces (n, whole): the first n of a piece of `whole` channels. A piece of which nothing
is missing is (n, n). Axes are counted from the last, -1, so that they stay when a tensor is broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


@dataclass(slots=True)
class Call:
    """One call of a function of torch.

    Attributes:
        name: Of the function.
        args: As it was called.
        kwargs: As it was called.
        given: Its tensors, with what each carried before the call.
        outs: The tensors that it gave.
        whole: The shapes that the same call gave in the whole network; empty if there was no such call, None
            if that pass was not made.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[tuple[torch.Tensor, Tags]]
    outs: list[torch.Tensor]
    whole: tuple[tuple[int, ...], ...] | None

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
        return self.whole[number] if self.whole else ()

    def checked(self, out: torch.Tensor, tags: Tags) -> Tags:
        """Return tags, lost where the pieces are not as many as the whole network's axis has."""
        if not self.whole:
            return tags
        shape = self.whole[next(i for i, one in enumerate(self.outs) if one is out)]
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


Rule = Callable[[Call], list[Tags]]
"""From a call to what each of its outputs carries."""


def _kept(call: Call) -> list[Tags]:
    """For calls that change each number by itself, or along axes that nothing was cut from."""
    found = []
    for out in call.outs:
        tags: Tags = {}
        for tensor, carried in call.given:
            for axis, tag in carried.items():
                is_same = tensor.dim() == out.dim() or (call.name in _BROADCAST and tensor.dim() < out.dim())
                if not is_same or out.shape[axis] != tensor.shape[axis]:
                    return call.lost()
                if tags.setdefault(axis, tag) != tag:
                    tags[axis] = Lost(call.name)
        found.append(tags)
    return found


def _lost(call: Call) -> list[Tags]:
    return call.lost()


def _plain(call: Call) -> list[Tags]:
    """For calls whose outputs no longer depend on which channels there were."""
    return [{} for _ in call.outs]


def _reduced(call: Call) -> list[Tags]:
    """For sums, means and the like over some axes."""
    dims = call.arg(1, "dim")
    if call.name in ("norm", "vector_norm"):
        dims = call.arg(2, "dim")
    if dims is None or isinstance(dims, torch.Tensor):
        return _kept(call) if isinstance(dims, torch.Tensor) else _plain(call)
    gone = {call.axis(dim) for dim in (dims if isinstance(dims, tuple | list) else (dims,))}
    if call.outs[0].dim() == call.x.dim():  # keepdim
        return [{axis: tag for axis, tag in call.tags.items() if axis not in gone} for _ in call.outs]
    kept = [axis for axis in range(-call.x.dim(), 0) if axis not in gone]
    return [_moved(call.tags, kept) for _ in call.outs]


def _moved(tags: Tags, order: Sequence[int | None]) -> Tags:
    """Return tags of a tensor whose axes are those numbered `order` of the first, None for a new one."""
    return {
        place - len(order): tags[axis]
        for place, axis in enumerate(order)
        if axis is not None and axis in tags
    }


def _transposed(call: Call) -> list[Tags]:
    order: list[int | None] = list(range(-call.x.dim(), 0))
    if call.name == "permute":
        dims = call.args[1:] if len(call.args) > 2 else call.arg(1, "dims")
        dims = (dims,) if isinstance(dims, int) else dims
        order = [call.axis(dim) for dim in dims]
    elif call.name in ("movedim", "moveaxis"):
        source, target = call.arg(1, "source"), call.arg(2, "destination")
        if not isinstance(source, int):
            return call.lost()
        order.insert(target % call.x.dim(), order.pop(source % call.x.dim()))
    elif call.name in ("T", "H", "t"):
        order.reverse()
    else:
        first, second = (-2, -1) if call.name in ("mT", "mH") else (call.arg(1, "dim0"), call.arg(2, "dim1"))
        order[first], order[second] = order[second], order[first]
    return [_moved(call.tags, order)]


def _joined(call: Call) -> list[Tags]:
    """For a concatenation: the pieces of one tensor, then those of the next."""
    tensors = call.arg(0, "tensors")
    axis = call.arg(1, "dim", call.kwargs.get("axis", 0))
    axis = axis if axis < 0 else axis - call.outs[0].dim()
    tags: Tags = {}
    pieces: list[tuple[int, int]] = []
    for tensor in tensors:
        carried = tags_of(tensor)
        own: Layout | Lost = carried.get(axis, ((tensor.shape[axis], tensor.shape[axis]),))
        if isinstance(own, Lost):
            return [{axis: own}]
        pieces.extend(own)
        for other, tag in carried.items():
            if other != axis and tags.setdefault(other, tag) != tag:
                tags[other] = Lost(call.name)
    if any(n != whole for n, whole in pieces):
        tags[axis] = tuple(pieces)
    return [tags]


def _stacked(call: Call) -> list[Tags]:
    dim = call.arg(1, "dim", 0)
    place = dim % call.outs[0].dim()
    order: list[int | None] = list(range(-call.x.dim(), 0))
    order.insert(place, None)
    found = [_moved(carried, order) for _, carried in call.given]
    return [found[0]] if all(one == found[0] for one in found) else call.lost()


def part_of(layout: Layout | Lost, start: int, n: int, by: str) -> Layout | Lost:
    """Return the layout of n channels from `start` on: whole pieces, or parts of those that miss nothing."""
    if isinstance(layout, Lost):
        return layout
    found, at = [], 0
    for kept, whole in layout:
        low, high = max(start, at), min(start + n, at + kept)
        if low < high or (kept == 0 and start <= at <= start + n):
            if high - low != kept and kept != whole:
                return Lost(by)
            found.append((high - low, high - low) if high - low != kept else (kept, whole))
        at += kept
    return tuple(found)


def _divided(call: Call) -> list[Tags]:
    """For chunk, split and the like: outputs that lie side by side along an axis."""
    place = 2 if call.name != "unbind" else 1
    axis = call.axis(call.arg(place, "dim", 0))
    found, start = [], 0
    for out in call.outs:
        tags = {other: tag for other, tag in call.tags.items() if other != axis}
        if call.name == "unbind":
            if axis in call.tags:
                return call.lost()
            found.append(_moved(call.tags, [a for a in range(-call.x.dim(), 0) if a != axis]))
            continue
        if axis in call.tags:
            tags[axis] = part_of(call.tags[axis], start, out.shape[axis], call.name)
            start += out.shape[axis]
        found.append(_without_whole(tags))
    if axis in call.tags and call.name not in ("chunk", "unbind"):
        call.whole_shape(0)  # sizes that are constants cut elsewhere in the whole network
    return found


def _without_whole(tags: Tags) -> Tags:
    return {
        axis: tag
        for axis, tag in tags.items()
        if isinstance(tag, Lost) or any(n != whole for n, whole in tag)
    }


def _halved(call: Call) -> list[Tags]:
    """For F.glu: one half gates the other."""
    axis = call.axis(call.arg(1, "dim", -1))
    tags = dict(call.tags)
    if axis in tags:
        half = call.outs[0].shape[axis]
        first, second = (part_of(tags[axis], start, half, call.name) for start in (0, half))
        tags[axis] = first if first == second else Lost(call.name)
    return [tags]


def _indexed(call: Call) -> list[Tags]:
    """For x[...]: integers and slices move axes; tensors in front leave the last axes as they are."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(one, torch.Tensor | list) for one in index):
        n_indexed = sum(
            one.dim() if isinstance(one, torch.Tensor) and one.dtype == torch.bool else 1 for one in index
        )
        last = call.x.dim() - n_indexed
        if any(one is None or one is Ellipsis for one in index) or any(axis < -last for axis in call.tags):
            return call.lost()
        return [dict(call.tags)]
    n_given = sum(one is not None and one is not Ellipsis for one in index)
    missing = [slice(None)] * (call.x.dim() - n_given)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    index = (*index[:at], *missing, *index[at + 1 :])
    order: list[int | None] = []
    tags, axis = dict(call.tags), -call.x.dim()
    for one in index:
        if one is None:
            order.append(None)
            continue
        if axis in tags and not (isinstance(one, slice) and one == slice(None)):
            call.whole_shape(0)
            if not isinstance(one, slice):
                del tags[axis]  # one channel, which both have if the cut one has it
            else:
                start, stop, step = one.indices(call.x.shape[axis])
                tags[axis] = (
                    Lost(call.name) if step != 1 else part_of(tags[axis], start, stop - start, call.name)
                )
        if isinstance(one, slice):
            order.append(axis)
        axis += 1
    return [_without_whole(_moved(tags, order))]


def _narrowed(call: Call) -> list[Tags]:
    axis = call.axis(call.arg(1, "dim"))
    tags = dict(call.tags)
    if axis in tags:
        call.whole_shape(0)
        start = int(call.arg(2, "start"))
        tags[axis] = part_of(tags[axis], start, call.outs[0].shape[axis], call.name)
    return [_without_whole(tags)]


def _selected(call: Call) -> list[Tags]:
    axis = call.axis(call.arg(1, "dim"))
    if call.name == "index_select":
        return call.lost() if axis in call.tags else [dict(call.tags)]
    return [_moved(call.tags, [a for a in range(-call.x.dim(), 0) if a != axis])]


def _squeezed(call: Call) -> list[Tags]:
    dim = call.arg(1, "dim")
    if call.name == "unsqueeze":
        order: list[int | None] = list(range(-call.x.dim(), 0))
        order.insert(dim % call.outs[0].dim(), None)
        return [_moved(call.tags, order)]
    dims = range(call.x.dim()) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    gone = {call.axis(d) for d in dims if call.x.shape[d] == 1}
    if gone & set(call.tags):
        return call.lost()
    return [_moved(call.tags, [axis for axis in range(-call.x.dim(), 0) if axis not in gone])]


def _repeated(call: Call) -> list[Tags]:
    """For repeat_interleave: each channel several times, one after the other."""
    dim = call.arg(2, "dim")
    times = call.arg(1, "repeats")
    if dim is None or not isinstance(times, int):
        return call.lost()
    tags, axis = dict(call.tags), call.axis(dim)
    if axis in tags:
        tags[axis] = _scaled(tags[axis], times)
    return [tags]


def _tiled(call: Call) -> list[Tags]:
    """For expand and repeat: an axis as often as the new size says."""
    out, tags = call.outs[0], {}
    for axis, tag in call.tags.items():
        times, rest = divmod(out.shape[axis], call.x.shape[axis])
        tags[axis] = Lost(call.name) if rest or isinstance(tag, Lost) else tag * times
    return [tags]


def _scaled(layout: Layout | Lost, times: int) -> Layout | Lost:
    return layout if isinstance(layout, Lost) else tuple((n * times, whole * times) for n, whole in layout)


def _multiplied(call: Call) -> list[Tags]:
    """For products of matrices: rows of the first, columns of the second; the axis between is summed."""
    (first, left), (second, right) = call.given[:2]
    if first.dim() < 2 or second.dim() < 2 or len(call.given) > 2:
        return call.lost()
    tags: Tags = {axis: tag for axis, tag in left.items() if axis != -1}
    for axis, tag in right.items():
        if axis != -2 and tags.setdefault(axis, tag) != tag:
            tags[axis] = Lost(call.name)
    return [tags]


def _attended(call: Call) -> list[Tags]:
    """For scaled_dot_product_attention: heads and places of the queries, features of the values."""
    (query, left), (key, middle), (value, right) = call.given[:3]
    tags: Tags = {axis: tag for axis, tag in left.items() if axis != -1}
    for tensor, carried in ((key, middle), (value, right)):
        for axis, tag in carried.items():
            if axis < -2 and tensor.shape[axis] == query.shape[axis] and tags.get(axis) != tag:
                tags[axis] = Lost(call.name)
    return [tags | {axis: tag for axis, tag in right.items() if axis == -1}]


def _projected(call: Call) -> list[Tags]:
    """For a linear layer or a convolution that is no operator: its outputs are all there."""
    axes = (-1,) if call.name in ("linear", "addmm") else tuple(range(1 - call.x.dim(), 0))
    return [{axis: tag for axis, tag in call.tags.items() if axis not in axes}]


def _summed(call: Call) -> list[Tags]:
    """For einsum without an ellipsis: an axis goes where its letter goes."""
    equation = str(call.args[0]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or len(letters) != len(call.given):
        return call.lost()
    tags: Tags = {}
    for (_, carried), word in zip(call.given, letters, strict=True):
        for axis, tag in carried.items():
            if word[axis] in output:
                place = output.index(word[axis]) - len(output)
                if tags.setdefault(place, tag) != tag:
                    tags[place] = Lost(call.name)
    return [tags]


def _shuffled(call: Call) -> list[Tags]:
    """For pixel_shuffle and pixel_unshuffle: channels become places, or places channels."""
    factor = int(call.arg(1, "upscale_factor", call.kwargs.get("downscale_factor", 1))) ** 2
    tag = call.tags.get(-3)
    if set(call.tags) != {-3} or isinstance(tag, Lost) or tag is None:
        return call.lost()
    if call.name == "pixel_unshuffle":
        return [{-3: _scaled(tag, factor)}]
    if any(n % factor or whole % factor for n, whole in tag):
        return call.lost()
    return [{-3: tuple((n // factor, whole // factor) for n, whole in tag)}]


# --- views ----------------------------------------------------------------------------------


def _reshaped(call: Call) -> list[Tags]:
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


# --- which call is which --------------------------------------------------------------------

_BROADCAST_NAMES = """
    add sub mul div true_divide pow where maximum minimum rsub masked_fill lerp addcmul eq ne lt le gt ge
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__
    add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__
"""
_BROADCAST = frozenset(_BROADCAST_NAMES.split())

_NAMES: dict[Rule, str] = {
    _reshaped: "view reshape flatten unflatten view_as reshape_as",
    _transposed: "transpose permute movedim moveaxis swapaxes swapdims T mT H mH t adjoint",
    _joined: "cat concat concatenate",
    _stacked: "stack",
    _divided: "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind",
    _halved: "glu",
    _indexed: "__getitem__",
    _narrowed: "narrow",
    _selected: "select index_select",
    _squeezed: "squeeze unsqueeze",
    _repeated: "repeat_interleave",
    _tiled: "expand expand_as broadcast_to repeat tile",
    _multiplied: "matmul bmm __matmul__ mm",
    _projected: """linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    _summed: "einsum",
    _attended: "scaled_dot_product_attention",
    _shuffled: "pixel_shuffle pixel_unshuffle",
    _reduced: """mean sum nansum amax amin max min prod std var norm vector_norm logsumexp all any argmax argmin
        median count_nonzero""",
    _lost: """flip fliplr flipud roll rot90 sort argsort topk gather take take_along_dim scatter unfold fold
        channel_shuffle unique diagonal diag index_put masked_select multi_head_attention_forward""",
    _plain: """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty
        new_full""",
}

_RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def rule_of(name: str) -> Rule:
    """Return what a function of torch does to layouts: calls that are not listed keep them."""
    return _RULES.get(name, _kept)
