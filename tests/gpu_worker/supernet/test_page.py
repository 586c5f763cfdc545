"""The example of docs/supernets.md runs as it stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests.paths import ROOT

if TYPE_CHECKING:
    import pytest

PAGE = ROOT / "docs" / "supernets.md"


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """It inserts into torch's own encoder, hosts two subnets, runs one and says what they weigh."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out

    assert "torch.Size([1, 10, 64])" in printed
    assert "2 subnets:" in printed
