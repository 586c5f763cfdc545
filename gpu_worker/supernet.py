"""DigitsSupernet: a small residual network of which depth and width are elastic.

A subnet's control tuple is {"d": blocks run in each stage, "w": width fraction of
each stage}; stage m then runs its first d[m] blocks on its first
ceil(w[m] * channels[m]) channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.operators import (
    Cursor,
    LayerSelect,
    SubnetNorm,
    WeightSliceConv2d,
    WeightSliceLinear,
    first_blocks,
    sliced_size,
)
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a DigitsSupernet at its largest.

    Attributes:
        image_shape: Channels, height and width of one image.
        channels: Of each stage; every stage after the first halves the image.
        depths: Blocks of each stage.
        n_classes: Size of the output.
        min_width: Smallest width fraction of a stage.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    n_classes: int
    min_width: float

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.depths):
            raise ConfigError(
                f"architecture: expected as many channels as depths, got {self.channels} and {self.depths}"
            )

    @property
    def largest(self) -> dict[str, list[Any]]:
        """The control tuple of the whole supernet."""
        return {"d": list(self.depths), "w": [1.0] * len(self.depths)}


class SubnetSizes(NamedTuple):
    """What a control tuple comes to: blocks and channels of each stage."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]


def subnet_sizes(architecture: Architecture, control: Mapping[str, Any]) -> SubnetSizes:
    """Check a control tuple and return the sizes that it names.

    Raises:
        ConfigError: Naming the stage, the value and the bound it breaks.
    """
    if set(control) != {"d", "w"}:
        raise ConfigError(f"control: expected exactly the keys d and w, got {sorted(control)}")
    depths = _entries(architecture, control, "d")
    widths = _entries(architecture, control, "w")
    for stage, (depth, most) in enumerate(zip(depths, architecture.depths, strict=True)):
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= most:
            raise ConfigError(
                f"control d, stage {stage}: expected a whole number from 1 to {most}, got {depth!r}"
            )
    for stage, width in enumerate(widths):
        if not isinstance(width, int | float) or not architecture.min_width <= width <= 1:
            raise ConfigError(
                f"control w, stage {stage}: "
                f"expected a fraction from {architecture.min_width} to 1, got {width!r}"
            )
    channels = tuple(sliced_size(w, c) for w, c in zip(widths, architecture.channels, strict=True))
    return SubnetSizes(depths, channels)


def _entries(architecture: Architecture, control: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    entries = control[key]
    n_stages = len(architecture.depths)
    if not isinstance(entries, list | tuple) or len(entries) != n_stages:
        raise ConfigError(f"control {key}: expected {n_stages} entries, one a stage, got {entries!r}")
    return tuple(entries)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, cursor: Cursor, *, stride: int) -> None:
        super().__init__()
        self.conv1 = WeightSliceConv2d(in_channels, channels, cursor, kernel_size=3, stride=stride)
        self.norm1 = SubnetNorm(channels, cursor)
        self.conv2 = WeightSliceConv2d(channels, channels, cursor, kernel_size=3)
        self.norm2 = SubnetNorm(channels, cursor)
        self.shortcut: WeightSliceConv2d | None = None
        if stride > 1:
            self.shortcut = WeightSliceConv2d(in_channels, channels, cursor, kernel_size=1, stride=stride)
            self.shortcut_norm = SubnetNorm(channels, cursor)

    def host(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Prepare for the hosted subnets' input and output channels, one of each a row."""
        outward = list(zip(outputs, inputs, strict=True))
        self.conv1.host(outward)
        self.norm1.host(outputs)
        self.conv2.host(list(zip(outputs, outputs, strict=True)))
        self.norm2.host(outputs)
        if self.shortcut is not None:
            self.shortcut.host(outward)
            self.shortcut_norm.host(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(shortcut(x) + body(x))."""
        body = F.relu(self.norm1(self.conv1(x)), inplace=True)
        body = self.norm2(self.conv2(body))
        shortcut = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        return F.relu(body + shortcut, inplace=True)  # (B, C, H', W')


class DigitsSupernet(nn.Module):
    """The resident supernet; `host` names its subnets and `actuate` picks one.

    Built with one hosted subnet, the whole.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.cursor = Cursor()
        channels = architecture.channels
        self.stem = WeightSliceConv2d(architecture.image_shape[0], channels[0], self.cursor, kernel_size=3)
        self.stem_norm = SubnetNorm(channels[0], self.cursor)
        self.stages = nn.ModuleList(self._stage(stage) for stage in range(len(channels)))
        self.head = WeightSliceLinear(channels[-1], architecture.n_classes, self.cursor)
        self.host((Subnet("largest", architecture.largest),))

    def host(self, subnets: Sequence[Subnet]) -> None:
        """Prepare every operator for these subnets and actuate the first.

        Statistics stay if there are as many subnets as before, else they start afresh.

        Raises:
            ConfigError: If there is no subnet, or one has a control tuple that
                does not fit; nothing is changed then.
        """
        if not subnets:
            raise ConfigError("subnets: expected at least one to host")
        sizes = [self._sizes(subnet) for subnet in subnets]
        self.cursor.row = 0
        image = [self.architecture.image_shape[0]] * len(sizes)
        inputs = [size.channels[0] for size in sizes]
        self.stem.host(list(zip(inputs, image, strict=True)))
        self.stem_norm.host(inputs)
        for m, stage in enumerate(self._layer_selects()):
            outputs = [size.channels[m] for size in sizes]
            stage.host([first_blocks(size.depths[m], len(stage.blocks)) for size in sizes])
            for block in stage.blocks:
                assert isinstance(block, ResidualBlock)
                block.host(inputs, outputs)
                inputs = outputs
        self.head.host([(self.architecture.n_classes, c) for c in inputs])
        self.subnets = tuple(subnets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the actuated subnet's logits, (B, n_classes), for images (B, C, H, W)."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]  # nn.Module's call is untyped

    def norms(self) -> list[SubnetNorm]:
        """Return every SubnetNorm, in the order of the state dict."""
        return [module for module in self.modules() if isinstance(module, SubnetNorm)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Moving to a device or dtype replaces the tensors that the views look into.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        row = self.cursor.row
        self.host(self.subnets)
        self.cursor.row = row
        return self

    def _layer_selects(self) -> list[LayerSelect]:
        return [stage for stage in self.stages if isinstance(stage, LayerSelect)]

    def _stage(self, stage: int) -> LayerSelect:
        channels = self.architecture.channels
        before = channels[max(stage - 1, 0)]
        blocks = []
        for block in range(self.architecture.depths[stage]):
            shrinks = stage > 0 and block == 0
            blocks.append(
                ResidualBlock(
                    before if block == 0 else channels[stage],
                    channels[stage],
                    self.cursor,
                    stride=2 if shrinks else 1,
                )
            )
        return LayerSelect(blocks, self.cursor)

    def _sizes(self, subnet: Subnet) -> SubnetSizes:
        if subnet.control is None:
            raise ConfigError(f"subnet {subnet.name}: expected a control tuple, got none")
        try:
            return subnet_sizes(self.architecture, subnet.control)
        except ConfigError as error:
            raise ConfigError(f"subnet {subnet.name}: {error}") from error
