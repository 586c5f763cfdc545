"""The supernet: what it hosts, where its statistics rest, what it weighs, what survives a move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gpu_worker.models.digits_supernet import DigitsArchitecture
from gpu_worker.supernet import supernet as supernet_module
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.supernet.operators import WeightSlice
from gpu_worker.supernet.supernet import SubnetStatistics, Supernet
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.models.plain import CONTROLS, SUBNETS, images, plain_subnet, small_supernet

ROWS = range(len(CONTROLS))


def outputs_of(supernet: Supernet, shown: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return each hosted subnet's logits."""
    found = []
    with torch.inference_mode():
        for row in range(len(supernet.subnets)):
            actuate(supernet, row)
            found.append(supernet(images() if shown is None else shown))
    return found


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compare subnet by subnet."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_an_actuated_subnet_answers_as_a_network_of_its_own_size(row: int) -> None:
    """In place or extracted, a subnet computes the same, its own statistics included."""
    supernet = small_supernet()
    reference = plain_subnet(supernet, row)
    actuate(supernet, row)
    with torch.inference_mode():
        torch.testing.assert_close(supernet(images()), reference(images()), rtol=1e-4, atol=1e-5)


def test_the_layout_in_memory_does_not_matter() -> None:
    """Channels last gives what channels first gives; views follow the move, and so does what is actuated."""
    supernet = small_supernet()
    first = outputs_of(supernet)
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub

    assert supernet.cursor.row == ROWS[-1]
    assert_alike(outputs_of(supernet, images().to(memory_format=torch.channels_last)), first)


def test_moving_to_another_dtype_takes_the_views_along() -> None:
    """A supernet in double precision runs on doubles, not on stale single-precision views."""
    supernet = small_supernet()
    before = outputs_of(supernet)
    supernet.double()
    after = outputs_of(supernet, images().double())

    assert {output.dtype for output in after} == {torch.float64}
    assert_alike([output.float() for output in after], before)


def test_half_precision_keeps_the_norms_in_single() -> None:
    """Weights become halves; SubnetNorm's scales stay float32, and answers stay close."""
    supernet = small_supernet()
    before = outputs_of(supernet)
    supernet.to_half(torch.bfloat16)
    after = outputs_of(supernet, images().bfloat16())

    assert {norm.weight.dtype for norm in supernet.norms if norm.weight is not None} == {torch.float32}
    assert next(supernet.model.parameters()).dtype == torch.bfloat16
    for one, other in zip(after, before, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 0.05


def test_a_deep_copy_stands_alone() -> None:
    """Changing a copy's weights changes no answer of the original, and the copy's own."""
    supernet = small_supernet()
    before = outputs_of(supernet)
    other = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)

    assert_alike(outputs_of(supernet), before)
    assert not torch.allclose(outputs_of(other)[0], before[0])


def test_loading_weights_reaches_every_slice() -> None:
    """After load_state_dict no subnet answers by its old weights, packed slices or not."""
    supernet, other = small_supernet(), small_supernet(seed=5)
    supernet.pack(ROWS, images(1), budget_bytes=10**6)
    supernet.model.load_state_dict(other.model.state_dict())
    supernet.set_statistics(other.statistics)

    assert_alike(outputs_of(supernet), outputs_of(other))


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"d": [1, 4, 1], "w": [1, 1, 1]}, "control d, stage 1: expected a whole number from 1 to 3, got 4"),
        ({"d": [0, 1, 1], "w": [1, 1, 1]}, "control d, stage 0: expected a whole number from 1 to 2, got 0"),
        (
            {"d": [1, 1, 1.0], "w": [1, 1, 1]},
            "control d, stage 2: expected a whole number from 1 to 1, got 1.0",
        ),
        ({"d": [1, 1, 1], "w": [1, 1, 1.5]}, "control w, size 2: expected a fraction from 0.1 to 1, got 1.5"),
        (
            {"d": [1, 1, 1], "w": [1, 1, True]},
            "control w, size 2: expected a fraction from 0.1 to 1, got True",
        ),
        ({"d": [1, 1], "w": [1, 1, 1]}, r"control d: expected 3 entries, one a stage, got \[1, 1\]"),
        ({"d": [1, 1, 1]}, r"control: expected exactly the keys d and w, got \['d'\]"),
        ({"d": "111", "w": [1, 1, 1]}, "control d: expected 3 entries, one a stage, got '111'"),
        (None, "expected a control tuple, got none"),
    ],
)
def test_a_control_tuple_out_of_bounds_is_refused(control: dict[str, Any] | None, message: str) -> None:
    """The error names the subnet, the entry, its value and the bound, and hosts nothing."""
    supernet = small_supernet()
    with pytest.raises(ConfigError, match=f"subnet bad: {message}"):
        supernet.host([SUBNETS[0], Subnet("bad", control)])

    assert supernet.subnets == SUBNETS


def test_hosting_needs_subnets_with_names_of_their_own() -> None:
    """None, or two of one name, are refused."""
    supernet = small_supernet()
    with pytest.raises(ConfigError, match="expected at least one to host"):
        supernet.host([])
    with pytest.raises(ConfigError, match="expected unique names"):
        supernet.host([SUBNETS[0], SUBNETS[0]])


def test_an_architecture_has_as_many_channels_as_depths() -> None:
    """Stages are described twice, alike."""
    with pytest.raises(ConfigError, match="as many channels as depths"):
        DigitsArchitecture((1, 8, 8), (8, 8), (1,), 10, (0.5, 1.0))


def test_idle_subnets_rest_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this many subnets are prepared; the statistics of others count as idle, and nothing is lost."""
    monkeypatch.setitem(supernet_module.MAX_PREPARED, "cpu", 2)
    supernet = small_supernet()
    before = outputs_of(supernet)
    report = supernet.memory()
    total = sum(4 * len(held.values) for held in supernet.statistics.values())

    assert report.n_resident == 2
    assert report.statistics_resident + report.statistics_idle == total
    assert report.statistics_idle > 0
    assert_alike(outputs_of(supernet), before)


def test_pinned_subnets_stay_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph looks into is not dropped, whatever runs meanwhile."""
    monkeypatch.setitem(supernet_module.MAX_PREPARED, "cpu", 1)
    supernet = small_supernet()
    supernet.pin([1, 2])
    held = [supernet.prepared(row) for row in (1, 2)]
    outputs_of(supernet)

    assert [supernet.prepared(row) for row in (1, 2)] == held
    assert all(supernet.prepared(row) is one for row, one in zip((1, 2), held, strict=True))


def test_packed_slices_answer_alike_and_are_counted() -> None:
    """Contiguous copies change no answer; their bytes are in the report, and keep to the budget."""
    supernet = small_supernet()
    before = outputs_of(supernet)
    views = supernet.memory()
    packed = supernet.pack(ROWS, images(1), budget_bytes=10**6)

    assert views.packed == 0
    assert supernet.memory().packed == packed > 0
    assert_alike(outputs_of(supernet), before)
    for layer in supernet.modules():
        if isinstance(layer, WeightSlice):
            assert all(slice_.weight.is_contiguous() for slice_ in layer.packed.values())


@pytest.mark.parametrize("budget_bytes", [0, 100, 1000])
def test_packing_keeps_to_its_budget(budget_bytes: int) -> None:
    """A budget too small for all slices packs some; one of nothing packs none and undoes what was packed."""
    supernet = small_supernet()
    supernet.pack(ROWS, images(1), budget_bytes=10**6)

    assert supernet.pack(ROWS, images(1), budget_bytes=budget_bytes) <= budget_bytes
    assert supernet.memory().packed <= budget_bytes
    assert_alike(outputs_of(supernet), outputs_of(small_supernet()))


def test_statistics_that_do_not_fit_are_refused() -> None:
    """The error names the subnet, and the norm where one is too long; those held stay."""
    supernet = small_supernet()
    held = dict(supernet.statistics)
    with pytest.raises(ConfigError, match="statistics of 0: expected 15 norms, got 1"):
        supernet.set_statistics({"0": SubnetStatistics((1,), torch.zeros(2))})
    channels = (99, *[0] * 14)
    with pytest.raises(ConfigError, match="statistics of 0, stem_norm: expected at most 8 channels, got 99"):
        supernet.set_statistics({"0": SubnetStatistics(channels, torch.zeros(198))})
    with pytest.raises(ConfigError, match="expected 2 float32 values"):
        SubnetStatistics((1,), torch.zeros(3))

    assert supernet.statistics == held


def test_a_trimmed_supernet_keeps_what_its_subnets_use() -> None:
    """Their answers stay; what none of them uses is gone, and others are refused."""
    supernet = small_supernet()
    supernet.host(SUBNETS[:3])
    before, whole = outputs_of(supernet), supernet.memory().shared
    supernet.trim(images(1))

    assert_alike(outputs_of(supernet), before)
    # Of 8, 10 and 12 channels 8, 3 and 12 are used at most; a third block of stage 1 never runs.
    shapes = {name: tuple(tensor.shape) for name, tensor in supernet.model.state_dict().items()}
    assert shapes["stages.1.0.conv1.weight"] == (3, 8, 3, 3)
    assert shapes["stages.2.0.shortcut.weight"] == (12, 3, 1, 1)
    assert shapes["stages.1.2.conv1.weight"] == (0, 0, 3, 3)
    assert shapes["stages.1.0.norm1.running_mean"] == (3,)
    assert supernet.memory().shared < 0.5 * whole
    with pytest.raises(ConfigError, match="subnet 3: the supernet was trimmed to others"):
        supernet.host(SUBNETS)
    with pytest.raises(ConfigError, match="subnet 2: the supernet was trimmed to others"):
        supernet.host([Subnet("2", SUBNETS[3].control)])  # a name alone is no subnet
    supernet.host([SUBNETS[2], SUBNETS[0]])
    assert_alike(outputs_of(supernet), [before[2], before[0]])


def test_a_trimmed_depthwise_convolution_keeps_its_groups() -> None:
    """Three of four channels in use: three groups stay, and a bias as long."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1, bias=False))
    supernet = insert(model, elastic=[Elastic("w", ["0"])]).eval()
    supernet.host([Subnet("a", {"w": [0.5]}), Subnet("b", {"w": [0.75]})])
    x = torch.randn(2, 1, 3, 3)
    before = outputs_of(supernet, x)
    supernet.trim(x)

    assert [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Conv2d)] == [
        (3, 1, 1, 1), (6, 1, 1, 1), (2, 6, 1, 1)
    ]  # fmt: skip
    assert_alike(outputs_of(supernet, x), before)
