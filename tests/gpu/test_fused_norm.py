"""The fused kernel against torch in double precision."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from gpu_worker.supernet.operators import fused_norm

CASES = list(itertools.product((8, 24, 168, 2048), (1, 7, 56), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)]
)
def test_it_computes_what_torch_does(dtype: torch.dtype, tolerance: float) -> None:
    """All combinations of parts, at sizes that fill tiles and that do not."""
    torch.manual_seed(0)
    for channels, side, is_affine, has_residual, rectifies in CASES:
        x, residual = (
            torch.randn(3, channels, side, side, device="cuda", dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        mean = torch.randn(channels, device="cuda")
        weight: torch.Tensor | None = torch.randn(channels, device="cuda")
        bias: torch.Tensor | None = torch.randn(channels, device="cuda")
        variance = torch.rand(channels, device="cuda") + 0.1
        if not is_affine:
            weight = bias = None
        added = residual if has_residual else None
        with torch.inference_mode(), fused_norm.fusing():
            assert fused_norm.is_fused(x, added, (mean, variance, weight, bias))
            found = fused_norm.norm_relu(x, mean, variance, weight, bias, 1e-5, added, rectifies=rectifies)
        expected = F.batch_norm(
            x.double(), mean.double(), variance.double(), _double(weight), _double(bias), eps=1e-5
        )
        expected = fused_norm.finished(expected, _double(added), rectifies=rectifies)
        error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < tolerance, (channels, side, is_affine, has_residual, rectifies)
        assert found.stride() == x.stride()


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()
