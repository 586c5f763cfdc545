"""What the benchmarks of SubnetAct compare with."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from loadgen.bench.rows.subnetact import resnet_parameters


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("ResNet-18", 11_689_512),
        ("ResNet-34", 21_797_672),
        ("ResNet-50", 25_557_032),
        ("ResNet-101", 44_549_160),
    ],
)
def test_hand_made_networks_have_the_published_number_of_parameters(name: str, n: int) -> None:
    """Counted from the definition, each is what is published of it."""
    assert resnet_parameters(name) == n
