"""The supernets that come with the package are proved, at their own sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_worker.engines.torch_executor import example_input
from gpu_worker.models.dynabert import DynaBertArchitecture, dynabert
from gpu_worker.models.kinds import KINDS, resident
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.calibration import load_statistics
from profiles.table import load_profile, statistics_path
from superserve.subnet import Subnet


def test_digits_is_proved_with_its_own_statistics() -> None:
    """As served: the shipped weights, profile and statistics."""
    kind, profile = KINDS["digits"], load_profile("digits-cpu")
    subnets = [Subnet(row.name, row.control) for row in profile.subnets]
    supernet = resident(kind, None)
    supernet.host(subnets)
    supernet.set_statistics(load_statistics(statistics_path("digits-cpu"), supernet, kind.name, subnets))
    proof = prove(supernet, example_input(supernet, kind, torch.float32, 2), subnets=subnets)

    assert set(proof.subnets) == {subnet.name for subnet in subnets}
    assert proof.deviation < 1e-12


def test_dynabert_is_proved() -> None:
    """Of small sizes, with padding in one query: each depth and each width occurs."""
    torch.manual_seed(0)
    sizes = DynaBertArchitecture(n_blocks=4, n_heads=4, head_size=8, n_units=24, n_tokens=50, max_length=16)
    tokens = torch.randint(1, 50, (2, 2, 9))
    tokens[:, 1] = torch.randint(0, 2, (2, 9))
    tokens[1, 0, 6:] = 0
    proof = prove(dynabert(sizes).eval(), tokens)

    assert len(proof.subnets) >= 6
    assert proof.deviation < 1e-12


def test_ofa_resnet50_is_proved() -> None:
    """At its full widths, on images small enough to be quick."""
    kind = KINDS["ofa-resnet50"]
    supernet = resident(kind, "random")
    images = example_input(supernet, kind, torch.float32, 2)[..., :32, :32]
    proof = prove(supernet, images, most=2, checks_resident=False)

    assert proof.n_layers > 150
    assert proof.deviation < 1e-12


@pytest.mark.slow
def test_32_subnets_of_ofa_resnet50_are_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 9 s on one thread, as measured by hand: a test does not judge time."""
    monkeypatch.setattr("gpu_worker.proof.prove.EXTRA_S", 1e9)  # however busy the machine is
    kind = KINDS["ofa-resnet50"]
    supernet = resident(kind, "random")
    rng = np.random.default_rng(3)
    supernet.host([Subnet(str(i), supernet.controls.space.random(rng)) for i in range(32)])
    images = example_input(supernet, kind, torch.float32, 2)[..., :32, :32]
    proof = prove(supernet, images, subnets=supernet.subnets, checks_resident=False)

    assert len(proof.subnets) == 32
    assert proof.deviation < 1e-12
