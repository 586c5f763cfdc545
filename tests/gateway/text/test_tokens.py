"""Texts into rows: filled up, cut, in pairs, and what is no tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from gateway.text.tokens import Tokens
from superserve.errors import ConfigError
from tests.gateway.text.small import CLS, EMBEDDER, PAD, RANKER, SEP, UNK, A, B, C, tokenizer_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    """Return the small tokenizer."""
    one = Tokens(tokenizer_file(tmp_path))
    yield one
    one.close()


def test_texts_are_filled_up_and_cut(tokens: Tokens) -> None:
    """To the model's length, with its special tokens; only real tokens count."""
    found = tokens.texts(["a b", "a b c a b c", "x"], EMBEDDER)
    assert [np.frombuffer(row, np.int32).tolist() for row in found.rows] == [
        [CLS, A, B, SEP, PAD, PAD],
        [CLS, A, B, C, A, SEP],
        [CLS, UNK, SEP, PAD, PAD, PAD],
    ]
    assert found.n_tokens == 4 + 6 + 3


def test_pairs_have_token_types(tokens: Tokens) -> None:
    """Two rows a query: ids, and to which text each belongs; the other model's length is no matter."""
    tokens.texts(["a"], EMBEDDER)
    found = tokens.pairs("a", ["b c", "c"], RANKER)
    assert [np.frombuffer(row, np.int32).reshape(2, 8).tolist() for row in found.rows] == [
        [[CLS, A, SEP, B, C, SEP, PAD, PAD], [0, 0, 0, 1, 1, 1, 0, 0]],
        [[CLS, A, SEP, C, SEP, PAD, PAD, PAD], [0, 0, 0, 1, 1, 0, 0, 0]],
    ]
    assert found.n_tokens == 6 + 5


def test_token_ids_are_taken_as_they_are(tokens: Tokens) -> None:
    """No special token is added."""
    found = tokens.ids([[A], [A, B, C, A, B, C]], EMBEDDER)
    assert [np.frombuffer(row, np.int32).tolist() for row in found.rows] == [
        [A, PAD, PAD, PAD, PAD, PAD],
        [A, B, C, A, B, C],
    ]
    assert found.n_tokens == 7


def test_another_file_is_refused(tmp_path: Path) -> None:
    """With its name."""
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"--tokenizer .*config.json: expected a tokenizer.json"):
        Tokens(path)
