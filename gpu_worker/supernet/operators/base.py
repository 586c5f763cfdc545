"""What every operator has: a cursor, its place in the settings, its path in the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    Settings = tuple[Any, ...]
    Spans = tuple[tuple[int, int], ...]
    Layouts = Mapping[int, Spans]


class Cursor:
    """What all operators of one supernet read.

    Attributes:
        settings: What the running forward pass uses, one entry an operator.
        layouts: What the running forward pass gives to the operators whose inputs are not the first of
            the whole layer's, by their place: spans of the whole layer's inputs, each (start, length).
        chosen: What the next forward pass will use. Actuation is one store of it, and a pass takes it
            over once, at its start; so no pass is half of one subnet and half of another.
        flow: Follows the running pass, in a subnet's first one.
        is_moved: Whether an operator has met other parameters since the supernet noted where they are.
    """

    __slots__ = ("chosen", "flow", "is_moved", "layouts", "settings")

    def __init__(self, chosen: Prepared) -> None:
        self.chosen = chosen
        self.settings = chosen.settings
        self.layouts: Layouts = {}
        self.is_moved = True
        self.flow: Any = None

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
    """What every operator has beside its layer: a cursor, its place in the settings, its path.

    An operator keeps views of its parameters. Before it uses one it looks whether its parameters are the
    tensors that they were: a new parameter, `torch.func.functional_call` and weights that are computed for
    each pass leave views of old numbers. `p.data = ...` keeps the tensor and moves it: a supernet looks once
    a pass whether any has moved.
    """

    channel_axis: ClassVar[int] = 1
    watched: tuple[str, ...] = ("weight", "bias")
    cursor: Cursor
    place: int
    path: str
    whole_inputs: int
    """Inputs of the whole layer, also after a trim."""
    follows_inputs = True
    """Whether a part of its inputs may be given to it."""
    is_joined = False
    """Whether in some subnet its inputs are not the first of the whole layer's: `cursor.layouts` has them."""

    def attach(self, cursor: Cursor, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.cursor, self.place, self.path = cursor, place, path
        self.whole_inputs = self.n_inputs
        self.renew()

    @property
    def n_inputs(self) -> int:
        """Inputs of the layer."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop everything that looks into parameters: they have moved, or changed."""

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies of parameters that it keeps."""
        return 0

    @property
    def spans(self) -> Spans | None:
        """Which of the whole layer's inputs the running pass gives; None for the first ones."""
        return self.cursor.layouts.get(self.place) if self.is_joined else None

    def look(self) -> None:
        """Drop the views unless the parameters are the tensors of which they are views."""
        held = self.held
        for i, tensor in enumerate(self._now()):
            if tensor is not held[i]:
                self.renew()
                return

    def _now(self) -> Sequence[torch.Tensor | None]:
        """Return the parameters watched; by the dictionary, as torch's attribute takes five times as long."""
        found = self.__dict__["_parameters"]
        return [found.get(name) for name in self.watched]

    def _used(self) -> Sequence[torch.Tensor | None]:
        """Return what the watched names give, parameters or not."""
        return [getattr(self, name, None) for name in self.watched]

    def renew(self) -> None:
        """Drop all views, and note of which parameters the next ones will be."""
        self.forget()
        # What a hook or a parametrization computes is no parameter, and may be another tensor each time.
        self.held: tuple[Any, ...] = tuple(
            _COMPUTED if tensor is None and used is not None else tensor
            for tensor, used in zip(self._now(), self._used(), strict=True)
        )
        self.cursor.is_moved = True

    # Moving a module to a device or a dtype replaces its parameters.
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[misc]  # an nn.Module's, beside which this is mixed in
        self.renew()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]  # as above
        self.renew()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # as above
        self.renew()  # the views in a deep copy are not views of the copy's parameters


_COMPUTED = object()
"""Held in place of a computed tensor: no tensor is it, and so nothing is kept from one pass to the next."""


class ElasticOperator(Operator):
    """An operator of which a subnet chooses how many outputs there are: its setting is their number.

    Attributes:
        parts: Sizes of the parts that the whole layer's outputs consist of, each of which is cut alike; empty
            for one part.
        whole_parts: The same of the layer as it was before a trim; its outputs if there is one part.
    """

    gives_channels = True
    """Whether its outputs are what is chosen; heads are inside."""
    passes_channels = False
    """Whether its outputs have its inputs' channels; then something else is chosen, such as a kernel size."""
    parts: tuple[int, ...] = ()
    whole_parts: tuple[int, ...]

    def consist_of(self, parts: tuple[int, ...]) -> None:
        """Have outputs of these parts, none for one part."""
        self.parts = parts
        self.whole_parts = parts or (self.n_outputs,)

    @property
    def n_outputs(self) -> int:
        """Outputs of the whole layer, or of its smallest part: what a size counts."""
        raise NotImplementedError

    def kept(self, outputs: int) -> Spans:
        """Return the spans of the whole layer's outputs that `outputs` of them stand for."""
        return kept_of_parts(self.parts, outputs) if self.parts else ((0, outputs),)


def kept_of_parts(parts: Sequence[int], outputs: int) -> Spans:
    """Return the spans that are kept of each part; the smallest keeps `outputs`, others in proportion."""
    least = min(parts)
    if outputs >= least:
        return ((0, sum(parts)),)
    found, start = [], 0
    for size in parts:
        found.append((start, outputs * (size // least)))
        start += size
    return tuple(found)


def length(spans: Spans) -> int:
    """Return how many entries the spans have together."""
    return sum(n for _, n in spans)


def taken(tensor: torch.Tensor, axis: int, spans: Spans) -> torch.Tensor:
    """Return these spans of an axis: a view if there is one span, else a copy."""
    pieces = [tensor.narrow(axis, start, n) for start, n in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def address_of(tensor: torch.Tensor) -> int:
    """Return where a tensor's numbers begin; -1 if it has none of its own, as in torch.func's transforms."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return -1


def version_of(*tensors: torch.Tensor | None) -> int:
    """Return a number that grows when one of these is written in place; inference tensors count nothing."""
    return sum(0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def first_fits(path: str, what: str, n: int, whole: int) -> None:
    """Raise ConfigError if a layer of `whole` inputs is given `n`, which are more."""
    if n > whole:
        raise ConfigError(f"{path}: expected at most {whole} {what}, got {n}")


def operators_in(model: nn.Module) -> Iterator[Operator]:
    """Yield every operator of a model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, Operator):
            yield module
