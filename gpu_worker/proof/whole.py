"""The whole network as an oracle: the model from before insertion, at full width, with absent elements."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpu_worker.proof.absence import Marks, UnjudgedError, UnsliceableError, address, caller
from gpu_worker.proof.flow import BlockCall, DataFlow, is_soft
from gpu_worker.proof.references import ReferenceCall, axis_of, reference_of
from gpu_worker.proof.rules import OperationCall, apply, tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gpu_worker.supernet.original import Original

    MeanAndVariance = tuple[torch.Tensor, torch.Tensor]


class LayerRun(NamedTuple):
    """One call of a layer.

    Attributes:
        path: Of the layer.
        outputs: Of its tensors, what is present.
        shapes: Of its whole tensors.
        sizes: The elastic sizes that are cut in it or in its inputs.
    """

    path: str
    outputs: tuple[torch.Tensor, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[str, ...]


@dataclass(slots=True)
class SubnetCut:
    """One subnet, for the oracle.

    Attributes:
        left_out: Paths of the blocks that do not run.
        kept: Outputs kept, by the name of an elastic size.
        statistics: From a norm's path and how many of its channels are present to their mean and variance,
            (channels,) each; None where the norm's own are used.
    """

    left_out: frozenset[str] = frozenset()
    kept: Mapping[str, int] = field(default_factory=dict)
    statistics: Callable[[str, int], MeanAndVariance | None] | None = None


@dataclass(slots=True)
class OracleRun:
    """What a pass of the oracle gave.

    Attributes:
        layers: Calls of layers, in order.
        output: The tensors of the model's output, as one call.
        channels: Of each norm that ran, how many are present.
        n_calls: Of each block, how often it was called.
        outside: Of each layer whose parameter was used outside of its forward, where.
        rounding: Of the lowest precision to which the model casts numbers on its own; 0 if it does not.
    """

    layers: list[LayerRun] = field(default_factory=list)
    output: LayerRun = field(default_factory=lambda: LayerRun("", (), (), ()))
    channels: dict[str, int] = field(default_factory=dict)
    n_calls: dict[str, int] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    rounding: float = 0.0


class _Pass(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Sees every operation of one pass."""

    def __init__(self, owners: Mapping[int, tuple[str, ...]], flow: DataFlow | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.marks, self.run, self.stack = Marks(), OracleRun(), list[str]()
        self.blocks: list[str] = []
        self._owners, self._flow = owners, flow

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = OperationCall(func, args, kwargs or {}, self.marks, self._owners)
        self._look_for_outside_use(call)
        before = [self._flow.node(tensor) for tensor in call.tensors] if self._flow is not None else []
        has_cut = any(self.marks.of(tensor) is not None for tensor in call.tensors)
        output = apply(call) if has_cut else call.run()
        if call.sizes and not has_cut and is_soft(func):
            # The whole part of a fused layer's outputs: it must not meet the part that is cut.
            for tensor in tensors_in(output):
                self.marks.touch(tensor, call.sizes)
        if func.overloadpacket.__name__ == "_to_copy":
            self.run.rounding = max(self.run.rounding, _rounding(args[0], output))
        if self._flow is not None:
            where = caller() if len(call.tensors) > 1 else ""
            self._flow.step(
                func, call.tensors, before, tensors_in(output), blocks=tuple(self.blocks), where=where
            )
        return output

    def _look_for_outside_use(self, call: OperationCall) -> None:
        for tensor in call.tensors:
            owners = self._owners.get(address(tensor), ())
            if owners and not any(owner in self.stack for owner in owners):
                for owner in owners:
                    self.run.outside.setdefault(owner, caller())


def _rounding(given: torch.Tensor, output: torch.Tensor) -> float:
    """Return the relative rounding of a cast to a lower precision; 0 for any other."""
    if not (given.is_floating_point() and output.is_floating_point()):
        return 0.0
    found = torch.finfo(output.dtype).eps
    return found if found > torch.finfo(given.dtype).eps else 0.0


class WholeNetwork:
    """The model from before insertion, with the data of a supernet.

    Args:
        original: What insertion remembers.
        tensors: Parameters and buffers by name; the oracle uses them, and changes none.
        operators: What the model's layers became, by path: they may bring a reference.
    """

    def __init__(
        self, original: Original, tensors: Mapping[str, torch.Tensor], operators: Mapping[str, nn.Module]
    ) -> None:
        assert original.model is not None, "the caller has looked"
        self.model = filled(original.model, tensors).eval()
        self._stages, self._sizes = original.stages, original.sizes
        self._size_of = {path: name for name, size in original.sizes.items() for path in size.layers}
        self._stage_of = {
            member: stage
            for stage in original.stages
            for path in stage.blocks
            for member in members_of(self.model, path)
        }
        self._operators = operators
        self._owners = _owners(self.model)
        self._answers: dict[str, _Answer] = {}
        self._pass: _Pass | None = None
        self._cut = SubnetCut()
        for path, module in self.model.named_modules(remove_duplicate=True):
            if type(module).forward is not nn.Module.forward:
                self._watch(path, module)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cut: SubnetCut, flow: DataFlow | None = None
    ) -> OracleRun:
        """Run a subnet of it.

        Raises:
            ProofError: What is cut meets what is kept, or there is no rule for an operation.
        """
        self._cut, self._pass = cut, _Pass(self._owners, flow)
        try:
            with torch.no_grad(), _plain_attention(), self._pass as found:
                output = self.model(*args, **kwargs)
                ran: OracleRun = found.run
                ran.output = self._ran("", output, ())
                return ran
        finally:
            self._pass = None

    # --- watching modules ---------------------------------------------------------------------

    def _watch(self, path: str, module: nn.Module) -> None:
        """Have a module report its calls, by its instance's forward: then `module.forward(x)` counts too."""
        is_layer = not any(True for _ in module.children()) or path in self._size_of
        is_layer = is_layer and (path in self._size_of or any(True for _ in module.parameters()))

        def forward(*args: Any, **kwargs: Any) -> Any:
            found = self._pass
            assert found is not None, "only `run` calls it"
            found.stack.append(path)
            try:
                output = self._call(path, module, args, kwargs)
            finally:
                found.stack.pop()
            if is_layer and path not in self._cut.left_out:
                ran = self._ran(path, output, (args, kwargs))
                found.run.layers.append(ran)
            return output

        module.forward = forward

    def _ran(self, path: str, output: Any, inputs: Any) -> LayerRun:
        with _disable_current_modes():
            return self._noted(path, output, inputs)

    def _noted(self, path: str, output: Any, inputs: Any) -> LayerRun:
        found = self._pass
        assert found is not None, "it is called in a pass"
        outputs = tensors_in(output)
        sizes = found.marks.sizes([*tensors_in(inputs), *outputs])
        if path in self._size_of:
            sizes.add(self._size_of[path])
        return LayerRun(
            path,
            tuple(present(tensor, found.marks.of(tensor)) for tensor in outputs),
            tuple(tuple(tensor.shape) for tensor in outputs),
            tuple(sorted(sizes)),
        )

    def _call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if path in self._stage_of:
            return self._call_block(path, module, args, kwargs)
        name = self._size_of.get(path)
        kept = None if name is None else self._cut.kept.get(name)
        if isinstance(module, _BatchNorm):
            return self._call_norm(path, module, args[0] if args else kwargs["input"])
        brought = reference_of(module, self._operators.get(path))
        if brought is None or (kept is None and not self._is_cut((args, kwargs))):
            output = type(module).forward(module, *args, **kwargs)
            if name is not None and kept is not None:
                self._mark(path, output, axis_of(module), kept)
            return output
        if brought.is_followed:
            return brought.compute(module, ReferenceCall(args, kwargs, (), kept))
        with _disable_current_modes():  # a reference says itself what is absent
            output = brought.compute(module, self._reference_call(args, kwargs, kept))
        if name is not None and kept is not None and brought.count is not None:
            n = brought.count(module)
            for tensor in tensors_in(output):
                self._put(tensor, torch.arange(tensor.shape[-1]) % n >= kept, name)
        return output

    def _is_cut(self, values: Any) -> bool:
        assert self._pass is not None, "it is called in a pass"
        return any(self._pass.marks.of(tensor) is not None for tensor in tensors_in(values))

    def _mark(self, path: str, output: torch.Tensor, axis: int | None, kept: int) -> None:
        """Mark the outputs that a subnet does not keep: the last ones, of each part."""
        if axis is None:
            raise UnjudgedError(
                f"layer {path}: it is not known along which axis its outputs lie: give its type a reference "
                "(gpu_worker.proof.references)"
            )
        name = self._size_of[path]
        number = _cut_outputs(self._sizes[name].parts, output.shape[axis], kept)
        self._put(output, number.reshape(-1, *[1] * (-axis - 1)), name)

    def _put(self, output: torch.Tensor, cut: torch.Tensor, name: str) -> None:
        assert self._pass is not None, "it is called in a pass"
        marks = self._pass.marks
        before, cut = marks.of(output), cut.expand(output.shape)
        marks.put(output, cut if before is None else cut | before, {name})

    def _reference_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], kept: int | None
    ) -> ReferenceCall:
        assert self._pass is not None, "it is called in a pass"
        marks = self._pass.marks

        def filled(value: Any) -> Any:
            cut = marks.of(value) if isinstance(value, torch.Tensor) else None
            return value if cut is None else value.masked_fill(cut, 0)

        absent = tuple(marks.of(value) if isinstance(value, torch.Tensor) else None for value in args)
        return ReferenceCall(
            tuple(map(filled, args)), {name: filled(value) for name, value in kwargs.items()}, absent, kept
        )

    def _call_norm(self, path: str, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the subnet's own statistics, each channel that is present by its own."""
        found = self._pass
        assert found is not None, "it is called in a pass"
        cut = found.marks.of(x)
        present = torch.ones(x.shape[1], dtype=torch.bool)
        if cut is not None:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            present = ~cut.all(axes)
        n = found.run.channels[path] = int(present.sum())
        given = None if self._cut.statistics is None else self._cut.statistics(path, n)
        output: torch.Tensor
        if given is None:
            output = type(norm).forward(norm, x)
            return output
        mean, variance = torch.zeros(len(present), dtype=x.dtype), torch.ones(len(present), dtype=x.dtype)
        mean[present], variance[present] = given[0].to(x.dtype), given[1].to(x.dtype)
        if norm.running_mean is None:
            return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
        own = norm.running_mean, norm.running_var
        norm.running_mean, norm.running_var = mean, variance
        try:
            output = type(norm).forward(norm, x)
        finally:
            norm.running_mean, norm.running_var = own
        return output

    # --- blocks -------------------------------------------------------------------------------

    def _call_block(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._pass
        assert found is not None, "it is called in a pass"
        found.run.n_calls[path] = found.run.n_calls.get(path, 0) + 1
        if path in self._cut.left_out:
            return self._left_out(path, block, args, kwargs)
        flow = found._flow
        given = tensors_in(_first_argument(block, args, kwargs))
        node = flow.node(given[0]) if flow is not None and given else None
        found.blocks.append(path)
        try:
            output = type(block).forward(block, *args, **kwargs)
        finally:
            found.blocks.pop()
        returned = tensors_in(output)
        if path not in self._answers and given and returned:
            with _disable_current_modes():
                self._answers[path] = _answer(given[0], output)
        if flow is not None and node is not None and returned:
            flow.calls.append(BlockCall(path, node, flow.node(returned[0])))
        return output

    def _left_out(self, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = self._stage_of[path]
        if callable(stage.skipped):
            return stage.skipped(*args, **kwargs)
        x = _first_argument(block, args, kwargs)
        seen = self._answers.get(path)
        if seen is None or not isinstance(x, torch.Tensor):
            raise UnjudgedError(
                f"block {path}: expected a tensor as its first argument and in what it returns: give "
                "Stage(..., skipped=a function)"
            )
        given = torch.zeros_like(x) if stage.skipped == "zero" else x
        # At another resolution than the whole network's the shapes are others, and the block keeps them too.
        if x.shape != seen.shape and seen.given != seen.shape:
            if seen.appends is None or stage.skipped == "zero":
                raise UnsliceableError(
                    f"block {path}: it turns {tuple(x.shape)} into {tuple(seen.shape)}, so that what "
                    "follows would be given another shape if it is left out: keep it in every subnet, or "
                    "give Stage(..., skipped=a function)"
                )
            given = self._without_what_is_appended(x, seen.shape, seen.appends)
        if seen.kind is None:
            return given
        if not seen.is_alone:
            raise UnjudgedError(
                f"block {path}: it returns several values: give Stage(..., skipped=a function) that returns "
                "as many when the block is left out"
            )
        return seen.kind([given, *[None] * (seen.n - 1)])

    def _without_what_is_appended(self, x: torch.Tensor, shape: torch.Size, axis: int) -> torch.Tensor:
        """Return the input in the shape of the output: what a dense block appends to it is absent."""
        assert self._pass is not None, "it is called in a pass"
        marks = self._pass.marks
        with _disable_current_modes():
            n, before = x.shape[axis], marks.of(x)
            given, cut = x.new_zeros(shape), torch.ones(shape, dtype=torch.bool)
            given.narrow(axis, 0, n).copy_(x)
            cut.narrow(axis, 0, n).copy_(torch.zeros(()) if before is None else before)
            marks.put(given, cut, marks.sizes([x]))
        return given


def _first_argument(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block's forward has first, by position or by name."""
    if args:
        return args[0]
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    return next((kwargs[name] for name in names if name in kwargs), next(iter(kwargs.values()), None))


class _Answer(NamedTuple):
    """What a block returned in the whole network.

    Attributes:
        given: The shape of its first argument.
        shape: Of its first tensor.
        kind: Tuple or list, if it is in one.
        n: How many values that has.
        is_alone: Whether all others are None.
        appends: The axis along which the first tensor is the block's input and more, if it is that.
    """

    given: torch.Size
    shape: torch.Size
    kind: type | None
    n: int
    is_alone: bool
    appends: int | None


def _answer(given: torch.Tensor, output: Any) -> _Answer:
    first = tensors_in(output)[0]
    kind = type(output) if isinstance(output, tuple | list) else None
    is_alone = kind is None or (kind in (tuple, list) and all(value is None for value in output[1:]))
    longer = [i for i in range(min(given.dim(), first.dim())) if first.shape[i] > given.shape[i]]
    appends = None
    if given.dim() == first.dim() and len(longer) == 1:
        head = first.narrow(longer[0], 0, given.shape[longer[0]])
        appends = longer[0] if torch.equal(head, given) else None
    return _Answer(given.shape, first.shape, kind, 1 if kind is None else len(output), is_alone, appends)


def filled(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a model without data, with these tensors in it."""
    memo: dict[int, Any] = {}
    for name, empty in tensors_of(model).items():
        found = tensors.get(name)
        if found is None or found.shape != empty.shape:
            raise UnjudgedError(
                f"tensor {name}: expected the shape {tuple(empty.shape)} from before insertion, got "
                f"{None if found is None else tuple(found.shape)}: prove a supernet before it is trimmed"
            )
        memo[id(empty)] = found
    return copy.deepcopy(model, memo)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name; one that has several names by each."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _owners(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return, by address, the paths of the modules that have a parameter or buffer."""
    found: dict[int, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.numel():
                found[address(tensor)] = (*found.get(address(tensor), ()), path)
    return found


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Have attention run as products and a softmax, which have rules, and not as one kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def present(output: torch.Tensor, absent: torch.Tensor | None) -> torch.Tensor:
    """Return a copy of the elements present, in order; with their axes if whole rows of these are absent."""
    if absent is None:
        return output.clone()
    here = ~absent
    for axis in range(output.dim()):
        others = [other for other in range(output.dim()) if other != axis]
        kept = here.any(others) if others else here
        if not bool(kept.all()):
            rows = kept.nonzero().flatten()
            output, here = output.index_select(axis, rows), here.index_select(axis, rows)
    return output if bool(here.all()) else output[here]


def _cut_outputs(parts: int | tuple[int, ...], n: int, kept: int) -> torch.Tensor:
    """Return which of n outputs are cut, (n,), if the smallest part keeps its first `kept`."""
    sizes = (n // parts,) * parts if isinstance(parts, int) else parts or (n,)
    least = min(sizes)
    return torch.cat([torch.arange(size) >= kept * size // least for size in sizes])


def members_of(model: nn.Module, path: str) -> list[str]:
    """Return what is called of a block: itself, or the members of a list, which is never called."""
    block = model.get_submodule(path)
    if not isinstance(block, nn.ModuleList | nn.ModuleDict):
        return [path]
    return [member for name, _ in block.named_children() for member in members_of(model, f"{path}.{name}")]
