"""OFA-ResNet50: the published once-for-all supernet for ImageNet.

A subnet's control tuple is {"d": 5 depths, "e": 18 expand ratios, "w": 6 widths}:

- d[0] is the stem's: its middle block runs only at 2. d[m], m from 1 to 4, is 0, 1 or 2: stage m runs
  its first (2, 2, 4, 2)[m - 1] + d[m] blocks;
- e[k] is block k's, counted at full depth (4, 4, 6, 4): its middle is round(out * e[k]) channels;
- w[0] is the stem's middle, w[1] its output, w[2..5] the stages' outputs: an index into
  (0.65, 0.8, 1.0).

Every number of channels is rounded to a multiple of 8. Images are (B, 3, H, W), normalised.

Source: Cai et al., "Once for All" (ICLR '20), the ResNet50 design space of
ofa_resnet50_d=0+1+2_e=0.2+0.25+0.35_w=0.65+0.8+1.0.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.control import Control, Controls, ControlSpace, Entry, Sizes, first_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import normed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_worker.supernet.supernet import Supernet

DEPTHS = (4, 4, 6, 4)
"""Blocks of each stage at full depth."""

BASE_DEPTHS = (2, 2, 4, 2)
EXPAND_RATIOS = (0.2, 0.25, 0.35)
WIDTHS = (0.65, 0.8, 1.0)
STEM_CHANNELS = 64
STAGE_CHANNELS = (256, 512, 1024, 2048)
STRIDES = (1, 2, 2, 2)
N_CLASSES = 1000


def make_divisible(value: float) -> int:
    """Return `value` rounded to a multiple of 8, down by no more than a tenth.

    Source: Once for All's own rounding.
    """
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


@dataclass(frozen=True, slots=True)
class Channels:
    """Every number of channels in a network.

    Attributes:
        stem: Of the stem's middle and of its output.
        stages: Of each stage's output.
        middles: Of each block's middle, by stage and block.
    """

    stem: tuple[int, int]
    stages: tuple[int, ...]
    middles: tuple[tuple[int, ...], ...]


def channels_of(widths: Sequence[int], expand_ratios: Sequence[float]) -> Channels:
    """Return the channels of w and e; blocks that do not run are counted too."""
    factors = [WIDTHS[index] for index in widths]
    out = tuple(make_divisible(c * f) for c, f in zip(STAGE_CHANNELS, factors[2:], strict=True))
    ratios = iter(expand_ratios)
    return Channels(
        stem=(make_divisible(STEM_CHANNELS // 2 * factors[0]), make_divisible(STEM_CHANNELS * factors[1])),
        stages=out,
        middles=tuple(
            tuple(make_divisible(round(c * next(ratios))) for _ in range(depth))
            for c, depth in zip(out, DEPTHS, strict=True)
        ),
    )


class ConvNorm(nn.Module):
    """A convolution without bias and its BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, rectifies: bool = False
    ) -> torch.Tensor:
        """Return the norm of the convolved x, plus `residual`, rectified if asked; (B, out, H', W')."""
        return normed(self.bn, self.conv(x), residual, rectifies=rectifies)


class StemBlock(nn.Module):
    """The stem's middle block: x + relu(convolved x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W)."""
        convolved: torch.Tensor = self.conv(x, rectifies=True)
        return x + convolved


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, *, stride: int, is_first: bool
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = ConvNorm(in_channels, middle, 1)
        self.conv2 = ConvNorm(middle, middle, 3, stride)
        self.conv3 = ConvNorm(middle, out_channels, 1)
        self.downsample = ConvNorm(in_channels, out_channels, 1) if is_first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(shortcut(x) + body(x)), (B, out, H', W')."""
        body = self.conv2(self.conv1(x, rectifies=True), rectifies=True)
        if self.downsample is not None:
            # Pooling before the 1 x 1 convolution, where ResNet50 strides in it.
            x = self.downsample(x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True))
        rectified: torch.Tensor = self.conv3(body, x, rectifies=True)
        return rectified


class OfaResNet50(nn.Module):
    """The network of some channels and depths, in plain torch: the whole, or a subnet on its own."""

    def __init__(self, channels: Channels, depths: Sequence[int], *, has_stem_block: bool = True) -> None:
        super().__init__()
        middle, out = channels.stem
        stem = [
            ConvNorm(3, middle, 3, 2),
            *([StemBlock(middle)] if has_stem_block else []),
            ConvNorm(middle, out, 3),
        ]
        self.input_stem = nn.ModuleList(stem)
        before = (out, *channels.stages)
        self.blocks = nn.ModuleList(
            Bottleneck(
                before[m] if k == 0 else before[m + 1],
                channels.middles[m][k],
                before[m + 1],
                stride=STRIDES[m] if k == 0 else 1,
                is_first=k == 0,
            )
            for m, depth in enumerate(depths)
            for k in range(depth)
        )
        self.classifier = nn.Linear(channels.stages[-1], N_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, 1000), for normalised images (B, 3, H, W)."""
        first, *middle, last = self.input_stem
        x = first(images, rectifies=True)
        for block in middle:
            x = block(x)
        x = F.max_pool2d(last(x, rectifies=True), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.classifier(x.mean((2, 3)))
        return logits


def _space() -> ControlSpace:
    stages = [f"stage {m}" for m in range(1, 5)]
    slots = [(m, k) for m, depth in enumerate(DEPTHS, start=1) for k in range(depth)]
    return ControlSpace(
        {
            "d": tuple(Entry(where, (0, 1, 2)) for where in ("stem", *stages)),
            "e": tuple(
                Entry(f"block {number} (stage {m}, block {k})", EXPAND_RATIOS)
                for number, (m, k) in enumerate(slots)
            ),
            "w": tuple(Entry(where, (0, 1, 2)) for where in ("stem middle", "stem", *stages)),
        }
    )


def _sizes(control: Control) -> Sizes:
    depths, channels = control["d"], channels_of(control["w"], control["e"])
    kept = [first_blocks(base + d, n) for base, d, n in zip(BASE_DEPTHS, depths[1:], DEPTHS, strict=True)]
    outputs = {"stem middle": channels.stem[0], "stem": channels.stem[1]}
    for m, out in enumerate(channels.stages):
        outputs[f"stage {m + 1}"] = out
        for k, middle in enumerate(channels.middles[m]):
            outputs[f"middle {_FIRST[m] + k}"] = middle
    return Sizes(((0,) if depths[0] == 2 else (), *kept), outputs)


_FIRST = (0, *itertools.accumulate(DEPTHS))[:4]  # number of each stage's first block
CONTROLS = Controls(_space(), _sizes)
"""The control tuples, and what each comes to."""

LARGEST = channels_of([2] * 6, [EXPAND_RATIOS[-1]] * 18)


def ofa_resnet50() -> Supernet:
    """Return the supernet with random weights, hosting the whole."""
    elastic = [
        Elastic("stem middle", ["input_stem.0.conv", "input_stem.1.conv.conv"]),
        Elastic("stem", ["input_stem.2.conv"]),
    ]
    stages = [Stage(["input_stem.1"], least=0)]
    for m, (first, depth) in enumerate(zip(_FIRST, DEPTHS, strict=True)):
        blocks = [f"blocks.{first + k}" for k in range(depth)]
        stages.append(Stage(blocks))
        outer = [f"{block}.conv3.conv" for block in blocks]
        elastic.append(Elastic(f"stage {m + 1}", [f"{blocks[0]}.downsample.conv", *outer]))
        elastic += [
            Elastic(f"middle {first + k}", [f"{block}.conv1.conv", f"{block}.conv2.conv"])
            for k, block in enumerate(blocks)
        ]
    return insert(OfaResNet50(LARGEST, DEPTHS), stages=stages, elastic=elastic, controls=CONTROLS)


def extracted(control: Control) -> OfaResNet50:
    """Return a subnet as a plain network of that size, with random weights."""
    sizes = CONTROLS.sizes_of(control)
    return OfaResNet50(
        channels_of(control["w"], control["e"]),
        [len(kept) for kept in sizes.blocks[1:]],
        has_stem_block=bool(sizes.blocks[0]),
    )


def published_name(name: str) -> str:
    """Return what the published checkpoint calls the tensor that is `name` here.

    There every layer is in a wrapper: conv.conv, bn.bn, linear.linear.
    """
    if name.startswith("classifier."):
        return name.replace("classifier.", "classifier.linear.linear.")
    return re.sub(r"\.(conv|bn)\.(\w+)$", r".\1.\1.\2", name)
