"""The supernet against plain networks of its subnets' sizes, and the control tuples it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_worker.actuation import actuate
from gpu_worker.supernet import Architecture, DigitsSupernet, subnet_sizes
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.plain import ARCHITECTURE, CHANNELS, CONTROLS, images, plain_subnet, small_supernet


@pytest.mark.parametrize("row", range(len(CONTROLS)))
def test_an_actuated_subnet_answers_as_a_network_of_its_own_size(row: int) -> None:
    """In place or extracted, a subnet computes the same."""
    supernet = small_supernet()
    reference = plain_subnet(supernet.state_dict(), row)
    actuate(supernet, row)
    with torch.inference_mode():
        torch.testing.assert_close(supernet(images()), reference(images()), rtol=1e-4, atol=1e-5)


def test_the_layout_in_memory_does_not_matter() -> None:
    """Channels last gives what channels first gives; views follow the move."""
    supernet = small_supernet()
    with torch.inference_mode():
        for row in range(len(CONTROLS)):
            actuate(supernet, row)
            first = supernet(images())
            supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
            assert supernet.cursor.row == row
            last = supernet(images().to(memory_format=torch.channels_last))
            torch.testing.assert_close(first, last, rtol=1e-4, atol=1e-5)


def test_moving_to_another_dtype_takes_the_views_along() -> None:
    """A supernet in double precision runs on doubles, not on stale single-precision views."""
    supernet = small_supernet()
    before = supernet(images())
    after = supernet.double()(images().double())

    assert after.dtype == torch.float64
    torch.testing.assert_close(before.double(), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", range(len(CONTROLS)))
def test_sizes_are_the_ceiling_of_width_times_channels(row: int) -> None:
    """ceil(w * C) channels a stage, and the depths as they stand."""
    depths, widths = CONTROLS[row]
    sizes = subnet_sizes(ARCHITECTURE, {"d": depths, "w": widths})

    assert sizes.depths == tuple(depths)
    assert sizes.channels == CHANNELS[row]


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"d": [1, 4, 1], "w": [1, 1, 1]}, "control d, stage 1: expected a whole number from 1 to 3, got 4"),
        ({"d": [0, 1, 1], "w": [1, 1, 1]}, "control d, stage 0: expected a whole number from 1 to 2, got 0"),
        (
            {"d": [1, 1, 1.0], "w": [1, 1, 1]},
            "control d, stage 2: expected a whole number from 1 to 1, got 1.0",
        ),
        (
            {"d": [1, 1, 1], "w": [1, 1, 1.5]},
            "control w, stage 2: expected a fraction from 0.1 to 1, got 1.5",
        ),
        (
            {"d": [1, 1, 1], "w": [1, 0.05, 1]},
            "control w, stage 1: expected a fraction from 0.1 to 1, got 0.05",
        ),
        (
            {"d": [1, 1, 1], "w": [float("nan"), 1, 1]},
            "control w, stage 0: expected a fraction from 0.1 to 1, got nan",
        ),
        (
            {"d": [1, 1, 1], "w": ["1", 1, 1]},
            "control w, stage 0: expected a fraction from 0.1 to 1, got '1'",
        ),
        ({"d": [1, 1], "w": [1, 1, 1]}, "control d: expected 3 entries, one a stage"),
        ({"d": [1, 1, 1], "w": 1}, "control w: expected 3 entries, one a stage"),
        ({"d": [1, 1, 1]}, "control: expected exactly the keys d and w, got ['d']"),
        ({"d": [1], "w": [1], "e": [1]}, "control: expected exactly the keys d and w"),
    ],
)
def test_a_bad_control_tuple_is_refused_by_stage_value_and_bound(
    control: dict[str, Any], message: str
) -> None:
    """The error says which entry is wrong and what it may be."""
    with pytest.raises(ConfigError) as raised:
        subnet_sizes(ARCHITECTURE, control)

    assert message in str(raised.value)


def test_hosting_a_bad_subnet_names_it_and_changes_nothing() -> None:
    """A refused set of subnets leaves the hosted ones running."""
    supernet = small_supernet()
    actuate(supernet, 1)
    before = supernet(images())
    good = Subnet("good", {"d": [1, 1, 1], "w": [1, 1, 1]})
    bad = Subnet("bad", {"d": [9, 1, 1], "w": [1, 1, 1]})
    with pytest.raises(ConfigError, match="subnet bad: control d, stage 0"):
        supernet.host([good, bad])

    assert supernet.cursor.row == 1
    assert torch.equal(supernet(images()), before)


def test_a_subnet_without_a_control_tuple_cannot_be_hosted() -> None:
    """A modelled profile's subnet has no weights behind it."""
    with pytest.raises(ConfigError, match="subnet modelled: expected a control tuple"):
        small_supernet().host([Subnet("modelled", None)])
    with pytest.raises(ConfigError, match="at least one"):
        small_supernet().host([])


def test_a_new_supernet_hosts_its_whole() -> None:
    """Before any other is named, the largest subnet runs."""
    supernet = DigitsSupernet(ARCHITECTURE)

    assert [subnet.control for subnet in supernet.subnets] == [ARCHITECTURE.largest]
    assert supernet(images(2)).shape == (2, 5)


def test_an_architecture_needs_a_depth_for_each_stage() -> None:
    """Channels and depths go in pairs."""
    with pytest.raises(ConfigError, match="as many channels as depths"):
        Architecture(image_shape=(1, 8, 8), channels=(8,), depths=(1, 1), n_classes=5, min_width=0.1)
