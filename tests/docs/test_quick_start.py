"""README.md's quick start, typed in an empty folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import steps
from tests.paths import ROOT

if TYPE_CHECKING:
    from tests.docs.reader import Reader

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_the_quick_start_works_in_an_empty_folder(reader: Reader) -> None:
    """A cluster, 32 answers, a load, a status, the end, and a run with GPUs of its own."""
    outputs = reader.follow(steps(PAGE))

    answers = outputs["python client.py"].splitlines()
    assert len(answers) == 32
    assert all(re.fullmatch(r"digits-[\d.]+ \([\d.]+ %\) in [\d.]+ ms", line) for line in answers), answers
    assert "policy     planfit" in outputs["cluster status"]
    assert "stopped" in outputs["cluster down"]
