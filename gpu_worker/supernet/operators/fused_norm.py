"""BatchNorm with given statistics, a residual and a ReLU in one kernel, where a CUDA device allows it.

On an H100 cuDNN's own kernel for inference took 10 us however small its input: more than half of all
the time of OFA-ResNet50's smallest subnet at batch 1, and two more kernels followed it. One Triton
kernel reads each number once and writes it once.

Launching it from Python takes some 150 us, much more than cuDNN's: so it is used within `fusing()` alone,
where a CUDA graph is captured, and its launches cost nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

_LOG = logging.getLogger(__name__)

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_TILE = 4_096  # elements a program
_CHANNELS_EACH = (32, 64, 128, 256)  # of a tile: few, since the kernel is compiled for each
_MAX_ELEMENTS = 2**31 - _TILE  # the kernel counts in 32 bits

_Launch = Callable[..., None]
_Parts = tuple[torch.Tensor | None, ...]


_fuses = False


@contextlib.contextmanager
def fusing() -> Iterator[None]:
    """Use the kernel within the block: around a capture, and the passes before it that compile kernels.

    For all threads, one at a time: one thread captures.
    """
    global _fuses  # noqa: PLW0603  what runs is the process's, as torch's own switches are
    _fuses = True
    try:
        yield
    finally:
        _fuses = False


def norm_relu(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    rectifies: bool = False,
) -> torch.Tensor:
    """Return relu(norm(x) + residual), without the parts that are not asked for.

    Args:
        x: (B, C, ...).
        mean: (C,), of the norm; so are the next three.
        variance: (C,).
        weight: (C,), or None.
        bias: (C,), or None.
        eps: Added to the variance.
        residual: Of x's shape.
        rectifies: Whether the ReLU comes last.
    """
    if is_fused(x, residual, (mean, variance, weight, bias)):
        return _launched(x, mean, variance, weight, bias, eps, residual, rectifies)
    return finished(F.batch_norm(x, mean, variance, weight, bias, eps=eps), residual, rectifies=rectifies)


def finished(normed: torch.Tensor, residual: torch.Tensor | None, *, rectifies: bool) -> torch.Tensor:
    """Return what follows a norm, in plain torch."""
    if residual is not None:
        normed = normed + residual
    return F.relu(normed, inplace=True) if rectifies else normed


def is_fused(x: torch.Tensor, residual: torch.Tensor | None, of_norm: _Parts) -> bool:
    """Return whether the kernel will do it here.

    Args:
        x: As `norm_relu` takes it.
        residual: As `norm_relu` takes it.
        of_norm: Mean, variance, weight and bias.
    """
    is_asked = _fuses and x.is_cuda and not torch.is_grad_enabled()
    return is_asked and fits(x, residual, of_norm) and _kernel() is not None


def fits(x: torch.Tensor, residual: torch.Tensor | None, of_norm: _Parts) -> bool:
    """Return whether the kernel can do it: channels last in memory, a multiple of 8, float32 norms."""
    is_dense = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else (
        x.dim() == 2 and x.is_contiguous()
    )  # fmt: skip
    return (
        is_dense
        and x.dtype in _DTYPES
        and x.shape[1] % 8 == 0
        and 0 < x.numel() < _MAX_ELEMENTS
        and (weight_and_bias := of_norm[2:]).count(None) in (0, len(weight_and_bias))
        and all(part is None or (part.dtype == torch.float32 and part.is_contiguous()) for part in of_norm)
        and (
            residual is None
            or (residual.dtype == x.dtype and residual.shape == x.shape and residual.stride() == x.stride())
        )
    )


def _launched(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    rectifies: bool,
) -> torch.Tensor:
    out = torch.empty_like(x)  # x may be used elsewhere: in a pre-activation network it is
    n_channels = x.shape[1]
    n_rows = x.numel() // n_channels
    channels_each = next((each for each in _CHANNELS_EACH if each >= n_channels), _CHANNELS_EACH[-1])
    rows_each = _TILE // channels_each
    grid = (-(-n_rows // rows_each), -(-n_channels // channels_each))
    launch = _kernel()
    assert launch is not None, "it was asked for"
    launch(
        grid, out, x, residual if residual is not None else x, mean, variance,
        mean if weight is None else weight, mean if bias is None else bias, eps, n_rows, n_channels // 8,
        has_affine=weight is not None, has_residual=residual is not None, rectifies=rectifies,
        rows_each=rows_each, channels_each=channels_each,
    )  # fmt: skip
    return out


@functools.cache
def _kernel() -> _Launch | None:
    """Return what launches the kernel; None where Triton is missing, and then torch's own kernels run."""
    try:
        from gpu_worker.supernet.operators.norm_kernel import normalise  # noqa: PLC0415  only CUDA builds bring Triton
    except ImportError as error:
        _LOG.warning("norms are not fused: %s", error)
        return None

    def launch(grid: tuple[int, int], *args: Any, **options: Any) -> None:
        normalise[grid](*args, **options)

    return launch
