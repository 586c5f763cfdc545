"""Which subnets a proof looks at."""

from __future__ import annotations

import numpy as np

from gpu_worker.models.ofa_resnet50 import CONTROLS
from gpu_worker.proof.sample import covering, drawn
from superserve.subnet import Subnet


def test_every_size_and_set_of_blocks_of_the_hosted_occurs() -> None:
    """Also where that takes more subnets than were asked for."""
    rng = np.random.default_rng(0)
    hosted = [Subnet(str(i), CONTROLS.space.random(rng)) for i in range(60)]
    for most in (1, 16):
        chosen, n_needed = covering(hosted, CONTROLS, most)
        assert n_needed <= len(chosen) <= max(most, n_needed)
        found, whole = (
            {
                (name, n)
                for one in subnets
                for name, n in (
                    *CONTROLS.sizes_of(one.control).outputs.items(),
                    *enumerate(CONTROLS.sizes_of(one.control).blocks),
                )
            }
            for subnets in (chosen[:n_needed], hosted)
        )
        assert found == whole
        assert 2 < len(chosen) < 30
    names = [subnet.name for subnet in covering(hosted, CONTROLS, 40).subnets]
    assert len(names) == len(set(names)) == 40
    assert sorted(subnet.name for subnet in covering(hosted[:3], CONTROLS, 32).subnets) == ["0", "1", "2"]


def test_every_choice_of_every_entry_is_drawn() -> None:
    """The smallest, the largest, and as many between as there are choices."""
    controls = [subnet.control for subnet in drawn(CONTROLS, 32).subnets]
    for key, row in CONTROLS.space.entries.items():
        for i, entry in enumerate(row):
            assert {control[key][i] for control in controls if control} == set(entry.choices)
    assert controls[:2] == [CONTROLS.space.smallest, CONTROLS.space.largest]
    assert len(drawn(CONTROLS, 4).subnets) <= 4
