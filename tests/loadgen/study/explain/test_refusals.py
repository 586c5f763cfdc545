"""What `explain` says to a query that is not there, to a record that is cut or foreign, and to no router."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadgen.cli.questions.explain import cli
from loadgen.study.explain.flight import Flight
from tests.loadgen.study.explain.flown import LARGEST, fly, spike

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a record."""
    path = tmp_path_factory.mktemp("record") / "saved"
    fly(spike(60), gpus=2, policy=LARGEST).flight.save(path)
    return path


def refusal(*words: str) -> str:
    """Run the command, which refuses; return its one line."""
    done = CliRunner().invoke(cli, [*words, "--no-changes"])
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    (line,) = done.output.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("999999", r"query 999999: not among the \d+ of the record, which runs from 1:0 to 1:\d+"),
        ("7:3", r"query 7:3: not among the \d+ of the record"),
        ("1:2:3", r"'1:2:3': expected a query's id"),
        ("x", r"'x': expected a query's id"),
        (":", r"':': expected a query's id"),
        ("9" * 40, r"query 9+: not among the \d+ of the record"),
    ],
)
def test_a_query_that_is_not_there_is_named(saved: Path, query: str, says: str) -> None:
    """With what the record has, or what an id looks like."""
    assert re.search(says, refusal(str(saved), query))


def test_a_record_that_is_cut_anywhere_is_refused_or_whole_to_there(saved: Path, tmp_path: Path) -> None:
    """At each length: an entry that is torn is named by its place, and none is made up."""
    whole, cut = saved.read_bytes(), tmp_path / "cut"
    first = whole.index(b"\n") + 1
    n_refused = n_read = 0
    for n_bytes in [*range(0, first, 97), *range(first, len(whole), 211)]:
        cut.write_bytes(whole[:n_bytes])
        done = CliRunner().invoke(cli, [str(cut), "--no-changes"])
        if done.exit_code:
            n_refused += 1
            assert str(cut) in done.output
            assert len(done.output.strip().splitlines()) == 1, done.output
        else:
            n_read += 1
    assert n_refused > 20
    assert n_read >= 1


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b'{"flight":2}\n', "expected a flight record of schema 1, got 2"),
        (b'{"flight":1}\n', "expected a flight record's GPUs and profiles"),
        (b'{"flight":1,"policy":"x","gpus":[],"profiles":[],"profile_of":[]}\n\x09', "kind 1 to 4, got 9"),
        (b"\x00\x01\x02", "expected a line of JSON"),
        (b"", "expected an event log, got an empty file"),
        (b'{"schema":99}\n', "expected an event log of schema 2"),
    ],
)
def test_a_record_of_another_version_is_named(tmp_path: Path, head: bytes, says: str) -> None:
    """The file, and what was expected."""
    path = tmp_path / "foreign"
    path.write_bytes(head)
    line = refusal(str(path))

    assert str(path) in line
    assert says in line


def test_a_record_that_is_absent_and_a_router_that_is_gone_are_named(tmp_path: Path) -> None:
    """The path; the endpoint, and what to do."""
    assert "no-such-record: expected a router's event log or a saved record" in refusal(
        f"{tmp_path}/no-such-record"
    )
    assert "router.jsonl: expected a router's event log" in refusal(str(tmp_path))
    line = refusal("live", "--connect", "127.0.0.1:9")
    assert "no router answers at tcp://127.0.0.1:9: start one" in line
    assert "--connect: expected it with `live` as RUN" in refusal(str(tmp_path), "--connect", "127.0.0.1:9")


def test_an_empty_record_has_nothing_to_explain(tmp_path: Path) -> None:
    """None of 0 queries missed, and a named query is not in the record."""
    path = tmp_path / "empty"
    Flight("planfit", [], [], []).save(path)
    done = CliRunner().invoke(cli, [str(path)])

    assert done.exit_code == 0
    assert "None of 0 queries of the record missed." in done.output
    assert "query 1: the record has no query" in refusal(str(path), "1")
