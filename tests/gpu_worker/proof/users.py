"""Modules as users write them, and how they are inserted, proved and asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.proof.absence import ProofError
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.insertion import insert
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.supernet.supernet import Supernet

HALF = Subnet("half", {"w": [0.5]})


ONE = Subnet("one", {"d": [1]})


class Residual(nn.Module):
    """A block with a residual path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return x and more."""
        return x + scale * F.relu(self.inner(x))


class Calls(nn.Module):
    """Blocks, and a function that says how their caller calls them."""

    def __init__(
        self, blocks: Sequence[nn.Module], call: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the caller's loop."""
        return self.call(self, x)


def residuals() -> nn.Module:
    """Return four residual blocks in a row, as 0.0 to 0.3."""
    return nn.Sequential(nn.Sequential(*(Residual() for _ in range(4))))


def at(model: nn.Module, x: torch.Tensor, subnet: Subnet, **declared: Any) -> Supernet:
    """Insert, and prove one subnet."""
    supernet = insert(model, **declared).eval()
    prove(supernet, x, subnets=[subnet])
    return supernet


def answer(supernet: Supernet, subnet: Subnet, x: torch.Tensor) -> torch.Tensor:
    """Return a subnet's answer in place."""
    supernet.host([subnet])
    actuate(supernet, 0)
    with torch.inference_mode():
        found: torch.Tensor = supernet(x)
    return found


def plainly(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Call one after the other."""
    for block in model.layers:
        x = block(x)
    return x


def around(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Add outside of the block."""
    for block in model.layers:
        x = x + block(x)
    return x


def branch() -> nn.Module:
    """A block without a residual path."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def refused_or_right(
    model: nn.Module, x: torch.Tensor, subnet: Subnet, expected: torch.Tensor, **declared: Any
) -> None:
    """What is proved answers right; what is not proved is refused."""
    supernet = insert(model, **declared).eval()
    try:
        prove(supernet, x, subnets=[subnet])
    except ProofError:
        return
    torch.testing.assert_close(answer(supernet, subnet, x), expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """Two layers, and what lies between them."""

    def __init__(
        self, a: nn.Module, b: nn.Module, between: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.a, self.b, self.between = a, b, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return b of what lies between of a of x."""
        found: torch.Tensor = self.b(self.between(self, self.a(x)))
        return found
