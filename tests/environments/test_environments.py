"""Commands in hostile environments: the sample that every test run takes. See `make environments` for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.environments.commands import COMMANDS
from tests.environments.draw import ONCE_WRONG, SAMPLED, pairs, sample
from tests.environments.hostile import FAMILIES
from tests.environments.runs import inputs, run_pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.environments.draw import Pair


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Make what the commands read, once."""
    with inputs() as made:
        yield made


def test_the_sample_has_every_family_and_every_command() -> None:
    """And a seed gives the same pairs each time."""
    assert {pair.family for pair in sample()} == set(FAMILIES)
    assert {pair.command for pair in sample()} == set(COMMANDS)
    assert len(sample()) <= SAMPLED + len(ONCE_WRONG)
    assert pairs(3, 50) == pairs(3, 50)
    assert [pair.hostile for pair in pairs(3, 50)] == [pair.hostile for pair in pairs(3, 50)]


@pytest.mark.e2e
@pytest.mark.timeout(180)  # a cluster is started, asked and stopped where processors may be busy
@pytest.mark.parametrize("pair", sample(), ids=str)
def test_a_command_works_or_says_in_one_line_why_not(pair: Pair, folder: Path) -> None:
    """It leaves no process, no empty file and no temporary one."""
    verdict = run_pair(pair, folder)
    if verdict.skipped:
        pytest.skip(verdict.skipped)
    assert not verdict.complaints, verdict.seen
