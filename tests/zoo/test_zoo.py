"""The zoo: every row is right or refused, none is wrong, and the page says which."""

from __future__ import annotations

import importlib.util

import pytest

from tests.zoo import own, published
from tests.zoo.judge import Row, Verdict, judge
from tests.zoo.page import PAGE, rows, verdicts

SAID = verdicts(PAGE.read_text(encoding="utf-8"))

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: the extra `zoo`"
)


def check(row: Row) -> None:
    """Judge a row, print its outcome, and compare it with the page."""
    outcome = judge(row)
    print(f"{row.name}: {outcome}")  # noqa: T201  the table, under pytest -s

    assert outcome.verdict is not Verdict.WRONG, outcome.why
    assert outcome.verdict is SAID[row.name], f"{outcome}; python -m tests.zoo.page writes the page again"


@pytest.mark.parametrize("row", own.rows(), ids=lambda row: row.name)
def test_a_network_of_a_common_kind_is_right_or_refused(row: Row) -> None:
    """UNet, DenseNet, squeeze-excite and LSTM, against masked ones."""
    check(row)


@needs_transformers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", published.rows(), ids=lambda row: row.name)
def test_a_published_architecture_is_right_or_refused(row: Row) -> None:
    """Those of transformers, against ones that transformers built smaller."""
    check(row)


def test_the_page_has_every_row_and_no_other() -> None:
    """And no row has another's name."""
    names = [row.name for row in rows()]

    assert len(set(names)) == len(names)
    assert set(SAID) == set(names)
