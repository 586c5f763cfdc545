"""What each operation of torch means if some of its inputs are absent.

`apply` runs one operation of torch's dispatcher and marks its outputs. The rules are those of the package's
page: products use zero, reductions the elements present, elementwise operations pass absence on, moves move
it. What has no rule is probed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.proof.absence import UnjudgedError, address, caller, joined, mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gpu_worker.proof.absence import Marks

aten = torch.ops.aten
_Tensors = list[torch.Tensor]


def tensors_in(value: Any) -> _Tensors:
    """Return the tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, one.name) for one in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors_in(one)]
    return []


class OperationCall:
    """One operation with its arguments, of which some elements are absent.

    Attributes:
        func: The overload that torch's dispatcher runs.
        args: As given.
        kwargs: As given.
        marks: Of the pass.
        weights: Addresses of parameters and buffers: they are complete, whatever is cut.
    """

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], marks: Marks, weights: Collection[int]
    ) -> None:
        self.func, self.args, self.kwargs, self.marks, self.weights = func, args, kwargs, marks, weights
        self.tensors = tensors_in((args, kwargs))
        self.sizes = marks.sizes(self.tensors)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return what of a tensor is absent; None if nothing is."""
        return self.marks.of(tensor)

    def filled(self, tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Return the tensor with `value` wherever it is absent."""
        cut = self.cut(tensor)
        return tensor if cut is None else tensor.masked_fill(cut, value)

    def run(self, *args: Any) -> Any:
        """Run the operation, with other leading arguments if any are given."""
        return self.func(*args, *self.args[len(args) :], **self.kwargs)

    def put(self, output: Any, cut: torch.Tensor | None) -> Any:
        """Mark an output and return it."""
        for tensor in tensors_in(output):
            self.marks.put(tensor, cut, self.sizes)
        return output

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a parameter, a buffer, or a view of one."""
        return address(tensor) in self.weights


def apply(call: OperationCall) -> Any:
    """Run an operation some of whose inputs are absent, and mark its outputs.

    Raises:
        UnsliceableError: Present elements would be combined with absent ones.
        UnjudgedError: There is no rule, and probing does not help.
    """
    name = call.func.overloadpacket.__name__
    rule = _RULES.get(name)
    if call.func.namespace not in ("aten", "prims"):
        raise UnjudgedError(f"{caller()}: the custom operation {call.func} is given a size that was cut")
    if rule is not None:
        return rule(call)
    if _is_view(call.func):
        return call.run()
    if torch.Tag.pointwise in call.func.tags:
        return _pointwise(call)
    return _probed(call)


def _is_view(func: Any) -> bool:
    infos = [given.alias_info for given in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


# --- elements one by one ----------------------------------------------------------------------


def _pointwise(call: OperationCall) -> Any:
    output = call.run()
    made = tensors_in(output)
    cut = joined(call.marks, call.tensors, made[0].shape)
    cut = None if cut is None else cut.clone()  # it views the marks that are about to change
    for tensor in made:
        call.marks.put(tensor, cut, call.sizes)
    return output


def _like_first(call: OperationCall) -> Any:
    """An operation whose first output has the absent elements of its first input."""
    cut = call.cut(call.args[0])
    output = call.run()
    call.put(output[0] if isinstance(output, tuple) else output, cut)
    return output


def _glu(call: OperationCall) -> Any:
    x, axis = call.args[0], call.args[1] if len(call.args) > 1 else -1
    first, second = x.chunk(2, axis)
    return call.put(call.run(), joined(call.marks, (first, second), first.shape))


def _copy(call: OperationCall) -> Any:
    target, source = call.args[0], call.args[1]
    cut = call.cut(source)
    call.run()
    call.marks.put(target, cut, call.sizes)
    return target


def _filled_in_place(call: OperationCall) -> Any:
    return call.put(call.run(), None)


def _new(call: OperationCall) -> Any:
    """An operation that uses its input's shape alone."""
    return call.run()


# --- moves ------------------------------------------------------------------------------------


def _moved(call: OperationCall) -> Any:
    """Run the operation on the marks of its first argument, or of all if that is a list."""
    first = call.args[0]
    rest = tensors_in((call.args[1:], call.kwargs))
    if any(call.cut(tensor) is not None for tensor in rest):
        raise UnjudgedError(f"{caller()}: {call.func} is given positions that depend on a size that was cut")

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        cut = call.cut(tensor)
        return torch.zeros_like(tensor, dtype=torch.bool) if cut is None else cut

    moved = call.run(mark(first) if isinstance(first, torch.Tensor) else [mark(one) for one in first])
    output = call.run()
    for tensor, cut in zip(tensors_in(output), tensors_in(moved), strict=True):
        call.marks.put(tensor, cut, call.sizes)
    return output


def _same_elements(call: OperationCall) -> Any:
    """A copy or a reshape: the output has the input's elements, in its own shape."""
    output = call.run()
    source = call.args[0]
    if address(output) == address(source):
        return output
    cut = call.cut(source)
    return call.put(output, None if cut is None else cut.reshape(output.shape))


def _padded(call: OperationCall) -> Any:
    x, pads = call.args[0], call.args[1]
    cut = call.cut(x)
    assert cut is not None, "some input is absent, and there is but one"
    axes = [x.dim() - 1 - i for i in range(len(pads) // 2) if pads[2 * i] or pads[2 * i + 1]]
    output = call.run()
    moved = aten.constant_pad_nd(cut, pads, 0).bool()
    inside = ~aten.constant_pad_nd(torch.zeros_like(cut), pads, 1).bool()
    # What is added to a channel that is absent as a whole is absent too.
    border = cut.all(axes, keepdim=True) if axes else cut
    return call.put(output, torch.where(inside, moved, border.expand(output.shape)))


# --- products ---------------------------------------------------------------------------------


def _product(call: OperationCall, at: int) -> Any:
    """Arguments `at` and the next, (..., n, k) and (..., k, m): a product over the elements present."""
    a, b = call.args[at], call.args[at + 1]
    rows, columns = call.cut(a), call.cut(b)
    cut = _product_cut(call, a, b, rows, columns)
    output = call.run(*call.args[:at], call.filled(a), call.filled(b))
    return call.put(output, cut)


def _product_cut(
    call: OperationCall,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    columns: torch.Tensor | None,
) -> torch.Tensor | None:
    shape = (*a.shape[:-1], b.shape[-1])
    if columns is None and call.is_weight(b):
        return None if rows is None else rows.all(-1, keepdim=True).expand(shape)
    if rows is None and call.is_weight(a):
        return None if columns is None else columns.all(-2, keepdim=True).expand(shape)
    rows = torch.zeros_like(a, dtype=torch.bool) if rows is None else rows
    columns = torch.zeros_like(b, dtype=torch.bool) if columns is None else columns
    here, there = (~rows).double(), (~columns).double()
    pairs = here @ there  # how many pairs of present elements each output has
    halves = here.sum(-1)[..., :, None] + there.sum(-2)[..., None, :] - 2 * pairs
    mixed = (pairs > 0) & (halves > 0)
    # A matrix that is absent as a whole, such as one head's, beside one that is there.
    alone = here.sum((-2, -1)).bool() ^ there.sum((-2, -1)).bool()
    mixed |= alone[..., None, None].expand(mixed.shape)
    if bool(mixed.any()):
        raise mismatch(call.sizes, "multiplies", int(mixed.sum()), mixed.numel())
    return pairs == 0


def _linear(call: OperationCall) -> Any:
    x = call.args[0]
    cut = call.cut(x)
    output = call.run(call.filled(x))
    absent = None if cut is None else cut.all(-1, keepdim=True)
    return call.put(output, None if absent is None else absent.expand(output.shape))


def _convolution(call: OperationCall) -> Any:
    x, weight = call.args[0], call.args[1]
    cut = call.cut(x)
    if cut is None or call.cut(weight) is not None:
        raise UnjudgedError(f"{caller()}: a convolution's weight depends on a size that was cut")
    flat = cut.flatten(2)
    if not torch.equal(flat.any(2), flat.all(2)):
        raise UnjudgedError(f"{caller()}: a convolution is given channels that are cut at some positions")
    groups, output = call.args[8], call.run(call.filled(x))
    of_group = flat[:, :, 0].reshape(len(flat), groups, -1).all(2)  # (B, groups)
    absent = of_group.repeat_interleave(output.shape[1] // groups, 1)
    return call.put(output, absent.reshape(*absent.shape, *[1] * (output.dim() - 2)).expand(output.shape))


# --- reductions -------------------------------------------------------------------------------


def _axes(x: torch.Tensor, given: Any) -> list[int]:
    if given is None or given == []:
        return list(range(x.dim()))
    return [given] if isinstance(given, int) else list(given)


def _given(call: OperationCall, at: int, name: str, default: Any) -> Any:
    return call.args[at] if len(call.args) > at else call.kwargs.get(name, default)


def _reduced(call: OperationCall, value: float, *, divides: bool = False, at: int = 1) -> Any:
    """Reduce over the elements present, with `value` in place of the others; `divides` counts them."""
    x = call.args[0]
    cut = call.cut(x)
    assert cut is not None, "some input is absent, and there is but one"
    named = {argument.name for argument in call.func._schema.arguments}
    axes = _axes(x, _given(call, at, "dim", None) if "dim" in named else None)
    keeps = bool(_given(call, at + 1, "keepdim", False)) if "keepdim" in named else False
    absent = cut.all(axes, keepdim=keeps)
    output = call.run(call.filled(x, value))
    if divides:
        n = (~cut).sum(axes, keepdim=keeps).clamp_min(1).to(x.dtype)
        whole = 1
        for axis in axes:
            whole *= x.shape[axis]
        output = output * (whole / n)
    for tensor in tensors_in(output):
        call.marks.put(tensor, absent, call.sizes)
    return output


def _variance(call: OperationCall) -> Any:
    x = call.args[0]
    axes = _axes(x, _given(call, 1, "dim", None))
    keeps = bool(call.kwargs.get("keepdim", False))
    correction = call.kwargs.get("correction", 1)
    present = _present(call, x)
    n = present.sum(axes, keepdim=True)
    mean = (x * present).sum(axes, keepdim=True) / n.clamp_min(1)
    total = ((x - mean).square() * present).sum(axes, keepdim=keeps)
    n = present.sum(axes, keepdim=keeps)
    output = total / (n - (1 if correction is None else correction)).clamp_min(0)
    name = call.func.overloadpacket.__name__
    if name in ("var_mean", "std_mean"):
        output = (output.sqrt() if name == "std_mean" else output, mean.reshape(n.shape))
    elif name == "std":
        output = output.sqrt()
    return call.put(output, n == 0)


def _softmax(call: OperationCall) -> Any:
    x, axis = call.args[0], call.args[1]
    cut = call.cut(x)
    assert cut is not None, "some input is absent, and there is but one"
    # A row that is absent as a whole must not become NaN.
    used = cut & ~cut.all(axis, keepdim=True)
    return call.put(call.run(x.masked_fill(used, float("-inf"))), cut)


def _present(call: OperationCall, x: torch.Tensor) -> torch.Tensor:
    cut = call.cut(x)
    return torch.ones_like(x) if cut is None else (~cut).to(x.dtype)


def _normalised(x: torch.Tensor, present: torch.Tensor, axes: list[int], eps: float) -> torch.Tensor:
    n = present.sum(axes, keepdim=True).clamp_min(1)
    mean = (x * present).sum(axes, keepdim=True) / n
    variance = ((x - mean).square() * present).sum(axes, keepdim=True) / n
    return (x - mean) / (variance + eps).sqrt()


def _layer_norm(call: OperationCall) -> Any:
    x, shape, weight, bias, eps = call.args
    axes = list(range(x.dim() - len(shape), x.dim()))
    output = call.run()
    found = _normalised(x, _present(call, x), axes, eps)
    found = found if weight is None else found * weight
    call.put(output[0].copy_(found if bias is None else found + bias), call.cut(x))
    return output


def _group_norm(call: OperationCall) -> Any:
    x, weight, bias, n, channels, _, groups, eps = call.args
    output = call.run()
    present = _present(call, x).reshape(n, groups, -1)
    found = _normalised(x.reshape(n, groups, -1), present, [2], eps).reshape(x.shape)
    shape = (1, channels, *[1] * (x.dim() - 2))
    found = found if weight is None else found * weight.reshape(shape)
    call.put(output[0].copy_(found if bias is None else found + bias.reshape(shape)), call.cut(x))
    return output


def _rms_norm(call: OperationCall) -> Any:
    x, shape, weight, eps = call.args
    axes = list(range(x.dim() - len(shape), x.dim()))
    output, present = call.run(), _present(call, x)
    n = present.sum(axes, keepdim=True).clamp_min(1)
    mean = (x.square() * present).sum(axes, keepdim=True) / n
    found = x / (mean + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    call.put(output[0].copy_(found if weight is None else found * weight), call.cut(x))
    return output


# --- what has no rule -------------------------------------------------------------------------

_DRAWS = 3  # a ReLU hides every second change


def _probed(call: OperationCall) -> Any:
    """Find out what the outputs depend on, by changing what is absent, and what is present.

    Raises:
        UnjudgedError: An output depends on both, or it has no numbers to look at.
    """
    generator = torch.Generator().manual_seed(0)

    def changed(*, absent: bool) -> tuple[Any, ...]:
        def change(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(change(one) for one in value)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or call.is_weight(value):
                return value
            cut = call.cut(value)
            noise = 3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            held = torch.zeros_like(value, dtype=torch.bool) if cut is None else cut
            base = call.filled(value)
            return torch.where(held, noise, base) if absent else torch.where(held, base, base + noise)

        return tuple(change(value) for value in call.args)

    def zero(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(zero(one) for one in value)
        return call.filled(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    if any(info is not None for info in (given.alias_info for given in call.func._schema.arguments)):
        raise UnjudgedError(f"{caller()}: {call.func} has no rule for a size that was cut")
    base = call.run(*(zero(value) for value in call.args))
    outputs = tensors_in(base)
    if not outputs or not outputs[0].is_floating_point():
        raise UnjudgedError(f"{caller()}: {call.func} makes numbers of a size that was cut")
    on_absent, on_present = ([torch.zeros_like(out, dtype=torch.bool) for out in outputs] for _ in range(2))
    for _ in range(_DRAWS):
        for is_absent, depends in ((True, on_absent), (False, on_present)):
            found = tensors_in(call.run(*changed(absent=is_absent)))
            for one, out, seen in zip(found, outputs, depends, strict=True):
                seen |= (one != out) & ~(one.isnan() & out.isnan())
    for out, absent, present in zip(outputs, on_absent, on_present, strict=True):
        if not out.is_floating_point():
            continue
        if bool((absent & present).any()):
            raise UnjudgedError(
                f"{caller()}: {call.func} mixes elements that are kept with elements that are cut; give the "
                "layer a reference (gpu_worker.proof.references)"
            )
        call.marks.put(out, absent, call.sizes)
    return base


_RULES: dict[str, Callable[[OperationCall], Any]] = {
    **dict.fromkeys(("copy_",), _copy),
    # One by one, though torch does not tag it; flat below -3, where a probe sees no dependence.
    **dict.fromkeys(("hardswish", "hardswish_"), _pointwise),
    **dict.fromkeys(("fill_", "zero_", "normal_", "uniform_"), _filled_in_place),
    **dict.fromkeys(
        (
            "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
            "new_ones", "new_empty", "new_full", "new_empty_strided", "sym_size", "sym_stride", "sym_numel",
        ),
        _new,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
            "_batch_norm_no_update", "cudnn_batch_norm", "tril", "triu", "cumsum_",
        ),
        _like_first,
    ),
    **dict.fromkeys(
        ("cat", "stack", "index_select", "index", "gather", "repeat", "flip", "roll", "pixel_shuffle",
         "pixel_unshuffle", "channel_shuffle", "unfold_copy"),
        _moved,
    ),
    **dict.fromkeys(("clone", "_to_copy", "contiguous", "_unsafe_view", "_reshape_copy"), _same_elements),
    "glu": _glu,
    "constant_pad_nd": _padded,
    "mm": lambda call: _product(call, 0),
    "bmm": lambda call: _product(call, 0),
    "addmm": lambda call: _product(call, 1),
    "baddbmm": lambda call: _product(call, 1),
    "linear": _linear,
    "convolution": _convolution,
    "sum": lambda call: _reduced(call, 0.0),
    "mean": lambda call: _reduced(call, 0.0, divides=True),
    "amax": lambda call: _reduced(call, float("-inf")),
    "amin": lambda call: _reduced(call, float("inf")),
    "max": lambda call: _reduced(call, float("-inf")),
    "min": lambda call: _reduced(call, float("inf")),
    "logsumexp": lambda call: _reduced(call, float("-inf")),
    "linalg_vector_norm": lambda call: _reduced(call, 0.0, at=2),
    "var": _variance,
    "std": _variance,
    "var_mean": _variance,
    "std_mean": _variance,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "_safe_softmax": _softmax,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_fused_rms_norm": _rms_norm,
}  # fmt: skip
