"""A thousand pairs of sentences, from the same to unrelated, as token ids for `profiles exits`.

    python sentence_pairs.py MODEL_FOLDER pairs.npz --length 64

The sentences are made of templates: a pair shares all of its parts, some of them, or none, in the same words
or in others. They show how an exit's ranking compares with full depth's. For the accuracy of your application
take pairs of your own, with the scores that they should have.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

N_PAIRS = 1_000
SEED = 20250428

# Each row is one meaning, in several words.
WHO = (
    ("a doctor", "a physician", "someone who works at the hospital"),
    ("a farmer", "a man who grows wheat", "the owner of the farm"),
    ("a student", "a young woman at university", "someone who studies physics"),
    ("the mayor", "the head of the city", "the politician who runs the town"),
    ("a musician", "a violin player", "somebody from the orchestra"),
    ("a child", "a little boy", "a kid of six"),
    ("a journalist", "a reporter", "someone from the newspaper"),
    ("the engineer", "a woman who designs bridges", "the technician in charge"),
)
DOES = (
    ("bought a car", "purchased a new vehicle", "paid for an automobile"),
    ("cooked dinner", "prepared the evening meal", "made something to eat"),
    ("lost the keys", "could not find the keys any more", "misplaced the key ring"),
    ("read a long book", "finished a thick novel", "spent hours with a story"),
    ("repaired the roof", "fixed a leak above the attic", "mended the top of the house"),
    ("won the race", "came first in the competition", "was faster than everyone else"),
    ("sold the house", "gave up the home for a good price", "found a buyer for the building"),
    ("missed the train", "arrived at the station too late", "saw the last carriage leave"),
)
WHERE = (
    ("in Paris", "in the capital of France"),
    ("near the sea", "on the coast"),
    ("in the mountains", "high up in the Alps"),
    ("at the market", "between the stalls of the square"),
    ("at home", "in the living room"),
    ("abroad", "in a foreign country"),
)
WHEN = (
    ("yesterday", "the day before today"),
    ("last winter", "in the cold months"),
    ("early in the morning", "at dawn"),
    ("after the war", "once there was peace again"),
    ("during the holidays", "on vacation"),
    ("at midnight", "in the middle of the night"),
)
PARTS = (WHO, DOES, WHERE, WHEN)
FORMS = ("{0} {1} {2} {3}.", "{3}, {0} {1} {2}.", "{2}, {0} {1} {3}.")


class Sentence(NamedTuple):
    """What a sentence says: a row of each part; in which words; and in which order."""

    rows: tuple[int, ...]
    words: tuple[int, ...]
    form: str

    def __str__(self) -> str:
        """Return it in words."""
        chosen = [part[row] for part, row in zip(PARTS, self.rows, strict=True)]
        text = self.form.format(*(words[i % len(words)] for words, i in zip(chosen, self.words, strict=True)))
        return text[0].upper() + text[1:]


def sentence_pairs(n: int = N_PAIRS, seed: int = SEED) -> list[tuple[str, str]]:
    """Return pairs that share from none to all of their four parts, evenly; the same ones for a seed."""
    rng = random.Random(seed)
    pairs = []
    for number in range(n):
        shared = rng.sample(range(len(PARTS)), number % (len(PARTS) + 1))
        one = _sentence(rng, [rng.randrange(len(part)) for part in PARTS])
        rows = [
            row if place in shared else (row + rng.randrange(1, len(part))) % len(part)
            for place, (row, part) in enumerate(zip(one.rows, PARTS, strict=True))
        ]
        pairs.append((str(one), str(_sentence(rng, rows))))
    return pairs


def _sentence(rng: random.Random, rows: list[int]) -> Sentence:
    return Sentence(tuple(rows), tuple(rng.randrange(6) for _ in rows), rng.choice(FORMS))


def token_ids(folder: Path, texts: list[str], length: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Return the token ids of texts, (N, length), as the encoder in `folder` takes them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], dtype=np.int32)


def main() -> None:
    """Write the pairs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the model's, with tokenizer.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=64, help="tokens of a query")
    asked = parser.parse_args()
    first, second = zip(*sentence_pairs(), strict=True)
    np.savez(
        asked.out,
        first=token_ids(asked.folder, list(first), asked.length),
        second=token_ids(asked.folder, list(second), asked.length),
    )
    print(f"wrote {asked.out}: {len(first)} pairs")


if __name__ == "__main__":
    main()
