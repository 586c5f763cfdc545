"""TorchExecutor: the shipped supernet, the batches it takes, and the files it refuses."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gpu_worker import digits
from gpu_worker.torch_executor import SHIPPED_PATH, Card, TorchExecutor, save
from superserve.errors import ConfigError, InvalidQueryError
from tests.gpu_worker.plain import images, small_supernet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXECUTOR = TorchExecutor.load(batch_sizes=(1, 4, 16))
LARGEST = len(EXECUTOR.subnets) - 1


def some_images(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return n images as a batch from the wire would be: not to be written to."""
    batch = np.random.default_rng(5).standard_normal((n, *EXECUTOR.input_spec.shape)).astype(np.float32)
    batch.flags.writeable = False
    return batch


def measured_accuracy(row: int, held_out: digits.Images) -> float:
    """Return the percentage of the held-out set that a row reads rightly, in batches of 512."""
    executor = TorchExecutor.load()
    logits = [
        executor.execute(row, held_out.pixels[start : start + 512])
        for start in range(0, len(held_out.labels), 512)
    ]
    return 100 * float((np.concatenate(logits).argmax(1) == held_out.labels).mean())


def test_the_smallest_subnet_is_as_accurate_as_the_file_says() -> None:
    """The shipped weights and statistics read the held-out digits as the card promises."""
    assert measured_accuracy(0, digits.held_out()) == pytest.approx(EXECUTOR.accuracies[0], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("row", range(1, LARGEST + 1))
def test_every_subnet_is_as_accurate_as_the_file_says(row: int) -> None:
    """So do all the larger subnets."""
    assert measured_accuracy(row, digits.held_out()) == pytest.approx(EXECUTOR.accuracies[row], abs=0.1)


def test_subnets_truly_differ() -> None:
    """Several subnets, each at least 0.3 points above the one before, more than ten points in all."""
    gaps = [after - before for before, after in itertools.pairwise(EXECUTOR.accuracies)]

    assert 5 <= len(EXECUTOR.subnets) <= 8
    assert min(gaps) >= 0.3
    assert EXECUTOR.accuracies[-1] - EXECUTOR.accuracies[0] > 10


def test_subnet_norm_is_what_makes_small_subnets_work() -> None:
    """With the largest subnet's statistics the smallest does no better than guessing, or little."""
    smallest = EXECUTOR.cards[0]

    assert smallest.accuracy_without_subnet_norm < 20 < smallest.accuracy


@pytest.mark.parametrize("n_queries", [1, 2, 4, 5, 16])
def test_padding_changes_no_answer(n_queries: int) -> None:
    """A query's logits do not depend on the zeros beside it, and padding is trimmed."""
    batch = some_images(n_queries)
    padded = EXECUTOR.execute(0, batch)
    alone = TorchExecutor.load().execute(0, batch)

    assert padded.shape == (n_queries, *EXECUTOR.output_spec.shape)
    assert padded.dtype == np.dtype(EXECUTOR.output_spec.dtype)
    np.testing.assert_allclose(padded, alone, rtol=1e-3, atol=1e-4)


def test_a_batch_answers_as_its_queries_do_alone() -> None:
    """Batching changes no answer."""
    batch = some_images(4)
    together = EXECUTOR.execute(LARGEST, batch)
    alone = np.concatenate([EXECUTOR.execute(LARGEST, query[np.newaxis]) for query in batch])

    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_switching_back_gives_the_same_bits() -> None:
    """A subnet's outputs do not remember which one ran between."""
    batch = some_images(4)
    first = EXECUTOR.execute(0, batch)
    EXECUTOR.execute(LARGEST, batch)

    assert np.array_equal(EXECUTOR.execute(0, batch), first)


def test_warming_up_answers_nothing_and_breaks_nothing() -> None:
    """After a warm-up the outputs are as before."""
    batch = some_images(1)
    before = EXECUTOR.execute(0, batch)
    EXECUTOR.warm_up()

    assert np.array_equal(EXECUTOR.execute(0, batch), before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((0, 1, 20, 20), dtype=np.float32), "at least 1 query"),
        (np.zeros((), dtype=np.float32), "at least 1 query"),
        (np.zeros((17, 1, 20, 20), dtype=np.float32), "at most 16 queries, got 17"),
        (np.zeros((1, 1, 20, 20)), "expected dtype float32, got float64"),
        (np.zeros((1, 20, 20), dtype=np.float32), r"expected shape \(1, 20, 20\), got \(20, 20\)"),
    ],
)
def test_a_bad_batch_is_refused(batch: np.ndarray[Any, Any], message: str) -> None:
    """The error says what was expected of the batch."""
    with pytest.raises(InvalidQueryError, match=message):
        EXECUTOR.execute(0, batch)


def test_a_row_that_is_not_hosted_is_refused() -> None:
    """The executor passes on what actuation says."""
    with pytest.raises(ConfigError, match="subnet: expected a row from 0"):
        EXECUTOR.execute(LARGEST + 1, some_images(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:<n>, got 'tpu'"),
        ({"device": "meta"}, "device: expected cpu, cuda or cuda:<n>, got 'meta'"),
        ({"device": "cuda:99"}, "device: cuda:99: this machine has"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"batch_sizes": (4, 2)}, "batch_sizes: expected ascending"),
        ({"batch_sizes": (0, 2)}, "batch_sizes: expected ascending"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    """Loading refuses what it cannot do, by the option's name."""
    with pytest.raises(ConfigError, match=message):
        TorchExecutor.load(**options)


def edited(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Path:
    """Write the shipped file with its tensors and metadata changed by `edit`."""
    with safe_open(SHIPPED_PATH, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(SHIPPED_PATH)
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, _: tensors.pop("head.weight"), "tensor head.weight: missing"),
        (
            lambda tensors, _: tensors.update({"head.bias": torch.zeros(3)}),
            r"tensor head.bias: expected shape \(10,\), got \(3,\)",
        ),
        (lambda tensors, _: tensors.update({"extra": torch.zeros(3)}), "tensor extra: not one of"),
        (lambda _, metadata: metadata.pop("architecture"), "metadata architecture: expected"),
        (lambda _, metadata: metadata.update({"subnets": "[{}]"}), "metadata subnets: expected"),
        (lambda _, metadata: metadata.update({"subnets": "[]"}), "subnets: expected at least one"),
        (
            lambda _, metadata: metadata.update(
                {"subnets": json.dumps(json.loads(metadata["subnets"])[::-1])}
            ),
            "metadata subnets: expected ascending accuracies",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_what_is_wrong_in_it(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], object], message: str
) -> None:
    """The error names the file and the tensor or metadata at fault."""
    path = edited(tmp_path / "damaged.safetensors", edit)
    with pytest.raises(ConfigError, match=message) as raised:
        TorchExecutor.load(path)

    assert str(path) in str(raised.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and mere bytes are all said to be no safetensors file."""
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not a supernet")
    for path in (tmp_path / "absent.safetensors", junk, tmp_path):
        with pytest.raises(ConfigError, match="expected a safetensors file"):
            TorchExecutor.load(path)


def test_a_saved_supernet_answers_as_before(tmp_path: Path) -> None:
    """Saving some of the hosted subnets and loading them changes their answers by rounding only."""
    supernet = small_supernet()
    cards = [
        Card(supernet.subnets[row].name, dict(supernet.subnets[row].control or {}), 10.0 * row, 0.0, 0.0)
        for row in (1, 3)
    ]
    path = tmp_path / "small.safetensors"
    save(supernet, cards, path, notes={"seed": "0"})
    executor = TorchExecutor.load(path)

    assert executor.subnets == (supernet.subnets[1], supernet.subnets[3])
    for row, original in enumerate((1, 3)):
        supernet.cursor.row = original
        with torch.inference_mode():
            expected = supernet(images()).numpy()
        np.testing.assert_allclose(executor.execute(row, images().numpy()), expected, rtol=0.05, atol=0.05)


def test_equal_files_have_equal_fingerprints(tmp_path: Path) -> None:
    """A fingerprint is the file's: the same for a copy, another for other weights."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(SHIPPED_PATH.read_bytes())
    other = edited(tmp_path / "other.safetensors", lambda tensors, _: tensors["head.bias"].add_(1))

    assert TorchExecutor.load(copy).fingerprint == EXECUTOR.fingerprint
    assert TorchExecutor.load(other).fingerprint != EXECUTOR.fingerprint


def test_a_selection_answers_as_the_same_subnets_do() -> None:
    """Rows are renumbered, answers are not changed, and an unknown name is refused."""
    chosen = TorchExecutor.load()
    chosen.select([EXECUTOR.subnets[row].name for row in (1, LARGEST)])
    batch = some_images(4)

    assert chosen.accuracies == (EXECUTOR.accuracies[1], EXECUTOR.accuracies[LARGEST])
    np.testing.assert_allclose(
        chosen.execute(1, batch), EXECUTOR.execute(LARGEST, batch), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ConfigError, match="got nobody"):
        chosen.select(["nobody"])
    with pytest.raises(ConfigError, match="row from 0 to 1"):
        chosen.execute(2, batch)
