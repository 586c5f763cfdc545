"""The shipped digits supernet against plain networks of its subnets' own sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gpu_worker.models.digits_supernet import DIGITS
from gpu_worker.models.kinds import KINDS, resident
from superserve.subnet import Subnet
from tests.gpu_worker.models.plain import PlainBlock
from tests.gpu_worker.models.published import gather


def plain(state: dict[str, torch.Tensor], depths: list[int], widths: list[float]) -> nn.Module:
    """Return a network of these sizes, its tensors gathered index by index by their order in the network."""
    channels = [math.ceil(width * c) for width, c in zip(widths, DIGITS.channels, strict=True)]
    stem = [nn.Conv2d(1, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    names, blocks, before = ["stem", "stem_norm"], [], channels[0]
    for m, depth in enumerate(depths):
        for k in range(depth):
            shrinks = m > 0 and k == 0
            blocks.append(PlainBlock(before, channels[m], 2 if shrinks else 1))
            layers = ["conv1", "norm1", "conv2", "norm2", *(["shortcut", "shortcut_norm"] if shrinks else [])]
            names += [f"stages.{m}.{k}.{layer}" for layer in layers]
            before = channels[m]
    network = nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, DIGITS.n_classes)
    )
    modules = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for name, module in zip([*names, "head"], modules, strict=True):
        own = module.state_dict()
        module.load_state_dict(
            {key: gather(state[f"{name}.{key}"], tuple(t.shape)) if t.dim() else t for key, t in own.items()}
        )
    return network.eval()


@pytest.mark.parametrize("n_tuples", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_random_subnets_of_the_digits_supernet_answer_as_plain_networks(n_tuples: int) -> None:
    """Random control tuples, actuated, against networks of their own sizes."""
    supernet = resident(KINDS["digits"], None)
    state = dict(supernet.model.state_dict())
    rng = np.random.default_rng(0)
    x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    for _ in range(n_tuples):
        control = supernet.controls.space.random(rng)
        with torch.inference_mode():
            found = supernet.run_with(supernet.settings_of(Subnet("drawn", control)), x)
            expected = plain(state, control["d"], control["w"])(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
