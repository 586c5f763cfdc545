"""Supernet: a resident model with operators inserted, the subnets it hosts, and the one that runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from gpu_worker.supernet.flow.follow import Flow
from gpu_worker.supernet.flow.layouts import NeedsWhole, forget_tags, tensors_in
from gpu_worker.supernet.operators import (
    NormCalibration,
    Prepared,
    Statistics,
    SubnetNorm,
    WeightSlice,
    is_packed_already,
)
from gpu_worker.supernet.operators.base import address_of
from gpu_worker.supernet.trimming import Trimmed, trim
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpu_worker.supernet.control import Controls
    from gpu_worker.supernet.flow.follow import Shapes
    from gpu_worker.supernet.insertion import Inserted
    from gpu_worker.supernet.operators.base import Layouts, Settings
    from gpu_worker.supernet.original import Original

MAX_PREPARED = {"cpu": 1_024}
"""By device, the most subnets that are ready to run, unless more are pinned: on a CPU they are only views."""

MAX_PREPARED_ELSEWHERE = 64
"""The limit for other devices, which hold these subnets' statistics; all others' are in host memory."""

MAX_FOLLOWED = 4_096
"""Most control tuples of which it is remembered what each layer is given; after as many all are forgotten."""


@dataclass(frozen=True, slots=True)
class SubnetStatistics:
    """What SubnetNorm keeps of one subnet, all norms end to end.

    Attributes:
        channels: Of each norm, in the order of the model's norms; 0 for one that did not run.
        values: For each norm its mean, then its variance; float32, (2 * sum(channels),), in host memory.
    """

    channels: tuple[int, ...]
    values: torch.Tensor

    def __post_init__(self) -> None:
        expected = 2 * sum(self.channels)
        if self.values.dtype != torch.float32 or self.values.shape != (expected,):
            raise ConfigError(
                f"statistics: expected {expected} float32 values, "
                f"got {self.values.dtype} {tuple(self.values.shape)}"
            )


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that a supernet occupies, by what for.

    Attributes:
        shared: Parameters and buffers of the model, on its device; all subnets use them.
        statistics_resident: SubnetNorm's of the subnets prepared, on the device.
        statistics_idle: SubnetNorm's of the others, in host memory.
        packed: Copies of slices, on the device: packed ones, and those of several parts.
        n_subnets: Subnets hosted.
        n_resident: Those of them that are prepared.
    """

    shared: int
    statistics_resident: int
    statistics_idle: int
    packed: int
    n_subnets: int
    n_resident: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.shared + self.statistics_resident + self.packed

    def __str__(self) -> str:
        """Return the report in one line."""
        return (
            f"{self.n_subnets} subnets: {_mb(self.shared)} shared, "
            f"{_mb(self.statistics_resident)} of statistics for {self.n_resident} resident subnets, "
            f"{_mb(self.statistics_idle)} for idle ones in host memory, {_mb(self.packed)} packed"
        )


def _sizes(settings: Settings) -> tuple[int | None, ...]:
    """Return the entries of settings that say what runs, and how much of it."""
    return tuple(entry if isinstance(entry, int) else None for entry in settings)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB"


class Supernet(nn.Module):
    """A model whose subnets run in place; made by `gpu_worker.supernet.insertion.insert`.

    `host` names the subnets, `gpu_worker.supernet.actuation.actuate` picks the one that the next forward
    pass runs. One pass runs at a time: a second thread waits for the first. Built with one
    hosted subnet, the whole.

    Attributes:
        model: The model, changed in place.
        cursor: What its operators read.
        controls: Its control tuples.
        subnets: Those hosted, in the order of their rows.
        original: The model from before insertion, without data; a proof needs it.
    """

    def __init__(self, model: nn.Module, inserted: Inserted, controls: Controls) -> None:
        super().__init__()
        self.original: Original | None = None
        self.model = model
        self.cursor = inserted.cursor
        self.controls = controls
        self._inserted = inserted
        self._one_pass = threading.RLock()
        self._statistics: dict[str, SubnetStatistics] = {}
        self._gathered_for: dict[str, Mapping[str, Any] | None] = {}
        self._pinned: frozenset[int] = frozenset()
        self._trimmed_to: tuple[Subnet, ...] | None = None
        self._followed: dict[tuple[int | None, ...], Layouts] = {}
        self._layouts: dict[int, Layouts] = {}
        self._whole_shapes: tuple[Any, Shapes] | None = None
        self._where: list[Callable[[], int]] = []
        self._addresses: list[int] = []
        self.host((Subnet("largest", controls.space.largest),))

    def host(self, subnets: Sequence[Subnet]) -> None:
        """Host these subnets and actuate the first; statistics stay with a name and its control tuple.

        A name that is hosted with another control tuple than its statistics were set for loses them.

        Raises:
            ConfigError: If there is no subnet, two have one name, or one has a control tuple that
                does not fit; nothing is changed then.
        """
        if not subnets:
            raise ConfigError("subnets: expected at least one to host")
        if len({subnet.name for subnet in subnets}) < len(subnets):
            raise ConfigError(f"subnets: expected unique names, got {[subnet.name for subnet in subnets]}")
        rows = [self.settings_of(subnet) for subnet in subnets]
        self.subnets = tuple(subnets)
        self._rows = rows
        self._layouts = {}
        self._drop_others_statistics()
        self._pinned = frozenset()
        self._forget()
        self.cursor.chosen = self.prepared(0)

    def settings_of(self, subnet: Subnet) -> Settings:
        """Return what every operator does for `subnet`; SubnetNorm's entries are None.

        Raises:
            ConfigError: Naming the subnet, and the entry of its control tuple that does not fit; or the
                supernet was trimmed to others.
        """
        if self._trimmed_to is not None and subnet not in self._trimmed_to:
            raise ConfigError(f"subnet {subnet.name}: the supernet was trimmed to others: build it again")
        try:
            sizes = self.controls.sizes_of(subnet.control)
        except ConfigError as error:
            raise ConfigError(f"subnet {subnet.name}: {error}") from error
        settings = list(self._inserted.defaults)
        for stage, kept in zip(self._inserted.stages, sizes.blocks, strict=True):
            stage.choose(kept, settings)
        for name, outputs in sizes.outputs.items():
            for layer in self._inserted.sizes[name]:
                settings[layer.place] = outputs
        return tuple(settings)

    def prepared(self, row: int) -> Prepared:
        """Return a hosted subnet ready to run: its statistics on the device, as a view for each norm."""
        found = self._prepared.get(row)
        if found is None:
            return self._prepare(row)
        self._prepared.move_to_end(row)
        return found

    def pin(self, rows: Iterable[int]) -> None:
        """Keep these subnets prepared whatever else is actuated: a captured graph holds their tensors."""
        self._pinned = frozenset(rows)
        for row in self._pinned:
            self.prepared(row)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the actuated subnet.

        Raises:
            ConfigError: In a subnet's first pass: a layer is given a part of its inputs, and it is not known
                which; or what a block gives that is left out.
        """
        chosen = self.cursor.chosen
        layouts = self._layouts.get(chosen.row)
        if layouts is None:
            out = self.run_with(chosen.settings, *args, **kwargs)
            if (found := self._followed.get(_sizes(chosen.settings))) is not None:
                self._layouts[chosen.row] = found
            return out
        return self._run(chosen.settings, layouts, args, kwargs)

    def is_followed(self, settings: Settings) -> bool:
        """Return whether these settings have run, so that the next pass looks at no channels."""
        return _sizes(settings) in self._followed

    def run_with(self, settings: Settings, *args: Any, **kwargs: Any) -> Any:
        """Run the model once with these settings, whatever is actuated.

        Raises:
            ConfigError: As `forward`.
        """
        layouts = self._followed.get(_sizes(settings))
        if layouts is None:
            return self._run_first(settings, args, kwargs)
        return self._run(settings, layouts, args, kwargs)

    def _run_first(self, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and follow the channels: from then on it is known what each layer is given."""
        if any(tensor.is_meta for tensor in tensors_in((*args, *kwargs.values()))):
            return self._run(settings, {}, args, kwargs)  # without numbers only shapes count
        plain = tuple(None if isinstance(one, NormCalibration) else one for one in settings)
        with self._one_pass:
            out, flow = self._follow(plain, args, kwargs)
            if len(self._followed) >= MAX_FOLLOWED:
                self._followed.clear()
            self._followed[_sizes(settings)] = flow.layouts
            if plain != settings:  # a pass that is repeated would count its batch twice
                return self._run(settings, flow.layouts, args, kwargs)
        for tensor in tensors_in((out,)):
            forget_tags(tensor)
        return out

    def _follow(self, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Flow]:
        shapes = None
        while True:
            try:
                flow = Flow(self.model, self.cursor, shapes)
                with flow:
                    return self._run(settings, flow.layouts, args, kwargs), flow
            except NeedsWhole:
                shapes = self._shapes_of_whole(args, kwargs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                if not self._shapes_of_whole(args, kwargs):
                    raise  # the whole network fails too
                raise ConfigError(
                    f"{flow.path or 'the model'}: runs in the whole network and not in this subnet: {error}"
                ) from error

    def _shapes_of_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
        """Return what each call gives in the whole network, of these inputs; nothing if it does not run."""
        inputs = tuple(tuple(tensor.shape) for tensor in tensors_in((*args, *kwargs.values())))
        if self._whole_shapes is None or self._whole_shapes[0] != inputs:
            shapes: Shapes = {}
            try:
                with torch.no_grad(), Flow(self.model, self.cursor, shapes, is_whole=True):
                    self._run(self._inserted.defaults, {}, args, kwargs)
            except (RuntimeError, ConfigError):
                shapes = {}  # then whatever depends on them is refused
            self._whole_shapes = inputs, shapes
        return self._whole_shapes[1]

    def _run(
        self, settings: Settings, layouts: Layouts, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self._one_pass:
            cursor = self.cursor
            if [where() for where in self._where] != self._addresses:  # p.data = ...: their views are old
                for op in self._inserted.operators:
                    op.renew()
            cursor.settings, cursor.layouts = settings, layouts
            try:
                return self.model(*args, **kwargs)
            finally:
                if cursor.is_moved:
                    self._note_addresses()

    def _note_addresses(self) -> None:
        """Note where the parameters are of which operators hold views."""
        held = [tensor for op in self._inserted.operators for tensor in op.held]
        at = [(tensor, address_of(tensor)) for tensor in held if isinstance(tensor, torch.Tensor)]
        self._where = [tensor.data_ptr for tensor, address in at if address >= 0]
        self._addresses = [address for _, address in at if address >= 0]
        self.cursor.is_moved = False

    # --- SubnetNorm's statistics --------------------------------------------------------------

    @property
    def norms(self) -> tuple[SubnetNorm, ...]:
        """Every SubnetNorm, in the order of the model."""
        return tuple(op for op in self._inserted.operators if isinstance(op, SubnetNorm))

    @property
    def statistics(self) -> Mapping[str, SubnetStatistics]:
        """What is held, by subnet name; subnets that are not hosted among them."""
        return self._statistics

    def set_statistics(self, statistics: Mapping[str, SubnetStatistics]) -> None:
        """Add these statistics, by subnet name, to those held already.

        Raises:
            ConfigError: Naming the subnet and the norm of which a number of channels does not fit.
        """
        norms = self.norms
        for name, held in statistics.items():
            if len(held.channels) != len(norms):
                raise ConfigError(
                    f"statistics of {name}: expected {len(norms)} norms, got {len(held.channels)}"
                )
            for norm, channels in zip(norms, held.channels, strict=True):
                if not 0 <= channels <= norm.num_features:
                    raise ConfigError(
                        f"statistics of {name}, {norm.path}: expected at most {norm.num_features} channels, "
                        f"got {channels}"
                    )
        self._statistics.update(statistics)
        # Statistics of names that are not hosted are those of whatever is hosted first under the name.
        self._gathered_for |= dict.fromkeys(statistics)
        self._drop_others_statistics()
        self._refresh()

    def _drop_others_statistics(self) -> None:
        """Drop the statistics that were set for other control tuples than those now hosted by that name."""
        for name, control in ((subnet.name, subnet.control) for subnet in self.subnets):
            if name in self._statistics:
                if self._gathered_for[name] is None:
                    self._gathered_for[name] = control
                elif self._gathered_for[name] != control:
                    del self._statistics[name], self._gathered_for[name]

    # --- packed slices, and what is not needed --------------------------------------------------

    def pack(self, rows: Iterable[int], example: torch.Tensor, *, budget_bytes: int) -> int:
        """Copy the slices of these subnets that are not contiguous, up to a budget; return the bytes.

        If a slice is scattered in memory, a convolution's kernels gather it on every pass. Earlier
        rows come first, and in each the slices that save most. A copy does not change when
        parameters are written in place: pack again then.

        Args:
            rows: Subnets in use.
            example: A batch, to find out which slices each of them uses.
            budget_bytes: For all copies together.
        """
        for op in self._inserted.operators:
            if isinstance(op, WeightSlice):
                op.unpack()
        spent = 0
        for row in rows:
            used = [
                (layer, (self.cursor.settings[layer.place], inputs))
                for layer, inputs in self._inputs_of(row, example).items()
                if (self.cursor.settings[layer.place], inputs) in layer.slices
            ]
            # Kernels of many positions first: they gather most.
            for layer, key in sorted(used, key=lambda found: -found[0].weight[0, 0].numel()):
                view = layer.slices[key].weight
                is_worth_it = not is_packed_already(view) and spent + _n_bytes(view) <= budget_bytes
                if key not in layer.packed and is_worth_it:
                    layer.pack(key)
                    spent += _n_bytes(view)
        return spent

    def trim(self, *examples: torch.Tensor) -> Trimmed:
        """Drop what no hosted subnet uses, as far as `examples` prove it: then only these can be hosted.

        A layer keeps the outputs and inputs of its largest slice, a norm its most channels, a block that
        never runs nothing. Attention layers and LayerNorms stay whole, and so does every layer that a trace
        cannot follow: see `gpu_worker.supernet.trimming`. Memory never grows.

        Args:
            examples: Batches, unlike each other, to find out what each subnet uses.
        """
        found = trim(self, examples)
        if found.n_cut:
            self._trimmed_to = self.subnets
        self._refresh()
        return found

    def _inputs_of(self, row: int, example: torch.Tensor) -> dict[WeightSlice, int]:
        """Return how many input channels each sliced layer that runs is given, by running subnet `row`."""
        seen: dict[WeightSlice, int] = {}
        with torch.inference_mode():  # what a block is like that never ran is learnt before anything is noted
            self.run_with(self.prepared(row).settings, example)

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(layer, WeightSlice), "hooks are on these alone"
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            seen[layer] = given.shape[layer.channel_axis]

        hooks = [
            cast("nn.Module", op).register_forward_pre_hook(note, with_kwargs=True)
            for op in self._inserted.operators
            if isinstance(op, WeightSlice)
        ]
        try:
            with torch.inference_mode():
                self.run_with(self.prepared(row).settings, example)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    # --- what it weighs -----------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """Return the bytes that it occupies."""
        names = {subnet.name for subnet in self.subnets}
        of_subnets = {name: _n_bytes(held.values) for name, held in self._statistics.items() if name in names}
        resident = sum(of_subnets.get(self.subnets[row].name, 0) for row in self._prepared)
        packed = sum(op.copied_bytes for op in self._inserted.operators)
        return MemoryReport(
            shared=sum(map(_n_bytes, (*self.model.parameters(), *self.model.buffers()))),
            statistics_resident=resident,
            statistics_idle=sum(of_subnets.values()) - resident,
            packed=packed,
            n_subnets=len(self.subnets),
            n_resident=len(self._prepared),
        )

    # --- moving -------------------------------------------------------------------------------

    def to_half(self, dtype: torch.dtype = torch.float16) -> None:
        """Cast everything except SubnetNorm: its statistics and scales are small, and rounding matters."""
        halves: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
        for module in self.model.modules():
            if not isinstance(module, SubnetNorm):
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.is_floating_point():
                        if parameter not in halves:
                            half = parameter.detach().to(dtype)
                            halves[parameter] = nn.Parameter(half, requires_grad=False)
                        setattr(module, name, halves[parameter])
        for op in self._inserted.operators:
            op.renew()

    @property
    def device(self) -> torch.device:
        """Where its parameters are; host memory if it has none."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Methods of this supernet's tensors and its lock are not a copy's.
        return {name: value for name, value in self.__dict__.items() if name not in ("_one_pass", "_where")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._one_pass = threading.RLock()
        self._note_addresses()
        self._refresh()  # the views in a deep copy are not views of the copy's statistics

    def _refresh(self) -> None:
        """Prepare all subnets again: parameters or statistics have moved."""
        row = self.cursor.chosen.row
        self._forget()
        for pinned in self._pinned:
            self.prepared(pinned)
        self.cursor.chosen = self.prepared(row)

    def _forget(self) -> None:
        self._prepared: OrderedDict[int, Prepared] = OrderedDict()

    def _prepare(self, row: int) -> Prepared:
        settings = self._rows[row]
        held = self._statistics.get(self.subnets[row].name)
        if held is not None:
            settings = self._with_statistics(settings, held)
        found = self._prepared[row] = Prepared(row, settings)
        most = MAX_PREPARED.get(self.device.type, MAX_PREPARED_ELSEWHERE)
        while len(self._prepared) > max(most, len(self._pinned) + 1):
            self._prepared.pop(next(old for old in self._prepared if old not in self._pinned))
        return found

    def _with_statistics(self, settings: Settings, held: SubnetStatistics) -> Settings:
        # One copy for all norms, and none on a CPU; doubles where the norms are, else as they are held.
        dtypes = {norm.weight.dtype for norm in self.norms if norm.weight is not None}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        values = held.values.to(self.device, dtype)
        parts = iter(torch.split(values, [n for channels in held.channels for n in (channels, channels)]))
        filled = list(settings)
        for norm, channels in zip(self.norms, held.channels, strict=True):
            statistics = Statistics(next(parts), next(parts))
            if channels:
                filled[norm.place] = statistics
        return tuple(filled)


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
