"""Azure's files are read as published, and every malformed row is named."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.traces.azure import Invocations, MinuteCounts, parse
from loadgen.traces.trace import load_trace
from superserve.clock import SECOND
from superserve.errors import TraceError
from tests.paths import SHARED

if TYPE_CHECKING:
    from pathlib import Path


TRACES = SHARED / "traces"
MAF = TRACES / "invocations_per_function_md.anon.sample500.m0480-0959.csv.gz"
MAF_DAY = TRACES / "invocations_per_function_md.anon.head9.csv.gz"
DURATIONS = TRACES / "function_durations_percentiles.anon.sample500.csv.gz"
FUNCTIONS_2021 = TRACES / "AzureFunctionsInvocationTraceForTwoWeeksJan2021.first3600s.txt.gz"
LLM_CONV = TRACES / "AzureLLMInferenceTrace_conv.1815-1855.csv.gz"
LLM_CODE = TRACES / "AzureLLMInferenceTrace_code.1815-1855.csv.gz"

needs_traces = pytest.mark.skipif(
    not TRACES.is_dir(), reason="the Azure excerpts do not lie beside the repository"
)

MAF_TEXT = b"HashOwner,HashApp,HashFunction,Trigger,480,481,482\no,a,f,http,1,0,5\no,a,g,timer,2,0,1\n"
TEXT_2021 = b"app,func,end_timestamp,duration\na,f,12.5,2.25\na,g,10.75,0.25\na,f,11.0,1.0\n"
TEXT_LLM = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
    b"2023-11-16 18:15:46.6805901,1,0\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
)


def minutes(data: bytes) -> MinuteCounts:
    """Return the counts of a Functions 2019 file."""
    found = parse(data, source="maf.csv")
    assert isinstance(found, MinuteCounts)
    return found


def invocations(data: bytes) -> Invocations:
    """Return the arrivals of a file with a row per invocation."""
    found = parse(data, source="rows.csv")
    assert isinstance(found, Invocations)
    return found


def test_minute_counts_are_summed_over_functions() -> None:
    """Minute numbers come from the header."""
    found = minutes(MAF_TEXT)

    assert (found.n_functions, found.first_minute, found.last_minute) == (2, 480, 482)
    assert found.counts.tolist() == [3, 0, 6]


def test_a_window_of_minutes_is_cut_by_number() -> None:
    """Start and length are optional."""
    found = minutes(MAF_TEXT)

    assert found.window(None, None, source="maf.csv").counts.tolist() == [3, 0, 6]
    assert found.window(481, None, source="maf.csv").counts.tolist() == [0, 6]
    assert found.window(None, 2, source="maf.csv").counts.tolist() == [3, 0]
    assert found.window(482, 1, source="maf.csv").first_minute == 482


@pytest.mark.parametrize(("start", "length"), [(479, None), (483, None), (480, 0), (480, 4), (482, -1)])
def test_a_window_beyond_the_file_says_what_is_there(start: int, length: int | None) -> None:
    """The error gives the minutes that the file has."""
    with pytest.raises(TraceError, match=r"maf\.csv: expected a window within minutes 480 to 482, got"):
        minutes(MAF_TEXT).window(start, length, source="maf.csv")


def test_an_invocation_of_2021_arrives_its_duration_before_its_end() -> None:
    """Rows end out of order; arrivals are sorted and start at 0."""
    found = invocations(TEXT_2021)

    assert found.due_ns.tolist() == [0, SECOND // 4, SECOND // 2]
    assert found.duration_ns == SECOND * 3 // 4


def test_an_llm_timestamp_keeps_its_seventh_digit() -> None:
    """Two requests 100 ns apart stay apart, and CRLF is no part of a field."""
    assert invocations(TEXT_LLM).due_ns.tolist() == [0, 100, 4_314_579_000]


@pytest.mark.parametrize("text", [MAF_TEXT, TEXT_2021, TEXT_LLM])
def test_line_ends_do_not_matter(text: bytes) -> None:
    """LF, CRLF, none after the last row and a byte order mark all read the same."""
    unix = text.replace(b"\r\n", b"\n")
    values = []
    for variant in (unix, unix.replace(b"\n", b"\r\n"), unix.rstrip(b"\n"), b"\xef\xbb\xbf" + unix):
        found = parse(variant, source="x.csv")
        values.append((found.counts if isinstance(found, MinuteCounts) else found.due_ns).tolist())

    assert values == values[:1] * 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"o,a,g,timer,2,0,1", b"o,a,g,timer,2,0", "line 3: expected 7 columns, got 6"),
        (b"o,a,g,timer,2,0,1", b"o,a,g,timer,2,0,1,9", "line 3: expected 7 columns, got 8"),
        (b"o,a,g,timer,2,0,1", b"\no,a,g,timer,2,0,1", "line 3: expected 7 columns, got 1"),
        (
            b"http,1,0,5",
            b"http,1,,5",
            "line 2: column 6, minute 481: expected an integer from 0 to 999999999, got ''",
        ),
        (b"timer,2,0,1", b"timer,2,0,1.5", "line 3: column 7, minute 482: expected an integer .* got '1.5'"),
        (b"timer,2,0,1", b"timer,-2,0,1", "line 3: column 5, minute 480: expected an integer .* got '-2'"),
        (b"timer,2,0,1", b"timer,2,x,1", "line 3: column 6, minute 481: expected an integer .* got 'x'"),
        (b"timer,2,0,1", b"timer,2,9999999999,1", "line 3: column 6, minute 481: expected an integer"),
        (b"480,481", b"480,482", "line 1: column 6: expected minute 481, got '482'"),
        (b"480,481", b"x,481", "line 1: column 5: expected a minute's number, got 'x'"),
        (b",480,481,482", b"", "line 1: column 5: expected a minute's number, got the line's end"),
        (b"HashOwner", b"Owner", "line 1: unknown header 'Owner,HashApp"),
    ],
)
def test_a_malformed_minute_file_names_line_and_column(old: bytes, new: bytes, message: str) -> None:
    """The first fault is named with what was expected and what was found."""
    assert old in MAF_TEXT

    with pytest.raises(TraceError, match=rf"^maf\.csv: {message}") as caught:
        parse(MAF_TEXT.replace(old, new), source="maf.csv")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (TEXT_2021, b"12.5,2.25", b"12.5", "line 2: expected 4 columns, got 3"),
        (TEXT_2021, b"10.75", b"-10.75", "line 3: column 3, end_timestamp: expected a number of seconds"),
        (TEXT_2021, b"10.75", b"nan", "line 3: column 3, end_timestamp: expected a number of seconds"),
        (TEXT_2021, b"11.0,1.0", b"11.0,inf", "line 4: column 4, duration: expected a number of seconds"),
        (TEXT_2021, b"11.0", b"11e90", "line 4: expected at most 10000000 s from first to last"),
        (TEXT_2021, b"a,g", b",g", "line 3: column 1, app: expected a name, got ''"),
        (TEXT_LLM, b"374,44", b"374", "line 2: expected 3 columns, got 2"),
        (TEXT_LLM, b"374", b"-374", "line 2: column 2, ContextTokens: expected an integer"),
        (TEXT_LLM, b",109", b",1.5", "line 4: column 3, GeneratedTokens: expected an integer"),
        (TEXT_LLM, b"2023-11-16 18:15:50", b"yesterday", "line 4: column 1, TIMESTAMP: expected YYYY-MM-DD"),
        (TEXT_LLM, b"18:15:50.9951690", b"18:15:50.99516900000", "line 4: column 1, TIMESTAMP: expected"),
        (
            TEXT_LLM,
            b"11-16 18:15:50",
            b"02-30 18:15:50",
            "line 4: column 1, TIMESTAMP: expected a day and time that exist",
        ),
        (TEXT_LLM, b"2023-11-16 18:15:50", b"2199-11-16 18:15:50", "line 4: expected at most 10000000 s"),
        (TEXT_LLM, b"2023-11-16 18:15:50", b"9023-11-16 18:15:50", "line 4: column 1, TIMESTAMP: expected"),
    ],
)
def test_a_malformed_invocation_names_line_and_column(
    text: bytes, old: bytes, new: bytes, message: str
) -> None:
    """Also in a column that is not used."""
    assert old in text

    with pytest.raises(TraceError, match=rf"^rows\.csv: {message}"):
        parse(text.replace(old, new), source="rows.csv")


DAY_HEADER = b"HashOwner,HashApp,HashFunction,Trigger," + b",".join(b"%d" % n for n in range(1, 1441))


def day(*rows: tuple[bytes, int]) -> bytes:
    """Return a whole day of 2019, without a line end after the last row, as the published files are."""
    lines = (key + b",http" + b",%d" % count * 1440 for key, count in rows)
    return b"\n".join((DAY_HEADER, *lines))


@pytest.mark.parametrize("joint", [b"", b"\n", b"\r\n", b"\n\xef\xbb\xbf"], ids=["none", "LF", "CRLF", "BOM"])
def test_days_that_were_joined_follow_one_another(joint: bytes) -> None:
    """The second header is no function: minute 1441 is the first of the second day."""
    found = minutes(day((b"o,a,f", 2), (b"o,a,g", 0)) + joint + day((b"o,a,f", 3), (b"o,a,h", 1)))

    assert (found.first_minute, found.last_minute) == (1, 2880)
    assert found.counts.tolist() == [2] * 1440 + [4] * 1440
    assert found.functions.names == ("a/f", "a/g", "a/h")
    assert found.functions.totals.tolist() == [5 * 1440, 0, 1440]


def test_a_function_is_chosen_on_all_days() -> None:
    """Its rows of every day count, and no other's."""
    data = day((b"o,a,f", 2), (b"o,a,g", 9)) + b"\n" + day((b"o,a,g", 9), (b"o,a,f", 3))
    found = parse(data, source="maf.csv", functions="a/f")

    assert isinstance(found, MinuteCounts)
    assert found.counts.tolist() == [2] * 1440 + [3] * 1440


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MAF_TEXT * 2, "line 4: a second header: .* these are minutes 480 to 482"),
        (MAF_TEXT + MAF_TEXT.replace(b"482", b"482,483"), "line 4: expected the header of line 1 again"),
        (TEXT_2021 + b"app,func,end_timestamp,duration,x\n", "line 5: expected the header of line 1 again"),
        (TEXT_2021 * 2 + b"a,f,-1,2\n", "line 9: column 3, end_timestamp: expected"),
        (TEXT_LLM * 2 + TEXT_LLM.partition(b"\r")[0], "line 9: no rows after the header"),
        (TEXT_LLM * 2 + b"2023-02-30 18:15:46,1,1\n", "line 9: column 1, TIMESTAMP: expected a day and time"),
    ],
    ids=["part of a day", "other minutes", "other columns", "2021", "no rows", "LLM"],
)
def test_faults_of_joined_files_are_named_by_line(data: bytes, message: str) -> None:
    """Lines are those of the joined file, whichever part they stand in."""
    with pytest.raises(TraceError, match=rf"^x\.csv: {message}"):
        parse(data, source="x.csv")


def test_rows_of_joined_files_come_together() -> None:
    """Their instants are absolute, so that the order of the files does not matter."""
    later = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:51.6805900,1,1"

    assert invocations(TEXT_LLM + later).due_ns.tolist() == [0, 100, 4_314_579_000, 5 * SECOND]
    assert invocations(later + TEXT_LLM).due_ns.tolist() == [0, 100, 4_314_579_000, 5 * SECOND]
    assert invocations(TEXT_2021 * 2).due_ns.size == 6


def test_rows_of_one_function_are_summed() -> None:
    """A function with two triggers is one function: `top:1` takes all of it, and a name finds it."""
    data = MAF_TEXT + b"o,a,f,timer,0,0,1\n"

    for choice in ("top:1", "f", "a/f"):
        found = parse(data, source="maf.csv", functions=choice)
        assert isinstance(found, MinuteCounts)
        assert (found.functions.names, found.functions.totals.tolist()) == (("a/f",), [7])
        assert found.counts.tolist() == [1, 0, 6]
    assert minutes(data).n_functions == 2


def test_functions_of_two_owners_are_told_apart() -> None:
    """A name is `app/function` while that is one function's, else the owner goes before it."""
    data = MAF_TEXT + b"p,a,f,http,0,2,0\n"
    found = parse(data, source="maf.csv", functions="p/a/f")

    assert isinstance(found, MinuteCounts)
    assert minutes(data).functions.names == ("o/a/f", "a/g", "p/a/f")
    assert found.counts.tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("stamps", "due_s"),
    [
        (["2024-05-10 00:00:00.500000+00:00", "2024-05-10 00:00:01+00:00"], 0.5),
        (["2024-05-10 00:00:00Z", "2024-05-10T00:00:01.25Z"], 1.25),
        (["2024-05-10 02:00:00+02:00", "2024-05-09 19:30:02-04:30"], 2.0),
        (["2024-05-10 00:00:00", "2024-05-10 00:00:03+00:00"], 3.0),
    ],
)
def test_timestamps_with_a_time_zone_are_read(stamps: list[str], due_s: float) -> None:
    """As in the file of 2024; without a zone they are UTC, as in that of 2023."""
    rows = "".join(f"{stamp},1,1\n" for stamp in stamps)
    found = invocations(b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows.encode())

    assert found.due_ns.tolist() == [0, round(due_s * SECOND)]
    assert found.origin.startswith("Azure LLM inference 2024 (")


@pytest.mark.parametrize("text", [MAF_TEXT, TEXT_2021, TEXT_LLM])
def test_a_header_without_rows_is_an_error(text: bytes) -> None:
    """There is nothing to replay."""
    with pytest.raises(TraceError, match=r"^x\.csv: no rows after the header"):
        parse(text.splitlines(keepends=True)[0], source="x.csv")


def test_counts_that_are_all_zero_are_an_error() -> None:
    """They have no shape."""
    with pytest.raises(TraceError, match="no invocations: every count of 1 functions is 0"):
        parse(b"HashOwner,HashApp,HashFunction,Trigger,1,2\no,a,f,http,0,0\n", source="x.csv")


def test_arrivals_at_a_single_instant_are_an_error() -> None:
    """They have no rate."""
    with pytest.raises(TraceError, match="expected arrivals at two different instants at least"):
        parse(b"".join(TEXT_LLM.splitlines(keepends=True)[:2]), source="x.csv")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\x00\xff" * 1000, b"a,b,c\n1,2,3\n"])
def test_an_unknown_header_says_which_are_known(data: bytes) -> None:
    """In one line, however long or unprintable the file's own is."""
    with pytest.raises(
        TraceError, match=r"^x\.csv: line 1: unknown header .*expected that of Azure"
    ) as caught:
        parse(data, source="x.csv")

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@settings(deadline=None)
@given(
    text=st.sampled_from([MAF_TEXT, TEXT_2021, TEXT_LLM]),
    at=st.integers(0, 200),
    new=st.binary(max_size=3),
    cut=st.integers(0, 3),
)
def test_mangled_bytes_are_read_or_are_a_trace_error(text: bytes, at: int, new: bytes, cut: int) -> None:
    """Whatever is overwritten, inserted or removed, nothing else is raised."""
    try:
        found = parse(text[:at] + new + text[at + cut :], source="x.csv")
    except TraceError:
        return
    if isinstance(found, Invocations):
        assert found.due_ns[0] == 0
        assert (np.diff(found.due_ns) >= 0).all()
        assert found.due_ns[-1] < found.duration_ns
    else:
        assert found.counts.sum() > 0


@needs_traces
def test_the_2019_sample_has_its_published_statistics() -> None:
    """500 functions, minutes 480 to 959, 3,037,902 invocations, the busiest minute 722."""
    found = minutes(gzip.decompress(MAF.read_bytes()))

    assert (found.n_functions, found.first_minute, found.last_minute) == (500, 480, 959)
    assert found.counts.sum() == 3_037_902
    assert (int(found.counts.max()), int(found.counts.argmax()) + 480) == (7603, 722)
    assert (int(found.counts.min()), int(found.counts.argmin()) + 480) == (3013, 502)
    assert found.counts.reshape(8, 60).sum(axis=1)[0] == 366_494
    assert found.counts.std() / found.counts.mean() == pytest.approx(0.100, abs=0.001)


@needs_traces
def test_a_full_day_of_2019_has_all_its_minutes() -> None:
    """1440 columns, 9 functions, 1061 invocations, and no line end after the last row."""
    found = minutes(gzip.decompress(MAF_DAY.read_bytes()))

    assert (found.n_functions, found.first_minute, found.last_minute) == (9, 1, 1440)
    assert (found.counts.sum(), found.counts.max()) == (1061, 19)


@needs_traces
def test_the_2021_excerpt_has_its_published_statistics() -> None:
    """620 invocations, 0.172 a second, CV² 3.61."""
    trace = load_trace(str(FUNCTIONS_2021))

    assert trace.n == 620
    assert trace.mean_qps == pytest.approx(0.172, abs=0.0005)
    assert trace.cv2 == pytest.approx(3.61, abs=0.005)
    assert int(trace.due_ns[-1]) / SECOND == pytest.approx(3599.56 - 0.0015, abs=0.01)


@needs_traces
@pytest.mark.parametrize(
    ("path", "n", "span_s", "mean_qps", "cv2", "busiest_second"),
    [(LLM_CONV, 13_927, 2353.2440130, 5.918, 1.16, 16), (LLM_CODE, 7000, 2275.8662720, 3.075, 160, 67)],
    ids=["conv", "code"],
)
def test_the_llm_excerpts_have_their_published_statistics(
    path: Path, n: int, span_s: float, mean_qps: float, cv2: float, busiest_second: int
) -> None:
    """Counts, rates and CV² agree; the span is exact to 100 ns."""
    trace = load_trace(str(path))

    assert trace.n == n
    assert int(trace.due_ns[-1]) == round(span_s * SECOND)
    assert trace.mean_qps == pytest.approx(mean_qps, abs=0.0005)
    assert trace.cv2 == pytest.approx(cv2, rel=0.004)
    # The published figure counts whole seconds; a second may start anywhere to be the busiest.
    assert busiest_second <= trace.peak_qps() <= 1.25 * busiest_second


@needs_traces
def test_the_2019_sample_squeezed_keeps_its_shape() -> None:
    """Eight hours in 120 s at 6400 q/s: an exact total, and each minute its share."""
    counts = minutes(gzip.decompress(MAF.read_bytes())).counts
    trace = load_trace(str(MAF), rate_qps=6400, duration_s=120, seed=1)
    squeezed = np.bincount(trace.due_ns // (SECOND // 4), minlength=480)

    assert trace.n == 768_000
    assert trace.mean_qps == 6400
    assert squeezed / 1600 == pytest.approx(counts / counts.mean(), abs=0.13)  # five deviations: 5 / 40
    assert np.corrcoef(squeezed, counts)[0, 1] > 0.95
    assert "3037902 recorded invocations" in trace.provenance
    assert "CC BY 4.0" in trace.provenance
    assert "uniform at random" in trace.provenance


@needs_traces
def test_the_durations_table_is_no_trace() -> None:
    """It has no arrivals, and its header shows that."""
    with pytest.raises(TraceError, match="unknown header 'HashOwner,HashApp,HashFunction,Average"):
        load_trace(str(DURATIONS))
