"""The generated names, shapes and values are those of the published checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.gpu_worker.models.published import (
    DYNABERT,
    OFA_RESNET50,
    STATE_DICTS,
    Shapes,
    dynabert_shapes,
    n_parameters,
    ofa_resnet50_shapes,
    random_tensors,
    read_shapes,
)

if TYPE_CHECKING:
    from pathlib import Path


needs_lists = pytest.mark.skipif(
    not STATE_DICTS.is_dir(), reason="the published tensor lists do not lie beside the repository"
)

GENERATED = ((OFA_RESNET50, ofa_resnet50_shapes()), (DYNABERT, dynabert_shapes()))


@needs_lists
@pytest.mark.parametrize(("path", "shapes"), GENERATED, ids=["ofa", "dynabert"])
def test_the_generated_shapes_are_the_published_ones(path: Path, shapes: Shapes) -> None:
    """Names, shapes and their order are those of the published list."""
    assert list(shapes.items()) == list(read_shapes(path).items())


def test_the_supernets_have_their_published_size() -> None:
    """OFA-ResNet50 has 368 tensors and 48.1 M parameters, DynaBERT 201 tensors and 109.5 M."""
    ofa, dynabert = ofa_resnet50_shapes(), dynabert_shapes()

    assert (len(ofa), n_parameters(ofa)) == (368, 48_105_992)
    assert (len(dynabert), n_parameters(dynabert)) == (201, 109_484_547)


def test_a_published_list_is_read(tmp_path: Path) -> None:
    """Comments are skipped, sizes are joined by x, and a scalar has no axes."""
    path = tmp_path / "shapes.tsv"
    path.write_text("# a comment\nconv.weight\t8x3x1x1\nnorm.bias\t8\nnorm.count\tscalar\n")

    assert read_shapes(path) == {"conv.weight": (8, 3, 1, 1), "norm.bias": (8,), "norm.count": ()}


SMALL: Shapes = {
    name: shape
    for name, shape in ofa_resnet50_shapes().items()
    if name.startswith(("input_stem", "blocks.0."))
}


def test_random_tensors_have_their_shapes_and_ranges() -> None:
    """Every tensor is of its shape; variances and norm weights are positive, counters are int64."""
    for name, tensor in random_tensors(SMALL, seed=0).items():
        assert tuple(tensor.shape) == SMALL[name]
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        if name.endswith("running_var"):
            assert tensor.min() >= 0.5
            assert tensor.max() <= 2
        if name.endswith("bn.weight"):
            assert tensor.min() >= 0.5
            assert tensor.max() <= 1.5


def test_random_tensors_follow_the_seed() -> None:
    """One seed gives the same tensors again, another gives others."""
    first, again, other = (random_tensors(SMALL, seed) for seed in (3, 3, 4))

    name = "blocks.0.conv2.conv.conv.weight"
    assert all(torch.equal(first[key], again[key]) for key in SMALL)
    assert not torch.equal(first[name], other[name])
