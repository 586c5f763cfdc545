"""An encoder on a CUDA device answers as Hugging Face's model on the CPU: each exit, each length bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.gpu_worker.models.encoders.folders import LENGTH, saved_encoder, token_ids
from tests.gpu_worker.models.encoders.test_sentence import expected, served

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("precision", "exact"), [("float32", 2e-3), ("auto", 2e-2)])
def test_each_exit_answers_on_cuda_as_the_published_model(
    tmp_path: Path, precision: str, exact: float
) -> None:
    """Short texts run in a short bucket's graph, long ones in a long one's; then the short ones again."""
    model = saved_encoder(tmp_path)
    executor = served(tmp_path, device="cuda", precision=precision, batch_sizes=(1, 4, 8))
    executor.warm_up()
    short, long = np.zeros((3, LENGTH), np.int32), token_ids(8)
    short[:, :12] = token_ids(3, 12)

    for ids in (short, long, short):
        for row, vectors in enumerate(expected(model, ids)):
            np.testing.assert_allclose(executor.execute(row, ids), vectors, atol=exact)
