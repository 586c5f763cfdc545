"""What a supernet answers, and how it is compared with a module that was cut by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.supernet.actuation import actuate
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet


def answer(supernet: Supernet, control: dict[str, list[Any]], *args: Any, **kwargs: Any) -> Any:
    """Host one subnet, actuate it, and run it without gradients; a later pass answers as its first one."""
    supernet.eval()
    supernet.host([Subnet("s", control)])
    actuate(supernet, 0)
    with torch.inference_mode():
        first, later = supernet(*args, **kwargs), supernet(*args, **kwargs)
    torch.testing.assert_close(later, first)
    return later


def alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare doubles, within 1e-9 of the largest number."""
    assert found.dtype == expected.dtype == torch.float64
    expected = expected.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return random doubles."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
