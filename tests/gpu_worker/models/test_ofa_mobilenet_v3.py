"""OFA-MobileNetV3, filled with random tensors of the published names and shapes.

The reference is a plain network of each subnet's own sizes, in `plain_mobilenet`, which shares nothing with
the slicing.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from gpu_worker.engines.torch_executor import Placement, TorchExecutor, example_input
from gpu_worker.models.kinds import KINDS, fitted, resident
from gpu_worker.models.ofa_mobilenet_v3 import control_of, ofa_mobilenet_v3, published_name
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.calibration import calibrate
from profiles.measuring.flops import CostCounter
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.models.plain_mobilenet import plain_mobilenet, published_shapes
from tests.gpu_worker.models.published import n_parameters, random_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet

    Tensors = dict[str, torch.Tensor]

NAME = "ofa-mobilenet-v3"
SMALLEST = control_of(depth=2, ratio=3, kernel=3, pixels=128)
LARGEST = control_of(depth=4, ratio=6, kernel=7)


@pytest.fixture(scope="module")
def filled_supernet() -> tuple[Supernet, Tensors]:
    """The supernet, and the tensors it was filled with."""
    tensors = random_tensors(published_shapes(), seed=0)
    supernet = ofa_mobilenet_v3().eval()
    own = supernet.model.state_dict()
    supernet.model.load_state_dict({name: tensors[published_name(name)] for name in own})
    return supernet, tensors


@pytest.fixture
def supernet(filled_supernet: tuple[Supernet, Tensors]) -> tuple[Supernet, Tensors]:
    """A copy that a test may change."""
    return copy.deepcopy(filled_supernet[0]), filled_supernet[1]


def images(n: int = 2, pixels: int = 64) -> torch.Tensor:
    """Return random images."""
    return torch.randn(n, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))


def assert_alike(supernet: Supernet, control: Control, plain: nn.Module, x: torch.Tensor) -> None:
    """Compare within 1e-5 of the largest logit."""
    with torch.inference_mode():
        found = supernet.run_with(supernet.settings_of(Subnet("drawn", control)), x)
        expected = plain(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("n_tuples", [4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_random_subnets_answer_as_plain_networks(
    filled_supernet: tuple[Supernet, Tensors], n_tuples: int
) -> None:
    """Random depths, expand ratios, kernel sizes and resolutions, and both ends of the space."""
    supernet, tensors = filled_supernet
    rng = np.random.default_rng(0)
    drawn = [supernet.controls.space.random(rng) for _ in range(n_tuples)]
    for control in (SMALLEST, LARGEST, *drawn):
        assert_alike(supernet, control, plain_mobilenet(tensors, control), images())


def test_the_ends_are_the_spaces_own(filled_supernet: tuple[Supernet, Tensors]) -> None:
    """The smallest and the largest tuple; at full resolution the images are what they were."""
    supernet, tensors = filled_supernet

    assert supernet.controls.space.smallest == SMALLEST
    assert supernet.controls.space.largest == LARGEST
    assert_alike(supernet, LARGEST, plain_mobilenet(tensors, LARGEST), images(1, 75))


@pytest.mark.parametrize(
    ("width", "n_million"),
    [(Fraction(1), 7.66476), pytest.param(Fraction(6, 5), 10.701632, marks=pytest.mark.slow)],
)
def test_both_published_widths_load_and_answer(width: Fraction, n_million: float, tmp_path: Path) -> None:
    """From a file with the published names; the parameters are counted without the matrices' own."""
    name = NAME if width == 1 else f"{NAME}-w1.2"
    shapes = published_shapes(width)
    tensors = random_tensors(shapes, seed=1)
    path = tmp_path / "published"
    torch.save({"state_dict": tensors}, path)
    kind = fitted(KINDS[name], str(path))
    supernet = resident(kind, str(path))
    matrices = sum(np.prod(shape) for key, shape in shapes.items() if key.endswith("_matrix"))
    control: Control = {"d": [2, 3, 4, 3, 2], "e": [3, 4, 6, 3] * 5, "ks": [7, 5, 3, 5] * 5, "r": [176]}

    assert len(shapes) == 475
    assert (n_parameters(shapes) - matrices) / 1e6 == pytest.approx(n_million, abs=1e-6)
    assert_alike(supernet, control, plain_mobilenet(tensors, control, width), images())


SPELLINGS: dict[str, Callable[[str], str]] = {
    "of older releases": lambda name: name,
    "of newer releases": lambda name: name.replace(".mobile_inverted_conv.", ".conv."),
    "all wrapped": lambda name: name.replace("classifier.linear.", "classifier.linear.linear."),
    "of several GPUs": lambda name: f"module.{name.replace('.mobile_inverted_conv.', '.conv.')}",
}


@pytest.mark.parametrize("form", SPELLINGS)
def test_each_releases_names_are_taken(form: str, tmp_path: Path) -> None:
    """And as many classes as the checkpoint has."""
    shapes = published_shapes(n_classes=7)
    tensors = {SPELLINGS[form](name): torch.zeros(shape) for name, shape in shapes.items() if shape}
    tensors |= {
        SPELLINGS[form](name): torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")
    }
    path = tmp_path / "checkpoint.safetensors"
    save_file(tensors, path)
    kind = fitted(KINDS[NAME], str(path))

    assert resident(kind, str(path)).model.get_parameter("classifier.bias").shape == (7,)
    assert kind.output_spec.shape == (7,)


def test_a_fault_is_named_as_the_file_spells_it(tmp_path: Path) -> None:
    """Of newer releases, and without the prefix that all names share."""
    spelled = SPELLINGS["of several GPUs"]
    tensors = {
        spelled(name): torch.zeros(shape) if shape else torch.tensor(0)
        for name, shape in published_shapes().items()
    }
    name = "blocks.3.conv.depth_conv.conv.5to3_matrix"
    tensors[f"module.{name}"] = torch.zeros(25, 25)
    path = tmp_path / "checkpoint.pt"
    torch.save(tensors, path)
    with pytest.raises(ConfigError, match=rf"tensor {name}: expected shape \(9, 9\), got \(25, 25\)"):
        resident(fitted(KINDS[NAME], str(path)), str(path))


DAMAGES: dict[str, tuple[Callable[[Tensors, str], object], str]] = {
    "dropped": (lambda tensors, name: tensors.pop(name), "tensor {name}: missing"),
    "renamed": (
        lambda tensors, name: tensors.update({f"{name}.old": tensors.pop(name)}),
        "tensor {name}: missing; tensor {name}.old: not one of this supernet's",
    ),
    "reshaped": (
        lambda tensors, name: tensors.update({name: torch.zeros(5)}),
        r"tensor {name}: expected shape \(.*\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "blocks.7.mobile_inverted_conv.depth_conv.conv.7to5_matrix",
        "blocks.6.mobile_inverted_conv.depth_conv.se.fc.expand.bias",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(damage: str, name: str, tmp_path: Path) -> None:
    """The error names the file and the tensor as the checkpoint does."""
    tensors = {
        key: torch.zeros(shape, dtype=torch.float16) if shape else torch.tensor(0)
        for key, shape in published_shapes().items()
    }
    edit, message = DAMAGES[damage]
    edit(tensors, name)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    with torch.device("meta"):  # nothing is drawn that is never used
        kind = fitted(KINDS[NAME], str(path))
        with pytest.raises(ConfigError, match=message.format(name=name)) as raised:
            resident(kind, str(path))

    assert str(path) in str(raised.value)


def test_weights_of_the_other_width_are_told(tmp_path: Path) -> None:
    """Not by hundreds of shapes."""
    path = tmp_path / "wide.pt"
    torch.save({"first_conv.conv.weight": torch.zeros(24, 3, 3, 3)}, path)

    with pytest.raises(ConfigError, match=r"wide.pt: expected weights of width 1, got those of width 1.2"):
        fitted(KINDS[NAME], str(path))
    assert fitted(KINDS[f"{NAME}-w1.2"], str(path)).name == f"{NAME}-w1.2"


def test_calibrated_statistics_are_those_of_the_subnets_own_batch(supernet: tuple[Supernet, Tensors]) -> None:
    """A subnet that was calibrated on a batch answers it as its plain network does by batch statistics."""
    found, tensors = supernet
    control = {**SMALLEST, "ks": [5] * 20, "d": [3] * 5}
    subnets = [Subnet("a", control), Subnet("largest", LARGEST)]
    found.host(subnets)
    x = images(4)
    found.set_statistics(calibrate(found, subnets, [x]))
    plain = plain_mobilenet(tensors, control).train()
    with torch.inference_mode():
        actuate(found, 1)
        found(x)
        actuate(found, 0)
        torch.testing.assert_close(found(x), plain(x), rtol=0, atol=1e-4 * float(plain(x).abs().max()))


def test_what_is_copied_is_the_smaller_kernels_alone(supernet: tuple[Supernet, Tensors]) -> None:
    """25 + 9 of 49 numbers of each depthwise kernel, once, however many subnets ran; weights stay."""
    found, tensors = supernet
    rng = np.random.default_rng(1)
    drawn = [found.controls.space.random(rng) for _ in range(6)]
    controls = [control_of(depth=4, ratio=3, kernel=kernel) for kernel in (3, 5)]
    found.host([Subnet(f"{n}", control) for n, control in enumerate((*controls, *drawn))])
    before = {name: tensor.data_ptr() for name, tensor in found.model.state_dict().items()}
    with torch.inference_mode():
        for row in range(8):
            actuate(found, row)
            found(images(1, 32))
    depthwise = sum(
        shape[0] for name, shape in published_shapes().items() if name.endswith("depth_conv.conv.conv.weight")
    )

    assert found.memory().packed == 4 * (25 + 9) * depthwise
    assert found.memory().packed < 0.05 * found.memory().shared
    assert before == {name: tensor.data_ptr() for name, tensor in found.model.state_dict().items()}
    assert_alike(found, SMALLEST, plain_mobilenet(tensors, SMALLEST), images())


@pytest.mark.parametrize("name", [NAME, pytest.param(f"{NAME}-w1.2", marks=pytest.mark.slow)])
def test_it_is_proved(name: str) -> None:
    """Each end of the depths, expand ratios, kernel sizes and resolutions, and some between."""
    kind = KINDS[name]
    supernet = resident(kind, "random")
    images = example_input(supernet, kind, torch.float32, 2)[..., :32, :32]
    proof = prove(supernet, images, most=3, checks_resident=False)

    assert proof.n_layers > 300
    assert proof.deviation < 1e-12


def test_a_worker_serves_it_trimmed() -> None:
    """Small subnets alone: what none of them uses is dropped, and the answers stay."""
    subnets = [
        Subnet("small", SMALLEST),
        Subnet("middle", control_of(depth=3, ratio=4, kernel=5, pixels=160)),
    ]
    batch = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    answers, sizes = [], []
    for trims in (False, True):
        executor = TorchExecutor.load(NAME, subnets, weights="random", placement=Placement(trims=trims))
        answers.append([executor.execute(row, batch) for row in range(2)])
        sizes.append(executor.memory().shared)

    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert sizes[1] < 0.75 * sizes[0]


def test_a_subnet_costs_what_its_plain_network_does() -> None:
    """Multiply-adds and kernels, without those that make smaller kernels once."""
    tensors, count = random_tensors(published_shapes(), seed=0), CostCounter(KINDS[NAME])
    control = {**SMALLEST, "ks": [3, 5] * 10, "r": [160]}
    plain = plain_mobilenet(tensors, control)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        plain(images(1, 224))
    layers = [one for one in plain.modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]

    assert count(control) == (counted.get_total_flops() // 2, len(layers))
