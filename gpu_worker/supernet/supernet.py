"""Supernet: a resident model with operators inserted, the subnets it hosts, and the one that runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from gpu_worker.supernet.operators import (
    Operator,
    Prepared,
    Statistics,
    SubnetNorm,
    WeightSlice,
    is_packed_already,
)
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpu_worker.supernet.control import Controls
    from gpu_worker.supernet.insertion import Inserted
    from gpu_worker.supernet.operators import Settings
    from gpu_worker.supernet.original import Original

MAX_PREPARED = {"cpu": 1_024}
"""By device, the most subnets that are ready to run, unless more are pinned: on a CPU they are only views."""

MAX_PREPARED_ELSEWHERE = 64
"""The limit for other devices, which hold these subnets' statistics; all others' are in host memory."""


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
        packed: Contiguous copies of slices, on the device.
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
        self._one_pass = threading.Lock()
        self._statistics: dict[str, SubnetStatistics] = {}
        self._pinned: frozenset[int] = frozenset()
        self._trimmed_to: frozenset[str] | None = None
        self.host((Subnet("largest", controls.space.largest),))

    def host(self, subnets: Sequence[Subnet]) -> None:
        """Host these subnets and actuate the first; statistics stay with the subnets' names.

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
        self._pinned = frozenset()
        self._forget()
        self.cursor.chosen = self.prepared(0)

    def settings_of(self, subnet: Subnet) -> Settings:
        """Return what every operator does for `subnet`; SubnetNorm's entries are None.

        Raises:
            ConfigError: Naming the subnet, and the entry of its control tuple that does not fit; or the
                supernet was trimmed to others.
        """
        if self._trimmed_to is not None and subnet.name not in self._trimmed_to:
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
        """Run the actuated subnet."""
        return self.run_with(self.cursor.chosen.settings, *args, **kwargs)

    def run_with(self, settings: Settings, *args: Any, **kwargs: Any) -> Any:
        """Run the model once with these settings, whatever is actuated."""
        with self._one_pass:
            self.cursor.settings = settings
            return self.model(*args, **kwargs)

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
        self._refresh()

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
                if isinstance(layer, WeightSlice)
            ]
            # Kernels of many positions first: they gather most.
            for layer, key in sorted(used, key=lambda found: -found[0].weight[0, 0].numel()):
                view = layer.slices[key].weight
                is_worth_it = not is_packed_already(view) and spent + _n_bytes(view) <= budget_bytes
                if key not in layer.packed and is_worth_it:
                    layer.pack(key)
                    spent += _n_bytes(view)
        return spent

    def trim(self, example: torch.Tensor) -> None:
        """Drop everything that no hosted subnet uses: then only these subnets can be hosted.

        A layer keeps the outputs and inputs of its largest slice, a norm its most channels, a block that
        never runs nothing. Attention layers and LayerNorms stay whole.

        Args:
            example: A batch, to find out what each subnet uses.
        """
        used: dict[Operator, set[tuple[int, int]]] = {op: set() for op in self._inserted.operators}
        for row in range(len(self.subnets)):
            for op, inputs in self._inputs_of(row, example).items():
                used[op].add((self.cursor.settings[op.place] if isinstance(op, WeightSlice) else 0, inputs))
        for op, keys in used.items():
            if isinstance(op, WeightSlice):
                op.trim(keys)
            elif isinstance(op, SubnetNorm):
                op.trim(max((inputs for _, inputs in keys), default=0))
        self._trimmed_to = frozenset(subnet.name for subnet in self.subnets)
        self._refresh()

    def _inputs_of(self, row: int, example: torch.Tensor) -> dict[Operator, int]:
        """Return how many input channels each operator that runs is given, by running subnet `row`."""
        seen: dict[Operator, int] = {}

        def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(layer, Operator), "hooks are on operators alone"
            seen[layer] = args[0].shape[layer.channel_axis]

        hooks = [cast("nn.Module", op).register_forward_pre_hook(note) for op in self._inserted.operators]
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
        packed = sum(
            _n_bytes(copy.weight)
            for op in self._inserted.operators
            if isinstance(op, WeightSlice)
            for copy in op.packed.values()
        )
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
        for module in self.model.modules():
            if not isinstance(module, SubnetNorm):
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.is_floating_point():
                        setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        for op in self._inserted.operators:
            op.forget()

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
        return {name: value for name, value in self.__dict__.items() if name != "_one_pass"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._one_pass = threading.Lock()
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
