"""A plain residual network, and a supernet to compare it with.

It shares no code with the slicer: ordinary torch layers of the subnet's own sizes,
whose weights are gathered from the supernet's state dict index by index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gpu_worker.models.digits_supernet import DigitsArchitecture, digits_supernet
from gpu_worker.supernet.supernet import SubnetStatistics, Supernet
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ARCHITECTURE = DigitsArchitecture(
    image_shape=(1, 8, 8), channels=(8, 10, 12), depths=(2, 3, 1), n_classes=5, widths=(0.1, 0.5, 1.0)
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


SUBNETS = tuple(Subnet(f"{row}", {"d": depths, "w": widths}) for row, (depths, widths) in enumerate(CONTROLS))


def small_supernet(seed: int = 0) -> Supernet:
    """Return a supernet with random weights and statistics that hosts SUBNETS."""
    torch.manual_seed(seed)
    supernet = digits_supernet(ARCHITECTURE)
    supernet.host(SUBNETS)
    with torch.no_grad():
        for norm in supernet.norms:
            assert norm.weight is not None
            assert norm.bias is not None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    supernet.set_statistics({SUBNETS[row].name: _statistics(supernet, row) for row in range(len(CONTROLS))})
    return supernet.eval()


def _statistics(supernet: Supernet, row: int) -> SubnetStatistics:
    """Return random statistics of one subnet, as long as each norm that runs is wide."""
    channels = []
    for norm in supernet.norms:
        stage, block = (0, 0) if norm.path == "stem_norm" else map(int, norm.path.split(".")[1:3])
        channels.append(CHANNELS[row][stage] if block < CONTROLS[row][0][stage] else 0)
    parts = [part for c in channels for part in (torch.randn(c), torch.rand(c) + 0.5)]
    return SubnetStatistics(tuple(channels), torch.cat(parts))


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


def plain_subnet(supernet: Supernet, row: int) -> nn.Module:
    """Return subnet `row` of CONTROLS as a plain network with the supernet's weights and statistics."""
    state = {**supernet.model.state_dict(), **_running(supernet, row)}
    depths, channels = CONTROLS[row][0], CHANNELS[row]
    stem = nn.Sequential(
        nn.Conv2d(1, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
    )
    _fill(stem[0], state, "stem")
    _fill_norm(stem[1], state, "stem_norm")
    blocks: list[nn.Module] = []
    inputs = channels[0]
    for stage, (depth, outputs) in enumerate(zip(depths, channels, strict=True)):
        for index in range(depth):
            block = PlainBlock(inputs, outputs, 2 if stage > 0 and index == 0 else 1)
            _fill_block(block, state, f"stages.{stage}.{index}")
            blocks.append(block)
            inputs = outputs
    head = nn.Linear(inputs, ARCHITECTURE.n_classes)
    _fill(head, state, "head")
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def _running(supernet: Supernet, row: int) -> State:
    """Return a subnet's statistics by the names that a plain network has for them."""
    held = supernet.statistics[SUBNETS[row].name]
    found, start = {}, 0
    for norm, channels in zip(supernet.norms, held.channels, strict=True):
        for name in ("running_mean", "running_var"):
            found[f"{norm.path}.{name}"] = held.values[start : start + channels]
            start += channels
    return found


def _fill_block(block: PlainBlock, state: Mapping[str, torch.Tensor], prefix: str) -> None:
    _fill(block.body[0], state, f"{prefix}.conv1")
    _fill_norm(block.body[1], state, f"{prefix}.norm1")
    _fill(block.body[3], state, f"{prefix}.conv2")
    _fill_norm(block.body[4], state, f"{prefix}.norm2")
    if len(block.shortcut) > 0:
        _fill(block.shortcut[0], state, f"{prefix}.shortcut")
        _fill_norm(block.shortcut[1], state, f"{prefix}.shortcut_norm")


def _fill(layer: nn.Module, state: Mapping[str, torch.Tensor], prefix: str) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(_gather(state[f"{prefix}.{name}"], parameter.shape[:2]))


def _fill_norm(layer: nn.Module, state: Mapping[str, torch.Tensor], prefix: str) -> None:
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    _fill(layer, state, prefix)
    # Their lengths are this layer's own, or the copy fails.
    layer.running_mean.copy_(state[f"{prefix}.running_mean"])
    layer.running_var.copy_(state[f"{prefix}.running_var"])


def _gather(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    for axis, size in enumerate(sizes):
        tensor = torch.stack([tensor.select(axis, index) for index in range(size)], dim=axis)
    return tensor
