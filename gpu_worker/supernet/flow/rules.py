"""Which of torch's calls do what to layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.supernet.flow import views
from gpu_worker.supernet.flow.layouts import Call, Layout, Lost, Tags, moved, part_of, scaled, tags_of

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
    return [moved(call.tags, kept) for _ in call.outs]


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
    return [moved(call.tags, order)]


def _joined(call: Call) -> list[Tags]:
    """For a concatenation: the pieces of one tensor, then those of the next."""
    tensors = call.arg(0, "tensors")
    axis = call.arg(1, "dim", call.kwargs.get("axis", 0))
    axis = axis if axis < 0 else axis - call.outs[0].dim()
    tags: Tags = {}
    pieces: list[tuple[int, int]] = []
    for tensor in tensors:
        if tensor.shape == (0,):
            continue  # torch joins an empty list of numbers with anything, as an empty cache is
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
    found = [moved(carried, order) for _, carried in call.given]
    return [found[0]] if all(one == found[0] for one in found) else call.lost()


def _halved(call: Call) -> list[Tags]:
    """For F.glu: one half gates the other."""
    axis = call.axis(call.arg(1, "dim", -1))
    tags = dict(call.tags)
    if axis in tags:
        half = call.outs[0].shape[axis]
        first, second = (part_of(tags[axis], start, half, call.name) for start in (0, half))
        tags[axis] = first if first == second else Lost(call.name)
    return [tags]


def _selected(call: Call) -> list[Tags]:
    axis = call.axis(call.arg(1, "dim"))
    if call.name == "index_select":
        return call.lost() if axis in call.tags else [dict(call.tags)]
    return [moved(call.tags, [a for a in range(-call.x.dim(), 0) if a != axis])]


def _squeezed(call: Call) -> list[Tags]:
    dim = call.arg(1, "dim")
    if call.name == "unsqueeze":
        order: list[int | None] = list(range(-call.x.dim(), 0))
        order.insert(dim % call.outs[0].dim(), None)
        return [moved(call.tags, order)]
    dims = range(call.x.dim()) if dim is None else dim if isinstance(dim, tuple | list) else (dim,)
    gone = {call.axis(d) for d in dims if call.x.shape[d] == 1}
    if gone & set(call.tags):
        return call.lost()
    return [moved(call.tags, [axis for axis in range(-call.x.dim(), 0) if axis not in gone])]


def _repeated(call: Call) -> list[Tags]:
    """For repeat_interleave: each channel several times, one after the other."""
    dim = call.arg(2, "dim")
    times = call.arg(1, "repeats")
    if dim is None or not isinstance(times, int):
        return call.lost()
    tags, axis = dict(call.tags), call.axis(dim)
    if axis in tags:
        tags[axis] = scaled(tags[axis], times)
    return [tags]


def _tiled(call: Call) -> list[Tags]:
    """For expand and repeat: an axis as often as the new size says."""
    out, tags = call.outs[0], {}
    for axis, tag in call.tags.items():
        times, rest = divmod(out.shape[axis], call.x.shape[axis])
        tags[axis] = Lost(call.name) if rest or isinstance(tag, Lost) else tag * times
    return [tags]


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
        return [{-3: scaled(tag, factor)}]
    if any(n % factor or whole % factor for n, whole in tag):
        return call.lost()
    return [{-3: tuple((n // factor, whole // factor) for n, whole in tag)}]


# --- which call is which --------------------------------------------------------------------

_BROADCAST_NAMES = """
    add sub mul div true_divide pow where maximum minimum rsub masked_fill lerp addcmul eq ne lt le gt ge
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__
    add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__
"""
_BROADCAST = frozenset(_BROADCAST_NAMES.split())

_NAMES: dict[Rule, str] = {
    views.reshaped: "view reshape flatten unflatten view_as reshape_as",
    _transposed: "transpose permute movedim moveaxis swapaxes swapdims T mT H mH t adjoint",
    _joined: "cat concat concatenate",
    _stacked: "stack",
    views.divided: "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split",
    views.unbound: "unbind",
    _halved: "glu",
    views.indexed: "__getitem__",
    views.narrowed: "narrow",
    _selected: "select index_select",
    _squeezed: "squeeze unsqueeze",
    _repeated: "repeat_interleave",
    _tiled: "expand expand_as broadcast_to repeat tile",
    _multiplied: "matmul bmm __matmul__ mm",
    _projected: """linear addmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    _summed: "einsum",
    _attended: "scaled_dot_product_attention",
    _shuffled: "pixel_shuffle pixel_unshuffle",
    _reduced: """mean sum nansum amax amin max min prod std var norm vector_norm logsumexp all any argmax
        argmin median count_nonzero""",
    _lost: """flip fliplr flipud roll rot90 sort argsort topk gather take take_along_dim scatter unfold fold
        baddbmm addbmm tensordot cdist outer kron bilinear inner cov channel_shuffle unique diagonal diag
        index_put masked_select multi_head_attention_forward""",
    _plain: """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty
        new_full""",
}

_RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def rule_of(name: str) -> Rule:
    """Return what a function of torch does to layouts: calls that are not listed keep them."""
    return _RULES.get(name, _kept)
