"""OFA-MobileNetV3: the published once-for-all supernet for ImageNet on small devices.

A subnet's control tuple is {"d": 5 depths, "e": 20 expand ratios, "ks": 20 kernel sizes, "r": 1 resolution},
by the names that the published code has:

- d[m], m from 0 to 4, is 2, 3 or 4: stage m runs its first d[m] blocks. A first block runs before them in
  every subnet;
- e[k] is block k's, counted at full depth: its middle is its input times 3, 4 or 6;
- ks[k] is the kernel of block k's depthwise convolution: 3, 5 or 7;
- r[0] is the height and width that images of 224 pixels are brought to, first of all.

Every number of channels is rounded to a multiple of 8. A squeeze-and-excite has a quarter of its block's
middle. Images are (B, 3, H, W), normalised.

Source: Cai et al., "Once for All" (ICLR '20), the MobileNetV3 design space of ofa_mbv3_d234_e346_k357_w1.0
and of the same with w1.2; Howard et al., "Searching for MobileNetV3" (ICCV '19).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.models.ofa_resnet50 import N_CLASSES, make_divisible
from gpu_worker.supernet.control import Control, Controls, ControlSpace, Entry, Sizes, first_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import normed
from gpu_worker.supernet.operators.chosen import KernelConv2d, Resize
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gpu_worker.supernet.supernet import Supernet

DEPTH = 4
"""Blocks of each stage at full depth."""

DEPTHS = (2, 3, 4)
EXPAND_RATIOS = (3, 4, 6)
KERNEL_SIZES = (3, 5, 7)
PIXELS = 224
RESOLUTIONS = (128, 144, 160, 176, 192, 208, PIXELS)
"""What a search draws from; the published supernets were trained on images of 128 to 224 pixels."""

STEM_CHANNELS = 16
STAGE_CHANNELS = (24, 40, 80, 112, 160)
STRIDES = (2, 2, 2, 1, 2)
HAS_H_SWISH = (False, False, True, True, True)
HAS_SQUEEZE = (False, True, False, True, True)
LAST_CHANNELS = (960, 1280)
N_BLOCKS = DEPTH * len(STAGE_CHANNELS)
_SQUEEZE = 4  # a squeeze-and-excite has as many times fewer channels than its block's middle


@dataclass(frozen=True, slots=True)
class MobileNetArchitecture:
    """The sizes of an OFA-MobileNetV3.

    Attributes:
        width: Multiplies every number of channels; 1.0 and 1.2 are published.
        n_classes: Size of the output.
    """

    width: float = 1.0
    n_classes: int = N_CLASSES

    def channels(self, base: int) -> int:
        """Return a number of channels at this width."""
        return make_divisible(base * self.width)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Channels that each block is given, at full depth."""
        before = STEM_CHANNELS
        found: list[int] = []
        for channels in STAGE_CHANNELS:
            found += [self.channels(before), *[self.channels(channels)] * (DEPTH - 1)]
            before = channels
        return tuple(found)

    def middle(self, block: int, ratio: float) -> int:
        """Return the channels of a block's middle at an expand ratio."""
        return make_divisible(round(self.inputs[block] * ratio))


W10, W12 = MobileNetArchitecture(1.0), MobileNetArchitecture(1.2)
"""The published ones."""


def squeezed(middle: int) -> int:
    """Return the channels of the squeeze-and-excite of a block with such a middle."""
    return make_divisible(middle // _SQUEEZE)


class MobileConv(nn.Module):
    """A convolution and its BatchNorm, and perhaps an activation.

    Args:
        conv: Without bias.
        has_h_swish: Whether a hard swish is last, and not a ReLU; None for neither.
    """

    def __init__(self, conv: nn.Conv2d, *, has_h_swish: bool | None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        self.act = nn.Hardswish() if has_h_swish else None
        self.rectifies = has_h_swish is False

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, C, H', W'); `residual` is added before the activation."""
        x = normed(self.bn, self.conv(x), residual, rectifies=self.rectifies)
        return x if self.act is None else self.act(x)


class SqueezeExcite(nn.Module):
    """Scales each channel by what two small layers make of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed(channels), 1)
        self.expand = nn.Conv2d(squeezed(channels), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W)."""
        scales = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.expand(scales))


class InvertedBottleneck(nn.Module):
    """A block: widen, convolve each channel, narrow; beside a shortcut where the shape stays.

    Args:
        channels: Of its input, its middle and its output.
        depthwise: The convolution of its middle.
        has_h_swish: Whether its activations are hard swishes, and not ReLUs.
        has_squeeze: Whether a squeeze-and-excite is behind the middle.
        expands: Whether it widens; the first block does not.
    """

    def __init__(
        self,
        channels: tuple[int, int, int],
        depthwise: nn.Conv2d,
        *,
        has_h_swish: bool,
        has_squeeze: bool,
        expands: bool = True,
    ) -> None:
        super().__init__()
        inputs, middle, outputs = channels
        self.inverted_bottleneck: MobileConv | None = None
        if expands:
            widen = nn.Conv2d(inputs, middle, 1, bias=False)
            self.inverted_bottleneck = MobileConv(widen, has_h_swish=has_h_swish)
        self.depth_conv = MobileConv(depthwise, has_h_swish=has_h_swish)
        self.se = SqueezeExcite(middle) if has_squeeze else None
        self.point_linear = MobileConv(nn.Conv2d(middle, outputs, 1, bias=False), has_h_swish=None)
        self.has_shortcut = inputs == outputs and depthwise.stride == (1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, outputs, H', W')."""
        middle = x if self.inverted_bottleneck is None else self.inverted_bottleneck(x)
        middle = self.depth_conv(middle)
        if self.se is not None:
            middle = self.se(middle)
        narrowed: torch.Tensor = self.point_linear(middle, x if self.has_shortcut else None)
        return narrowed


class OfaMobileNetV3(nn.Module):
    """The whole network, in plain torch."""

    def __init__(self, sizes: MobileNetArchitecture = W10) -> None:
        super().__init__()
        stem = sizes.channels(STEM_CHANNELS)
        self.resize = Resize(PIXELS)
        self.first_conv = MobileConv(nn.Conv2d(3, stem, 3, 2, 1, bias=False), has_h_swish=True)
        first = nn.Conv2d(stem, stem, 3, 1, 1, groups=stem, bias=False)
        blocks = [
            InvertedBottleneck((stem, stem, stem), first, has_h_swish=False, has_squeeze=False, expands=False)
        ]
        for k, inputs in enumerate(sizes.inputs):
            stage, middle = k // DEPTH, sizes.middle(k, EXPAND_RATIOS[-1])
            stride = STRIDES[stage] if k % DEPTH == 0 else 1
            blocks.append(
                InvertedBottleneck(
                    (inputs, middle, sizes.channels(STAGE_CHANNELS[stage])),
                    KernelConv2d(middle, KERNEL_SIZES, stride=stride),
                    has_h_swish=HAS_H_SWISH[stage],
                    has_squeeze=HAS_SQUEEZE[stage],
                )
            )
        self.blocks = nn.ModuleList(blocks)
        widest, last = (sizes.channels(base) for base in LAST_CHANNELS)
        expand = nn.Conv2d(sizes.channels(STAGE_CHANNELS[-1]), widest, 1, bias=False)
        self.final_expand_layer = MobileConv(expand, has_h_swish=True)
        self.feature_mix_layer = nn.Conv2d(widest, last, 1, bias=False)
        self.classifier = nn.Linear(last, sizes.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, n_classes), for normalised images (B, 3, H, W)."""
        x = self.first_conv(self.resize(images))
        for block in self.blocks:
            x = block(x)
        x = self.final_expand_layer(x).mean((2, 3), keepdim=True)
        x = nn.functional.hardswish(self.feature_mix_layer(x))
        logits: torch.Tensor = self.classifier(x.flatten(1))
        return logits


def _space() -> ControlSpace:
    blocks = [f"block {k} (stage {k // DEPTH}, block {k % DEPTH})" for k in range(N_BLOCKS)]
    return ControlSpace(
        {
            "d": tuple(Entry(f"stage {m}", DEPTHS) for m in range(len(STAGE_CHANNELS))),
            "e": tuple(Entry(where, EXPAND_RATIOS) for where in blocks),
            "ks": tuple(Entry(where, KERNEL_SIZES) for where in blocks),
            "r": (Entry("resolution", RESOLUTIONS),),
        }
    )


def controls_of(sizes: MobileNetArchitecture) -> Controls:
    """Return the control tuples, and what each comes to."""

    def found(control: Control) -> Sizes:
        outputs = {"resolution": control["r"][0]}
        for k, (ratio, kernel) in enumerate(zip(control["e"], control["ks"], strict=True)):
            outputs[f"middle {k}"] = middle = sizes.middle(k, ratio)
            outputs[f"kernel {k}"] = kernel
            if HAS_SQUEEZE[k // DEPTH]:
                outputs[f"squeeze {k}"] = squeezed(middle)
        return Sizes(tuple(first_blocks(depth, DEPTH) for depth in control["d"]), outputs)

    return Controls(_space(), found)


def ofa_mobilenet_v3(sizes: MobileNetArchitecture = W10) -> Supernet:
    """Return the supernet with random weights, hosting the whole."""
    elastic = [Elastic("resolution", ["resize"])]
    for k in range(N_BLOCKS):
        block = f"blocks.{1 + k}"
        middles = [f"{block}.inverted_bottleneck.conv"]
        if HAS_SQUEEZE[k // DEPTH]:
            middles.append(f"{block}.se.expand")
            elastic.append(Elastic(f"squeeze {k}", [f"{block}.se.reduce"]))
        elastic += [Elastic(f"middle {k}", middles), Elastic(f"kernel {k}", [f"{block}.depth_conv.conv"])]
    stages = [
        Stage([f"blocks.{1 + k}" for k in range(first, first + DEPTH)], least=DEPTHS[0])
        for first in range(0, N_BLOCKS, DEPTH)
    ]
    return insert(OfaMobileNetV3(sizes), stages=stages, elastic=elastic, controls=controls_of(sizes))


# --- published names --------------------------------------------------------------------------


def published_name(name: str) -> str:
    """Return what the published checkpoints call the tensor that is `name` here.

    There a block is in a wrapper beside its shortcut, and what is elastic is in one more: conv.conv, bn.bn.
    """
    name = re.sub(r"^(blocks\.\d+)\.se\.", r"\1.depth_conv.se.fc.", name)
    name = re.sub(r"^(blocks\.\d+)\.", r"\1.mobile_inverted_conv.", name)
    name = re.sub(r"^feature_mix_layer\.", "feature_mix_layer.conv.", name)
    name = re.sub(r"^classifier\.", "classifier.linear.", name)
    if name.startswith("blocks.") and not name.startswith("blocks.0."):
        name = re.sub(r"\.(conv|bn)\.(?!\w+_matrix$)(\w+)$", r".\1.\1.\2", name)
    return name


def spelled_as(names: Collection[str]) -> Callable[[str], str]:
    """Return `published_name` in the spelling of a checkpoint with these names.

    Releases of the published code differ in the wrappers: a block's is mobile_inverted_conv or conv, and a
    layer that is not elastic is in one more or not.
    """
    spelled = {_bare(name): _unprefixed(name) for name in names}

    def name_of(name: str) -> str:
        published = published_name(name)
        return spelled.get(_bare(published), published)

    return name_of


def _bare(name: str) -> str:
    """Return a published name without what releases differ in."""
    name = _unprefixed(name).replace(".mobile_inverted_conv.", ".conv.")
    return re.sub(r"\.(conv|bn|linear)\.\1\.", r".\1.", name)


def _unprefixed(name: str) -> str:
    """Return a published name without what all names may begin with, such as `module.`."""
    return re.sub(r"^.*?(?=(first_conv|blocks|final_expand_layer|feature_mix_layer|classifier)\.)", "", name)


def architecture_of(
    sizes: MobileNetArchitecture, shapes: dict[str, tuple[int, ...]]
) -> MobileNetArchitecture:
    """Return an architecture with as many classes as a checkpoint with these shapes has.

    Raises:
        ConfigError: The checkpoint is of the other published width.
    """
    by_bare = {_bare(name): shape for name, shape in shapes.items()}
    stem, classifier = by_bare.get("first_conv.conv.weight"), by_bare.get("classifier.linear.weight")
    for other in (W10, W12):
        is_its = stem is not None and stem[:1] == (other.channels(STEM_CHANNELS),)
        if is_its and other.width != sizes.width:
            raise ConfigError(
                f"expected weights of width {sizes.width:g}, got those of width {other.width:g}: choose the "
                "supernet of that width"
            )
    n_classes = sizes.n_classes if classifier is None or len(classifier) != 2 else classifier[0]
    return MobileNetArchitecture(sizes.width, n_classes)


def control_of(*, depth: int, ratio: int, kernel: int, pixels: int = PIXELS) -> Control:
    """Return the control tuple with the same choice everywhere."""
    n_stages = len(STAGE_CHANNELS)
    return {"d": [depth] * n_stages, "e": [ratio] * N_BLOCKS, "ks": [kernel] * N_BLOCKS, "r": [pixels]}
