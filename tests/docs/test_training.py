"""docs/training.md, block after block, in an empty folder: files are saved, commands are typed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import steps
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.docs.reader import Reader

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_page_takes_a_pretrained_network_to_a_supernet(reader: Reader) -> None:
    """The subnets that guessed before are right; the function does what the command does."""
    outputs = reader.follow(steps(PAGE))
    trained = next(output for line, output in outputs.items() if line.startswith("profiles train"))
    smallest, largest = (
        float(re.search(rf"^ *{name} .* ([\d.]+) *$", trained, re.MULTILINE)[1])  # type: ignore[index]  # it is there
        for name in ("smallest", "largest")
    )

    assert "wrote weights.safetensors after 210 steps" in trained
    assert smallest > 60  # 27 with the pretrained weights alone
    assert largest > 90
    rows = outputs["python train.py"].splitlines()
    assert rows[0].startswith("smallest {'d': [1], 'w': [0.25]} ")
    assert rows[-1].startswith("largest {'d': [4], 'w': [1.0]} ")


def test_the_page_is_read_block_by_block() -> None:
    """The test above is not passed by finding nothing."""
    assert [step.file for step in steps(PAGE) if step.file] == ["plain.py", "elastic.py", "train.py"]
