"""A family on a CUDA device: members of each kind answer as on the CPU, where their runtime is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest

from gpu_worker.engines.torch_executor import Placement
from gpu_worker.family.engine import FamilyExecutor
from gpu_worker.family.file import load_family
from gpu_worker.family.onnx_member import CUDA
from tests.gpu_worker.family import models
from tests.gpu_worker.family.models import Linear, linear, queries, weights_of, written

if TYPE_CHECKING:
    from pathlib import Path

FUNCTION = f"{models.__name__}:build"


@pytest.mark.parametrize("kind", ["pt2", "function", "onnx"])
def test_a_member_answers_on_cuda_as_its_weights_say(kind: str, tmp_path: Path) -> None:
    """In batches of each size; float32 may be multiplied with fewer bits there."""
    if kind == "onnx" and CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no {CUDA}: onnxruntime-gpu would")
    model = {"pt2": "a.pt2", "function": FUNCTION, "onnx": "a.onnx"}[kind]
    if kind == "pt2":
        models.exported(tmp_path / model, Linear())
    elif kind == "onnx":
        linear(tmp_path / model)
    path = written(
        tmp_path, f'name: a, model: "{model}", accuracy: 1', head="input: {dtype: float32, shape: [5]}"
    )
    executor = FamilyExecutor.load(load_family(path), Placement("cuda", batch_sizes=(1, 4)))
    executor.warm_up()

    for n in (1, 3, 4):
        got = executor.execute(0, queries(n))
        np.testing.assert_allclose(got, queries(n) @ weights_of(0), rtol=2e-3, atol=2e-3)
    assert "cuda" in executor.runs_by()["a"].lower()
