"""The live page in a browser, under a burst: each panel has data, in any width and light, without a mouse."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cluster.web.recording import recorded_page
from loadgen.live.run import Emulation, RunSettings, emulated, run_trace
from superserve.clock import MS
from superserve.roles.processes import ProcessGroup
from tests.loadgen.study.explain.flown import drawn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SECONDS = 12

PAINTED = """id => {
  const canvas = document.getElementById(id), c = canvas.getContext("2d");
  const { data } = c.getImageData(0, 0, canvas.width, canvas.height);
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) colours.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  return colours.size;
}"""
UPDATES = """() => {
  const least = [Infinity, Infinity, Infinity, Infinity];
  for (let k = 0; k < 80; k++) {
    const began = performance.now();
    update();
    least[turn % 4] = Math.min(least[turn % 4], performance.now() - began);
  }
  return least;
}"""
NAMELESS = """() => {
  const kinds = "canvas, [role=img], [role=region], button, input, table, section";
  const isNamed = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
    || one.textContent.trim() || one.parentElement.closest("[role=img]") || (one.labels && one.labels.length);
  return [...document.querySelectorAll(kinds)].filter((one) => !isNamed(one)).map((one) => one.outerHTML);
}"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Open the page of a cluster of four emulated GPUs that serves a burst."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not shutil.which("chromium"):
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("web")
    trace = drawn("bursty:base=300,variant=700,cv2=8", float(SECONDS))
    with (
        emulated(Emulation("cnn-8gpu-modelled", 4, "slackfit", folder=folder)) as cluster,
        ProcessGroup() as group,
    ):
        web = group.start(
            "web", ["-m", "cluster", "web", "--connect", cluster.client_endpoint, "--port", "0"]
        )
        group.wait_ready(30.0)
        load = threading.Thread(
            target=run_trace, args=(trace, RunSettings(25 * MS), cluster.client_endpoint), daemon=True
        )
        load.start()
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            opened = browser.new_page(viewport={"width": 1440, "height": 1300})
            opened.errors = []
            opened.on("console", lambda said: opened.errors.append(said.text))
            opened.on("pageerror", lambda error: opened.errors.append(str(error)))
            opened.goto(web.ready["address"])
            until(opened, "superserve.frames.length > 24")
            yield opened
            browser.close()
        load.join(60.0)


def until(page: Page, condition: str, timeout_s: float = 30.0) -> None:
    """Wait for a condition. Playwright's own wait needs `eval`, which the page forbids."""
    for _ in range(int(timeout_s * 10)):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"after {timeout_s:g} s: {condition}")


def latest(page: Page, key: str) -> Any:
    """Return a field of the latest frame."""
    return page.evaluate(f"superserve.frames[superserve.frames.length - 1].{key}")


def test_each_panel_has_data(page: Page, tmp_path: Path) -> None:
    """While the burst is served: the verdict, the river, the curves, the lanes and the tables."""
    until(page, "superserve.frames.some((f) => f.ok > 50 && f.batches.length)")
    until(page, "document.querySelectorAll('#clients tbody tr').length > 0")
    page.screenshot(path=str(tmp_path / "1440.png"), full_page=True)

    assert page.inner_text("#sentence") not in ("", "Waiting for the first figures…")
    figures = dict(
        zip(
            page.locator("#figures dt").all_inner_texts(),
            page.locator("#figures dd").all_inner_texts(),
            strict=True,
        )
    )
    assert figures["GPUs ready"] == "4"
    assert figures["since start"].endswith("%")
    assert page.evaluate(PAINTED, "river") > 4
    assert page.evaluate(PAINTED, "lanes") > 3
    assert page.evaluate("charts.rates.data[0].length") > 20
    assert page.evaluate("Math.max(...charts.rates.data[1])") > 50
    assert page.evaluate("charts.subnets.data.slice(1).flat().some((share) => share > 0)")
    assert page.evaluate("charts.attainment.data[1].some((share) => share > 0)")
    assert page.locator("#workers tbody tr").count() == 4
    assert page.locator("#legend li").count() == 6
    if latest(page, "att[2]") < 1:
        until(page, "document.querySelectorAll('#misses tbody tr .parts i').length > 0")
    assert page.errors == []  # type: ignore[attr-defined]


def test_it_is_painted_soon(page: Page) -> None:
    """By the browser's own clock, from asking for the page on: a second, on a slow machine some."""
    assert page.context.browser is not None
    fresh = page.context.browser.new_page()
    fresh.goto(page.url)
    until(fresh, "performance.getEntriesByName('first-contentful-paint').length")
    painted_ms = fresh.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    fresh.close()

    assert painted_ms < 10_000


def test_it_is_quick(page: Page) -> None:
    """Each kind of update fits into a frame of 60 Hz, also on a slow machine: the least of many is judged."""
    took = page.evaluate(UPDATES)

    assert len(took) == 4
    assert max(took) <= 16.0, took
    # Those that drew what had just come in, new rows included.
    assert min(page.evaluate("superserve.took")) <= 16.0


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [800, 1440])
def test_it_fits_any_width_and_light(page: Page, scheme: Any, width: int, tmp_path: Path) -> None:
    """Nothing scrolls sideways, the colours follow, and texts stand out from their background."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_timeout(600)
    page.screenshot(path=str(tmp_path / f"{width}-{scheme}.png"), full_page=True)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page_colour, ink = page.evaluate("[theme.page, theme.ink]")
    assert (int(page_colour[1:3], 16) < 0x40) == (scheme == "dark")
    assert abs(int(page_colour[1:3], 16) - int(ink[1:3], 16)) > 0xA0
    assert page.errors == []  # type: ignore[attr-defined]


def test_it_works_without_a_mouse_or_a_screen(page: Page) -> None:
    """Everything has a name, the tab key reaches the controls, and the pictures are told in words."""
    assert page.evaluate(NAMELESS) == []
    until(page, "document.getElementById('river-text').textContent.includes('queries wait')")
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:3] == ["skip", "pause", "save"]
    page.keyboard.press("p")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    n = page.evaluate("superserve.took.length")
    page.wait_for_timeout(600)
    assert page.evaluate("superserve.took.length") <= n + 1  # paused: nothing is drawn
    page.keyboard.press("p")
    page.locator("#workers tbody button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#log:not([hidden])")
    until(page, "document.getElementById('log').textContent.includes('cluster logs')")


def test_one_of_several_routers_can_be_chosen(page: Page, tmp_path: Path) -> None:
    """A recording of two routers, of which one goes: the whole, each alone, and who does not answer."""
    own = page.evaluate("superserve.frames.slice(-12)")
    assert page.is_hidden("#router-label")
    frames = []
    for i, frame in enumerate(own):
        parts = [{**frame, "queue": 1_001}, {**frame, "queue": 2_002} if i < 11 else None]
        rows = [
            {"router": 1 + k, "endpoint": f"tcp://r{k}", "answers": part is not None, "draining": False,
             "gpus": 4, "queue": 1, "in": 2.0, "att": 0.5}
            for k, part in enumerate(parts)
        ]  # fmt: skip
        frames.append(orjson.dumps({**frame, "queue": 3_003, "parts": parts, "routers": rows}))
    saved = tmp_path / "several.html"
    saved.write_text(recorded_page(frames))

    played = page.context.browser.new_page()  # type: ignore[union-attr]
    played.goto(saved.as_uri())
    played.keyboard.press("p")
    queue = "[...document.querySelectorAll('#figures div')].at(-1).lastChild.textContent"
    until(played, f"{queue} === '3,003'")
    played.select_option("#router", "1")
    until(played, f"{queue} === '2,002'")
    played.select_option("#router", "0")
    until(played, f"{queue} === '1,001'")
    until(played, "document.querySelectorAll('#routers tbody tr').length === 2", 5)
    played.locator("#seek").fill("11")
    played.select_option("#router", "1")
    until(played, "document.getElementById('sentence').textContent === 'Router 2 does not answer.'")
    assert played.evaluate(NAMELESS) == []
    played.close()


def test_a_recording_plays_without_a_server(page: Page, tmp_path: Path) -> None:
    """The saved file shows the same panels from disk, and its slider moves."""
    saved = tmp_path / "recording.html"
    saved.write_bytes(page.request.get(page.url + "recording").body())

    played = page.context.browser.new_page()  # type: ignore[union-attr]
    errors: list[str] = []
    played.on("console", lambda said: errors.append(said.text))
    played.goto(saved.as_uri())
    until(played, "superserve.frames.length > 12")
    assert played.evaluate(PAINTED, "river") > 4
    assert played.locator("#workers tbody tr").count() == 4
    before = int(played.input_value("#seek"))
    played.locator("#seek").focus()
    for _ in range(3):
        played.keyboard.press("ArrowRight")
    assert int(played.input_value("#seek")) != before
    assert errors == []
    played.close()
