"""Kernel size and resolution as elastic sizes, against torch's own layers and Pillow."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.proof.absence import ProofError
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.supernet.operators.chosen import ElasticKernelConv2d, KernelConv2d, Resize, matrix_name
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

KERNELS = (3 / 7, 5 / 7, 1.0)


class TwoBranches(nn.Module):
    """Two layers whose outputs are joined, a depthwise convolution of them, and a layer of all."""

    def __init__(self) -> None:
        super().__init__()
        self.resize = Resize(16)
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(3, 8, 1)
        self.depthwise = KernelConv2d(16, (3, 5, 7), stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 5, H', W')."""
        x = self.resize(x)
        joined = torch.cat([self.first(x), self.second(x)], 1)
        out: torch.Tensor = self.last(F.hardswish(self.norm(self.depthwise(joined))))
        return out


def made() -> tuple[Supernet, TwoBranches]:
    """Return the supernet, with random matrices, and a plain copy of its model."""
    torch.manual_seed(0)
    model = TwoBranches().eval()
    with torch.no_grad():
        for large, small in ((7, 5), (5, 3)):
            model.depthwise.get_parameter(matrix_name(large, small)).normal_(0, 0.3)
        assert model.norm.running_mean is not None
        model.norm.running_mean.normal_(0, 0.1)
    plain = copy.deepcopy(model)
    supernet = insert(
        model,
        elastic=[
            Elastic("width", ["first", "second"], (0.5, 1.0)),
            Elastic("kernel", ["depthwise"], KERNELS),
            Elastic("pixels", ["resize"], (0.5, 0.75, 1.0)),
        ],
    ).eval()
    return supernet, plain


def answered(supernet: Supernet, width: float, kernel: int, pixels: int, x: torch.Tensor) -> torch.Tensor:
    """Return what a subnet answers."""
    control = {"w": [width, kernel / 7, pixels / 16]}
    out: torch.Tensor = supernet.run_with(supernet.settings_of(Subnet("one", control)), x)
    return out


def expected(plain: TwoBranches, width: float, kernel: int, pixels: int, x: torch.Tensor) -> torch.Tensor:
    """Return the same of torch's own functions, with weights gathered index by index."""
    if pixels < 16:
        x = F.interpolate(x, (pixels, pixels), mode="bilinear", antialias=True)
    n = round(8 * width)
    halves = [F.conv2d(x, layer.weight[:n], layer.bias[:n]) for layer in (plain.first, plain.second)]  # type: ignore[index]  # they have biases
    rows = [*range(n), *range(8, 8 + n)]
    kernels = plain.depthwise.weight[rows, 0]
    for large, small in ((7, 5), (5, 3)):
        if kernel <= small:
            matrix = plain.depthwise.get_parameter(matrix_name(large, small))
            centres = kernels[:, 1:-1, 1:-1].reshape(len(rows), -1)
            kernels = torch.stack([matrix @ centre for centre in centres]).reshape(-1, small, small)
    x = F.conv2d(torch.cat(halves, 1), kernels[:, None], None, 2, kernel // 2, groups=2 * n)
    norm = plain.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = F.batch_norm(x, norm.running_mean[rows], norm.running_var[rows], norm.weight[rows], norm.bias[rows])
    return F.conv2d(F.hardswish(x), plain.last.weight[:, rows], plain.last.bias)


def images() -> torch.Tensor:
    """Return two random images."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_each_choice_is_torchs_own_layers() -> None:
    """With joined inputs too, of which the first channels of each half are kept."""
    supernet, plain = made()
    with torch.inference_mode():
        for width in (0.5, 1.0):
            for kernel in (3, 5, 7, 5):
                for pixels in (8, 12, 16):
                    torch.testing.assert_close(
                        answered(supernet, width, kernel, pixels, images()),
                        expected(plain, width, kernel, pixels, images()),
                        rtol=1e-5,
                        atol=1e-6,
                    )


def test_gradients_reach_the_matrices_and_are_torchs_own() -> None:
    """Of the smallest kernel both matrices learn, of the middle one only the first."""
    for kernel in (3, 5):
        supernet, plain = made()
        answered(supernet, 0.5, kernel, 12, images()).square().sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        expected(plain, 0.5, kernel, 12, images()).square().sum().backward()  # type: ignore[no-untyped-call]  # as above
        own = dict(supernet.model.named_parameters())
        for name, parameter in plain.named_parameters():
            found = own[name].grad
            if kernel == 5 and name.endswith("5to3_matrix"):
                assert found is None
                continue
            assert found is not None
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["written", "replaced", "moved", "loaded"])
@pytest.mark.parametrize("name", ["weight", "7to5_matrix", "5to3_matrix"])
def test_a_kernel_follows_its_parameters(name: str, how: str) -> None:
    """A computed kernel is made again after any of what it was made of has changed."""
    supernet, plain = made()
    layer = supernet.model.get_submodule("depthwise")
    other = plain.depthwise.get_parameter(name)
    with torch.inference_mode():
        answered(supernet, 1.0, 3, 16, images())
    with torch.no_grad():
        other.mul_(1.5)
        parameter = layer.get_parameter(name)
        if how == "written":
            parameter.copy_(other)
        elif how == "replaced":
            setattr(layer, name, nn.Parameter(other.clone()))
        elif how == "moved":
            parameter.data = other.clone()
        else:
            supernet.model.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(
            answered(supernet, 1.0, 3, 16, images()),
            expected(plain, 1.0, 3, 16, images()),
            rtol=1e-5,
            atol=1e-6,
        )


def test_it_is_proved_and_wrong_kernels_and_pixels_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's own rule for both: a transposed matrix, a corner for the centre, a nearest pixel."""
    supernet, _ = made()
    assert prove(supernet, images()).deviation < 1e-12

    compute = ElasticKernelConv2d._computed
    spoilt = {
        "a corner": lambda layer, size: layer.weight[:, :, :size, :size],
        "a centre without its matrix": lambda layer, size: layer.weight[
            :, :, (7 - size) // 2 : (7 + size) // 2, (7 - size) // 2 : (7 + size) // 2
        ],
        "transposed": lambda layer, size: compute(layer, size).transpose(2, 3),
        "of the next channel": lambda layer, size: compute(layer, size).roll(1, 0),
    }
    for wrong in spoilt.values():
        with monkeypatch.context() as patch:
            patch.setattr(ElasticKernelConv2d, "_computed", wrong)
            with pytest.raises(ProofError, match=r"layer depthwise: .* deviates"):
                prove(made()[0], images())
    interpolate = F.interpolate
    with monkeypatch.context() as patch:
        patch.setattr(F, "interpolate", lambda x, size, **_: interpolate(x, size, mode="nearest"))
        with pytest.raises(ProofError, match=r"layer resize: .* deviates"):
            prove(made()[0], images())


def test_a_resize_is_pillows() -> None:
    """Images are what an application gets that resizes them before it sends them."""
    image = pytest.importorskip("PIL.Image")
    model = nn.Sequential(Resize(224), nn.Conv2d(3, 3, 1))
    supernet = insert(model, elastic=[Elastic("pixels", ["0"], (0.5, 1.0))])
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        supernet.cursor.settings = supernet.settings_of(Subnet("small", {"w": [160 / 224]}))
        found = supernet.model.get_submodule("0")(x)[0]
    channels = [image.fromarray(channel.numpy()) for channel in x[0]]
    pillows = np.stack([np.asarray(one.resize((160, 160), image.Resampling.BILINEAR)) for one in channels])

    np.testing.assert_allclose(found.numpy(), pillows, atol=1e-4)


def test_halves_are_computed_exactly() -> None:
    """A kernel in half precision is rounded once, and not between its matrices."""
    supernet, plain = made()
    supernet.to_half()
    layer = supernet.model.get_submodule("depthwise")
    assert isinstance(layer, ElasticKernelConv2d)
    exact = copy.deepcopy(plain.depthwise)
    exact.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    middle = exact.weight[:, :, 1:-1, 1:-1].flatten(2) @ exact.get_parameter("7to5_matrix").T
    centre = middle.reshape(-1, 1, 5, 5)[:, :, 1:-1, 1:-1].flatten(2)
    small = (centre @ exact.get_parameter("5to3_matrix").T).reshape(-1, 1, 3, 3)
    with torch.inference_mode():
        found = layer._computed(3)

    assert found.dtype == torch.float16
    torch.testing.assert_close(found, small.half(), rtol=6e-4, atol=0)  # half a last place


def test_what_cannot_be_a_kernel_is_refused() -> None:
    """Sizes that the layer does not have, and lists that are none."""
    supernet, _ = made()
    with pytest.raises(ConfigError, match="depthwise: expected a kernel size of 3, 5, 7, got 4"):
        answered(supernet, 1.0, 4, 16, images())
    for wrong in ([], [4], [5, 3], [3, 3], [-1]):
        with pytest.raises(ConfigError, match=r"kernel_sizes: expected ascending odd numbers, got \["):
            KernelConv2d(4, wrong)


def test_a_size_of_kernels_has_equal_layers() -> None:
    """Layers of one size have the same largest kernel; their channels may differ."""
    model = nn.Sequential(KernelConv2d(4, (3, 5)), KernelConv2d(4, (3, 5, 7)))
    with pytest.raises(ConfigError, match="size k: expected layers with equally many outputs"):
        insert(model, elastic=[Elastic("k", ["0", "1"])])
