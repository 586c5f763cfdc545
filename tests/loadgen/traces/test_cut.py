"""`loadgen trace` cuts, squeezes and speeds up traces of every kind, and keeps their shape."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.cli import cli
from loadgen.traces.azure_functions import Functions
from loadgen.traces.cut import Cut, counts_by_second, make_trace, parse_window, sparkline
from loadgen.traces.trace import Trace, load_trace
from superserve.clock import SECOND
from superserve.errors import TraceError
from tests.paths import ROOT, SHARED

if TYPE_CHECKING:
    from pathlib import Path


TRACES = SHARED / "traces"
MAF = TRACES / "invocations_per_function_md.anon.sample500.m0480-0959.csv.gz"
LLM_CODE = TRACES / "AzureLLMInferenceTrace_code.1815-1855.csv.gz"
needs_traces = pytest.mark.skipif(
    not TRACES.is_dir(), reason="the Azure excerpts do not lie beside the repository"
)

MAF_TEXT = """HashOwner,HashApp,HashFunction,Trigger,480,481,482
o,app1,fox,http,100,0,500
o,app1,fun,timer,200,0,100
o,app2,fun,queue,0,30,0
"""
TEXT_2021 = """app,func,end_timestamp,duration
a,f,12.5,2.25
a,g,10.75,0.25
a,f,11.0,1.0
b,f,14.0,1.0
a,f,15.0,1.0
"""
LLM_TEXT = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.0000000,1,1\n" for second in (0, 1, 1, 2, 10, 11, 40)
)


@pytest.fixture
def maf(tmp_path: Path) -> str:
    """Return a Functions 2019 file of three functions in three minutes."""
    return written(tmp_path / "maf.csv", MAF_TEXT)


@pytest.fixture
def functions_2021(tmp_path: Path) -> str:
    """Return a Functions 2021 file of five invocations."""
    return written(tmp_path / "rows.txt", TEXT_2021)


@pytest.fixture
def llm(tmp_path: Path) -> str:
    """Return an LLM trace of seven requests."""
    return written(tmp_path / "llm.csv", LLM_TEXT)


def written(path: Path, text: str) -> str:
    """Write a file and return its path."""
    path.write_text(text)
    return str(path)


def bins(trace: Trace, n: int) -> list[int]:
    """Return the queries in each of `n` equal parts of a trace, cut in integers."""
    part = [due * n // trace.duration_ns for due in trace.due_ns.tolist()]
    counts: list[int] = np.bincount(np.array(part), minlength=n).tolist()
    return counts


def loadgen(*args: str) -> Result:
    """Run a command of the load generator in this process."""
    return CliRunner().invoke(cli, ["trace", *args])


@settings(deadline=None)
@given(
    due_ns=st.lists(st.integers(0, 100 * SECOND - 1), min_size=1, max_size=200),
    n_bins=st.sampled_from([1, 10, 100]),
    factor=st.sampled_from([1, 2, 5, 8, 20, 25, 50, 64, 100]),  # an edge stays a whole nanosecond
)
def test_a_trace_that_is_squeezed_has_equal_counts_in_equal_bins(
    due_ns: list[int], n_bins: int, factor: int
) -> None:
    """All queries are kept, and none goes over to another bin, those due on an edge included."""
    edges = range(0, 100 * SECOND, 100 * SECOND // n_bins)
    due = np.array(sorted([*due_ns, *edges]), dtype=np.int64)
    original = Trace("t", due, 100 * SECOND, "made by hand")

    squeezed = original.fitted(100 / factor)

    assert squeezed.n == original.n
    assert squeezed.duration_ns * factor == original.duration_ns
    assert bins(squeezed, n_bins) == bins(original, n_bins)


@pytest.mark.parametrize("cut", [Cut(squeeze_to_s=4.0), Cut(speed_up=10.0), Cut(speed_up=0.5)], ids=str)
def test_recorded_arrivals_keep_their_shape(tmp_path: Path, cut: Cut) -> None:
    """Counts in forty bins are equal, faster or slower, and so is the CV²."""
    saved = tmp_path / "saved"
    load_trace("gamma:rate=50,cv2=8", duration_s=40, seed=3).save(saved)
    original = load_trace(str(saved))

    made = make_trace(str(saved), cut).trace

    assert made.duration_ns == round(40e9 / (cut.speed_up or 10))
    assert bins(made, 40) == bins(original, 40)
    assert made.cv2 == pytest.approx(original.cv2, rel=1e-4)


@pytest.mark.parametrize("cut", [Cut(squeeze_to_s=3.0), Cut(speed_up=60.0)], ids=str)
def test_minute_counts_keep_their_shape(maf: str, cut: Cut) -> None:
    """Each minute takes an equal part of the time, with exactly its recorded count."""
    made = make_trace(maf, cut)

    assert made.trace.duration_ns == 3 * SECOND
    assert bins(made.trace, 3) == [300, 30, 600]
    assert made.kind == "Azure Functions 2019: counts of minutes 480 to 482"


def test_a_window_of_minutes_goes_by_their_numbers(maf: str) -> None:
    """The end is not included; either end may be left out."""
    assert make_trace(maf, Cut(window="481:482", squeeze_to_s=1)).trace.n == 30
    assert make_trace(maf, Cut(window="481:")).trace.n == 630
    assert make_trace(maf, Cut(window=":481")).trace.n == 300


def test_a_window_of_minutes_lasts_as_long_and_holds_some_queries(maf: str) -> None:
    """One that is empty, or beyond the file, is an error that names its minutes."""
    made = make_trace(maf, Cut(window="482:483"))

    assert (made.trace.n, made.trace.duration_ns) == (600, 60 * SECOND)
    with pytest.raises(TraceError, match="no invocations in minutes 481 to 481"):
        make_trace(maf, Cut(window="481:482", functions="top:1"))
    with pytest.raises(TraceError, match="expected a window within minutes 480 to 482"):
        make_trace(maf, Cut(window="479:"))


def test_a_window_of_seconds_starts_anew_at_its_beginning(llm: str) -> None:
    """What is due at the end of the window is not in it."""
    made = make_trace(llm, Cut(window="1:11"))

    assert made.trace.due_ns.tolist() == [0, 0, SECOND, 9 * SECOND]
    assert made.trace.duration_ns == 10 * SECOND
    assert "from 1 s to 11 s" in made.trace.provenance
    assert made.kind == "Azure LLM inference 2023: recorded arrivals"


def test_the_busiest_functions_are_taken(maf: str, functions_2021: str) -> None:
    """Of a file of either year, by invocations in the whole file."""
    assert make_trace(maf, Cut(functions="top:1", speed_up=60)).trace.n == 600
    assert make_trace(maf, Cut(functions="top:2", speed_up=60)).trace.n == 900

    made = make_trace(functions_2021, Cut(functions="top:1"))
    assert made.trace.due_ns.tolist() == [0, SECOND // 4, 4 * SECOND]
    assert made.functions is not None
    assert made.functions.names == ("a/f",)


@pytest.mark.parametrize(
    ("names", "n"),
    [("fox", 600), ("fo", 600), ("app1/fun", 300), ("app2", 30), ("fox,app2/fun", 630), ("fox,fo", 600)],
)
def test_functions_are_taken_by_name(maf: str, names: str, n: int) -> None:
    """By function, by app/function, or by the beginning of either where only one begins so."""
    assert make_trace(maf, Cut(functions=names, speed_up=60)).trace.n == n


def test_a_full_name_goes_before_those_that_begin_with_it() -> None:
    """`f` is `a/f`, though `a/fg` begins with it too."""
    found = Functions(("a/fg", "a/f"), np.array([5, 1]))

    assert found.chosen("f", source="x").tolist() == [False, True]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("top:4", r"maf\.csv: functions: top:4: expected at most the 3 that it has"),
        ("top:0", r"functions: expected top:N, or names"),
        ("fox,", r"functions: expected top:N, or names"),
        ("bat", r"functions: no function's name begins with 'bat'"),
        ("fun", r"functions: 2 functions' names begin with 'fun', .* app1/fun and app2/fun"),
    ],
)
def test_a_wrong_choice_of_functions_says_what_was_expected(maf: str, choice: str, message: str) -> None:
    """Names that mean nobody, or several, are errors."""
    with pytest.raises(TraceError, match=message):
        make_trace(maf, Cut(functions=choice))


def test_functions_without_invocations_are_an_error(tmp_path: Path) -> None:
    """They have no shape."""
    path = written(tmp_path / "m.csv", MAF_TEXT.replace("100,0,500", "0,0,0"))

    with pytest.raises(TraceError, match=r"m\.csv: no invocations: every count of 1 functions is 0"):
        make_trace(path, Cut(functions="fox"))


def test_functions_are_refused_where_there_are_none(llm: str, tmp_path: Path) -> None:
    """An LLM trace, a saved one and a spec have no functions."""
    saved = tmp_path / "saved"
    load_trace("poisson:rate=50", duration_s=1).save(saved)
    for spec in (llm, str(saved), "poisson:rate=50"):
        with pytest.raises(TraceError, match="functions: "):
            make_trace(spec, Cut(functions="top:1", duration_s=1))


def test_a_rate_is_the_mean_of_what_is_made(maf: str, llm: str) -> None:
    """Recorded queries are all kept; of minute counts there are as many as it takes."""
    recorded = make_trace(llm, Cut(rate_qps=70)).trace
    counted = make_trace(maf, Cut(rate_qps=100, squeeze_to_s=3)).trace
    drawn = make_trace("constant:rate=5", Cut(rate_qps=10, duration_s=4, speed_up=2)).trace

    assert recorded.n == 7
    assert recorded.mean_qps == pytest.approx(70)
    assert (counted.n, counted.duration_ns) == (300, 3 * SECOND)
    assert (drawn.n, drawn.duration_ns) == (40, 2 * SECOND)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Cut(squeeze_to_s=1, speed_up=2), "squeeze_to_s and speed_up: expected one of them"),
        (Cut(rate_qps=5, speed_up=2), "rate_qps, squeeze_to_s and speed_up: expected one of them"),
        (Cut(duration_s=5), "duration_s: only a spec"),
        (Cut(speed_up=0), "speed_up: expected"),
        (Cut(squeeze_to_s=-1), "squeeze_to_s: expected"),
        (Cut(rate_qps=0), "rate_qps: expected"),
        (Cut(window="5:5"), "expected a window within 0 to"),
        (Cut(window="5:5000"), "expected a window within 0 to"),
        (Cut(window="20:30"), "no queries in 10 s"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused(llm: str, cut: Cut, message: str) -> None:
    """The error names what was given."""
    with pytest.raises(TraceError, match=message):
        make_trace(llm, cut)


@pytest.mark.parametrize("text", ["", "5", "x:1", "-1:5", "1:nan", "1:inf", "1:2:3"])
def test_a_window_is_two_numbers_around_a_colon(text: str) -> None:
    """Anything else is an error that shows how it is written."""
    with pytest.raises(TraceError, match="window: expected START:END, such as 60:120"):
        parse_window(text)


def test_a_part_of_a_minute_is_no_window(maf: str) -> None:
    """When within a minute a query came was not recorded."""
    with pytest.raises(TraceError, match="window: expected whole minutes"):
        make_trace(maf, Cut(window="480:481.5"))


def test_the_sparkline_shows_the_rate_over_time() -> None:
    """The fullest part fills its cell; a part with any query is not blank."""
    trace = Trace("t", np.array([0] * 80 + [2] * 40 + [3]), 4, "made by hand")

    assert sparkline(trace, 4) == "█ ▄▁"


def test_seconds_are_counted_whole() -> None:
    """What is left at the end does not look like a second of little load."""
    late = Trace("t", np.array([0, 1, SECOND, 2 * SECOND + 5]), 2 * SECOND + 9, "made by hand")
    short = Trace("t", np.array([0, 1]), 9, "made by hand")

    assert counts_by_second(late).tolist() == [2, 1]
    assert counts_by_second(short).tolist() == [2]


@pytest.mark.parametrize("name", ["out.trace", "out.trace.gz"])
def test_the_command_saves_what_it_prints(llm: str, tmp_path: Path, name: str) -> None:
    """`info` of the saved file says the same as `make` did; a name in .gz is gzipped, equal each time."""
    out = tmp_path / name
    made = loadgen("make", llm, "--speed-up", "20", "--out", str(out))
    again = tmp_path / f"again-{name}"
    loadgen("make", llm, "--speed-up", "20", "--out", str(again))
    told = loadgen("info", str(out))

    assert (made.exit_code, told.exit_code) == (0, 0), made.output + told.output
    assert f"written          {out}: {out.stat().st_size:,} bytes" in made.output
    assert told.output.splitlines()[2:] == made.output.splitlines()[2:-1]
    assert "kind             saved trace" in told.output
    assert out.read_bytes() == again.read_bytes()
    assert out.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


def test_the_command_says_what_a_trace_is_like(functions_2021: str) -> None:
    """Kind, counts, span, rates, burstiness, functions, picture, provenance."""
    output = loadgen("info", functions_2021).output

    for part in (
        "kind             Azure Functions 2021: recorded arrivals",
        "queries          5\n",
        "peak             3 q/s",
        "CV² of gaps      ",
        "variance / mean",
        "functions        3; busiest a/f, 60.0%",
        "rate over time   █",
        "CC BY 4.0",
    ):
        assert part in output


def test_a_malformed_row_is_named_by_the_command(tmp_path: Path) -> None:
    """File, line and column, on one line, and no traceback."""
    path = written(tmp_path / "bad.csv", LLM_TEXT.replace("18:15:02.0000000,1,1", "18:15:02.0000000,1,x"))
    result = loadgen("info", path)

    assert result.exit_code == 1
    assert result.output == (
        f"Error: {path}: line 5: column 3, GeneratedTokens: expected an integer from 0 to 999999999,"
        " got 'x'\n"
    )


def test_the_page_reads_a_saved_trace_without_this_package(tmp_path: Path) -> None:
    """docs/traces.md specifies the format: its Python finds the instants that were saved."""
    page = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    saved = load_trace("poisson:rate=50", duration_s=4)
    (tmp_path / "out").mkdir()
    saved.save(tmp_path / "out" / "burst.trace.gz")

    done = subprocess.run(
        [sys.executable, "-c", f"{snippet}\nprint(due_ns.tolist())"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == saved.due_ns.tolist()


@needs_traces
def test_the_code_trace_keeps_its_shape_at_twenty_times_its_speed() -> None:
    """All 7,000 requests, CV² 160, and each of 2,276 bins as full as before."""
    original = load_trace(str(LLM_CODE))
    made = make_trace(str(LLM_CODE), Cut(speed_up=20)).trace

    assert made.n == 7000
    assert made.cv2 == pytest.approx(160, rel=0.004)
    moved = np.abs(np.array(bins(made, 2276)) - bins(original, 2276)).sum()
    assert moved <= 2  # its length is no multiple of 20 ns, so an edge may fall between two nanoseconds


@needs_traces
def test_the_busiest_three_of_the_2019_sample_are_left_out_as_published() -> None:
    """The rest have 670,398 of its 3,037,902 invocations."""
    top = make_trace(str(MAF), Cut(functions="top:3", squeeze_to_s=60))

    assert top.trace.n == 3_037_902 - 670_398
    assert top.functions is not None
    assert top.functions.totals.max() == 1_915_521
