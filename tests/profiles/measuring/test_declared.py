"""Subnets whose accuracy a user states are measured without a search."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from profiles.cli import cli
from profiles.measuring.declared import subnets_of
from profiles.table import load_profile
from superserve.errors import ProfileError
from tests.clock import ProcessorClock

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"name": "small", "control": {"d": [1, 1, 1], "w": [0.125, 0.125, 0.125]}, "accuracy": 70}
WHOLE = {"name": "whole", "control": {"d": [2, 2, 2], "w": [1.0, 1.0, 1.0]}, "accuracy": 95.5}


def written(folder: Path, data: object) -> str:
    """Write a list of subnets; return its path."""
    path = folder / "mine.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_a_list_of_subnets_becomes_a_measured_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order; its rows are those stated, and the provenance names the file."""
    # By the real clock a small subnet that waits for other work is slower than the whole, and has no row.
    monkeypatch.setattr("profiles.measuring.commands.MonotonicClock", ProcessorClock)
    out = tmp_path / "here.json"
    arguments = ["measure", "--batch-sizes", "1,2", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(cli, [*arguments, "--subnets", written(tmp_path, [WHOLE, SMALL])])

    assert result.exit_code == 0, result.output
    profile = load_profile(out)
    assert [
        {"name": row.name, "control": row.control, "accuracy": row.accuracy} for row in profile.subnets
    ] == [SMALL, WHOLE]
    assert (profile.supernet, profile.source) == ("digits", "measured")
    assert "Accuracies are those that mine.json states." in profile.provenance
    assert profile.subnets[0].latency_ns[0] > 1_000


def test_a_profile_is_still_a_profile(tmp_path: Path) -> None:
    """By a shipped name, or as a file, which is not taken for a list."""
    shipped = load_profile("digits-cpu")
    copy = tmp_path / "copy.json"
    copy.write_bytes(shipped.to_json())

    assert subnets_of("digits-cpu", "digits") == shipped
    assert subnets_of(str(copy), "digits") == shipped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**SMALL, "accuracy": "70"}], "subnet 0: accuracy: expected a number, got '70'"),
        ([SMALL, {"name": "whole"}], "subnet 1: expected an object with exactly name, control and accuracy"),
        ([SMALL, {**WHOLE, "accuracy": 70}], "'whole': accuracy: expected more than 70, that of 'small'"),
        ([SMALL, {**WHOLE, "name": "small"}], "'small'"),
        ([{**SMALL, "accuracy": 101}], "'small': accuracy: expected"),
        ([], "subnets: expected"),
    ],
)
def test_an_error_names_the_file_and_the_subnet(rows: list[Any], message: str, tmp_path: Path) -> None:
    """A list that no profile can be made of is refused before anything is measured."""
    path = written(tmp_path, rows)
    with pytest.raises(ProfileError) as caught:
        subnets_of(path, "digits")

    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_a_control_tuple_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """The supernet checks it, by subnet and entry."""
    wrong = {**WHOLE, "control": {"d": [2, 2, 3], "w": [1.0, 1.0, 1.0]}}
    path = written(tmp_path, [SMALL, wrong])
    out = tmp_path / "here.json"
    result = CliRunner().invoke(cli, ["measure", "--out", str(out), "--subnets", path])

    assert result.exit_code == 1
    assert "subnet whole: control d, stage 2: expected a whole number from 1 to 2, got 3" in result.output
