"""Small supernets of every operator, for proofs that hold and for mutants of the slicer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.supernet.control import spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet


class Inverted(nn.Module):
    """Widen, convolve each channel, narrow, and add: every kind of convolution and norm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(channels, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.down = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        inner = self.norm1(self.up(x)).relu()
        inner = self.norm2(self.depthwise(inner)).relu()
        added: torch.Tensor = x + self.norm3(self.down(inner))
        return added


class Convolutional(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, channels: int = 12, hidden: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Inverted(channels, hidden) for _ in range(depth)))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 5) for images (B, 3, H, W)."""
        y: torch.Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


def convolutional() -> Supernet:
    """Return a supernet of convolutions, of which the residual stream is elastic too."""
    torch.manual_seed(0)
    return insert(
        Convolutional(),
        stages=[Stage("blocks")],
        elastic=[
            Elastic("stream", ["stem", "blocks.*.down"]),
            *(Elastic(f"hidden {i}", [f"blocks.{i}.up"]) for i in range(3)),
        ],
    ).eval()


def encoder() -> Supernet:
    """Return a supernet of torch's own encoder, with a norm over a cut width behind it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    tail = [nn.Linear(16, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3)]
    model = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), *tail)
    return insert(
        model,
        stages=[Stage("0.layers", rule=spread_blocks)],
        elastic=[
            Elastic("heads", ["0.layers.*.self_attn"]),
            Elastic("hidden", ["0.layers.*.linear1"]),
            Elastic("tail", ["1"]),
        ],
    ).eval()


IMAGES = (2, 3, 6, 6)
WORDS = (2, 5, 16)
