"""A plain residual network, and a supernet to compare it with.

It shares no code with the slicer: ordinary torch layers of the subnet's own sizes,
whose weights are gathered from the supernet's state dict index by index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.supernet import Architecture, DigitsSupernet
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ARCHITECTURE = Architecture(
    image_shape=(1, 8, 8), channels=(8, 10, 12), depths=(2, 3, 1), n_classes=5, min_width=0.1
)

CONTROLS: tuple[tuple[list[int], list[float]], ...] = (
    ([1, 1, 1], [0.1, 0.1, 0.1]),
    ([1, 2, 1], [0.5, 0.25, 1.0]),
    ([2, 1, 1], [1.0, 0.3, 0.75]),
    ([2, 3, 1], [1.0, 1.0, 1.0]),
)

# ceil(width * channels), by hand.
CHANNELS: tuple[tuple[int, ...], ...] = ((1, 1, 2), (4, 3, 12), (8, 3, 9), (8, 10, 12))

State = dict[str, torch.Tensor]


def small_supernet(seed: int = 0) -> DigitsSupernet:
    """Return a supernet with random weights and statistics that hosts CONTROLS."""
    torch.manual_seed(seed)
    supernet = DigitsSupernet(ARCHITECTURE)
    supernet.host([Subnet(str(depths), {"d": depths, "w": widths}) for depths, widths in CONTROLS])
    with torch.no_grad():
        for norm in supernet.norms():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.mean.normal_()
            norm.variance.uniform_(0.5, 2)
    return supernet.eval()


def images(n: int = 6, seed: int = 1) -> torch.Tensor:
    """Return random images for the small supernet."""
    return torch.randn(n, *ARCHITECTURE.image_shape, generator=torch.Generator().manual_seed(seed))


class PlainBlock(nn.Module):
    """A residual block of fixed size."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return torch.relu(self.body(x) + self.shortcut(x))


def plain_subnet(state: Mapping[str, torch.Tensor], row: int) -> nn.Module:
    """Return subnet `row` of CONTROLS as a plain network with the supernet's weights."""
    depths, channels = CONTROLS[row][0], CHANNELS[row]
    stem = nn.Sequential(
        nn.Conv2d(1, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
    )
    _fill(stem[0], state, "stem")
    _fill_norm(stem[1], state, "stem_norm", row)
    blocks: list[nn.Module] = []
    inputs = channels[0]
    for stage, (depth, outputs) in enumerate(zip(depths, channels, strict=True)):
        for index in range(depth):
            block = PlainBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1)
            _fill_block(block, state, f"stages.{stage}.blocks.{index}", row)
            blocks.append(block)
            inputs = outputs
    head = nn.Linear(inputs, ARCHITECTURE.n_classes)
    _fill(head, state, "head")
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def _fill_block(block: PlainBlock, state: Mapping[str, torch.Tensor], prefix: str, row: int) -> None:
    _fill(block.body[0], state, f"{prefix}.conv1")
    _fill_norm(block.body[1], state, f"{prefix}.norm1", row)
    _fill(block.body[3], state, f"{prefix}.conv2")
    _fill_norm(block.body[4], state, f"{prefix}.norm2", row)
    if len(block.shortcut) > 0:
        _fill(block.shortcut[0], state, f"{prefix}.shortcut")
        _fill_norm(block.shortcut[1], state, f"{prefix}.shortcut_norm", row)


def _fill(layer: nn.Module, state: Mapping[str, torch.Tensor], prefix: str) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(_gather(state[f"{prefix}.{name}"], parameter.shape[:2]))


def _fill_norm(layer: nn.Module, state: Mapping[str, torch.Tensor], prefix: str, row: int) -> None:
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    _fill(layer, state, prefix)
    size = (layer.num_features,)
    layer.running_mean.copy_(_gather(state[f"{prefix}.mean"][row], size))
    layer.running_var.copy_(_gather(state[f"{prefix}.variance"][row], size))


def _gather(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    for axis, size in enumerate(sizes):
        tensor = torch.stack([tensor.select(axis, index) for index in range(size)], dim=axis)
    return tensor
