"""The model's tokenizer: texts into rows of token ids, in threads of its own."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gateway.text.asks import TokenModel

_MAX_THREADS = 4
_PADDING = "[PAD]"


class TokenRows(NamedTuple):
    """Queries, and how many tokens they have without those that fill up."""

    rows: list[memoryview]
    n_tokens: int


class Tokens:
    """A tokenizer, as Hugging Face's `tokenizer.json` describes it.

    Args:
        path: That file.

    Attributes:
        pool: Encoding runs here: it holds no other request up, and does not hold the interpreter.

    Raises:
        ConfigError: The file cannot be read, or the package `tokenizers` is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers  # noqa: PLC0415  optional
        except ImportError as error:
            raise ConfigError(
                "--tokenizer: expected the package tokenizers; try: pip install 'superserve[tokens]'"
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"--tokenizer {path}: expected a tokenizer.json: {error}") from error
        self._lock = threading.Lock()
        self._length = 0
        self.pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "tokens")

    def close(self) -> None:
        """End the threads; what waits for them is dropped."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def texts(self, texts: Sequence[str], model: TokenModel) -> TokenRows:
        """Return single texts as rows, cut to the model's length."""
        return self._rows(list(texts), model)

    def pairs(self, query: str, documents: Sequence[str], model: TokenModel) -> TokenRows:
        """Return a query with each of some documents as rows; of what is too long the longer text is cut."""
        return self._rows([(query, document) for document in documents], model)

    def ids(self, ids: Sequence[Sequence[int]], model: TokenModel) -> TokenRows:
        """Return token ids as rows: they are taken as they are, and filled up."""
        padding = self._padding_id()
        rows = [
            memoryview(np.array([*one, *[padding] * (model.length - len(one))], model.dtype).tobytes())
            for one in ids
        ]
        return TokenRows(rows, sum(len(one) for one in ids))

    def _rows(self, texts: list[Any], model: TokenModel) -> TokenRows:
        with self._lock:
            if self._length != model.length:
                self._tokenizer.enable_truncation(model.length)
                self._tokenizer.enable_padding(
                    length=model.length, pad_id=self._padding_id(), pad_token=self._padding_token()
                )
                self._length = model.length
        rows, n_tokens = [], 0
        for encoding in self._tokenizer.encode_batch(texts):
            values = [encoding.ids, encoding.type_ids] if model.is_pairs else encoding.ids
            rows.append(memoryview(np.array(values, model.dtype).tobytes()))
            n_tokens += sum(encoding.attention_mask)
        return TokenRows(rows, n_tokens)

    def _padding_token(self) -> str:
        given = self._tokenizer.padding
        return str(given["pad_token"]) if given else _PADDING

    def _padding_id(self) -> int:
        given = self._tokenizer.padding
        found = given["pad_id"] if given else self._tokenizer.token_to_id(_PADDING)
        return int(found or 0)
