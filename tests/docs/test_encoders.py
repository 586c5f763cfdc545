"""docs/encoders.md, block after block, in an empty folder: files are saved, commands are typed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import steps
from tests.gpu_worker.models.encoders.folders import HAS_MINILM, WITHOUT_MINILM
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.docs.reader import Reader

PAGE = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_MINILM, reason=WITHOUT_MINILM)
def test_the_page_takes_a_folder_to_a_first_answer(reader: Reader) -> None:
    """Every file and command works as it stands; sentences that mean the same are close, others are not."""
    outputs = reader.follow(steps(PAGE))

    found = re.fullmatch(r"(-?\d\.\d\d) (-?\d\.\d\d) by depth-[136]\n", outputs["python client.py"])
    assert found is not None, outputs["python client.py"]
    same, other = map(float, found.groups())
    assert same > other + 0.15
    ranked = json.loads((reader.folder / "ranked.json").read_bytes())
    assert (ranked[-1]["accuracy"], ranked[0]["control"]) == (100.0, {"d": [1]})


def test_a_first_answer_takes_ten_lines() -> None:
    """The exits, a folder, a profile, a cluster, a client and its end: files count by what they hold."""
    first = PAGE.partition("## What a query is")[0]
    found = steps(first)

    assert [step.file for step in found if step.file] == ["exits.json", "client.py"]
    typed = [line for step in found if not step.file for line in step.text.splitlines()]
    assert len(typed) == 5
    assert len(found[0].text.splitlines()) + len(typed) <= 10


def test_the_pages_table_is_what_the_live_test_serves() -> None:
    """The figures of the thousand pairs: those that tests/e2e/test_encoder.py serves by."""
    from tests.e2e.test_encoder import RANKS  # noqa: PLC0415  only here

    section = PAGE.partition("## MiniLM by depth")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| (\d) \| ([\d.]+) \|", section, re.MULTILINE)
    assert [(int(depth), float(rank)) for depth, rank in shown] == list(enumerate(RANKS, start=1))
