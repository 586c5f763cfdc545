"""The digits supernet: a small residual network of which depth and width are elastic.

A subnet's control tuple is {"d": blocks run in each stage, "w": width fraction of each stage};
stage m then runs its first d[m] blocks on its first ceil(w[m] * channels[m]) channels. The
stem is as wide as the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import normed
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet


@dataclass(frozen=True, slots=True)
class DigitsArchitecture:
    """The sizes of a digits network at its largest.

    Attributes:
        image_shape: Channels, height and width of one image.
        channels: Of each stage; every stage after the first halves the image.
        depths: Blocks of each stage.
        n_classes: Size of the output.
        widths: Width fractions of a stage that a search draws from, ascending to 1.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    n_classes: int
    widths: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.depths):
            raise ConfigError(
                f"architecture: expected as many channels as depths, got {self.channels} and {self.depths}"
            )


# Widths that give multiples of 4 channels: a CPU's vectors compute the others padded.
DIGITS = DigitsArchitecture(
    image_shape=(1, 20, 20),
    channels=(32, 64, 64),
    depths=(2, 2, 2),
    n_classes=10,
    widths=(0.125, 0.25, 0.5, 0.75, 1.0),
)
"""The one whose weights are shipped."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(shortcut(x) + body(x))."""
        body = normed(self.norm1, self.conv1(x), rectifies=True)
        shortcut = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        return normed(self.norm2, self.conv2(body), shortcut, rectifies=True)  # (B, C, H', W')


class DigitsNet(nn.Module):
    """The network at its largest, in plain torch."""

    def __init__(self, architecture: DigitsArchitecture) -> None:
        super().__init__()
        channels = architecture.channels
        self.stem = nn.Conv2d(architecture.image_shape[0], channels[0], 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels[0])
        self.stages = nn.ModuleList(_stage(architecture, stage) for stage in range(len(channels)))
        self.head = nn.Linear(channels[-1], architecture.n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, n_classes), for images (B, C, H, W)."""
        x = normed(self.stem_norm, self.stem(x), rectifies=True)
        for stage in self.stages:
            x = stage(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def _stage(architecture: DigitsArchitecture, stage: int) -> nn.Sequential:
    channels = architecture.channels
    before = channels[max(stage - 1, 0)]
    return nn.Sequential(
        *(
            ResidualBlock(
                before if block == 0 else channels[stage],
                channels[stage],
                stride=2 if stage > 0 and block == 0 else 1,
            )
            for block in range(architecture.depths[stage])
        )
    )


def digits_supernet(architecture: DigitsArchitecture = DIGITS) -> Supernet:
    """Return the supernet with random weights, hosting the whole."""
    stages = range(len(architecture.depths))
    return insert(
        DigitsNet(architecture),
        stages=[Stage(f"stages.{m}") for m in stages],
        elastic=[Elastic(f"{m}", _layers_of(m), architecture.widths) for m in stages],
    )


def _layers_of(stage: int) -> list[str]:
    """Return the layers whose outputs are as wide as a stage."""
    blocks = [f"stages.{stage}.*.conv1", f"stages.{stage}.*.conv2"]
    return ["stem", *blocks] if stage == 0 else [*blocks, f"stages.{stage}.*.shortcut"]
