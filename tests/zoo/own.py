"""Rows for kinds of networks that transformers has none of: UNet, DenseNet, squeeze-excite, LSTM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.supernet.insertion import Elastic, Stage
from tests.zoo.judge import Row, ignoring, without

if TYPE_CHECKING:
    from typing import Any

CHANNELS = 8
HALF: dict[str, list[Any]] = {"w": [0.5]}


def images() -> torch.Tensor:
    """Return random images, (2, 3, 16, 16)."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution, its norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        out: torch.Tensor = x + self.body(x)
        return out


class UNet(nn.Module):
    """Two levels, with residual blocks at the bottom and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(conv(3, CHANNELS), conv(CHANNELS, CHANNELS))
        self.down = conv(CHANNELS, 2 * CHANNELS, stride=2)
        self.bottom = nn.Sequential(*(Residual(conv(2 * CHANNELS, 2 * CHANNELS)) for _ in range(3)))
        self.up = nn.ConvTranspose2d(2 * CHANNELS, CHANNELS, 2, 2)
        self.join = nn.Sequential(conv(2 * CHANNELS, CHANNELS), nn.Conv2d(CHANNELS, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 2, H, W)."""
        skip = self.outer(x)
        x = self.up(self.bottom(self.down(skip)))
        out: torch.Tensor = self.join(torch.cat([skip, x], 1))
        return out


class DenseLayer(nn.Module):
    """Concatenates its input and what it makes of it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.squeeze, self.grow = conv(inputs, 4 * growth, 1), conv(4 * growth, growth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, inputs + growth, H, W)."""
        return torch.cat([x, self.grow(self.squeeze(x))], 1)


class DenseNet(nn.Module):
    """Three dense layers, and a transition that takes whatever they give."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, CHANNELS)
        self.layers = nn.ModuleList(DenseLayer(CHANNELS + 4 * n, 4) for n in range(3))
        self.transition = conv(CHANNELS + 12, 2 * CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 16)."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.transition(x).mean((2, 3))
        return out


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels' means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H, W)."""
        scale = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        out: torch.Tensor = x * scale[:, :, None, None]
        return out


class SqueezeExciteNet(nn.Module):
    """Residual blocks with squeeze and excitation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, CHANNELS)
        self.layers = nn.ModuleList(
            Residual(nn.Sequential(conv(CHANNELS, 16), SqueezeExcite(16), nn.Conv2d(16, CHANNELS, 1)))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 8)."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


class Recurrent(nn.Module):
    """x + an LSTM's output, projected back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, width)."""
        out: torch.Tensor = x + self.out(self.lstm(x)[0])
        return out


class Tagger(nn.Module):
    """An embedding, residual LSTMs and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(Recurrent(8, 12) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, T, 5)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x)
        return out


def tokens() -> torch.Tensor:
    """Return random tokens, (2, 7)."""
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def fewer_cells(whole: nn.Module) -> nn.Module:
    """Return the tagger with LSTMs of 6 cells: of each of the four gates the first 6 rows."""
    for layer in whole.modules():
        if isinstance(layer, Recurrent):
            old, layer.lstm = layer.lstm, nn.LSTM(8, 6, batch_first=True)
            rows = torch.cat([12 * gate + torch.arange(6) for gate in range(4)])
            with torch.no_grad():
                for name, parameter in layer.lstm.named_parameters():
                    parameter.copy_(
                        getattr(old, name)[rows][..., : parameter.shape[-1]].reshape(parameter.shape)
                    )
            out, layer.out = layer.out, nn.Linear(6, 8)
            layer.out.weight = nn.Parameter(out.weight[:, :6])
            layer.out.bias = out.bias
    return whole


def rows() -> list[Row]:
    """Return all rows."""
    first_two: dict[str, list[Any]] = {"d": [2]}
    return [
        Row("UNet", "depth", UNet, images, without("bottom", (0, 1)), first_two, stages=[Stage("bottom")]),
        Row(
            "UNet", "channels", UNet, images, ignoring({"outer.1.0": 4}), HALF,
            elastic=[Elastic("w", ["outer.0.0"])],
        ),
        Row(
            "UNet", "channels of the skip", UNet, images,
            ignoring({"down.0": 4, "join.0.0": [0, 1, 2, 3, *range(8, 16)]}), HALF,
            elastic=[Elastic("w", ["outer.1.0"])],
        ),
        Row(
            "DenseNet", "depth", DenseNet, images, ignoring({"transition.0": CHANNELS + 8}), first_two,
            stages=[Stage("layers")],
        ),
        Row(
            "DenseNet", "channels", DenseNet, images, ignoring({"layers.*.grow.0": 8}), HALF,
            elastic=[Elastic("w", ["layers.*.squeeze.0"])],
        ),
        Row(
            "DenseNet", "growth", DenseNet, images,
            ignoring(
                {
                    "layers.1.squeeze.0": [*range(8), 8, 9],
                    "layers.2.squeeze.0": [*range(8), 8, 9, 12, 13],
                    "transition.0": [*range(8), 8, 9, 12, 13, 16, 17],
                }
            ),
            HALF, elastic=[Elastic("w", ["layers.*.grow.0"])],
        ),
        Row(
            "squeeze-excite", "depth", SqueezeExciteNet, images, without("layers", (0, 1)), first_two,
            stages=[Stage("layers")],
        ),
        Row(
            "squeeze-excite", "channels", SqueezeExciteNet, images,
            ignoring({"layers.*.body.1.reduce": 8, "layers.*.body.2": 8}), HALF,
            elastic=[Elastic("w", ["layers.*.body.0.0", "layers.*.body.1.expand"])],
        ),
        Row(
            "squeeze-excite", "channels, without those of its expansion", SqueezeExciteNet, images,
            ignoring({"layers.*.body.1.reduce": 8, "layers.*.body.2": 8}), HALF,
            elastic=[Elastic("w", ["layers.*.body.0.0"])],
        ),
        Row("LSTM", "depth", Tagger, tokens, without("layers", (0, 1)), first_two, stages=[Stage("layers")]),
        Row(
            "LSTM", "hidden units", Tagger, tokens, fewer_cells, HALF,
            elastic=[Elastic("w", ["layers.*.lstm"])],
        ),
    ]  # fmt: skip
