"""The report in a browser: no table scrolls inside the page at 1,200 pixels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from loadgen.results.report import write_report
from tests.loadgen.results.test_report import OVERLOADED, result_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

NAMES = ("planfit", "slackfit", "demandfit", "fixed:cnn-80.16", "maxbatch", "mincost")


def test_wide_tables_fit_1200_pixels(tmp_path: Path) -> None:
    """Six runs side by side, each with many ways to miss."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    results = [replace(result_of(4_000, OVERLOADED, seed=i), policy=name) for i, name in enumerate(NAMES)]
    path = tmp_path / "report.html"
    write_report(path, results)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(path.as_uri())
        page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
        widths = page.evaluate(
            "[...document.querySelectorAll('.wide')].map((one) => [one.scrollWidth, one.clientWidth])"
        )
        body = page.evaluate("document.documentElement.scrollWidth")
        rivers = page.locator("#river svg [id*='river-']").count()
        browser.close()

    assert len(widths) >= 4
    assert all(inner <= outer for inner, outer in widths), widths
    assert body <= 1200
    assert rivers > 6
