"""Profiles: look-ups, files, and every way in which one is refused."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import MAX_BATCH_SIZE, Profile, SubnetProfile, evenly, load_profile, shipped_profiles
from superserve.errors import ConfigError, ProfileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CNN = load_profile("cnn-8gpu-modelled")

GOOD: dict[str, Any] = {
    "schema": 1,
    "name": "toy",
    "supernet": "toynet",
    "device": "none",
    "source": "modelled",
    "provenance": "made up",
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-23",
    "batch_sizes": [1, 2, 8],
    "subnets": [
        {
            "name": "small",
            "control": {"d": [1, 1]},
            "accuracy": 70,
            "gflops": 1.5,
            "latency_ms": [1.0, 1.5, 4.0],
            "latency_ms_p99": [1.1, 1.6, 4.4],
        },
        {
            "name": "large",
            "control": None,
            "accuracy": 80.0,
            "gflops": None,
            "latency_ms": [2.0, 3.0, 9.0],
            "latency_ms_p99": [2.0, 3.2, 9.9],
        },
    ],
}


def good() -> dict[str, Any]:
    """Return a profile file's content that a test may spoil."""
    return copy.deepcopy(GOOD)


def test_shipped_profiles_load_by_name_and_by_path(tmp_path: Path) -> None:
    """A shipped profile is found by its name, and any file by its path as a string or a Path."""
    assert "cnn-8gpu-modelled" in shipped_profiles()
    for name in shipped_profiles():
        profile = load_profile(name)
        assert profile.name == name
        path = tmp_path / "copy"  # no suffix needed
        path.write_bytes(profile.to_json())
        assert load_profile(path) == load_profile(str(path)) == profile


def test_a_batch_size_between_two_profiled_ones_costs_the_next() -> None:
    """Batches are padded: 3 images cost as much as 4, and 9 as much as 16."""
    assert [CNN.padded(size) for size in (1, 2, 3, 4, 5, 8, 9, 16)] == [1, 2, 4, 4, 8, 8, 16, 16]
    assert CNN.latency_ns(0, 3) == CNN.latency_ns(0, 4) == 2_598_000
    assert CNN.latency_p99_ns(1, 9) == CNN.latency_p99_ns(1, 16) == 12_360_000


@pytest.mark.parametrize("size", [-1, 0, 17])
def test_a_batch_size_outside_the_profile_is_refused(size: int) -> None:
    """Neither an empty batch nor one above the largest profiled has a latency."""
    look_ups: tuple[Callable[[], object], ...] = (
        lambda: CNN.latency_ns(0, size),
        lambda: CNN.latency_p99_ns(0, size),
        lambda: CNN.padded(size),
        lambda: CNN.most_accurate(size, 10**9),
    )
    for look_up in look_ups:
        with pytest.raises(ProfileError, match=f"batch_size: expected 1 to 16, got {size}"):
            look_up()


def test_a_profile_below_its_smallest_batch_size_pads_up() -> None:
    """A profile that starts at 4 runs one query at the cost of 4."""
    data = good() | {"batch_sizes": [4, 6, 8]}
    profile = Profile.from_dict(data)
    assert (profile.padded(1), profile.latency_ns(1, 1), profile.max_batch_size) == (4, 2_000_000, 8)


def test_rows_are_found_by_name() -> None:
    """A subnet's name gives its row; an unknown one is answered with the nearest."""
    assert [CNN.row(subnet.name) for subnet in CNN.subnets] == list(range(CNN.n_subnets))
    with pytest.raises(ProfileError, match=r"no subnet is called 'cnn-78.2'; did you mean 'cnn-78.25'\?"):
        CNN.row("cnn-78.2")
    with pytest.raises(ProfileError, match=r"no subnet is called 'zzz'$"):
        CNN.row("zzz")


@pytest.mark.parametrize(
    ("min_accuracy", "row"),
    [(0.0, 0), (73.82, 0), (73.83, 1), (78.0, 3), (80.16, 5), (80.17, None), (math.inf, None)],
)
def test_a_floor_is_the_smallest_row_that_is_accurate_enough(min_accuracy: float, row: int | None) -> None:
    """An accuracy between two rows rounds up; one above all has no row."""
    assert CNN.floor_row(min_accuracy) == row


@given(budget_ns=st.integers(-1, 40_000_000), row=st.integers(0, 5), size=st.integers(1, 16))
def test_what_fits_a_budget_is_the_largest_that_does(budget_ns: int, row: int, size: int) -> None:
    """largest_batch and most_accurate agree with trying everything."""
    sizes = [batch for batch in CNN.batch_sizes if CNN.latency_p99_ns(row, batch) <= budget_ns]
    rows = [subnet for subnet in range(6) if CNN.latency_p99_ns(subnet, size) <= budget_ns]
    assert CNN.largest_batch(row, budget_ns) == max(sizes, default=None)
    assert CNN.most_accurate(size, budget_ns) == max(rows, default=None)


@given(row=st.integers(0, 5), size=st.integers(1, 15))
def test_latency_grows_with_batch_size_and_accuracy(row: int, size: int) -> None:
    """P1 and P2 of the paper hold for each look-up."""
    for look_up in (CNN.latency_ns, CNN.latency_p99_ns):
        assert look_up(row, size) <= look_up(row, size + 1)
        assert look_up(max(0, row - 1), size) <= look_up(row, size)


@given(latencies_ns=st.lists(st.integers(1, 10**14), min_size=3, max_size=3))
def test_a_file_keeps_every_nanosecond(latencies_ns: list[int]) -> None:
    """Milliseconds in the file are nanoseconds in memory, exactly."""
    latencies = tuple(sorted(latencies_ns))
    row = SubnetProfile("s", {"d": [2]}, 50.0, 1.25, latencies, latencies)
    profile = Profile("p", "n", "d", "measured", "", {"torch": "2"}, "2026-01-02", (1, 2, 3), (row,))
    assert Profile.from_dict(orjson.loads(profile.to_json())) == profile


def test_raw_figures_are_allowed_and_not_kept() -> None:
    """A measured profile may keep its raw figures in the file, whole or by subnet."""
    data = good() | {"raw": [1, 2, 3]}
    data["subnets"][0]["raw"] = {"latency_ms": [[1.0, 1.1]]}
    assert Profile.from_dict(data) == Profile.from_dict(GOOD)


def test_one_subnet_and_one_batch_size_are_a_profile() -> None:
    """The smallest profile has one figure."""
    data = good() | {"batch_sizes": [1]}
    data["subnets"] = [GOOD["subnets"][0] | {"latency_ms": [1], "latency_ms_p99": [1]}]
    assert Profile.from_dict(data).latency_ns(0, 1) == 1_000_000


def test_a_tie_at_some_batch_sizes_is_still_pareto() -> None:
    """A more accurate subnet may be as fast where launches dominate, but not at every size."""
    data = good()
    data["subnets"][1]["latency_ms"][:2] = data["subnets"][0]["latency_ms"][:2]
    Profile.from_dict(data)
    data["subnets"][1]["latency_ms"] = data["subnets"][0]["latency_ms"]
    with pytest.raises(ProfileError, match="subnet 'large': latency_ms: expected longer than the less accur"):
        Profile.from_dict(data)


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets the entry at `path`, keys and indices joined by dots."""

    def spoil(data: Any) -> None:
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        for key in parents:
            data = data[key]
        data[last] = value

    return spoil


def drop(path: str) -> Callable[[dict[str, Any]], None]:
    """Return what deletes the key at `path`."""

    def spoil(data: Any) -> None:
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        for key in parents:
            data = data[key]
        del data[last]

    return spoil


SPOILT: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("schema", 2), "schema: expected 1, got 2"),
    (put("schema", True), "schema: expected 1, got True"),
    (drop("device"), "device: expected text, got nothing"),
    (put("devise", "x"), "unknown key 'devise'; did you mean 'device'?"),
    (drop("subnets.1.gflops"), "subnets[1]: gflops: expected a number, got nothing"),
    (put("subnets.0.acuracy", 1), "subnets[0]: unknown key 'acuracy'; did you mean 'accuracy'?"),
    (put("name", 3), "name: expected text, got 3"),
    (put("name", ""), "name: expected a name, got ''"),
    (put("source", "guessed"), "source: expected 'measured' or 'modelled', got 'guessed'"),
    (put("source", None), "source: expected 'measured' or 'modelled', got None"),
    (put("versions", []), "versions: expected an object, got []"),
    (put("versions.torch", 2), "versions: torch: expected text, got 2"),
    (put("date", "last week"), "date: expected an ISO date such as 2026-11-23, got 'last week'"),
    (put("batch_sizes", 4), "batch_sizes: expected a list, got 4"),
    (put("batch_sizes", []), "batch_sizes: expected ascending sizes from 1 to 65536, got []"),
    (put("batch_sizes.0", 0), "batch_sizes: expected ascending sizes from 1 to 65536, got [0, 2, 8]"),
    (put("batch_sizes.1", 8), "batch_sizes: expected ascending sizes from 1 to 65536, got [1, 8, 8]"),
    (put("batch_sizes.2", MAX_BATCH_SIZE + 1), "batch_sizes: expected ascending sizes from 1 to 65536"),
    (put("batch_sizes.1", 2.0), "batch_sizes[1]: expected an integer, got 2.0"),
    (put("batch_sizes.0", True), "batch_sizes[0]: expected an integer, got True"),
    (put("subnets", {}), "subnets: expected a list, got {}"),
    (put("subnets", []), "subnets: expected at least one"),
    (put("subnets.0", "small"), "subnets[0]: expected an object, got 'small'"),
    (put("subnets.0.name", None), "subnets[0]: name: expected text, got None"),
    (put("subnets.0.name", ""), "subnet '': name: expected a name"),
    (put("subnets.1.name", "small"), "'small': name: expected a unique name, got that of rows 0 and 1"),
    (put("subnets.0.control", [1]), "subnets[0]: control: expected an object, got [1]"),
    (put("subnets.0.accuracy", "70"), "subnets[0]: accuracy: expected a number, got '70'"),
    (put("subnets.0.accuracy", True), "subnets[0]: accuracy: expected a number, got True"),
    (put("subnets.0.accuracy", -1), "'small': accuracy: expected a percentage from 0 to 100, got -1"),
    (put("subnets.1.accuracy", 101), "'large': accuracy: expected a percentage from 0 to 100, got 101"),
    (put("subnets.1.accuracy", math.nan), "'large': accuracy: expected a percentage from 0 to 100, got nan"),
    (put("subnets.1.accuracy", 70), "'large': accuracy: expected more than 70, that of 'small' before it"),
    (put("subnets.0.gflops", -1), "'small': gflops: expected a number of at least 0, got -1"),
    (put("subnets.0.gflops", "1"), "subnets[0]: gflops: expected a number, got '1'"),
    (put("subnets.0.latency_ms", 1.0), "subnets[0]: latency_ms: expected a list, got 1.0"),
    (
        put("subnets.0.latency_ms", [1.0]),
        "'small': latency_ms: expected 3 latencies, one per batch size, got 1",
    ),
    (put("subnets.0.latency_ms_p99", [9.0] * 4), "'small': latency_ms_p99: expected 3 latencies"),
    (put("subnets.0.latency_ms.1", "2"), "subnets[0]: latency_ms[1]: expected a number, got '2'"),
    (put("subnets.0.latency_ms.1", 0), "'small': latency_ms: expected milliseconds above 0 and below"),
    (put("subnets.0.latency_ms.1", -1.0), "'small': latency_ms: expected milliseconds above 0 and below"),
    (put("subnets.0.latency_ms.1", math.nan), "'small': latency_ms: expected milliseconds above 0 and below"),
    (put("subnets.0.latency_ms.2", math.inf), "'small': latency_ms: expected milliseconds above 0 and below"),
    (put("subnets.0.latency_ms.2", 10**400), "'small': latency_ms: expected milliseconds above 0 and below"),
    (put("subnets.0.latency_ms.0", 1e-9), "'small': latency_ms: at batch size 1 expected at least 1e-06 ms"),
    (
        put("subnets.0.latency_ms.1", 0.9),
        "'small': latency_ms: at batch size 2 expected at least 1 ms, got 0.9 ms: latencies are positive and",
    ),
    (
        put("subnets.0.latency_ms_p99.2", 1.5),
        "'small': latency_ms_p99: at batch size 8 expected at least 1.6 ms",
    ),
    (
        put("subnets.1.latency_ms_p99.1", 2.5),
        "'large': latency_ms_p99: at batch size 2 expected at least the median 3 ms, got 2.5 ms",
    ),
    (
        put("subnets.1.latency_ms.1", 1.4),
        "'large': latency_ms: at batch size 2 expected at least 2 ms, got 1.4 ms",
    ),
    (
        put("subnets.1.latency_ms.0", 0.9),
        (
            "'large': latency_ms: at batch size 1 expected at least 1 ms, that of the less accurate 'small' "
            "(pareto), got 0.9 ms"
        ),
    ),
    (
        put("subnets.0.latency_ms_p99.0", 1.6 + 0.5),
        "'small': latency_ms_p99: at batch size 2 expected at least 2.1 ms, got 1.6 ms",
    ),
    (
        put("subnets.0.latency_ms_p99.2", 10.0),
        "'large': latency_ms_p99: at batch size 8 expected at least 10 ms, that of the less accurate 'small'",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[message[:60] for _, message in SPOILT])
def test_a_malformed_profile_is_refused_in_one_line(
    spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    """The message names the file, the subnet, the field and what was expected."""
    data = good()
    spoil(data)
    with pytest.raises(ProfileError) as refusal:
        Profile.from_dict(data, where="toy.json")
    assert str(refusal.value).startswith("toy.json: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_profile_built_in_code_is_checked_too() -> None:
    """No unsound Profile exists, whoever makes it."""
    row = SubnetProfile("s", None, 50.0, None, (2, 1), (2, 2))
    with pytest.raises(ProfileError, match="subnet 's': latency_ms: at batch size 2"):
        Profile("p", "n", "d", "modelled", "", {}, "2026-01-02", (1, 2), (row,))
    sound = SubnetProfile("s", None, 50.0, None, (1, 2), (2, 2))
    with pytest.raises(ProfileError, match="source: expected 'measured' or 'modelled', got 'x'"):
        Profile("p", "n", "d", "x", "", {}, "2026-01-02", (1, 2), (sound,))  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("data", [None, [], "profile", 3])
def test_only_an_object_is_a_profile(data: object) -> None:
    """A file whose JSON is not an object is refused."""
    with pytest.raises(ProfileError, match=r"^x\.json: expected an object, got "):
        Profile.from_dict(data, where="x.json")


def test_a_missing_profile_is_answered_with_the_shipped_ones(tmp_path: Path) -> None:
    """A slip in a shipped name gets the nearest; an unreadable path says why."""
    with pytest.raises(ProfileError, match=r"did you mean 'cnn-8gpu-modelled'\?"):
        load_profile("cnn-8gpu-modeled")
    with pytest.raises(ConfigError, match="Is a directory: expected a file or a shipped profile"):
        load_profile(tmp_path)


def test_a_file_that_is_not_json_is_refused_with_the_place(tmp_path: Path) -> None:
    """The message names the file, the line and the column."""
    path = tmp_path / "broken.json"
    path.write_text('{"schema": 1,\n "name": }')
    with pytest.raises(ProfileError, match=r"broken\.json: expected JSON: .* line 2 column 10"):
        load_profile(path)


@pytest.mark.parametrize(("n", "most"), [(1, 32), (32, 32), (33, 32), (1000, 32), (7, 3), (32, 6)])
def test_evenly_spread_rows_include_both_ends(n: int, most: int) -> None:
    """As many as allowed, ascending, both ends among them, with gaps that differ by one at most."""
    rows = evenly(n, most)
    gaps = {after - before for before, after in itertools.pairwise(rows)}

    assert len(rows) == min(n, most)
    assert (rows[0], rows[-1]) == (0, n - 1)
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
