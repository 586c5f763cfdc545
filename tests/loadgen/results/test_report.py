"""The page shows what the run result says, needs nothing beside it, and leaves no panel empty unexplained."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from loadgen.cli import cli
from loadgen.live.environment import environment_of
from loadgen.live.records import UNANSWERED
from loadgen.results.canvas import spread, thinned, time_ticks
from loadgen.results.report import load_runs, page, write_report
from loadgen.results.result import load_run
from loadgen.results.style import percent
from loadgen.results.timeline import recorded
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.loadgen.results.columns import SLO_NS, UNSENT, run_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadgen.results.result import RunResult

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.timeout(120)

PANELS = (
    "rate",
    "attainment",
    "river",
    "accuracy",
    "subnets",
    "ends",
    "batch",
    "latency",
    "queue",
    "gpus",
    "lag",
    "distribution",
)
OVERLOADED = (Status.OK, Status.LATE, Status.INFEASIBLE, Status.EXPIRED, UNANSWERED, UNSENT)


def result_of(
    n: int,
    ends: Sequence[int] = (Status.OK,),
    *,
    policy: str = "slackfit",
    duration_s: float = 2.0,
    seed: int = 0,
) -> RunResult:
    """Return the result of a run that never was, with all that its file keeps."""
    run, trace = run_of(n, ends=ends, policy=policy, duration_s=duration_s, seed=seed)
    return recorded(run, trace, SLO_NS, environment_of(trace=trace.provenance))


class Page(HTMLParser):
    """What a page holds: figures and the paths in them, exact values, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.paths: dict[str, int] = {}  # points drawn, by panel
        self.empty: dict[str, str] = {}
        self.values: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._figure = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += found.items()
        if tag == "figure":
            self._figure = found["id"]
            self.paths[self._figure] = 0
        elif tag == "path":
            self.paths[self._figure] += len(re.findall("[LC] ", found["d"]))
        elif tag == "data":
            self.values.append(found["value"])
        self._open.append(found.get("class", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that holds nothing."""
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Leave a tag."""
        self._open.pop()
        if tag == "figure":
            self._figure = ""

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data
        if self._open and self._open[-1] == "empty":
            self.empty[self._figure] = data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the panels out, half a second for each page, where its words and tables are judged."""
    monkeypatch.setattr("loadgen.results.report.draw", lambda _: [])


@pytest.mark.parametrize(
    ("n", "ends", "duration_s"),
    [
        (2_000, (Status.OK,), 2.0),
        (2_000, OVERLOADED, 30.0),
        (1, (Status.OK,), 0.01),
        (10, (Status.OK,), 10.0),
        (10, (Status.INFEASIBLE,), 10.0),
        (10, (UNANSWERED,), 1.0),
        (10, (UNSENT,), 1.0),
        (50, tuple(Status), 1e4),
    ],
)
def test_every_panel_is_filled_or_says_why_not(n: int, ends: Sequence[int], duration_s: float) -> None:
    """A drawing with data in it, or a sentence in its place; never both, never neither."""
    found = Page(page([result_of(n, ends, duration_s=duration_s)]))

    assert tuple(found.paths) == PANELS
    for key in PANELS:
        assert (found.paths[key] > 8) != (len(found.empty.get(key, "")) > 20), key


@pytest.mark.parametrize("n_runs", [1, 2, 6])
def test_the_page_needs_nothing_beside_it(n_runs: int) -> None:
    """No script, no address, no reference but to its own parts, and those exist, each once."""
    results = [result_of(500, OVERLOADED, policy=f"policy-{i}", seed=i) for i in range(n_runs)]
    text = page(results)
    found = Page(text)

    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert "http" not in text
    assert "@import" not in text
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value for name, value in found.attributes if name in ("href", "xlink:href", "src")]
    references += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)]
    assert references
    assert {value.removeprefix("#") for value in references} <= set(ids)
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert len(text.encode()) < 2_000_000


@pytest.mark.usefixtures("undrawn")
def test_tables_have_the_results_own_numbers() -> None:
    """Every figure of the file's headline, counts and shares stands in the page, exactly."""
    results = [result_of(2_000, OVERLOADED), result_of(2_000, policy="fixed:large", seed=1)]
    for shown in ([results[0]], results):
        found = Page(page(shown))
        for result in shown:
            expected: list[object] = [
                result.slo_attainment, result.mean_accuracy, result.goodput_qps, *result.latency_ms.values(),
                result.batch_size_mean, result.offered_qps, result.realised_qps, result.realised_cv2,
                result.slo_ms, result.duration_s, *(n for n in result.queries.values() if n),
                *result.subnet_share.values(),
            ]  # fmt: skip
            assert {str(value) for value in expected} <= set(found.values)


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    """Drawn from memory or from saved files, now or later."""
    results = [result_of(300, OVERLOADED), result_of(300, policy="fixed:large")]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, result in zip(paths, results, strict=True):
        path.write_text(result.to_json())
    write_report(tmp_path / "page.html", results)
    saved, labels = load_runs(paths)

    assert page(saved, labels) == page(results) == (tmp_path / "page.html").read_text()


HOSTILE = "<script>alert('$x^2$ & \"y\"')</script>"


def test_what_comes_from_outside_is_text() -> None:
    """Names of traces, policies and subnets, reasons and hosts are shown, never run or typeset."""
    result = result_of(200, (Status.OK, Status.INFEASIBLE))
    timeline = orjson.loads(orjson.dumps(result.timeline))
    timeline["subnets"][0]["name"] = HOSTILE
    hostile = replace(
        result, trace=HOSTILE, policy=HOSTILE, reasons={"INFEASIBLE": HOSTILE}, timeline=timeline,
        subnet_share={**result.subnet_share, HOSTILE: 0.1},
        environment={"machine": {HOSTILE: HOSTILE}, "command": HOSTILE},
    )  # fmt: skip
    found = Page(page([hostile, result]))

    assert "script" not in found.tags
    assert found.text.count(HOSTILE) >= 6
    assert "$x^2$" in found.text


def test_names_in_any_letters_are_drawn() -> None:
    """The font that matplotlib measures by lacks many; the page's own fonts need not."""
    assert "模型" in Page(page([result_of(20, policy="模型"), result_of(20)])).text


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_does_not_count_says_so_first() -> None:
    """Invalid, disturbed, unanswered, broken: in words, above every figure."""
    fine = result_of(200)
    cases = [
        (result_of(200, (Status.OK, UNSENT)), "Invalid, it does not count:"),
        (result_of(200, (Status.OK, UNANSWERED)), "got no answer at all"),
        (replace(fine, disturbed=True), "Disturbed: the p99.9 of send lag"),
        (replace(fine, partial=True), "Partial: interrupted after"),
        (replace(fine, environment={"violations": 3}), "event logs show 3 violations"),
        (replace(fine, environment={"duplicates": 2}), "2 answers came beyond"),
        (fine, "Valid: every query was sent"),
    ]
    for result, words in cases:
        text = Page(page([result])).text
        assert words in text[: text.index("Over time")]
    text = Page(page([fine, result_of(300, policy="other")])).text
    assert "not offered the same load" in text[: text.index("Over time")]


@pytest.mark.usefixtures("undrawn")
def test_runs_are_compared_in_words() -> None:
    """What the first gained over the second, and what it gave for it."""
    ours, theirs = result_of(400), result_of(400, (Status.OK, Status.INFEASIBLE), policy="fixed:large")
    theirs = replace(theirs, mean_accuracy=(ours.mean_accuracy or 0) + 2)
    text = Page(page([ours, theirs])).text

    gain = 100 * ((ours.slo_attainment or 0) - (theirs.slo_attainment or 0))
    assert f"slackfit answered {gain:.2f} points more in time, at 2.00 points less accuracy" in text


def test_a_run_without_a_timeline_is_in_the_tables() -> None:
    """One saved by an older version, alone and beside another."""
    old = replace(result_of(100, policy="old"), timeline=None, environment=None, reasons=None)

    for results in ([old], [old, result_of(100)]):
        found = Page(page(results))
        assert "old was saved without a timeline" in found.text
        assert str(old.slo_attainment) in found.values
        assert bool(found.paths) == (len(results) > 1)


def test_a_timeline_of_another_run_is_refused() -> None:
    """Its sums or its length give it away."""
    one, other = result_of(100), result_of(101, duration_s=3.0)

    with pytest.raises(ConfigError, match=r"timeline\.queries\.\w+: expected counts that sum to"):
        page([replace(one, timeline=other.timeline)])
    with pytest.raises(ConfigError, match=r"timeline\.bin_ms: expected 20 bins"):
        page([replace(one, duration_s=3.0)])
    with pytest.raises(ConfigError, match="expected 1 to 6 runs, got 7"):
        page([one] * 7)


def test_without_matplotlib_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to install, and comes before the run."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    args = ["run", "--trace", "poisson:rate=9", "--duration", "600", "--emulate", "cnn-8gpu-modelled:1"]
    result = CliRunner().invoke(cli, [*args, "--report", str(tmp_path / "page.html")])

    assert result.exit_code == 1
    assert "pip install 'superserve[report]'" in result.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.e2e
def test_a_run_writes_its_page_and_the_page_is_made_again(tmp_path: Path) -> None:
    """`loadgen run --report`, then `loadgen report` of the saved result: the same bytes."""
    saved, first, again = tmp_path / "run.json", tmp_path / "new" / "page.html", tmp_path / "again.html"
    args = ["run", "--trace", "poisson:rate=300", "--duration", "1", "--emulate", "cnn-8gpu-modelled:1"]
    ran = CliRunner().invoke(cli, [*args, "--json", str(saved), "--report", str(first)])
    made = CliRunner().invoke(cli, ["report", str(saved), "--output", str(again)])

    assert made.exit_code == 0, made.output
    assert first.read_bytes() == again.read_bytes(), ran.output
    found = Page(first.read_text())
    assert str(load_run(saved).slo_attainment) in found.values
    assert "1 emulated GPUs of cnn-8gpu-modelled" in found.text
    assert "no violations" in found.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "RUNS"),
        (("{tmp}/none.json", "--output", "{tmp}/page.html"), "none.json: expected a readable run result"),
        (("{tmp}/text.json", "--output", "{tmp}/page.html"), "text.json: expected JSON"),
        (("{tmp}/run.json", "--output", "{tmp}/text.json/page.html"), "--output: {tmp}/text.json"),
        (("{tmp}/bad.json", "--output", "{tmp}/page.html"), "timeline"),
        (("{tmp}/run.json",) * 7 + ("--output", "{tmp}/page.html"), "1 to 6 runs"),
    ],
)
def test_a_wrong_command_is_one_clear_line(tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    """No traceback, and no page."""
    (tmp_path / "text.json").write_text("no JSON")
    result = result_of(5)
    (tmp_path / "run.json").write_text(result.to_json())
    (tmp_path / "bad.json").write_text(replace(result, timeline={"bin_ms": 100}).to_json())
    ran = CliRunner().invoke(cli, ["report", *(arg.format(tmp=tmp_path) for arg in args)])

    assert isinstance(ran.exception, SystemExit), ran.exc_info
    assert ran.exit_code != 0
    assert message.format(tmp=tmp_path) in ran.stderr.splitlines()[-1]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    """By policy; else by file; else by number."""
    for folder, name, policy in (("a", "x", "one"), ("a", "y", "two"), ("a", "z", "one"), ("b", "x", "one")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(result_of(5, policy=policy).to_json())

    assert load_runs([tmp_path / "a/x.json", tmp_path / "a/y.json"])[1] == ["one", "two"]
    assert load_runs([tmp_path / "a/x.json", tmp_path / "a/z.json"])[1] == ["x", "z"]
    assert load_runs([tmp_path / "a/x.json", tmp_path / "b/x.json"])[1] == ["run 1", "run 2"]


@given(wanted=st.lists(st.floats(0, 100), max_size=12), gap=st.floats(1, 15))
def test_labels_do_not_cover_each_other(wanted: list[float], gap: float) -> None:
    """They keep their order, their distance, and within bounds, as far as there is room."""
    placed = spread(wanted, gap, 0, 100)
    ordered = [y for _, y in sorted(zip(wanted, placed, strict=True))]
    room = min(gap, 100 / max(1, len(wanted) - 1))

    assert all(-1e-6 <= y <= 100 + 1e-6 for y in placed)
    assert all(b - a >= room - 1e-6 for a, b in pairwise(ordered))


@given(share=st.floats(0, 100))
def test_a_percentage_below_100_never_reads_100(share: float) -> None:
    """However near it is, to a millionth of a point."""
    assert (percent(share) == "100 %") == (share == 100)
    assert float(percent(share).removesuffix(" %")) == pytest.approx(share, abs=0.01)
    assert share > 100 - 1e-6 or share == 100 or float(percent(share).removesuffix(" %")) < 100


@given(end_s=st.floats(1e-3, 1e7))
def test_time_ticks_are_few_and_within_the_run(end_s: float) -> None:
    """From 0 on, each with its unit."""
    ticks = time_ticks(end_s)

    assert ticks[0][0] == 0
    assert 3 <= len(ticks) <= 10
    assert ticks[-1][0] <= end_s * 1.0001
    assert len({text for _, text in ticks}) == len(ticks)


@given(n=st.integers(1, 60), n_fit=st.integers(2, 12))
def test_a_long_key_keeps_its_ends(n: int, n_fit: int) -> None:
    """The smallest and the largest subnet are always named."""
    entries = [(str(i), "#000000") for i in range(n)]
    kept = thinned(entries, n_fit)

    assert len(kept) <= max(n_fit, 1)
    assert (kept[0], kept[-1]) == (entries[0], entries[-1])
