"""The example that makes pairs of sentences: as many as it promises, the same ones each time, of all grades.

`tests/e2e/test_encoder.py` takes its sentences from it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "sentence_pairs.py"


def sentence_pairs() -> Any:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("sentence_pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sentence_pairs"] = module  # its classes look there for what they are
    spec.loader.exec_module(module)
    return module


def test_pairs_share_from_none_to_all_of_their_parts() -> None:
    """A fifth each shares 0, 1, 2, 3 and 4 parts, in the same words or others; a seed gives the same ones."""
    module = sentence_pairs()
    pairs = module.sentence_pairs()

    def meaning(sentence: str) -> tuple[int, ...]:
        """Return the row of each part that the sentence is made of: the one with its longest phrase."""
        low = sentence.lower()
        return tuple(
            max(
                range(len(part)),
                key=lambda row: max((len(words) for words in part[row] if words.lower() in low), default=0),
            )
            for part in module.PARTS
        )

    shared = Counter(
        sum(a == b for a, b in zip(meaning(one), meaning(other), strict=True)) for one, other in pairs
    )
    assert shared == dict.fromkeys(range(5), 200)
    assert pairs == module.sentence_pairs()
    assert pairs != module.sentence_pairs(seed=1)
    assert len(set(pairs)) > 990


def test_the_script_writes_token_ids(tmp_path: Path) -> None:
    """As the tokenizer in the model's folder gives them, cut to the length and filled up."""
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "doctor": 4, "farmer": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "pairs.npz"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path), str(out), "--length", "12"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    with np.load(out) as pairs:
        assert {name: (pairs[name].shape, pairs[name].dtype) for name in pairs.files} == {
            name: ((1_000, 12), np.dtype(np.int32)) for name in ("first", "second")
        }
        assert (pairs["first"][:, 0] == 1).all()
        assert all(2 in row[1:] for row in pairs["second"])
    assert done.stdout == f"wrote {out}: 1000 pairs\n"
