"""A subnet of OFA-ResNet50 as a plain network, to compare sliced subnets with.

It shares no code with the slicer: ordinary torch layers of the subnet's own sizes,
whose weights are gathered from the published tensors index by index. Sizes are worked
out in exact fractions, so that no rounding of floats decides a channel.

Source: Once-for-All (Cai et al., ICLR 2020) and its published OFA-ResNet50.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import nn

from tests.gpu_worker.models.published import filled, filled_linear, gather

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTHS = (Fraction("0.65"), Fraction("0.8"), Fraction(1))

STEM_CHANNELS = 64
STAGE_CHANNELS = (256, 512, 1024, 2048)
STAGE_STRIDES = (1, 2, 2, 2)
BASE_DEPTHS = (2, 2, 4, 2)
SLOTS = (4, 4, 6, 4)  # blocks a stage holds at full depth

BATCH_NORM_EPS = 1e-5


def round_channels(value: Fraction | int) -> int:
    """Round a channel count to a multiple of 8 that is at least 0.9 of it, and at least 8."""
    rounded = max(8, math.floor((value + 4) / Fraction(8)) * 8)
    return rounded + 8 if rounded < Fraction("0.9") * value else rounded


class PlainStemBlock(nn.Module):
    """The residual convolution in the middle of the stem."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the body makes of `x` to it."""
        out: torch.Tensor = self.body(x) + x
        return out


class PlainBottleneck(nn.Module):
    """A bottleneck block of fixed size."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return torch.relu(self.body(x) + self.shortcut(x))


def plain_ofa(
    tensors: Mapping[str, torch.Tensor], control: Mapping[str, Sequence[float]], image_channels: int = 3
) -> nn.Module:
    """Return a subnet as a plain network in eval mode.

    Args:
        tensors: The published tensors, by name.
        control: `d`, 5 depths out of 0, 1, 2 (stem, 4 stages); `e`, 18 expand ratios, by a
            block's position at full depth; `w`, 6 indices into WIDTHS (stem middle, stem
            out, 4 stages).
        image_channels: Channels of an image; fewer than 3 use the first ones of the weights.

    Returns:
        A network from float images (B, image_channels, H, W) to logits (B, 1000). Its
        children are the stem's layers and the kept blocks, in the order they run.
    """
    depths = [int(depth) for depth in control["d"]]
    ratios = [Fraction(str(ratio)) for ratio in control["e"]]
    widths = [WIDTHS[int(index)] for index in control["w"]]
    assert (len(depths), len(ratios), len(widths)) == (5, 18, 6)

    middle = round_channels(widths[0] * STEM_CHANNELS / 2)
    inputs = round_channels(widths[1] * STEM_CHANNELS)
    layers = _stem(tensors, image_channels, middle, inputs, with_block=depths[0] == 2)
    first_slot = 0
    for stage, stage_channels in enumerate(STAGE_CHANNELS):
        outputs = round_channels(widths[2 + stage] * stage_channels)
        for index in range(BASE_DEPTHS[stage] + depths[1 + stage]):
            slot = first_slot + index
            hidden = round_channels(round(outputs * ratios[slot]))
            stride = STAGE_STRIDES[stage] if index == 0 else 1
            sizes = (inputs, hidden, outputs)
            layers.append(_block(tensors, f"blocks.{slot}", sizes, stride, is_first=index == 0))
            inputs = outputs
        first_slot += SLOTS[stage]
    head = filled_linear(tensors, "classifier.linear.linear", inputs=inputs, outputs=1000)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def _stem(
    tensors: Mapping[str, torch.Tensor], images: int, middle: int, outputs: int, *, with_block: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Sequential(
            _conv(tensors, "input_stem.0.conv.conv", images, middle, kernel=3, stride=2),
            _norm(tensors, "input_stem.0.bn.bn", middle),
            nn.ReLU(),
        )
    ]
    if with_block:
        body = nn.Sequential(
            _conv(tensors, "input_stem.1.conv.conv.conv", middle, middle, kernel=3),
            _norm(tensors, "input_stem.1.conv.bn.bn", middle),
            nn.ReLU(),
        )
        layers.append(PlainStemBlock(body))
    last = nn.Sequential(
        _conv(tensors, "input_stem.2.conv.conv", middle, outputs, kernel=3),
        _norm(tensors, "input_stem.2.bn.bn", outputs),
        nn.ReLU(),
    )
    return [*layers, last, nn.MaxPool2d(3, stride=2, padding=1)]


def _block(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    sizes: tuple[int, int, int],
    stride: int,
    *,
    is_first: bool,
) -> PlainBottleneck:
    inputs, hidden, outputs = sizes
    body = nn.Sequential(
        _conv(tensors, f"{name}.conv1.conv.conv", inputs, hidden, kernel=1),
        _norm(tensors, f"{name}.conv1.bn.bn", hidden),
        nn.ReLU(),
        _conv(tensors, f"{name}.conv2.conv.conv", hidden, hidden, kernel=3, stride=stride),
        _norm(tensors, f"{name}.conv2.bn.bn", hidden),
        nn.ReLU(),
        _conv(tensors, f"{name}.conv3.conv.conv", hidden, outputs, kernel=1),
        _norm(tensors, f"{name}.conv3.bn.bn", outputs),
    )
    if not is_first:
        return PlainBottleneck(body, nn.Identity())
    shortcut = nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=True),
        _conv(tensors, f"{name}.downsample.conv.conv", inputs, outputs, kernel=1),
        _norm(tensors, f"{name}.downsample.bn.bn", outputs),
    )
    return PlainBottleneck(body, shortcut)


def _conv(
    tensors: Mapping[str, torch.Tensor], name: str, inputs: int, outputs: int, *, kernel: int, stride: int = 1
) -> nn.Conv2d:
    # On the meta device no weight is made only to be replaced.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, device="meta")
    return filled(conv, {"weight": gather(tensors[f"{name}.weight"], (outputs, inputs))})


def _norm(tensors: Mapping[str, torch.Tensor], name: str, channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, device="meta")
    parts = ("weight", "bias", "running_mean", "running_var")
    state = {part: gather(tensors[f"{name}.{part}"], (channels,)) for part in parts}
    return filled(norm, state | {"num_batches_tracked": tensors[f"{name}.num_batches_tracked"].clone()})
