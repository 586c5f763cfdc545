"""Which norms are fused, and that what is not fused computes the same in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from gpu_worker.models.digits_supernet import DIGITS, DigitsNet, digits_supernet
from gpu_worker.supernet.operators import fused_norm, normed

if TYPE_CHECKING:
    from collections.abc import Callable

C = 16


def channels_last(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return a tensor of zeros."""
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def of_norm(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return mean, variance, weight and bias."""
    return tuple(torch.ones(C, dtype=dtype) for _ in range(4))


@pytest.mark.parametrize(
    ("x", "residual", "parts", "fits"),
    [
        (channels_last(2, C, 5, 5), None, of_norm(), True),
        (channels_last(2, C, 5, 5), channels_last(2, C, 5, 5), of_norm(), True),
        (torch.zeros(2, C), None, of_norm(), True),
        (channels_last(2, C, 5, 5), None, (*of_norm()[:2], None, None), True),
        (torch.zeros(2, C, 5, 5), None, of_norm(), False),  # channels first
        (channels_last(2, C, 5, 5), torch.zeros(2, C, 5, 5, dtype=torch.float16), of_norm(), False),
        (channels_last(2, C, 5, 5), channels_last(1, C, 5, 5), of_norm(), False),
        (channels_last(2, C, 5, 5, dtype=torch.float64), None, of_norm(torch.float64), False),
        (channels_last(2, C, 5, 5), None, of_norm(torch.float16), False),
        (channels_last(2, 12, 5, 5), None, tuple(torch.ones(12) for _ in range(4)), False),
        (channels_last(0, C, 5, 5), None, of_norm(), False),
        (torch.zeros(2, C, 5), None, of_norm(), False),
    ],
)
def test_only_what_the_kernel_can_do_is_given_to_it(
    x: torch.Tensor, residual: torch.Tensor | None, parts: tuple[torch.Tensor | None, ...], fits: bool
) -> None:
    """Dense channels last, a multiple of 8 of them, float32 statistics, a residual that lies alike."""
    assert fused_norm.fits(x, residual, parts) is fits


def subnet_norm() -> torch.nn.Module:
    """Return a SubnetNorm of C channels with statistics of its own."""
    supernet = digits_supernet()
    norm = next(norm for norm in supernet.norms if norm.num_features >= C)
    norm.running_mean = torch.linspace(-1, 1, norm.num_features)
    norm.running_var = torch.linspace(0.5, 2, norm.num_features)
    return cast("torch.nn.Module", norm)


@pytest.mark.parametrize("rectifies", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("make", [lambda: torch.nn.BatchNorm2d(C).eval(), subnet_norm])
def test_a_norm_said_at_once_is_the_three_lines(
    make: Callable[[], torch.nn.Module], has_residual: bool, rectifies: bool
) -> None:
    """A plain norm and a SubnetNorm, by its own statistics: norm, sum, ReLU."""
    torch.manual_seed(0)
    norm = make()
    x, residual = torch.randn(2, C, 5, 5), torch.randn(2, C, 5, 5)
    with torch.inference_mode():
        expected = norm(x) + residual if has_residual else norm(x)
        expected = F.relu(expected) if rectifies else expected
        found = normed(norm, x, residual if has_residual else None, rectifies=rectifies)

    torch.testing.assert_close(found, expected)


def test_no_kernel_is_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain network and the supernet's whole agree, and Triton is never looked for."""

    def fail() -> None:
        raise AssertionError("no CUDA device, no kernel")

    monkeypatch.setattr(fused_norm, "_kernel", fail)
    supernet = digits_supernet().eval()
    plain = DigitsNet(DIGITS).eval()
    plain.load_state_dict(supernet.model.state_dict())
    x = torch.randn(2, *DIGITS.image_shape)
    with torch.inference_mode(), fused_norm.fusing():
        torch.testing.assert_close(supernet(x), plain(x))


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = True


def test_it_is_fused_where_a_graph_is_captured_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched one by one from Python it would cost more than it saves; training needs gradients."""
    monkeypatch.setattr(fused_norm, "_kernel", lambda: print)
    x = channels_last(2, C, 5, 5).as_subclass(OnDevice)
    with torch.inference_mode():
        assert not fused_norm.is_fused(x, None, of_norm())
        with fused_norm.fusing():
            assert fused_norm.is_fused(x, None, of_norm())
        assert not fused_norm.is_fused(x, None, of_norm())
    with fused_norm.fusing():
        assert not fused_norm.is_fused(x, None, of_norm())


def test_without_triton_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that comes without it serves all the same, by torch's own kernels."""
    monkeypatch.setattr(fused_norm, "_kernel", lambda: None)
    x = channels_last(2, C, 5, 5).as_subclass(OnDevice)
    with torch.inference_mode(), fused_norm.fusing():
        assert not fused_norm.is_fused(x, None, of_norm())


def test_a_norm_without_running_statistics_goes_by_the_batch() -> None:
    """As torch's own does with track_running_stats=False, in eval mode too."""
    norm = subnet_norm().eval()
    for name in ("running_mean", "running_var"):
        setattr(norm, name, None)
    plain = torch.nn.BatchNorm2d(C, track_running_stats=False).eval()
    x = torch.randn(4, C, 5, 5)
    with torch.inference_mode():
        torch.testing.assert_close(normed(norm, x, rectifies=True), F.relu(plain(x)))
