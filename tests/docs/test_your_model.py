"""docs/your-model.md, block after block, in an empty folder: files are saved, commands are typed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import steps
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.docs.reader import Reader

PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_page_takes_a_network_to_a_served_cluster(reader: Reader) -> None:
    """Every file and command of the page works as it stands, and the client gets right answers."""
    client = reader.follow(steps(PAGE))["python client.py"]

    counts = re.search(r"(\d+) of 100 answered, (\d+) right\nthe last by small-", client)
    assert counts is not None, client
    answered, right = map(int, counts.groups())
    assert right > answered / 2 > 0  # a model whose subnets guess gets a tenth right


def test_the_page_is_read_block_by_block() -> None:
    """The test above is not passed by finding nothing: five files, and the commands."""
    found = steps(PAGE)

    files = [step.file for step in found if step.file]
    assert files == ["my_model.py", "my_supernet.py", "train.py", "known.json", "client.py"]
    assert sum(len(step.text.splitlines()) for step in found if not step.file) >= 9
