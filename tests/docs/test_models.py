"""docs/models.md: every way in leads to a page, and the published supernet to an answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import steps
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.docs.reader import Reader

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_published_supernet_answers(reader: Reader) -> None:
    """Every file and command of the page works as it stands."""
    outputs = reader.follow(steps(PAGE))

    assert outputs["python client.py"] == "large (1000,)\n"


@pytest.mark.parametrize("page", ["families", "encoders", "your-model", "training"])
def test_each_way_is_a_page_that_a_test_follows(page: str) -> None:
    """The table's pages are there, and each has a test that types its blocks."""
    assert f"({page}.md)" in PAGE.split("## ")[0]
    test = ROOT / "tests" / "docs" / f"test_{page.replace('-', '_')}.py"
    text = test.read_text(encoding="utf-8")
    assert re.search(rf'"docs" / "{page}\.md"', text)
    assert "reader.follow(" in text
