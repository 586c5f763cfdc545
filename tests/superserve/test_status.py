"""STATUS: read once, named where it is wrong, and the one place that says whether a worker is well."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.workers import PeerState, WorkerState
from superserve import status as statuses
from superserve.errors import WireError
from superserve.hello import ModelSpec
from superserve.status import (
    BatchCounts,
    EndCounts,
    GpusNeeded,
    GpuStatus,
    ListedKeys,
    QueryCounts,
    QueueStatus,
    Recent,
    RecentWindow,
    RouterInfo,
    RouterStatus,
    is_well,
)
from superserve.subnet import TensorSpec
from superserve.wire import Control, Kind, Status, decode, encode
from tests.superserve.statuses import gpu, status

RECORDED: list[dict[str, Any]] = [
    each["body"]
    for each in json.loads(
        (Path(__file__).parent.parent / "cluster" / "show" / "recorded_status.json").read_text(
            encoding="utf-8"
        )
    )
]

SIZES = st.integers(0, 2**53)
TIMES = st.floats(0, 1e12)
TEXT = st.text(max_size=20)
ENDS = st.builds(EndCounts, *[SIZES] * len(Status))
SPECS = st.builds(
    TensorSpec,
    st.sampled_from(["float32", "uint8", "<i8"]),
    st.lists(st.integers(1, 512), max_size=4).map(tuple),
)
MODELS = st.builds(ModelSpec, st.none() | SPECS, st.none() | SPECS, TEXT)
WINDOWS = st.builds(RecentWindow, TIMES, SIZES, ENDS, TIMES, TIMES, SIZES)
NAMES = st.lists(TEXT, max_size=3).map(tuple)
GPUS = st.builds(
    GpuStatus,
    name=TEXT, slot=SIZES, state=TEXT, process=TEXT, history=NAMES, profile=TEXT, device=TEXT, credit=SIZES,
    outstanding=SIZES, free_in_ms=TIMES, transport_ms=TIMES, slowdown=TIMES, batches=SIZES, queries=SIZES,
    busy_s=TIMES, last_subnet=st.none() | TEXT, gauges=st.dictionaries(TEXT, st.none() | SIZES | TIMES),
    host=TEXT, version=TEXT,
)  # fmt: skip
STATUSES = st.builds(
    RouterStatus,
    router=st.builds(
        RouterInfo, draining=st.booleans(), pid=SIZES, host=TEXT, version=TEXT, epoch=SIZES, policy=TEXT,
        client_endpoint=TEXT, worker_endpoint=TEXT, cpu_s=TIMES, loop_s=TIMES,
    ),
    queries=st.builds(QueryCounts, SIZES, SIZES, ENDS, SIZES, TIMES, SIZES, TIMES, SIZES, SIZES),
    queue=st.builds(QueueStatus, SIZES, st.none() | TIMES, SIZES),
    batches=st.builds(BatchCounts, SIZES, SIZES, SIZES),
    lost_processes=SIZES, model=st.none() | MODELS, clients=SIZES, counts=st.dictionaries(TEXT, SIZES),
    recent=st.builds(Recent, WINDOWS, WINDOWS), workers_ready=SIZES,
    workers_needed=st.builds(GpusNeeded, TIMES, TIMES),
    workers=st.lists(GPUS, max_size=4).map(tuple),
    keys=st.none() | st.builds(ListedKeys, NAMES, NAMES, NAMES),
)  # fmt: skip


# --- reading and writing ------------------------------------------------------------------


@given(sent=STATUSES)
def test_what_is_sent_is_what_is_read(sent: RouterStatus) -> None:
    """Over the wire and back: every field, whatever it holds."""
    message = decode(encode(Control(Kind.STATUS, sent.body())))

    assert isinstance(message, Control)
    assert RouterStatus.from_body(message.body) == sent


@pytest.mark.parametrize("body", RECORDED)
def test_a_recorded_status_reads_and_is_written_as_it_was(body: dict[str, Any]) -> None:
    """By a router that said no version yet: what was not said has its default, the rest is as it was."""
    read = RouterStatus.from_body(body)
    written = orjson.loads(orjson.dumps(read.body()))
    for part in (written["router"], *written["workers"]):
        assert part.pop("version") == ""
    assert written["router"].pop("build") == ""
    unsaid = {"max_queries": 0, "max_bytes": 0, "margin_ms": None, "settings_error": ""}
    assert {name: written["router"].pop(name) for name in unsaid} == unsaid

    assert json.dumps(written) == json.dumps(body), "the same keys in the same order"


def test_what_a_newer_router_says_is_ignored() -> None:
    """Keys that are not known, at any depth."""
    body = deepcopy(RECORDED[0])
    body["moon"] = body["router"]["moon"] = body["workers"][0]["moon"] = {"phase": 1}
    body["queries"]["answered"]["eaten"] = 3

    assert RouterStatus.from_body(body) == RouterStatus.from_body(RECORDED[0])


REQUIRED = [
    "router", "router.pid", "router.draining", "router.cpu_s", "queries", "queries.received",
    "queries.answered", "queue.head_slack_ms", "batches.stale", "lost_processes", "model", "clients",
    "counts", "recent", "recent.10s", "recent.60s", "recent.10s.seconds", "workers_ready",
    "workers_needed.at_least", "workers", "workers[1].slot", "workers[1].state", "workers[1].gauges",
]  # fmt: skip


def changed(path: str, value: object = ...) -> dict[str, Any]:
    """Return a recorded STATUS with the field at `path` set to `value`, or without it."""
    body = deepcopy(RECORDED[0])
    *way, last = path.split(".")
    part = body
    for key in way:
        name, _, index = key.partition("[")
        part = part[name] if not index else part[name][int(index[:-1])]
    name, _, index = last.partition("[")
    if index:
        part[name][int(index[:-1])] = value
    elif value is ...:
        del part[name]
    else:
        part[name] = value
    return body


@pytest.mark.parametrize("path", REQUIRED)
def test_a_field_that_is_missing_is_named(path: str) -> None:
    """With its whole way."""
    with pytest.raises(WireError) as caught:
        RouterStatus.from_body(changed(path))

    assert str(caught.value).startswith(f"status: {path.replace('.', ': ')}: expected ")
    assert str(caught.value).endswith(", got nothing")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("router", 7, "router: expected an object, got 7"),
        ("router.pid", "7", "router: pid: expected an integer, got '7'"),
        ("router.pid", True, "router: pid: expected an integer, got True"),
        ("router.pid", 1.5, "router: pid: expected an integer, got 1.5"),
        ("router.draining", 0, "router: draining: expected true or false, got 0"),
        ("router.cpu_s", None, "router: cpu_s: expected a number, got None"),
        ("router.policy", None, "router: policy: expected text, got None"),
        ("queries.answered.ok", "many", "queries: answered: ok: expected an integer, got 'many'"),
        ("counts", [1], "counts: expected an object, got [1]"),
        ("counts.loops", 1.5, "counts: loops: expected an integer, got 1.5"),
        ("model.input", {"dtype": "float32"}, "model: input: expected a dtype and a shape, got "),
        ("model.input", {"dtype": "?", "shape": [0]}, "model: input: expected a dtype and a shape, got "),
        ("recent.60s.busy_s", "x", "recent: 60s: busy_s: expected a number, got 'x'"),
        ("workers", {}, "workers: expected a list, got {}"),
        ("workers[2]", "w", "workers[2]: expected an object, got 'w'"),
        ("workers[2].history", [1], "workers[2]: history[0]: expected text, got 1"),
        ("workers[2].gauges", {"a": "b"}, "workers[2]: gauges: a: expected a number, got 'b'"),
        ("keys", {"clients": []}, "keys: workers: expected a list, got nothing"),
    ],
)
def test_a_field_of_another_type_is_named(path: str, value: object, words: str) -> None:
    """With what was expected, and with what came."""
    with pytest.raises(WireError) as caught:
        RouterStatus.from_body(changed(path, value))

    assert str(caught.value).startswith(f"status: {words}")


@given(path=st.sampled_from(REQUIRED), value=st.none() | st.booleans() | SIZES | TEXT | st.lists(SIZES))
def test_nothing_but_a_wire_error_comes_of_a_wrong_value(path: str, value: object) -> None:
    """Whatever a peer sends, the caller gets a value or an error that names the fault."""
    said = complaint(changed(path, value))

    assert said is None or said.startswith(f"status: {path.replace('.', ': ')}")


def complaint(body: dict[str, Any]) -> str | None:
    """Return what is wrong with a STATUS; None if it can be read."""
    try:
        RouterStatus.from_body(body)
    except WireError as error:
        return str(error)
    return None


def test_a_long_wrong_value_is_cut() -> None:
    """An error fits on a screen whatever a peer says."""
    with pytest.raises(WireError) as caught:
        RouterStatus.from_body(changed("router", "x" * 10_000))

    assert len(str(caught.value)) < 300


def test_ends_are_those_of_the_wire() -> None:
    """The same names in the same order: counts by `Status` are laid out by position."""
    assert [name for name, _ in EndCounts().items()] == [one.name.lower() for one in Status]


def test_ends_are_summed_and_subtracted() -> None:
    """What was cancelled is no part of those who wanted an answer."""
    now, then = EndCounts(ok=7, late=2, cancelled=3), EndCounts(ok=4, cancelled=3)

    assert (now.total, now.wanted) == (12, 9)
    assert now.since(then) == EndCounts(ok=3, late=2)


# --- is this worker well? -----------------------------------------------------------------


WELL = {(PeerState.LIVE, WorkerState.READY)}


@pytest.mark.parametrize("process", PeerState)
@pytest.mark.parametrize("state", WorkerState)
def test_a_gpu_is_well_only_if_its_process_is_heard_and_it_answers_in_time(
    process: PeerState, state: WorkerState
) -> None:
    """Every pair of the core's two tables; one of them is well."""
    one = gpu(process=process.value, state=state.value)

    assert one.is_well == is_well(process.value, state.value) == ((process, state) in WELL)


@pytest.mark.parametrize(
    ("process", "state", "word"),
    [
        ("live", "ready", "ready"),
        ("live", "overrun", "overrun"),
        ("live", "draining", "draining"),
        ("suspect", "ready", "suspect"),
        ("suspect", "draining", "suspect"),
        ("dead", "gone", "dead"),
    ],
)
def test_the_condition_is_what_is_wrong_first(process: str, state: str, word: str) -> None:
    """A silent process matters more than the last state of its GPU."""
    assert gpu(process=process, state=state).condition == word


def test_a_process_is_well_if_all_its_gpus_are() -> None:
    """One GPU that drains is one too many; a process without any is not there."""
    gpus = [
        gpu("a"),
        gpu("a", slot=1),
        gpu("b"),
        gpu("b", slot=1, state="draining"),
        gpu("c", process="dead"),
    ]
    found = status(*gpus)

    assert found.well() == {"a"}
    assert {name: len(of) for name, of in found.processes().items()} == {"a": 2, "b": 2, "c": 1}
    assert replace(found, workers=()).well() == set()


def test_no_other_module_knows_which_states_are_well() -> None:
    """A module that spelled them out again would decide for itself."""
    root = Path(statuses.__file__).parent.parent
    folders = ("superserve", "router/report", "router/serve", "cluster", "loadgen")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = {
        path.name
        for path in paths
        if '"live"' in (text := path.read_text(encoding="utf-8")) and '"ready"' in text
    }

    assert found == {"status.py"}
