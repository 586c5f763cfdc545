"""Judgements: fresh seeds, every verdict listed, and a page of them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from loadgen.study.gate.judgements import (
    Judgement,
    append_judgement,
    commit_of,
    fresh_seeds,
    parse_seeds,
    read_judgements,
    tuning_seeds,
)
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

BAD = Judgement("2026-11-29T12:00:00+00:00", "abc", "mine", "demandfit", (21, 22), 3, 1, False,
                {"one": ["a -0.1 (slackfit)", "c -0.5 (mincost)"]})  # fmt: skip
GOOD = replace(BAD, seeds=(23, 24), holds=True, fails={})


def test_every_judgement_is_listed(tmp_path: Path) -> None:
    """Each is appended, failed ones too, and reads back; the page has a row for each and what failed."""
    path = tmp_path / "judgements.json"

    for one in (BAD, GOOD):
        page = append_judgement(path, one)

    assert read_judgements(path) == [BAD, GOOD]
    lines = page.read_text().splitlines()
    assert page == tmp_path / "judgements.md"
    assert (
        "| 1 | 2026-11-29T12:00:00+00:00 | abc | `mine` | `demandfit` | 21 to 22 | 3 | 1 | fails in 1 |"
        in lines
    )
    assert any(line.startswith("| 2 ") and line.endswith("| 23 to 24 | 3 | 1 | holds |") for line in lines)
    assert lines[-1] == "| one | a -0.1 (slackfit); c -0.5 (mincost) |"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected a list of judgements"),
        ("{}", "expected a list of judgements"),
        ("[3]", "expected a list of judgements, each with baseline, commit"),
        ('[{"date": 1}]', "expected a list of judgements, each with baseline, commit"),
    ],
)
def test_a_list_that_is_none_is_refused_and_left(tmp_path: Path, text: str, said: str) -> None:
    """Nothing is appended to what cannot be read."""
    path = tmp_path / "judgements.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=said):
        append_judgement(path, GOOD)
    assert path.read_text() == text


def test_a_judgement_takes_the_next_fresh_seeds() -> None:
    """From 21 on, after those that the list has used, whatever policy that was."""
    assert fresh_seeds(None, []) == (21, 22, 23, 24, 25)
    assert fresh_seeds(None, [BAD]) == (23, 24, 25, 26, 27)
    assert fresh_seeds("40:2", [BAD]) == (40, 41)
    assert tuning_seeds(None) == (1, 2, 3, 4, 5)
    assert tuning_seeds("20:1") == (20,)


@pytest.mark.parametrize("text", ["20:5", "1:5"])
def test_seeds_for_tuning_judge_nothing(text: str) -> None:
    """Below 21 a policy may have been fitted to them."""
    with pytest.raises(ConfigError, match=f"expected seeds from 21 on for a judgement, got {text}"):
        fresh_seeds(text, [])


def test_seeds_are_used_once() -> None:
    """One of an earlier judgement is enough."""
    with pytest.raises(
        ConfigError, match="an earlier judgement has used 22: expected fresh ones, from 23 on"
    ):
        fresh_seeds("22:5", [BAD])


def test_seeds_for_judgements_are_not_looked_at() -> None:
    """Without a judgement they stay unseen."""
    with pytest.raises(ConfigError, match="expected seeds from 1 to 20 without --judgement, got 17:5"):
        tuning_seeds("17:5")


@pytest.mark.parametrize("text", ["", "5", "0:5", "1:0", "1:", ":5", "a:5", "1:1001", "-1:5"])
def test_malformed_seeds_are_refused(text: str) -> None:
    """The message says what was expected."""
    with pytest.raises(ConfigError, match=f"--seeds: expected FIRST:N, .* got '{text}'"):
        parse_seeds(text)


def test_the_commit_says_whether_files_differ(tmp_path: Path) -> None:
    """A plus stands for changes; a folder without history has no commit."""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    assert commit_of(tmp_path) == ""
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = commit_of(tmp_path)
    (tmp_path / "file").write_text("two")

    assert len(clean) == 12
    assert commit_of(tmp_path) == f"{clean}+"
