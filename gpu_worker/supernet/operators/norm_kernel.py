"""The Triton kernel of `fused_norm`; imported only where there is a CUDA device and Triton."""

from __future__ import annotations

import triton
import triton.language as tl


# Not specialised: otherwise it would be compiled once for lengths that 16 divides, and again for others.
@triton.jit(do_not_specialize=["n_rows", "n_eighths"])  # type: ignore[untyped-decorator, unused-ignore]
def normalise(  # type: ignore[no-untyped-def]  # Triton reads annotations, and knows its own alone
    out,
    x,
    residual,
    mean,
    variance,
    weight,
    bias,
    eps,
    n_rows,
    n_eighths,
    has_affine: tl.constexpr,
    has_residual: tl.constexpr,
    rectifies: tl.constexpr,
    rows_each: tl.constexpr,
    channels_each: tl.constexpr,
):
    """Normalise, add and rectify one tile of a matrix (n_rows, 8 * n_eighths), in float32.

    That the row's length is written as a multiple of 8 lets the compiler move 16 bytes at a time.
    """
    n_channels = n_eighths * 8
    row = tl.program_id(0) * rows_each + tl.arange(0, rows_each)
    channel = tl.program_id(1) * channels_each + tl.arange(0, channels_each)
    is_channel = channel < n_channels
    scale = 1.0 / tl.sqrt(tl.load(variance + channel, mask=is_channel, other=1.0) + eps)
    if has_affine:
        scale *= tl.load(weight + channel, mask=is_channel, other=0.0)
    shift = -tl.load(mean + channel, mask=is_channel, other=0.0) * scale
    if has_affine:
        shift += tl.load(bias + channel, mask=is_channel, other=0.0)
    at = row[:, None] * n_channels + channel[None, :]
    inside = (row < n_rows)[:, None] & is_channel[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if has_residual:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if rectifies:
        value = tl.maximum(value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
