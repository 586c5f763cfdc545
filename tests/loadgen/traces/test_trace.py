"""Traces load from files and specs, scale, and come back from disk as they were."""

from __future__ import annotations

import contextlib
import gzip
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.traces.trace import Trace, load_trace
from superserve.clock import SECOND
from superserve.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path


MAF_TEXT = (
    b"HashOwner,HashApp,HashFunction,Trigger,480,481,482\no,a,f,http,100,0,500\no,a,g,timer,200,0,100\n"
)
LLM_TEXT = b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"".join(
    b"2023-11-16 18:15:%02d.0000000,1,1\n" % second for second in range(0, 40, 4)
)
SPECS = (
    "constant:rate=200",
    "poisson:rate=200",
    "gamma:rate=200,cv2=2",
    "bursty:base=50,variant=150,cv2=4",
    "accel:from=100,to=300,tau=50,cv2=2",
    "maf-like:rate=200",
)


def trace(due_ns: list[int], duration_ns: int) -> Trace:
    """Return a trace of these instants."""
    return Trace("t", np.array(due_ns, dtype=np.int64), duration_ns, "made by hand")


@pytest.fixture
def maf(tmp_path: Path) -> str:
    """Return a Functions 2019 file of 900 invocations in three minutes."""
    path = tmp_path / "maf.csv.gz"
    path.write_bytes(gzip.compress(MAF_TEXT))
    return str(path)


@pytest.fixture
def llm(tmp_path: Path) -> str:
    """Return an LLM trace of ten requests, four seconds apart."""
    path = tmp_path / "llm.csv"
    path.write_bytes(LLM_TEXT)
    return str(path)


def test_the_figures_of_a_trace() -> None:
    """Mean, CV² and peak are those of the instants."""
    example = trace([0, SECOND, 2 * SECOND, 2 * SECOND + 1, 9 * SECOND], 10 * SECOND)
    gaps = np.diff(example.due_ns) / SECOND

    assert example.n == 5
    assert example.mean_qps == 0.5
    assert example.cv2 == pytest.approx(gaps.var() / gaps.mean() ** 2)
    assert example.peak_qps() == 2  # 1 s and 2 s are two windows: a window leaves out its end
    assert example.peak_qps(window_s=1.1) == pytest.approx(3 / 1.1)
    assert example.peak_qps(window_s=1000) == 0.5


@pytest.mark.parametrize(
    ("due_ns", "duration_ns", "message"),
    [
        ([], 10, "t: no queries in 1e-08 s"),
        ([3, 2], 10, "ascending instants"),
        ([-1, 2], 10, "ascending instants"),
        ([1, 10], 10, "ascending instants"),
        ([0], 0, "t: duration_ns: expected 1 ns to"),
        ([0], 2**62, "t: duration_ns: expected 1 ns to"),
    ],
)
def test_an_impossible_trace_cannot_be_made(due_ns: list[int], duration_ns: int, message: str) -> None:
    """The constructor names what is wrong."""
    with pytest.raises(TraceError, match=message):
        trace(due_ns, duration_ns)


def test_a_trace_of_floats_cannot_be_made() -> None:
    """Time is integer nanoseconds."""
    floats: np.ndarray[tuple[int], np.dtype[np.float64]] = np.zeros(2)
    with pytest.raises(TraceError, match="due_ns: expected int64"):
        Trace("t", floats, 10, "")  # type: ignore[arg-type]  # the mistake under test


@settings(deadline=None)
@given(gaps=st.lists(st.integers(0, 2**33), min_size=1, max_size=50), name=st.text(max_size=5))
def test_a_saved_trace_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], name: str
) -> None:
    """Instants, duration, name and provenance survive, with short gaps and long ones, also gzipped."""
    due_ns = np.cumsum(np.array(gaps, dtype=np.int64))
    saved = Trace(name, due_ns, int(due_ns[-1]) + 1, "a\nb")
    path = tmp_path_factory.mktemp("saved") / "a.trace"
    saved.save(path)
    zipped = path.with_suffix(".gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))

    for loaded in (load_trace(str(path)), load_trace(str(zipped))):
        np.testing.assert_array_equal(loaded.due_ns, due_ns)
        assert (loaded.name, loaded.duration_ns, loaded.provenance) == (name, saved.duration_ns, "a\nb")


def test_short_gaps_take_four_bytes(tmp_path: Path) -> None:
    """A thousand queries within seconds are a four-kilobyte file and a line of header."""
    load_trace("constant:rate=1000", duration_s=1).save(tmp_path / "x")

    assert 4000 < (tmp_path / "x").stat().st_size < 4300


def test_a_trace_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    """For instance into a folder that does not exist."""
    with pytest.raises(TraceError, match=r"nowhere.*cannot be written: No such file"):
        trace([0], 1).save(tmp_path / "nowhere" / "x")


def saved(**changes: object) -> bytes:
    """Return a saved trace of three queries with these fields of its header changed."""
    header = {"name": "t", "provenance": "p", "duration_ns": 10, "n": 3, "gap_bytes": 4} | changes
    gaps = np.array([1, 2, 3], dtype="<u4").tobytes()
    return b"SuperServe-trace 1\n" + orjson.dumps(header) + b"\n" + gaps


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved()[:-1], "expected 12 bytes of gaps, got 11"),
        (saved() + b"x", "expected 12 bytes of gaps, got 13"),
        (saved(n=4), "expected 16 bytes of gaps, got 12"),
        (saved(n=0), "line 2: n: expected 1 to"),
        (saved(n=-1), "line 2: n: expected 1 to"),
        (saved(n=10**12), "line 2: n: expected 1 to"),
        (saved(n=True), "line 2: n: expected int, got True"),
        (saved(n="3"), "line 2: n: expected int, got '3'"),
        (saved(name=None), "line 2: name: expected str, got None"),
        (saved(gap_bytes=2), "line 2: gap_bytes: expected 4 or 8, got 2"),
        (saved(duration_ns=6), "t: due_ns: expected ascending instants"),
        (saved(extra=1), "line 2: expected an object of name, provenance, duration_ns, n, gap_bytes"),
        (b"SuperServe-trace 2\n{}\n", "line 1: expected format version 1, got b'2'"),
        (b"SuperServe-trace 1\n{\n", "line 2: expected a JSON object"),
        (b"SuperServe-trace 1\n[]\n", "line 2: expected an object of"),
        (b"SuperServe-trace ", "line 1: expected format version 1"),
    ],
)
def test_a_damaged_saved_trace_names_its_fault(tmp_path: Path, data: bytes, message: str) -> None:
    """With the file, and the line where there is one."""
    path = tmp_path / "x.trace"
    path.write_bytes(data)

    with pytest.raises(TraceError, match=rf"x\.trace: {message}") as caught:
        load_trace(str(path))

    assert "\n" not in str(caught.value)


def test_gaps_that_overflow_are_no_trace(tmp_path: Path) -> None:
    """Their sum turns negative, and is caught."""
    header = {"name": "t", "provenance": "p", "duration_ns": 10, "n": 2, "gap_bytes": 8}
    gaps = np.array([2**62, 2**63], dtype="<u8").tobytes()
    (tmp_path / "x").write_bytes(b"SuperServe-trace 1\n" + orjson.dumps(header) + b"\n" + gaps)

    with pytest.raises(TraceError, match="expected ascending instants"):
        load_trace(str(tmp_path / "x"))


@settings(deadline=None)
@given(at=st.integers(0, 130), new=st.binary(max_size=4), cut=st.integers(0, 4))
def test_a_mangled_saved_trace_is_read_or_is_a_trace_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes, cut: int
) -> None:
    """Nothing else is raised."""
    path = tmp_path_factory.mktemp("mangled") / "x"
    path.write_bytes(saved()[:at] + new + saved()[at + cut :])
    with contextlib.suppress(TraceError):
        assert load_trace(str(path)).n == 3


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_gives_its_rate_for_its_duration(spec: str) -> None:
    """The mean is near 200 q/s for each; the same seed gives the same trace, another one does not."""
    first = load_trace(spec, duration_s=20, seed=1)
    mean_qps = 280 if spec.startswith("accel") else 200

    assert first.duration_ns == 20 * SECOND
    assert first.mean_qps == pytest.approx(mean_qps, rel=0.1)
    assert first.name == spec
    assert "synthetic" in first.provenance
    np.testing.assert_array_equal(load_trace(spec, duration_s=20, seed=1).due_ns, first.due_ns)
    if not spec.startswith("constant"):
        assert not np.array_equal(load_trace(spec, duration_s=20, seed=2).due_ns, first.due_ns)


@pytest.mark.parametrize("spec", SPECS)
def test_a_rate_scales_a_spec_as_a_whole(spec: str) -> None:
    """The mean over the duration is the one asked for, and the name shows the rates that ran."""
    scaled = load_trace(spec, rate_qps=500, duration_s=20, seed=1)

    assert scaled.mean_qps == pytest.approx(500, rel=0.1)
    assert scaled.name != spec


def test_acceleration_alone_implies_its_duration() -> None:
    """The ramp's; any other spec asks for one."""
    assert load_trace("accel:from=100,to=300,tau=50,cv2=2").duration_ns == 4 * SECOND
    with pytest.raises(TraceError, match="trace poisson:rate=5: duration_s is missing"):
        load_trace("poisson:rate=5")
    with pytest.raises(TraceError, match="duration_s is missing"):
        load_trace("accel:from=100,to=100,tau=50,cv2=2")


def test_a_spec_that_gives_no_query_is_an_error() -> None:
    """An empty trace cannot be replayed."""
    with pytest.raises(TraceError, match=r"poisson:rate=1e-06: no queries in 0\.001 s"):
        load_trace("poisson:rate=0.000001", duration_s=0.001)


def test_minute_counts_in_real_time_are_exact(maf: str) -> None:
    """Each minute has its recorded count; which seed decides only where within it."""
    for seed in (0, 1):
        loaded = load_trace(maf, seed=seed)
        assert loaded.duration_ns == 180 * SECOND
        assert np.bincount(loaded.due_ns // (60 * SECOND)).tolist() == [300, 0, 600]
        assert loaded.name == "maf"


def test_minute_counts_are_squeezed_into_the_duration(maf: str) -> None:
    """Without a rate all recorded invocations are kept; with one the total is rate times duration."""
    squeezed = load_trace(maf, duration_s=3)
    scaled = load_trace(maf, duration_s=3, rate_qps=5000)
    real_time = load_trace(maf, rate_qps=50)

    assert np.bincount(squeezed.due_ns // SECOND).tolist() == [300, 0, 600]
    counts = np.bincount(scaled.due_ns // SECOND)
    assert counts.sum() == 15_000
    assert counts[1] == 0
    assert counts[2] == pytest.approx(10_000, rel=0.05)
    assert (real_time.n, real_time.duration_ns) == (9000, 180 * SECOND)


def test_recorded_arrivals_are_squeezed_to_a_rate(llm: str) -> None:
    """Ten requests four seconds apart at 10 q/s are ten requests a tenth of a second apart."""
    loaded = load_trace(llm, rate_qps=10)

    assert load_trace(llm).duration_ns == 40 * SECOND
    assert loaded.duration_ns == SECOND
    assert loaded.due_ns == pytest.approx(np.arange(10) * SECOND / 10, abs=1)


def test_recorded_arrivals_are_cut_to_a_duration(llm: str) -> None:
    """Without a rate, in real time; with one, as many as it takes, fitted exactly."""
    cut = load_trace(llm, duration_s=10)
    fitted = load_trace(llm, rate_qps=5, duration_s=1)

    assert cut.due_ns.tolist() == [0, 4 * SECOND, 8 * SECOND]
    assert (fitted.n, fitted.duration_ns, fitted.mean_qps) == (5, SECOND, 5)


def test_more_than_was_recorded_is_an_error_that_says_what_there_is(llm: str) -> None:
    """Queries are never repeated."""
    with pytest.raises(TraceError, match=r"llm: expected duration_s of at most 40 \(10 queries\), got 41"):
        load_trace(llm, duration_s=41)
    with pytest.raises(TraceError, match=r"to be 1 to 10 queries.*\(0\.25 q/s for 40 s\), got 11"):
        load_trace(llm, rate_qps=11, duration_s=1)
    with pytest.raises(TraceError, match=r"to be 1 to 10 queries.*got 0"):
        load_trace(llm, rate_qps=0.1, duration_s=1)


@settings(deadline=None)
@given(
    due_ns=st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True).map(sorted),
    rate_qps=st.floats(0.1, 1e4),
    share=st.floats(0.01, 1),
)
def test_scaling_gives_the_rate_and_duration_asked_for(
    due_ns: list[int], rate_qps: float, share: float
) -> None:
    """The count is exact, and the instants stay ascending within the duration."""
    whole = trace(due_ns, 10**6 + 1)
    n = max(1, round(share * whole.n))
    scaled = whole.scaled(rate_qps=rate_qps, duration_s=n / rate_qps)

    assert scaled.n == n
    assert scaled.mean_qps == pytest.approx(rate_qps, rel=1e-4)


def test_a_query_due_together_with_the_first_left_out_stays_within() -> None:
    """It falls on the last nanosecond, not on the end."""
    assert trace([0, 5, 5], 10).scaled(rate_qps=2, duration_s=1).due_ns.tolist() == [0, SECOND - 1]


def test_queries_that_are_due_at_once_have_no_rate() -> None:
    """No squeeze can spread what arrived together."""
    with pytest.raises(TraceError, match="the first 3 queries are due at once"):
        trace([0, 0, 0, 5], 10).scaled(rate_qps=2, duration_s=1)


def test_a_trace_scaled_by_nothing_is_itself() -> None:
    """No copy is made."""
    example = trace([0, 5], 10)

    assert example.scaled() is example


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_or_duration_out_of_range_is_named(bad: float, llm: str, maf: str) -> None:
    """For every kind of trace."""
    for spec in ("poisson:rate=5", llm, maf):
        with pytest.raises(TraceError, match="rate_qps: expected a number above 0"):
            load_trace(spec, rate_qps=bad, duration_s=1)
        with pytest.raises(TraceError, match="duration_s: expected a number above 0"):
            load_trace(spec, duration_s=bad)


def test_a_negative_seed_is_an_error() -> None:
    """Generators take none."""
    with pytest.raises(TraceError, match="seed: expected an integer of at least 0, got -1"):
        load_trace("poisson:rate=5", duration_s=1, seed=-1)


def test_a_missing_file_suggests_the_spec_that_may_be_meant() -> None:
    """The error says what a trace can be."""
    with pytest.raises(TraceError, match=r"^nowhere\.csv: no such file: expected a trace file, or a spec"):
        load_trace("nowhere.csv")
    with pytest.raises(TraceError, match="did you mean poisson"):
        load_trace("poison")


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    """The system's own words say why it cannot be read."""
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        load_trace(str(tmp_path))


def test_a_file_that_is_no_gzip_in_spite_of_its_name_is_an_error(tmp_path: Path) -> None:
    """Its first bytes are shown."""
    (tmp_path / "x.csv.gz").write_bytes(MAF_TEXT)

    with pytest.raises(TraceError, match=r"x\.csv\.gz: expected a gzip file.*got b'HashOwner"):
        load_trace(str(tmp_path / "x.csv.gz"))


@pytest.mark.parametrize("damage", ["cut", "flip", "header"])
def test_a_damaged_gzip_file_is_an_error(tmp_path: Path, damage: str) -> None:
    """Cut short, altered inside, or nothing but gzip's first two bytes."""
    data = bytearray(gzip.compress(MAF_TEXT))
    if damage == "cut":
        del data[-12:]
    elif damage == "flip":
        data[-6] ^= 0xFF
    else:
        del data[2:]
    (tmp_path / "x.csv.gz").write_bytes(data)

    with pytest.raises(TraceError, match=r"x\.csv\.gz: expected a whole gzip file"):
        load_trace(str(tmp_path / "x.csv.gz"))


def test_an_oversized_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is small until it is uncompressed."""
    monkeypatch.setattr("loadgen.traces.trace.MAX_FILE_BYTES", 10_000)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(10_001)))

    with pytest.raises(TraceError, match="expected at most 10000 bytes, uncompressed"):
        load_trace(str(tmp_path / "x.gz"))


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "a pointer of Git LFS"),
        ("app,func,end_timestamp,duration\na,f,1.5,0.5\n".encode("utf-16"), "UTF-16 text"),
        (b"", "an empty file"),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_what_stands_in_a_traces_place_is_named(tmp_path: Path, name: str, content: bytes, got: str) -> None:
    """Not as a header of unknown letters."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError, match=f"{name}: expected a trace, got {got}"):
        load_trace(str(tmp_path / name))
