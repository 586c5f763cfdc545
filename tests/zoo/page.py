"""The page of the zoo, docs/zoo.md: what can be made smaller, and what is refused.

    python -m tests.zoo.page

writes it again; `tests/zoo/test_zoo.py` checks each line.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from typing import TYPE_CHECKING

from tests.paths import ROOT
from tests.zoo import own, published
from tests.zoo.judge import Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.zoo.judge import Outcome, Row

_WIDTH = 150  # of an outcome
PAGE = ROOT / "docs" / "zoo.md"

_HEAD = """# The zoo: which networks can be made smaller

Small random networks of the usual architectures, made supernets by `insert`. For each, depth (some blocks are
left out) and widths. A subnet's answer is compared with that of a network that has its size from the start:
transformers builds it with fewer layers or hidden units, and it is filled from the whole; or it is the whole
with the dropped inputs multiplied by zero. *Right* means a largest error of 5e-5 of the largest number, whole
and trimmed. *Refused* means an error before the first answer. A wrong answer fails the tests (`tests/zoo/`).

| network | what is smaller | outcome |
|---|---|---|
"""


def rows() -> list[Row]:
    """Return all rows, in the page's order."""
    return sorted([*published.rows(), *own.rows()], key=lambda row: row.network.lower())


def line_of(row: Row, outcome: Outcome) -> str:
    """Return a row's line; of why it is refused the beginning, without a machine's paths."""
    words = re.sub(r"/\S*/site-packages/", "", str(outcome)).replace("|", "/")
    return f"| {row.network} | {row.what} | {textwrap.shorten(words, _WIDTH, placeholder=' ...')} |"


def verdicts(page: str) -> dict[str, Verdict]:
    """Return what a page says of each row, by the row's name."""
    lines: Mapping[tuple[str, str], str] = {
        (network, what): outcome
        for network, what, outcome in re.findall(
            r"^\| ([^|]+) \| ([^|]+) \| (right|refused|WRONG)", page, re.MULTILINE
        )
    }
    return {f"{network}, {what}": Verdict(outcome) for (network, what), outcome in lines.items()}


def main() -> None:
    """Judge all rows and write the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        lines = [line_of(row, judge(row)) for row in rows()]
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
