"""A subnet of OFA-MobileNetV3 as a plain network, and the names and shapes that are published.

It shares no code with the slicer: ordinary torch layers of the subnet's own sizes, whose weights are gathered
from the published tensors index by index, and kernels that are made by the published rule.

Source: Once-for-All (Cai et al., ICLR 2020) and its published OFA-MobileNetV3.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from tests.gpu_worker.models.published import filled, gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.gpu_worker.models.published import Shapes

# Of each stage: channels, stride of its first block, hard swish and not ReLU, squeeze-and-excite.
STAGES = (
    (24, 2, False, False),
    (40, 2, False, True),
    (80, 2, True, False),
    (112, 1, True, True),
    (160, 2, True, True),
)
SLOTS = 4


def rounded(value: Fraction | int) -> int:
    """Round to a multiple of 8 that is at least 0.9 of it, and at least 8."""
    found = max(8, math.floor((value + 4) / Fraction(8)) * 8)
    return found + 8 if found < Fraction("0.9") * value else found


def published_shapes(width: Fraction = Fraction(1), n_classes: int = 1000) -> Shapes:
    """Return the names and shapes of the published file of this width."""
    return dict(_published(width, n_classes))


def _published(width: Fraction, n_classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    stem = rounded(16 * width)
    yield "first_conv.conv.weight", (stem, 3, 3, 3)
    yield from _norm_shapes("first_conv.bn", stem)
    for part, kernel in (("depth_conv", (1, 3, 3)), ("point_linear", (stem, 1, 1))):
        yield f"blocks.0.mobile_inverted_conv.{part}.conv.weight", (stem, *kernel)
        yield from _norm_shapes(f"blocks.0.mobile_inverted_conv.{part}.bn", stem)
    inputs, number = stem, 1
    for channels, _, _, has_squeeze in STAGES:
        outputs = rounded(channels * width)
        for _ in range(SLOTS):
            block, middle = f"blocks.{number}.mobile_inverted_conv", rounded(6 * inputs)
            yield f"{block}.inverted_bottleneck.conv.conv.weight", (middle, inputs, 1, 1)
            yield from _norm_shapes(f"{block}.inverted_bottleneck.bn.bn", middle)
            yield f"{block}.depth_conv.conv.5to3_matrix", (9, 9)
            yield f"{block}.depth_conv.conv.7to5_matrix", (25, 25)
            yield f"{block}.depth_conv.conv.conv.weight", (middle, 1, 7, 7)
            yield from _norm_shapes(f"{block}.depth_conv.bn.bn", middle)
            if has_squeeze:
                squeezed = rounded(middle // 4)
                yield f"{block}.depth_conv.se.fc.reduce.weight", (squeezed, middle, 1, 1)
                yield f"{block}.depth_conv.se.fc.reduce.bias", (squeezed,)
                yield f"{block}.depth_conv.se.fc.expand.weight", (middle, squeezed, 1, 1)
                yield f"{block}.depth_conv.se.fc.expand.bias", (middle,)
            yield f"{block}.point_linear.conv.conv.weight", (outputs, middle, 1, 1)
            yield from _norm_shapes(f"{block}.point_linear.bn.bn", outputs)
            inputs, number = outputs, number + 1
    widest, last = rounded(960 * width), rounded(1280 * width)
    yield "final_expand_layer.conv.weight", (widest, inputs, 1, 1)
    yield from _norm_shapes("final_expand_layer.bn", widest)
    yield "feature_mix_layer.conv.weight", (last, widest, 1, 1)
    yield "classifier.linear.weight", (n_classes, last)
    yield "classifier.linear.bias", (n_classes,)


def _norm_shapes(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


class HardSwish(nn.Module):
    """x times relu6(x + 3) / 6."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return it."""
        return x * F.relu6(x + 3) / 6


class PlainSqueeze(nn.Module):
    """Channels scaled by a hard sigmoid of two layers on their means."""

    def __init__(self, reduce: nn.Conv2d, expand: nn.Conv2d) -> None:
        super().__init__()
        self.reduce, self.expand = reduce, expand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels."""
        means = x.mean(3, keepdim=True).mean(2, keepdim=True)
        return x * F.relu6(self.expand(torch.relu(self.reduce(means))) + 3) / 6


class PlainResidual(nn.Module):
    """A body beside its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the two."""
        out: torch.Tensor = self.body(x) + x
        return out


class PlainResize(nn.Module):
    """Images of 224 pixels to fewer; others to the same share."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Resize them."""
        size = [round(length * self.pixels / 224) for length in x.shape[2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)


def plain_mobilenet(
    tensors: Mapping[str, torch.Tensor], control: Mapping[str, Sequence[int]], width: Fraction = Fraction(1)
) -> nn.Module:
    """Return a subnet as a plain network in eval mode.

    Args:
        tensors: The published tensors, by name.
        control: `d`, 5 depths; `e` and `ks`, 20 expand ratios and kernel sizes by a block's position at full
            depth; `r`, one resolution.
        width: Of all channels.
    """
    stem = rounded(16 * width)
    first = "blocks.0.mobile_inverted_conv"
    layers: list[nn.Module] = [
        PlainResize(control["r"][0]) if control["r"][0] != 224 else nn.Identity(),
        _conv(tensors["first_conv.conv.weight"], 3, stem, stride=2),
        _norm(tensors, "first_conv.bn", stem),
        HardSwish(),
        PlainResidual(
            nn.Sequential(
                _depthwise(tensors[f"{first}.depth_conv.conv.weight"], stem, 1),
                _norm(tensors, f"{first}.depth_conv.bn", stem),
                nn.ReLU(),
                _conv(tensors[f"{first}.point_linear.conv.weight"], stem, stem),
                _norm(tensors, f"{first}.point_linear.bn", stem),
            )
        ),
    ]
    inputs = stem
    for stage, (channels, stride, has_h_swish, has_squeeze) in enumerate(STAGES):
        outputs = rounded(channels * width)
        for index in range(control["d"][stage]):
            slot = stage * SLOTS + index
            name = f"blocks.{1 + slot}.mobile_inverted_conv"
            step = stride if index == 0 else 1
            sizes = (inputs, rounded(inputs * control["e"][slot]), outputs)
            body = _body(
                tensors,
                name,
                sizes,
                control["ks"][slot],
                step,
                nonlinear=HardSwish if has_h_swish else nn.ReLU,
            )
            if has_squeeze:
                body.insert(6, _squeeze(tensors, f"{name}.depth_conv.se.fc", sizes[1]))
            layers.append(PlainResidual(body) if inputs == outputs and step == 1 else body)
            inputs = outputs
    widest, last = rounded(960 * width), rounded(1280 * width)
    layers += [
        _conv(tensors["final_expand_layer.conv.weight"], inputs, widest),
        _norm(tensors, "final_expand_layer.bn", widest),
        HardSwish(),
        nn.AdaptiveAvgPool2d(1),
        _conv(tensors["feature_mix_layer.conv.weight"], widest, last),
        HardSwish(),
        nn.Flatten(),
        filled(
            nn.Linear(last, len(tensors["classifier.linear.bias"]), device="meta"),
            {part: tensors[f"classifier.linear.{part}"] for part in ("weight", "bias")},
        ),
    ]
    return nn.Sequential(*layers).eval()


def _body(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    sizes: tuple[int, int, int],
    kernel: int,
    stride: int,
    *,
    nonlinear: type[nn.Module],
) -> nn.Sequential:
    inputs, middle, outputs = sizes
    return nn.Sequential(
        _conv(tensors[f"{name}.inverted_bottleneck.conv.conv.weight"], inputs, middle),
        _norm(tensors, f"{name}.inverted_bottleneck.bn.bn", middle),
        nonlinear(),
        _depthwise(smaller_kernel(tensors, f"{name}.depth_conv.conv", kernel), middle, stride),
        _norm(tensors, f"{name}.depth_conv.bn.bn", middle),
        nonlinear(),
        _conv(tensors[f"{name}.point_linear.conv.conv.weight"], middle, outputs),
        _norm(tensors, f"{name}.point_linear.bn.bn", outputs),
    )


def smaller_kernel(tensors: Mapping[str, torch.Tensor], name: str, size: int) -> torch.Tensor:
    """Return the kernels of a size, (C, 1, size, size): each centre times the matrix, step by step."""
    kernels = list(tensors[f"{name}.conv.weight"][:, 0])
    for larger, smaller in ((7, 5), (5, 3)):
        if size <= smaller:
            matrix = tensors[f"{name}.{larger}to{smaller}_matrix"]
            centres = torch.stack([kernel[1:-1, 1:-1].reshape(-1) for kernel in kernels])
            kernels = list((centres.double() @ matrix.double().T).float().reshape(-1, smaller, smaller))
    return torch.stack(kernels)[:, None]


def _squeeze(tensors: Mapping[str, torch.Tensor], name: str, channels: int) -> PlainSqueeze:
    few = rounded(channels // 4)
    layers = []
    for part, inputs, outputs in (("reduce", channels, few), ("expand", few, channels)):
        weight = gather(tensors[f"{name}.{part}.weight"], (outputs, inputs))
        bias = gather(tensors[f"{name}.{part}.bias"], (outputs,))
        layers.append(filled(nn.Conv2d(inputs, outputs, 1, device="meta"), {"weight": weight, "bias": bias}))
    return PlainSqueeze(*layers)


def _conv(weight: torch.Tensor, inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    kernel = weight.shape[-1]
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, device="meta")
    return filled(conv, {"weight": gather(weight, (outputs, inputs))})


def _depthwise(weight: torch.Tensor, channels: int, stride: int) -> nn.Conv2d:
    kernel = weight.shape[-1]
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False, device="meta"
    )
    return filled(conv, {"weight": gather(weight, (channels,))})


def _norm(tensors: Mapping[str, torch.Tensor], name: str, channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-5, device="meta")
    parts = ("weight", "bias", "running_mean", "running_var")
    state = {part: gather(tensors[f"{name}.{part}"], (channels,)) for part in parts}
    return filled(norm, state | {"num_batches_tracked": tensors[f"{name}.num_batches_tracked"].clone()})
