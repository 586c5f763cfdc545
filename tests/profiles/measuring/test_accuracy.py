"""Accuracies: the published predictor's own figures, its features by hand, and what data says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gpu_worker.engines.torch_executor import Placement
from gpu_worker.models.digits_supernet import DigitsArchitecture, digits_supernet
from gpu_worker.models.dynabert import DynaBertArchitecture, dynabert
from gpu_worker.models.examples import Data, Examples
from gpu_worker.models.kinds import SupernetKind, as_floats, as_tokens, resident
from gpu_worker.models.ofa_resnet50 import CONTROLS
from gpu_worker.supernet.calibration import calibrate
from gpu_worker.supernet.supernet import SubnetStatistics
from profiles.measuring.accuracy import (
    N_FEATURES,
    MeasuredAccuracy,
    OfaPredictor,
    accuracy_by_statistics,
    features,
    first_channels,
    judge_of,
)
from superserve.errors import ConfigError
from superserve.subnet import Subnet, TensorSpec
from tests.paths import SHARED

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.supernet.control import Control

PREDICTOR = SHARED / "state-dicts" / "ofa_resnet50_acc_predictor.pth"
WITHOUT = f"the published predictor is not beside the repository, as {PREDICTOR.name}"

SPACE = CONTROLS.space
MIDDLE: Control = {"d": [2, 1, 1, 1, 1], "e": [0.25] * 18, "w": [1] * 6}

ARCHITECTURE = DigitsArchitecture(
    image_shape=(1, 8, 8), channels=(8, 16), depths=(2, 2), n_classes=3, widths=(0.5, 0.75, 1.0)
)


def tiny_data() -> Data:
    """Return noise, and labels that a subnet of random weights gets right now and then."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((96, 1, 8, 8)).astype(np.float32)
    labels = rng.integers(0, 3, 96)
    return Data(inputs[:32], Examples(inputs[32:64], labels[32:64]), Examples(inputs[64:], labels[64:]))


TINY = SupernetKind(
    name="tiny",
    build=lambda: digits_supernet(ARCHITECTURE),
    input_spec=TensorSpec("float32", (1, 8, 8)),
    output_spec=TensorSpec("float32", (3,)),
    preprocess=as_floats,
    data=tiny_data,
    takes_images=True,
)
"""A supernet that is searched in seconds; as a command's option it is this module's `TINY`."""

_BERT = DynaBertArchitecture(
    n_blocks=2, n_heads=2, head_size=4, n_units=8, n_tokens=9, max_length=6, n_classes=3
)
TINY_BERT = SupernetKind(
    name="tiny-bert",
    build=lambda: dynabert(_BERT),
    input_spec=TensorSpec("int32", (2, 6)),
    output_spec=TensorSpec("float32", (3,)),
    preprocess=as_tokens,
    data=lambda: Data(
        np.ones((4, 2, 6), np.int32),
        Examples(np.ones((4, 2, 6), np.int32), np.zeros(4, np.int64)),
        Examples(np.ones((4, 2, 6), np.int32), np.zeros(4, np.int64)),
    ),
)


# --- predicted ------------------------------------------------------------------------------


@pytest.mark.skipif(not PREDICTOR.exists(), reason=WITHOUT)
def test_the_published_predictor_gives_its_published_figures() -> None:
    """At 224 pixels: the largest, the smallest and a middling subnet, to four decimals."""
    predicted = OfaPredictor.load(PREDICTOR)([SPACE.largest, SPACE.smallest, MIDDLE])

    assert (predicted / 100).round(4).tolist() == [0.8299, 0.7878, 0.8241]


def published_shapes() -> dict[str, torch.Tensor]:
    """Return tensors of the published names and shapes, all zero."""
    tensors = {}
    for layer, inputs in enumerate((82, 400, 400)):
        tensors[f"layers.{layer}.0.weight"] = torch.zeros(400, inputs)
        tensors[f"layers.{layer}.0.bias"] = torch.zeros(400)
    return {**tensors, "layers.3.weight": torch.zeros(1, 400), "base_acc": torch.tensor([0.5])}


def test_features_lie_where_they_should() -> None:
    """8 of image size, 2 of the stem block, 6 x 3 widths, 18 x 3 expand ratios; none of unkept blocks."""
    control: dict[str, Any] = {
        "d": [1, 0, 1, 2, 0],
        "e": [0.2, 0.25, 0.35, 0.2] + [0.35] * 14,
        "w": [2, 0, 1, 2, 0, 1],
    }
    row = features(control, 224)

    assert row.shape == (N_FEATURES,) == (82,)
    assert np.flatnonzero(row[:10]).tolist() == [5, 9]  # 224 is the sixth size; d[0] is above 0
    assert np.flatnonzero(row[10:28]).tolist() == [2, 3, 7, 11, 12, 16]
    ratios = row[28:].reshape(18, 3)
    assert ratios[:4].argmax(axis=1).tolist()[:2] == [0, 1]
    # Stages run 2, 3, 6 and 2 blocks of 4, 4, 6 and 4.
    kept = [1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert ratios.sum(axis=1).tolist() == kept
    assert features({**control, "d": [0, 0, 1, 2, 0]}, 128)[:10].nonzero()[0].tolist() == [0, 8]


def test_the_network_is_three_hidden_layers_of_relu() -> None:
    """One path of ones through it counts the kept blocks whose ratio is 0.35; negatives are cut off."""
    tensors = published_shapes()
    tensors["layers.0.0.weight"][0, 30::3] = 1.0  # every third feature from the first ratio of 0.35
    tensors["layers.0.0.bias"][1] = -1.0
    for layer in (1, 2):
        tensors[f"layers.{layer}.0.weight"][0, :2] = torch.tensor([1.0, 100.0])
    tensors["layers.3.weight"][0, 0] = 0.01
    predicted = OfaPredictor(tensors)([SPACE.largest, SPACE.smallest, {**SPACE.smallest, "e": [0.35] * 18}])

    assert predicted == pytest.approx([50 + 18, 50, 50 + 10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("base_acc"), "tensor base_acc: missing"),
        (
            lambda tensors: tensors.update({"layers.1.0.bias": torch.zeros(7)}),
            r"tensor layers.1.0.bias: expected shape \(400,\), got \(7,\)",
        ),
        (lambda tensors: tensors.update({"more": torch.zeros(1)}), "tensor more: not one of"),
    ],
)
def test_a_file_that_is_no_predictor_is_named(
    spoil: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    """The error names the file and the tensor that is missing, misshapen or unknown."""
    tensors = published_shapes()
    spoil(tensors)
    path = tmp_path / "predictor.pth"
    torch.save(tensors, path)

    with pytest.raises(ConfigError, match=message) as error:
        OfaPredictor.load(path)
    assert str(path) in str(error.value)


def test_a_tuple_of_another_supernet_is_refused() -> None:
    """The predictor knows OFA-ResNet50's tuples only."""
    with pytest.raises(ConfigError, match="expected exactly the keys d, e and w"):
        OfaPredictor(published_shapes())([{"d": [1], "w": [1.0]}])


def test_an_accuracy_needs_a_predictor_or_data() -> None:
    """A kind without data, or a predictor of another supernet, is one clear error."""
    bare = SupernetKind("bare", TINY.build, TINY.input_spec, TINY.output_spec, as_floats)

    with pytest.raises(ConfigError, match="bare comes without data"):
        judge_of(bare, "random", None, None, Placement())
    with pytest.raises(ConfigError, match="predictor: expected the supernet ofa-resnet50, got tiny"):
        judge_of(TINY, "random", Path("any.pth"), None, Placement())


# --- measured -------------------------------------------------------------------------------


def measured(data: Data | None = None) -> MeasuredAccuracy:
    """Return what measures the tiny supernet's subnets."""
    return MeasuredAccuracy(resident(TINY, "random"), TINY, data or tiny_data())


def test_a_subnet_is_judged_with_statistics_of_its_own() -> None:
    """Labels that are a calibrated subnet's own answers are all right for it, in both halves."""
    supernet, plain = resident(TINY, "random"), tiny_data()
    subnet = Subnet("half", {"d": [1, 2], "w": [0.5, 0.75]})
    supernet.host([subnet])
    supernet.set_statistics(calibrate(supernet, [subnet], [torch.from_numpy(plain.calibration)]))

    def answered(examples: Examples) -> Examples:
        with torch.inference_mode():
            logits = supernet(torch.from_numpy(examples.inputs))
        return Examples(examples.inputs, logits.argmax(1).numpy())

    judge = measured(Data(plain.calibration, answered(plain.selection), answered(plain.held_out)))

    assert subnet.control is not None
    assert judge([dict(subnet.control)]).tolist() == [100.0]
    assert judge.selection([subnet], judge.calibrated([subnet])) == [100.0]
    assert judge.held_out([subnet], judge.calibrated([subnet])) == [100.0]


def test_a_search_is_answered_from_part_of_the_data() -> None:
    """The part is what the provenance says, and no more than there is."""
    part = MeasuredAccuracy(resident(TINY, "random"), TINY, tiny_data(), n_calibration=8, n_selection=10)

    assert (100 / 10 * np.arange(11)).tolist().count(part([SPACE_OF_TINY.largest]).item()) == 1
    assert "the search itself saw 10 of them, each subnet calibrated on 8 training examples" in part.words
    assert measured().n_selection == 32


SPACE_OF_TINY = TINY.build().controls.space


def test_a_subnet_finds_its_first_channels_in_the_largest_ones_statistics() -> None:
    """Means and variances are cut alike, and a norm that does not run keeps none."""
    whole = SubnetStatistics((3, 2), torch.tensor([1.0, 2, 3, 10, 20, 30, 4, 5, 40, 50]))

    assert first_channels(whole, (2, 1)).values.tolist() == [1, 2, 10, 20, 4, 40]
    assert first_channels(whole, (1, 0)).values.tolist() == [1, 10]


def test_the_largest_subnets_own_statistics_are_the_shared_ones() -> None:
    """Both accuracies of the largest are one; of others they come from different statistics."""
    subnets = [Subnet("small", SPACE_OF_TINY.smallest), Subnet("whole", SPACE_OF_TINY.largest)]
    _, (own, shared) = accuracy_by_statistics(measured(), subnets)

    assert own == shared


def test_without_batch_norm_there_is_nothing_to_compare() -> None:
    """A transformer needs no calibration: it is judged as it is, and the comparison says why not."""
    judge = judge_of(TINY_BERT, "random", None, None, Placement())
    assert isinstance(judge, MeasuredAccuracy)
    subnets = [Subnet("whole", judge.supernet.controls.space.largest)]

    assert judge.calibrated(subnets) == {}
    assert judge([judge.supernet.controls.space.largest]).item() in (0.0, 100.0)
    with pytest.raises(ConfigError, match="expected a supernet with BatchNorm"):
        accuracy_by_statistics(judge, subnets)
