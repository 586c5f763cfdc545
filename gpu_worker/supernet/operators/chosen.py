"""Layers of which a subnet chooses something else than how many outputs there are.

`KernelConv2d` is a depthwise convolution whose kernel may be smaller, `Resize` brings images to a smaller
size. Both are plain layers; a size that names one counts its kernel or its pixels, and insertion turns them
into the operators below. What they give has the channels of what they are given.

Source: Cai et al., "Once for All" (ICLR '20): elastic kernel size, and elastic resolution.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from gpu_worker.supernet.operators.base import ElasticOperator, first_fits, taken, version_of
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# --- the plain layers -----------------------------------------------------------------------


class KernelConv2d(nn.Conv2d):
    """A depthwise convolution that was trained with several kernel sizes.

    The smaller kernel is the centre of the larger one, times a learned matrix that all channels share. As it
    stands it has its largest kernel; the parameter "7to5_matrix", (25, 25), makes a kernel of 5 of one of 7.

    Args:
        channels: Of its input and its output.
        kernel_sizes: Odd, ascending.
        stride: The same for height and width.
    """

    def __init__(self, channels: int, kernel_sizes: Sequence[int], *, stride: int = 1) -> None:
        sizes = tuple(kernel_sizes)
        if not sizes or list(sizes) != sorted(set(sizes)) or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ConfigError(f"kernel_sizes: expected ascending odd numbers, got {list(kernel_sizes)}")
        super().__init__(channels, channels, sizes[-1], stride, sizes[-1] // 2, groups=channels, bias=False)
        self.kernel_sizes = sizes
        for small, large in itertools.pairwise(sizes):
            self.register_parameter(matrix_name(large, small), nn.Parameter(torch.eye(small**2)))

    @property
    def elastic_size(self) -> int:
        """Its largest kernel."""
        return self.kernel_sizes[-1]


def matrix_name(large: int, small: int) -> str:
    """Return what the matrix from one kernel size to the next smaller one is called."""
    return f"{large}to{small}_matrix"


class Resize(nn.Module):
    """Brings images to a share of their height and width; as it stands it leaves them as they are.

    Args:
        pixels: Height and width of the images that are served, which a size counts. Images of another
            size are brought to the same share of it.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    @property
    def elastic_size(self) -> int:
        """Pixels of an image that is left as it is."""
        return self.pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images, (B, C, H, W)."""
        return x


# --- the operators --------------------------------------------------------------------------


class ElasticKernelConv2d(ElasticOperator, KernelConv2d):
    """A depthwise convolution of which a subnet chooses the kernel size; it follows its input's channels.

    A smaller kernel is computed at its first use, for all channels: the matrix is the same for each, so that
    every subnet uses the first ones of it. It is kept until a parameter is written or replaced. While
    gradients are recorded, it is computed in each pass, and gradients reach the matrices.
    """

    channel_axis = -3
    gives_channels = False
    passes_channels = True
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def attach(self, cursor: Any, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        pairs = itertools.pairwise(self.kernel_sizes)
        self.watched = ("weight", *(matrix_name(large, small) for small, large in pairs))
        super().attach(cursor, place, path)

    def forget(self) -> None:
        """Drop all kernels, computed ones and views."""
        self.kernels: dict[Any, torch.Tensor] = {}
        self.computed: dict[int, torch.Tensor] = {}
        self.written = version_of(*self._parameters.values())

    @property
    def copied_bytes(self) -> int:
        """Bytes of the smaller kernels."""
        return sum(kernel.numel() * kernel.element_size() for kernel in self.computed.values())

    @property
    def n_inputs(self) -> int:
        """Channels of the whole layer."""
        return len(self.weight)

    @property
    def n_outputs(self) -> int:
        """The largest kernel size: what a size counts."""
        return self.elastic_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve each channel with the actuated kernel: (B, C, H, W) to (B, C, H', W')."""
        size: int = self.cursor.settings[self.place]
        channels = x.shape[self.channel_axis]
        kernel = self._kernel_in_use(size, channels)
        return F.conv2d(x, kernel, None, self.stride, size // 2, self.dilation, channels)

    def _kernel_in_use(self, size: int, channels: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self._part(self._computed(size), channels)
        self.look()
        if self.computed and self.written != version_of(*self._parameters.values()):
            self.forget()
        key = (size, channels, self.spans)
        found = self.kernels.get(key)
        if found is None:
            if size not in self.computed and size != self.elastic_size:
                with _disable_current_modes():  # who counts what a pass costs does not count this
                    self.computed[size] = self._computed(size).detach()
            found = self._part(self.computed.get(size, self.weight.detach()), channels)
            self.kernels[key] = found
        return found

    def _part(self, kernel: torch.Tensor, channels: int) -> torch.Tensor:
        first_fits(self.path, "inputs", channels, self.n_inputs)
        return taken(kernel, 0, self.spans or ((0, channels),))

    def _computed(self, size: int) -> torch.Tensor:
        """Return the kernel of this size, of all channels, (C, 1, size, size)."""
        if size not in self.kernel_sizes:
            sizes = ", ".join(map(str, self.kernel_sizes))
            raise ConfigError(f"{self.path}: expected a kernel size of {sizes}, got {size}")
        if size == self.elastic_size:
            return self.weight
        # In half precision every step would round.
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        kernel = self.weight.to(exact)
        for small, large in reversed(list(itertools.pairwise(self.kernel_sizes))):
            if large <= size:
                break
            matrix: torch.Tensor = getattr(self, matrix_name(large, small))
            edge = (large - small) // 2
            centre = kernel[:, :, edge : edge + small, edge : edge + small]
            kernel = F.linear(centre.flatten(2), matrix.to(exact)).reshape(-1, 1, small, small)
        return kernel.to(self.weight.dtype)

    proof_is_followed = True

    @staticmethod
    def proof_reference(layer: KernelConv2d, call: Any) -> torch.Tensor:
        """Return what the plain layer is to give: its kernel written as one matrix on the whole kernel."""
        size = layer.elastic_size
        kept = size if call.kept is None else call.kept
        # Places of the whole kernel in the order of its rows; each step keeps those of the centre.
        step = torch.eye(size**2, dtype=layer.weight.dtype)
        while size > kept:
            smaller = max(one for one in layer.kernel_sizes if one < size)
            places = torch.arange(size**2).reshape(size, size)
            edge = (size - smaller) // 2
            centre = places[edge:-edge, edge:-edge].reshape(-1)
            step = layer.get_parameter(matrix_name(size, smaller)) @ step[centre]
            size = smaller
        flat = layer.weight.reshape(len(layer.weight), -1)
        kernel = torch.einsum("ij,cj->ci", step, flat).reshape(-1, 1, size, size)
        (x,) = call.args
        return F.conv2d(x, kernel, None, layer.stride, size // 2, layer.dilation, layer.groups)


class ElasticResize(ElasticOperator, Resize):
    """A resize of which a subnet chooses the pixels: bilinear, over all pixels that a smaller one covers."""

    channel_axis = -3
    gives_channels = False
    passes_channels = True
    follows_inputs = False
    watched = ()

    @property
    def n_inputs(self) -> int:
        """Channels; any number of them."""
        return 0

    @property
    def n_outputs(self) -> int:
        """Pixels of an image that is left as it is."""
        return self.pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the images with the actuated number of pixels: (B, C, H, W) to (B, C, H', W')."""
        pixels: int = self.cursor.settings[self.place]
        if pixels == self.pixels:
            return x
        size = [max(1, round(length * pixels / self.pixels)) for length in x.shape[-2:]]
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    proof_is_followed = True

    @staticmethod
    def proof_reference(layer: Resize, call: Any) -> torch.Tensor:
        """Return what the plain layer is to give, as a product with one matrix for each axis."""
        (x,) = call.args
        if call.kept is None or call.kept == layer.pixels:
            return cast("torch.Tensor", x)
        rows, columns = (_triangles(n, round(n * call.kept / layer.pixels), x.dtype) for n in x.shape[-2:])
        product: torch.Tensor = rows @ x @ columns.T
        return product


def _triangles(n: int, kept: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the shares of `n` pixels in each of `kept`, (kept, n): a triangle as wide as two new pixels."""
    share = n / kept
    centres = (torch.arange(kept, dtype=dtype) + 0.5) * share
    distance = (torch.arange(n, dtype=dtype) + 0.5 - centres[:, None]).abs() / max(1.0, share)
    triangle = (1 - distance).clamp_min(0)
    return triangle / triangle.sum(1, keepdim=True)


CHOSEN: dict[type[nn.Module], type[ElasticOperator]] = {
    KernelConv2d: ElasticKernelConv2d,
    Resize: ElasticResize,
}
"""What each plain layer becomes."""
