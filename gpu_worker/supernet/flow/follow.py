"""Flow: a pass in which every call is followed."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from gpu_worker.supernet.flow.layouts import Call, Lost, NeedsWhole, Whole, tags_of, tensors_in
from gpu_worker.supernet.flow.rules import rule_of
from gpu_worker.supernet.operators import ElasticOperator, Operator, Switched, recurrent, slices
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from gpu_worker.supernet.flow.layouts import Layout, Tags
    from gpu_worker.supernet.operators import Cursor
    from gpu_worker.supernet.operators.base import Spans

Shapes = dict[tuple[str, int], tuple[str, Whole]]
"""What each call gave: by the path of the module that made it and its number there, its name and shapes."""

_APPENDS = -1
"""In place of a call's number: what a block does with its input."""

_UNKNOWN = Whole((), (), {})

_ADDING = frozenset(
    {
        "add",
        "add_",
        "__add__",
        "__radd__",
        "__iadd__",
        "sub",
        "sub_",
        "__sub__",
        "__isub__",
        "rsub",
        "__rsub__",
    }
)


_ASKING = frozenset(
    """
    shape size dim ndim numel stride dtype device layout is_cuda is_meta is_sparse is_quantized is_nested
    is_contiguous is_floating_point is_complex is_inference requires_grad data_ptr _version item tolist
    """.split()  # noqa: SIM905  as many words as lines otherwise
)
"""Calls that give no tensor: most of those of a pass."""


class _LeftOut(NamedTuple):
    """Marks what came back from a block that was left out: the block, its input, and what that came of.

    Tensors by weak references, as everywhere here: a pass frees what it no longer needs.
    """

    path: str
    inputs: tuple[weakref.ref[torch.Tensor], ...]


class Flow(TorchFunctionMode):
    """Active during a pass: follows layouts through every call, and notes what each operator is given.

    Attributes:
        is_paused: Whether what runs is no part of the pass.
        layouts: Spans of the whole layer's inputs, by the operator's place, where they are not the first.

    Args:
        model: What runs.
        cursor: Of its operators.
        whole: What each call gave in the whole network; None if that is not known.
        is_whole: Whether this is a pass of the whole network: `whole` is filled.
    """

    def __init__(
        self, model: nn.Module, cursor: Cursor, whole: Shapes | None, *, is_whole: bool = False
    ) -> None:
        super().__init__()
        self.layouts: dict[int, Spans] = {}
        self._model, self._cursor, self._whole, self._is_whole = model, cursor, whole, is_whole
        self.is_paused = False
        self._inside: list[str] = [""]
        self._calls: dict[str, int] = {}
        self._used: dict[int, Spans | None] = {}

    @property
    def path(self) -> str:
        """The module that is running, or in which the pass ended with an error."""
        return self._inside[-1]

    def __enter__(self) -> Flow:
        self._hooks = [
            hook for path, module in self._model.named_modules() for hook in self._hooked(path, module)
        ]
        self._cursor.flow = self
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's
        self._cursor.flow = None
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name in _ASKING or self.is_paused:
            return func(*args, **kwargs)
        given = list(tensors_in((*args, *kwargs.values())))
        if name in _ADDING:
            _refuse_twice(given)
        before = [(tensor, tags_of(tensor)) for tensor in given]
        out = func(*args, **kwargs)
        outs = list(tensors_in((out,)))
        if not outs:
            if name == "__setitem__" and any(tags for _, tags in before):
                # Which channels these are depends on where they were put.
                _tag(args[0], dict.fromkeys(range(-args[0].dim(), 0), Lost("an assignment")))
            return out
        whole = self._note(name, Whole(tuple(tuple(tensor.shape) for tensor in outs), args[1:], kwargs))
        _carry_marks(given, outs)
        if any(tags for _, tags in before):
            call = Call(name, args, kwargs, before, outs, whole)
            for tensor, tags in zip(outs, rule_of(name)(call), strict=True):
                _tag(tensor, call.checked(tensor, tags))
        elif any(map(tags_of, outs)):  # an output that is a tensor written into
            for tensor in outs:
                _tag(tensor, {})
        return out

    def _note(self, name: str, found: Whole) -> Whole | None:
        """Note a call, and return the same one in the whole network; None if that has not been looked at."""
        path = self._inside[-1]
        number = self._calls[path] = self._calls.get(path, 0) + 1
        if self._whole is None:
            return None
        if self._is_whole:
            self._whole[path, number] = (name, found.without_tensors())
        same, whole = self._whole.get((path, number), ("", _UNKNOWN))
        return whole if same == name and len(whole.shapes) == len(found.shapes) else _UNKNOWN

    # --- modules ----------------------------------------------------------------------------

    def _hooked(self, path: str, module: nn.Module) -> Iterator[Any]:
        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.is_paused:
                return
            self._inside.append(path)
            self._calls[path] = 0
            if isinstance(module, Operator):
                self._given(module, next(tensors_in((*args, *kwargs.values())), None))

        def leave(_module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if self.is_paused:
                return
            self._inside.pop()
            given = next(tensors_in((*args, *kwargs.values())), None)
            if isinstance(module, Switched) and self._is_whole and self._whole is not None:
                self._whole[path, _APPENDS] = ("appends", Whole(_appended(given, out), (), {}))
            if isinstance(module, Operator):
                _tag_outputs(module, given, list(tensors_in((out,))))

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def _given(self, op: Operator, x: torch.Tensor | None) -> None:
        """Note which inputs of the whole layer an operator is given.

        Raises:
            ConfigError: It is given a part of them, and not known which.
        """
        whole = whole_inputs_of(op)
        if x is None or whole is None or x.dim() < -op.channel_axis:
            return
        axis = op.channel_axis if op.channel_axis < 0 else op.channel_axis - x.dim()
        layout = tags_of(x).get(axis)
        if self._is_whole and self._whole is not None:
            self._whole[op.path, 0] = ("given", Whole(((x.shape[axis],),), (), {}))
        if layout is None:
            self._refuse_unseen(op, x.shape[axis], whole)
            self._use(op, ((0, x.shape[axis]),))
            return
        if isinstance(layout, Lost):
            n = f"{x.shape[axis]}" + (f" of {whole}" if x.shape[axis] != whole else "")
            raise ConfigError(
                f"{op.path}: given {n} inputs through {layout.by}, and it is not known which they are: "
                f"{_ADVICE}"
            )
        if sum(total for _, total in layout) != whole:
            if self._whole is None:
                raise NeedsWhole  # of blocks that are left out, and would have appended to this
            raise ConfigError(
                f"{op.path}: given {x.shape[axis]} inputs that are {_words(layout)} of the whole network's, "
                f"for its {whole}: {_ADVICE}"
            )
        self._use(op, _spans(layout))

    def _use(self, op: Operator, spans: Spans) -> None:
        """Have an operator use these inputs of the whole layer, in this pass and those that are like it."""
        is_first = len(spans) <= 1 and all(start == 0 for start, _ in spans)
        before = self._used.setdefault(op.place, None if is_first else spans)
        if before != (None if is_first else spans):
            raise ConfigError(
                f"{op.path}: called more than once in a pass, with other parts of its inputs each time, of "
                "which later passes would know one: leave the layers before it whole"
            )
        if not is_first:
            op.is_joined = True
            self.layouts[op.place] = spans

    def _refuse_unseen(self, op: Operator, n: int, whole: int) -> None:
        """Raise ConfigError if a part came about where no call was seen, unless it is the model's input."""
        if n >= whole:
            return
        if self._whole is None:
            raise NeedsWhole
        if self._whole.get((op.path, 0), ("", _UNKNOWN))[1].shapes != ((n,),):
            raise ConfigError(
                f"{op.path}: given {n} of {whole} inputs, which came by no call of torch that is seen "
                "(numpy, a scripted function, an own kernel), or since a block was left out that changes "
                "their number: leave the layers before it whole, or that block in"
            )

    # --- blocks that are left out ---------------------------------------------------------------

    @contextlib.contextmanager
    def apart(self, path: str) -> Iterator[None]:
        """Count the calls within as those of no module: the whole network does not make them."""
        self._inside.append(f"{path}, left out")
        try:
            yield
        finally:
            self._inside.pop()

    def left_out(self, path: str, stands: Any) -> Any:
        """Return what stands for a block that is left out, marked, so that adding it to its input is seen."""
        if not isinstance(stands, torch.Tensor):
            return stands
        alias = stands.view_as(stands)
        tags = dict(tags_of(stands))
        for axis, more in (self._whole or {}).get((path, _APPENDS), ("", _UNKNOWN))[1].shapes:
            before = tags.get(axis, ((stands.shape[axis], stands.shape[axis]),))
            tags[axis] = before if isinstance(before, Lost) else (*before, (0, more))
        _tag(alias, tags)
        inputs = (weakref.ref(stands), *getattr(stands, "_superserve_of", ()))
        alias._superserve_left_out = _LeftOut(path, inputs)  # type: ignore[attr-defined]  # ours
        return alias


_ADVICE = (
    "declare fused outputs with Elastic(parts=), compute sizes from the shape instead of constants, "
    "or leave the layers before it whole"
)

_FEW = 6  # calls back that an input is followed, to a norm before the block or what was added to it


def _appended(given: torch.Tensor | None, out: object) -> tuple[tuple[int, int], ...]:
    """Return the axis along which a block appends to its input, as a dense net's do, and by how much."""
    if not isinstance(out, torch.Tensor) or given is None or given.dim() != out.dim():
        return ()
    longer = [axis for axis in range(-out.dim(), 0) if out.shape[axis] != given.shape[axis]]
    if len(longer) != 1 or out.shape[longer[0]] < given.shape[longer[0]]:
        return ()
    (axis,) = longer
    n = given.shape[axis]
    is_first = torch.equal(out.narrow(axis, 0, n), given)
    return ((axis, out.shape[axis] - n),) if is_first else ()


def _name_of(func: Any) -> str:
    """Return a function's name: of a property `x.T` and of an overload `aten.relu.default` too."""
    name: str = getattr(func, "__name__", type(func).__name__)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name.partition(".")[0]


def _tag(tensor: torch.Tensor, tags: Tags) -> None:
    if tags or hasattr(tensor, "_superserve_tags"):
        tensor._superserve_tags = tags  # type: ignore[attr-defined]  # ours, and gone with the tensor


def _refuse_twice(given: list[torch.Tensor]) -> None:
    """Raise ConfigError if a caller adds to a tensor what stands for a block that was given it."""
    for tensor in given:
        mark: _LeftOut | None = getattr(tensor, "_superserve_left_out", None)
        if mark is not None and any(other is one() for other in given for one in mark.inputs):
            raise ConfigError(
                f"{mark.path}: when it is left out it gives back its input, and its caller adds that to the "
                'same input once more: give its stage skipped="zero"'
            )


def _carry_marks(given: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
    """Carry marks, and which tensors an output came of, through calls that change numbers one by one."""
    if len(outs) != 1:
        return
    out, same = outs[0], [tensor for tensor in given if tensor.shape == outs[0].shape]
    marks = [mark for tensor in same if (mark := getattr(tensor, "_superserve_left_out", None)) is not None]
    if len(same) == 1 and same[0] is not out:
        if marks:
            out._superserve_left_out = marks[0]  # type: ignore[attr-defined]  # ours
        out._superserve_of = (weakref.ref(same[0]), *getattr(same[0], "_superserve_of", ()))[:_FEW]  # type: ignore[attr-defined]


# --- operators ------------------------------------------------------------------------------


def whole_inputs_of(op: Operator) -> int | None:
    """Return the inputs of the whole layer; None if no part of them is ever given."""
    return op.whole_inputs if op.follows_inputs else None


def _spans(layout: Layout) -> Spans:
    """Return the pieces of a layout as spans, adjacent ones as one."""
    found: list[tuple[int, int]] = []
    start = 0
    for n, whole in layout:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + n)
        elif n:
            found.append((start, n))
        start += whole
    return tuple(found)


def _words(layout: Layout) -> str:
    pieces = [f"{n} of {whole}" for n, whole in layout[:4]]
    return ", ".join(pieces) + (", ..." if len(layout) > 4 else "")


def _tag_outputs(op: Operator, x: torch.Tensor | None, outs: list[torch.Tensor]) -> None:
    """Tag what an operator gives: with what it keeps, or with what it was given."""
    if x is None:
        return
    for out in outs:
        for mark in ("_superserve_left_out", "_superserve_of"):
            if hasattr(out, mark) and isinstance(op, ElasticOperator):
                delattr(out, mark)
    layout = _outputs_of(op, x)
    given = tags_of(x)
    for number, out in enumerate(outs):
        if out.dim() < -op.channel_axis:
            continue  # what else a packed sequence holds
        axis = op.channel_axis if op.channel_axis < 0 else op.channel_axis - out.dim()
        if not isinstance(op, ElasticOperator) or op.passes_channels:
            _tag(out, dict(given))
            continue
        kept = (
            layout[:1] if isinstance(op, recurrent.SlicedRecurrent) and number else layout
        )  # a state's units
        # Other axes are as they were in a linear layer, and a convolution's batch.
        tags: Tags = {
            a: tag
            for a, tag in given.items()
            if a != axis and out.dim() == x.dim() and out.shape[a] == x.shape[a]
        }
        if any(n != whole for n, whole in kept):
            tags[axis] = kept
        _tag(out, tags)


def _outputs_of(op: Operator, x: torch.Tensor) -> Layout:
    if not isinstance(op, ElasticOperator) or not op.gives_channels:
        return ()
    if isinstance(op, slices.Grouped) and op.groups > 1:
        inputs = tags_of(x).get(op.channel_axis)
        if inputs is None or isinstance(inputs, Lost):
            return ()
        a_group, outputs = op.whole_group
        return tuple((n // a_group * outputs, whole // a_group * outputs) for n, whole in inputs)
    setting: int = op.cursor.settings[op.place]
    kept = op.whole_parts
    least = min(kept)
    return tuple((min(setting, least) * (size // least), size) for size in kept)
