"""Exits are ranked against full depth or given scores; the list that is written is what is measured next."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from profiles.measuring.commands import exits_command, measure_command
from profiles.measuring.exits import spearman
from profiles.table import load_profile
from superserve.errors import ConfigError
from tests.gpu_worker.models.encoders.folders import (
    LENGTH,
    N_BLOCKS,
    classifier,
    hidden_states,
    pairs_of,
    pooled,
    saved_encoder,
    token_ids,
)
from tests.profiles.measuring.test_commands import run

if TYPE_CHECKING:
    from pathlib import Path

N_PAIRS = 40
ENCODER, RERANKER = f"bert-encoder@length={LENGTH}", f"bert-reranker@length={LENGTH}"
DEPTHS = [f"depth-{depth}" for depth in range(1, N_BLOCKS + 1)]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_the_rank_correlation_is_scipys(points: list[tuple[int, int]]) -> None:
    """With ties; what is constant has no order and is refused."""
    one, other = map(list, zip(*points, strict=True))
    if len(set(one)) == 1 or len(set(other)) == 1:
        with pytest.raises(ConfigError, match="scores: expected finite numbers that are not all equal"):
            spearman(one, other)
    else:
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def texts() -> dict[str, Any]:
    """Return pairs of texts."""
    return {"first": token_ids(N_PAIRS, seed=1), "second": token_ids(N_PAIRS, seed=2)[::-1].copy()}


def ranked(folder: Path, supernet: str, arrays: dict[str, Any], *options: object) -> tuple[list[str], Any]:
    """Rank a folder's exits on arrays; return the lines printed and the list that was written."""
    pairs, out = folder / "pairs.npz", folder / "made" / "subnets.json"
    np.savez(pairs, **arrays)
    result = run(
        exits_command, "--supernet", supernet, "--weights", folder, "--pairs", pairs, "--out", out, *options
    )
    assert result.exit_code == 0, result.output
    return result.output.splitlines(), json.loads(out.read_bytes())


def similarities(model: Any, arrays: dict[str, Any]) -> list[Any]:
    """Return the pairs' cosines at each exit, by Hugging Face's hidden states."""
    sides = [hidden_states(model, arrays[name])[1:] for name in ("first", "second")]
    return [
        torch.cosine_similarity(pooled(one, arrays["first"]), pooled(other, arrays["second"])).numpy()
        for one, other in zip(*sides, strict=True)
    ]


def test_an_encoders_exits_are_ranked_against_full_depth(tmp_path: Path) -> None:
    """By the cosines of its pairs; an exit that is no better than a shallower one is left out."""
    model, arrays = saved_encoder(tmp_path, normalises=False), texts()
    lines, rows = ranked(tmp_path, ENCODER, arrays)
    cosines = similarities(model, arrays)
    expected = [max(0.0, 100 * spearmanr(one, cosines[-1]).statistic) for one in cosines]

    printed = [line.split()[:2] for line in lines[:N_BLOCKS]]
    assert [name for name, _ in printed] == DEPTHS
    assert [float(percent) for _, percent in printed] == pytest.approx(expected, abs=0.006)
    kept = [d for d in range(N_BLOCKS) if expected[d] > max([-1.0, *expected[:d]])]
    assert [row["name"] for row in rows] == [DEPTHS[d] for d in kept]
    assert [row["control"] for row in rows] == [{"d": [d + 1]} for d in kept]
    assert all(("left out" in line) == (d not in kept) for d, line in enumerate(lines[:N_BLOCKS]))


def test_given_scores_are_what_counts(tmp_path: Path) -> None:
    """Those of the second exit make it the best, and deeper ones are left out."""
    model, arrays = saved_encoder(tmp_path), texts()
    scores = similarities(model, arrays)[1]
    lines, rows = ranked(tmp_path, ENCODER, {**arrays, "scores": scores})

    assert lines[1].split()[:2] == ["depth-2", "100.00"]
    assert rows[-1] == {"name": "depth-2", "control": {"d": [2]}, "accuracy": 100.0}
    assert all("left out: a shallower exit ranks as well" in line for line in lines[2:N_BLOCKS])


def test_a_rerankers_exits_are_ranked_by_their_scores(tmp_path: Path) -> None:
    """By the logits of its inputs; what is written is measured as it stands, for the longest queries."""
    model = classifier()
    model.save_pretrained(tmp_path)
    inputs = pairs_of(token_ids(N_PAIRS, seed=4))
    lines, rows = ranked(tmp_path, RERANKER, {"inputs": inputs})
    with torch.no_grad():
        hidden = hidden_states(model.bert, inputs[:, 0], inputs[:, 1])[1:]
        scores = [model.classifier(model.bert.pooler(one))[:, 0].numpy() for one in hidden]
    expected = [max(0.0, 100 * spearmanr(one, scores[-1]).statistic) for one in scores]
    assert [float(line.split()[1]) for line in lines[:N_BLOCKS]] == pytest.approx(expected, abs=0.006)

    (tmp_path / "rows.json").write_text(json.dumps([rows[0], rows[-1]]))
    result = run(
        measure_command, "--supernet", RERANKER, "--weights", tmp_path, "--subnets", tmp_path / "rows.json",
        "--batch-sizes", "1,2", "--repeats", 5, "--out", tmp_path / "profile.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    profile = load_profile(tmp_path / "profile.json")
    assert (profile.supernet, profile.subnets[-1].accuracy) == (RERANKER, 100.0)
    assert f"Latencies are of queries of {LENGTH} tokens, the longest." in profile.provenance


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"second": None}, "expected the arrays first and second, or inputs, and perhaps scores, got first"),
        ({"labels": np.zeros(N_PAIRS)}, "expected the arrays .*, got first, second, labels"),
        ({"second": token_ids(N_PAIRS - 1)}, r"second: expected 40 rows, got shape \(39, 48\)"),
        ({"second": token_ids(N_PAIRS, 20)}, r"second: expected shape \(48,\), got \(20,\)"),
        ({"first": np.zeros((N_PAIRS, LENGTH))}, "first: expected dtype int32, got float64"),
        ({"scores": np.zeros((N_PAIRS, 2))}, r"scores: expected numbers, got float64 of shape \(40, 2\)"),
        ({"scores": np.zeros(N_PAIRS)}, "scores: expected finite numbers that are not all equal"),
    ],
)
def test_what_is_wrong_with_pairs_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """The file, the array, and what was expected."""
    saved_encoder(tmp_path)
    arrays = {name: array for name, array in {**texts(), **changed}.items() if array is not None}
    np.savez(tmp_path / "pairs.npz", **arrays)
    result = run(
        exits_command, "--supernet", ENCODER, "--weights", tmp_path, "--pairs", tmp_path / "pairs.npz",
        "--out", tmp_path / "out.json",
    )  # fmt: skip

    assert result.exit_code == 1
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(ConfigError, match=rf"pairs\.npz: {message}"):
        raise ConfigError(result.output)


def test_a_supernet_that_chooses_more_than_depth_has_no_exits(tmp_path: Path) -> None:
    """The error names its keys."""
    np.savez(tmp_path / "pairs.npz", **texts())
    result = run(
        exits_command,
        "--supernet",
        "digits",
        "--pairs",
        tmp_path / "pairs.npz",
        "--out",
        tmp_path / "out.json",
    )

    assert result.exit_code == 1
    assert "supernet digits: expected one that chooses one depth, got the keys d, w" in result.output
