"""How accurate subnets are: predicted by a published network, or measured on data held out of training.

Both are called with control tuples and return percents, for the search.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from gpu_worker.engines.torch_executor import answer, model_input
from gpu_worker.models.examples import read_examples
from gpu_worker.models.kinds import fitted, resident
from gpu_worker.models.names import OFA_RESNET50
from gpu_worker.models.ofa_resnet50 import BASE_DEPTHS, CONTROLS, DEPTHS, EXPAND_RATIOS, WIDTHS
from gpu_worker.supernet.calibration import accuracy_percent, calibrate
from gpu_worker.supernet.checkpoints import read_tensors
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from gpu_worker.engines.torch_executor import Placement
    from gpu_worker.models.examples import Data, Examples
    from gpu_worker.models.kinds import SupernetKind
    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet

    Floats = npt.NDArray[np.float64]

IMAGE_SIZES = (128, 144, 160, 176, 192, 224, 240, 256)
"""Heights and widths of images that the predictor knows; one-hot, they are its first features."""

N_FEATURES = len(IMAGE_SIZES) + 2 + 6 * len(WIDTHS) + sum(DEPTHS) * len(EXPAND_RATIOS)
"""82: image size, stem block, widths, and the expand ratio of every block."""

_HIDDEN = 400
_SHAPES = {
    "layers.0.0.weight": (_HIDDEN, N_FEATURES),
    "layers.0.0.bias": (_HIDDEN,),
    "layers.1.0.weight": (_HIDDEN, _HIDDEN),
    "layers.1.0.bias": (_HIDDEN,),
    "layers.2.0.weight": (_HIDDEN, _HIDDEN),
    "layers.2.0.bias": (_HIDDEN,),
    "layers.3.weight": (1, _HIDDEN),
    "base_acc": (1,),
}


class Judge(Protocol):
    """Returns how accurate subnets are."""

    @property
    def words(self) -> str:
        """The meaning of its figures, for a profile's provenance."""
        ...

    def __call__(self, controls: Sequence[Control]) -> Floats:
        """Return the accuracy of each control tuple, percent."""
        ...


class OfaPredictor:
    """OFA-ResNet50's published accuracy predictor: a network of three hidden layers.

    It predicts top-1 accuracy on a held-out part of ImageNet's training set, which is some points
    above that on the test set.

    Source: Cai et al., "Once for All" (ICLR '20).
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], image_size: int = 224) -> None:
        if image_size not in IMAGE_SIZES:
            raise ConfigError(f"image_size: expected one of {IMAGE_SIZES}, got {image_size}")
        self._tensors = {name: tensors[name].float() for name in _SHAPES}
        self.image_size = image_size

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the published file.

        Raises:
            ConfigError: A tensor is missing, unknown or misshapen; the error names the file and the tensor.
        """
        tensors = read_tensors(path)
        for name, shape in _SHAPES.items():
            if name not in tensors:
                raise ConfigError(f"{path}: tensor {name}: missing")
            if tuple(tensors[name].shape) != shape:
                raise ConfigError(
                    f"{path}: tensor {name}: expected shape {shape}, got {tuple(tensors[name].shape)}"
                )
        for name in tensors:
            if name not in _SHAPES:
                raise ConfigError(f"{path}: tensor {name}: not one of an OFA-ResNet50 accuracy predictor's")
        return cls(tensors)

    @property
    def words(self) -> str:
        """What it predicts."""
        return (
            f"Accuracy is predicted by OFA-ResNet50's published predictor at {self.image_size} pixels: of a "
            "held-out part of ImageNet's training set, some points above that on the test set."
        )

    def __call__(self, controls: Sequence[Control]) -> Floats:
        """Return the predicted accuracy of each control tuple, percent."""
        x = torch.from_numpy(np.stack([features(control, self.image_size) for control in controls]))
        t = self._tensors
        with torch.inference_mode():
            for layer in range(3):
                x = F.relu(F.linear(x, t[f"layers.{layer}.0.weight"], t[f"layers.{layer}.0.bias"]))
            share = F.linear(x, t["layers.3.weight"])[:, 0] + t["base_acc"]  # (N,)
        return 100 * share.double().numpy()


def features(control: Control, image_size: int) -> npt.NDArray[np.float32]:
    """Return the predictor's features of an OFA-ResNet50 control tuple, (82,).

    One-hot, in this order: image size; whether d[0] is above 0; each of w; each of e, all zero if the
    block is not kept.

    Raises:
        ConfigError: If the tuple is not one of OFA-ResNet50's.
    """
    CONTROLS.space.check(control)
    kept = [
        block < base + extra
        for base, extra, depth in zip(BASE_DEPTHS, control["d"][1:], DEPTHS, strict=True)
        for block in range(depth)
    ]
    rows = [
        _one_hot(IMAGE_SIZES.index(image_size), len(IMAGE_SIZES)),
        _one_hot(int(control["d"][0] > 0), 2),
        *(_one_hot(index, len(WIDTHS)) for index in control["w"]),
        *(
            _one_hot(EXPAND_RATIOS.index(ratio) if is_kept else None, len(EXPAND_RATIOS))
            for ratio, is_kept in zip(control["e"], kept, strict=True)
        ),
    ]
    return np.concatenate(rows)


def _one_hot(index: int | None, n: int) -> npt.NDArray[np.float32]:
    row = np.zeros(n, dtype=np.float32)
    if index is not None:
        row[index] = 1
    return row


# --- measured -------------------------------------------------------------------------------

_BATCH = 64  # examples at a time: measured a quarter faster than 256 on a CPU, because it fits its cache


class MeasuredAccuracy:
    """Accuracy of a supernet's subnets on its own data, each with its own statistics.

    A search evaluates many subnets, so it uses a part of the data. The few finalists are calibrated on all
    of it and chosen by more; the ones kept are evaluated on examples that no choice depended on.
    """

    def __init__(
        self,
        supernet: Supernet,
        kind: SupernetKind,
        data: Data,
        *,
        n_calibration: int = 128,
        n_selection: int = 512,
        n_finals: int = 1024,
    ) -> None:
        self.supernet = supernet
        self._kind = kind
        self._data = data
        self.n_calibration = min(n_calibration, len(data.calibration))
        self.n_selection = min(n_selection, len(data.selection.labels))
        self.n_finals = min(n_finals, len(data.selection.labels))

    @property
    def n_held_out(self) -> int:
        """Number of examples that `held_out` uses."""
        return len(self._data.held_out.labels)

    @property
    def words(self) -> str:
        """What was measured, and on what."""
        is_calibrated = bool(self.supernet.norms)
        after = ", after calibration" if is_calibrated else ""
        on = f", each subnet calibrated on {self.n_calibration} training examples" if is_calibrated else ""
        return (
            f"Accuracy is measured on {self.n_held_out} held-out examples{after}. The finalists "
            f"were chosen by {self.n_finals} others held out of training; the search "
            f"itself saw {self.n_selection} of them{on}."
        )

    def __call__(self, controls: Sequence[Control]) -> Floats:
        """Return percents on part of the selection half, after calibration on part of its data."""
        judged = list(self._examples(self._data.selection, self.n_selection))
        calibration = list(self._inputs(self._data.calibration[: self.n_calibration]))
        found = []
        for control in controls:
            subnets = [Subnet("candidate", control)]
            statistics = self._calibrated(subnets, calibration)
            found += accuracies(self.supernet, self._kind, subnets, statistics, judged)
        return np.array(found)

    def calibrated(self, subnets: Sequence[Subnet]) -> dict[str, SubnetStatistics]:
        """Return statistics from all calibration data; none if the supernet has no SubnetNorm."""
        return self._calibrated(subnets, list(self._inputs(self._data.calibration)))

    def selection(self, subnets: Sequence[Subnet], statistics: Mapping[str, SubnetStatistics]) -> list[float]:
        """Return percents on more of the selection half, for finalists; the supernet then hosts them."""
        judged = list(self._examples(self._data.selection, self.n_finals))
        return accuracies(self.supernet, self._kind, subnets, statistics, judged)

    def held_out(self, subnets: Sequence[Subnet], statistics: Mapping[str, SubnetStatistics]) -> list[float]:
        """Return percents on the held-out examples; the supernet then hosts the subnets."""
        judged = list(self._examples(self._data.held_out, self.n_held_out))
        return accuracies(self.supernet, self._kind, subnets, statistics, judged)

    def _calibrated(
        self, subnets: Sequence[Subnet], batches: Sequence[torch.Tensor]
    ) -> dict[str, SubnetStatistics]:
        return calibrate(self.supernet, subnets, batches)

    def _examples(self, examples: Examples, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = torch.split(torch.from_numpy(examples.labels[:n]), _BATCH)
        yield from zip(self._inputs(examples.inputs[:n]), labels, strict=True)

    def _inputs(self, inputs: npt.NDArray[np.generic]) -> Iterator[torch.Tensor]:
        for batch in torch.split(torch.from_numpy(inputs), _BATCH):
            yield model_input(self._kind, batch.to(self.supernet.device), torch.float32)


def judge_of(
    kind: SupernetKind,
    weights: str | None,
    predictor: Path | None,
    examples: Path | None,
    placement: Placement,
) -> OfaPredictor | MeasuredAccuracy:
    """Return the given predictor, or what measures on examples: a file's, or the supernet's own.

    Raises:
        ConfigError: There is neither or both, or the predictor is for another supernet.
    """
    if predictor is not None:
        if examples is not None:
            raise ConfigError("accuracy: expected a predictor or examples to measure it on, got both")
        if kind.name != OFA_RESNET50:
            raise ConfigError(f"predictor: expected the supernet {OFA_RESNET50}, got {kind.name}")
        return OfaPredictor.load(predictor)
    return measured_accuracy(kind, weights, examples, placement)


def measured_accuracy(
    kind: SupernetKind, weights: str | None, examples: Path | None, placement: Placement
) -> MeasuredAccuracy:
    """Return the object that calibrates and measures a supernet on a file's examples, or on its own data.

    Raises:
        ConfigError: There are no examples.
    """
    kind = fitted(kind, weights)
    if examples is not None:
        data = read_examples(examples, kind.input_spec)
    elif kind.data is not None:
        data = kind.data()
    else:
        raise ConfigError(f"accuracy: {kind.name} comes without data: expected examples, or a predictor")
    supernet = resident(kind, weights)
    layout = {"memory_format": torch.channels_last} if kind.takes_images else {}
    supernet.to(placement.torch_device(), **layout)  # type: ignore[call-overload]  # missing in the stub
    return MeasuredAccuracy(supernet, kind, data)


def accuracies(
    supernet: Supernet,
    kind: SupernetKind,
    subnets: Sequence[Subnet],
    statistics: Mapping[str, SubnetStatistics],
    examples: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> list[float]:
    """Host the subnets with these statistics and return the percentage of examples that each gets right."""
    supernet.host(subnets)
    supernet.set_statistics(statistics)

    def answers(row: int, inputs: torch.Tensor) -> torch.Tensor:
        return answer(kind, supernet.run_with(supernet.prepared(row).settings, inputs))

    return [accuracy_percent(functools.partial(answers, row), examples) for row in range(len(subnets))]


def first_channels(whole: SubnetStatistics, channels: Sequence[int]) -> SubnetStatistics:
    """Return the part for these channels of a larger subnet's statistics."""
    parts = iter(torch.split(whole.values, [n for size in whole.channels for n in (size, size)]))
    cut = [
        part[:kept]
        for kept in channels
        for part in (next(parts), next(parts))  # mean, variance
    ]
    return SubnetStatistics(tuple(channels), torch.cat(cut) if cut else torch.empty(0))


def accuracy_by_statistics(
    measured: MeasuredAccuracy, subnets: Sequence[Subnet]
) -> list[tuple[float, float]]:
    """Return each subnet's held-out percents with its own statistics and with the largest subnet's.

    The second is what the subnet would reach if SubnetNorm kept one mean and variance for all subnets.

    Raises:
        ConfigError: If the supernet has no norm whose statistics could differ.
    """
    supernet = measured.supernet
    if not supernet.norms:
        raise ConfigError("accuracy: expected a supernet with BatchNorm: LayerNorm keeps no statistics")
    own = measured.calibrated(subnets)
    largest = Subnet("largest", supernet.controls.space.largest)
    whole = measured.calibrated([largest])[largest.name]
    shared = {name: first_channels(whole, held.channels) for name, held in own.items()}
    return list(zip(measured.held_out(subnets, own), measured.held_out(subnets, shared), strict=True))
