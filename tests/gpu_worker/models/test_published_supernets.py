"""OFA-ResNet50 and DynaBERT, filled with random tensors of the published names and shapes.

The references are plain networks of each subnet's own sizes, in `plain_ofa` and `plain_dynabert`,
which share nothing with the slicing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.models.dynabert import MNLI, DynaBertArchitecture, dynabert
from gpu_worker.models.kinds import KINDS, fitted, resident
from gpu_worker.models.ofa_resnet50 import extracted, make_divisible, ofa_resnet50, published_name
from gpu_worker.supernet.checkpoints import load_checkpoint
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.models.plain_dynabert import plain_dynabert
from tests.gpu_worker.models.plain_ofa import plain_ofa
from tests.gpu_worker.models.published import dynabert_shapes, ofa_resnet50_shapes, random_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet

N_TUPLES = pytest.mark.parametrize("n_tuples", [24, pytest.param(200, marks=pytest.mark.slow)])
WORDS = 100  # a vocabulary so small costs no time to fill


@pytest.fixture(scope="module")
def ofa() -> tuple[Supernet, dict[str, torch.Tensor]]:
    """OFA-ResNet50, and the tensors it was filled with."""
    tensors = random_tensors(ofa_resnet50_shapes(), seed=0)
    supernet = ofa_resnet50().eval()
    own = supernet.model.state_dict()
    supernet.model.load_state_dict({name: tensors[published_name(name)] for name in own})
    return supernet, tensors


@pytest.fixture(scope="module")
def bert() -> tuple[Supernet, dict[str, torch.Tensor]]:
    """DynaBERT with a small vocabulary, and the tensors it was filled with."""
    tensors = random_tensors(dynabert_shapes(WORDS), seed=0)
    supernet = dynabert(DynaBertArchitecture(n_tokens=WORDS)).eval()
    supernet.model.load_state_dict(tensors)
    return supernet, tensors


def assert_alike(supernet: Supernet, control: Control, plain: nn.Module, x: torch.Tensor) -> None:
    """Compare within a relative 1e-4 of the largest logit."""
    with torch.inference_mode():
        found = supernet.run_with(supernet.settings_of(Subnet("drawn", control)), x)
        expected = plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@N_TUPLES
@pytest.mark.timeout(300)
def test_random_subnets_of_ofa_resnet50_answer_as_plain_networks(
    ofa: tuple[Supernet, dict[str, torch.Tensor]], n_tuples: int
) -> None:
    """Random control tuples, actuated, against networks of their own sizes."""
    supernet, tensors = ofa
    rng = np.random.default_rng(0)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for _ in range(n_tuples):
        control = supernet.controls.space.random(rng)
        assert_alike(supernet, control, plain_ofa(tensors, control), x)


@N_TUPLES
@pytest.mark.timeout(300)
def test_random_subnets_of_dynabert_answer_as_plain_networks(
    bert: tuple[Supernet, dict[str, torch.Tensor]], n_tuples: int
) -> None:
    """Random control tuples, actuated, against networks of their own sizes; one query is padded."""
    supernet, tensors = bert
    rng = np.random.default_rng(0)
    x = torch.randint(1, WORDS, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    x[:, 1] = torch.tensor([0, 0, 0, 1, 1, 1])
    x[1, :, 4:] = 0
    for _ in range(n_tuples):
        control = supernet.controls.space.random(rng)
        assert_alike(supernet, control, plain_dynabert(tensors, control["d"][0], control["w"]), x)


def test_widths_off_the_grid_of_dynabert_are_rounded_as_its_authors_do(
    bert: tuple[Supernet, dict[str, torch.Tensor]],
) -> None:
    """0.35 keeps 4 heads and 1,024 units; the subnet answers as a network of these sizes."""
    supernet, tensors = bert
    control: Control = {"d": [6], "w": [0.35, 0.3, 0.375, 0.55, 5 / 12, 0.9] * 2}
    sizes = supernet.controls.sizes_of(control).outputs

    assert (sizes["heads 0"], sizes["units 0"]) == (4 * 64, 1024)
    x = torch.randint(1, WORDS, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    assert_alike(supernet, control, plain_dynabert(tensors, 6, control["w"]), x)


def test_the_ends_of_both_spaces_answer_as_plain_networks(
    ofa: tuple[Supernet, dict[str, torch.Tensor]], bert: tuple[Supernet, dict[str, torch.Tensor]]
) -> None:
    """The smallest and the largest subnet, at an odd image size, and tokens of several lengths."""
    images = torch.randn(1, 3, 75, 75, generator=torch.Generator().manual_seed(0))
    for control in (ofa[0].controls.space.smallest, ofa[0].controls.space.largest):
        assert_alike(ofa[0], control, plain_ofa(ofa[1], control), images)
    for length, control in ((1, bert[0].controls.space.smallest), (9, bert[0].controls.space.largest)):
        tokens = torch.ones(1, 2, length, dtype=torch.int64)
        assert_alike(bert[0], control, plain_dynabert(bert[1], control["d"][0], control["w"]), tokens)


@pytest.mark.parametrize(
    ("value", "channels"), [(1, 8), (12, 16), (20.8, 24), (41.6, 40), (51, 48), (166.4, 168), (2048, 2048)]
)
def test_channels_are_rounded_to_eights(value: float, channels: int) -> None:
    """By hand: 12 rounds up at the half, 51 down to 48, which is no less than 0.9 of it."""
    assert make_divisible(value) == channels


def test_a_subnet_on_its_own_has_the_plain_networks_sizes() -> None:
    """What benchmarks extract has the parameters of the reference, tensor by tensor."""
    tensors = random_tensors(ofa_resnet50_shapes(), seed=0)
    control: Control = {"d": [2, 0, 1, 2, 0], "e": [0.2, 0.25, 0.35] * 6, "w": [0, 1, 2, 1, 0, 2]}
    own = [tuple(parameter.shape) for parameter in extracted(control).parameters()]
    plain = [tuple(parameter.shape) for parameter in plain_ofa(tensors, control).parameters()]

    assert sorted(own) == sorted(plain)


@pytest.mark.parametrize(
    ("kind", "control", "message"),
    [
        (
            "ofa-resnet50",
            {"d": [0, 3, 0, 0, 0]},
            "control d, stage 1: expected a whole number from 0 to 2, got 3",
        ),
        (
            "ofa-resnet50",
            {"e": [0.3] * 18},
            r"control e, block 0 \(stage 1, block 0\): expected one of 0.2, 0.25, 0.35, got 0.3",
        ),
        (
            "ofa-resnet50",
            {"w": [0, 0, 0, 0, 0, -1]},
            "control w, stage 4: expected a whole number from 0 to 2, got -1",
        ),
        ("dynabert", {"d": [13]}, "control d, stage 0: expected a whole number from 1 to 12, got 13"),
        (
            "dynabert",
            {"w": [0.25] * 11 + [0.2]},
            "control w, block 11: expected a fraction from 0.25 to 1, got 0.2",
        ),
    ],
)
def test_a_tuple_out_of_bounds_is_named(kind: str, control: Control, message: str) -> None:
    """The error names the stage or block, the value and the bound."""
    with torch.device("meta"):
        controls = KINDS[kind].build().controls
    with pytest.raises(ConfigError, match=message):
        controls.sizes_of({**controls.space.smallest, **control})


# --- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(params=["ofa-resnet50", "dynabert"])
def published(request: pytest.FixtureRequest) -> tuple[str, dict[str, torch.Tensor]]:
    """A kind, and tensors of the published names and shapes, as small in memory as they can be."""
    shapes = ofa_resnet50_shapes() if request.param == "ofa-resnet50" else dynabert_shapes()
    return request.param, {
        name: torch.zeros(shape, dtype=torch.float16) if shape else torch.tensor(0)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped.pt"])
def test_a_published_checkpoint_loads(
    published: tuple[str, dict[str, torch.Tensor]], form: str, tmp_path: Path
) -> None:
    """From safetensors, from a dictionary, and from one under "state_dict", by its own names."""
    kind, tensors = published
    name = "classifier.linear.linear.bias" if kind == "ofa-resnet50" else "classifier.bias"
    tensors[name] = torch.arange(len(tensors[name]), dtype=torch.float16)
    path = tmp_path / f"checkpoint.{form}"
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if form == "wrapped.pt" else tensors, path)
    supernet = resident(KINDS[kind], str(path))

    bias = supernet.model.get_parameter("classifier.bias")
    assert bias.tolist() == tensors[name].tolist()
    assert bias.dtype == torch.float32


@pytest.mark.parametrize("form", ["safetensors", "pt", "prefixed.pt"])
@pytest.mark.parametrize("n_classes", [1, 2, 3, 5])
def test_dynabert_has_as_many_classes_as_its_checkpoint(n_classes: int, form: str, tmp_path: Path) -> None:
    """SST-2 has two, STS-B one: the classifier, and what the worker says it answers, follow."""
    prefix = "module." if form == "prefixed.pt" else ""
    tensors = {f"{prefix}classifier.weight": torch.zeros(n_classes, 768), f"{prefix}other": torch.zeros(1)}
    path = tmp_path / f"checkpoint.{form}"
    save_file(tensors, path) if form == "safetensors" else torch.save(tensors, path)
    kind = fitted(KINDS["dynabert"], str(path))
    with torch.device("meta"):
        classifier = kind.build().model.get_parameter("classifier.weight")

    assert (kind.output_spec.shape, tuple(classifier.shape)) == ((n_classes,), (n_classes, 768))
    assert fitted(KINDS["digits"], str(path)) is KINDS["digits"]
    assert fitted(KINDS["dynabert"], "random") is KINDS["dynabert"]
    with pytest.raises(ConfigError, match=r"absent: expected a safetensors or .pt file"):
        fitted(KINDS["dynabert"], str(tmp_path / "absent"))


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], object], str]] = {
    "dropped": (lambda tensors, name: tensors.pop(name), "tensor {name}: missing"),
    "renamed": (
        lambda tensors, name: tensors.update({f"{name}.old": tensors.pop(name)}),
        "tensor {name}: missing; tensor {name}.old: not one of this supernet's",
    ),
    "reshaped": (
        lambda tensors, name: tensors.update({name: torch.zeros(5, dtype=torch.float16)}),
        r"tensor {name}: expected shape \(.*\), got \(5,\)",
    ),
    "of another type": (
        lambda tensors, name: tensors.update({name: tensors[name].int()}),
        "tensor {name}: expected torch.float32, got torch.int32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(
    published: tuple[str, dict[str, torch.Tensor]], damage: str, tmp_path: Path
) -> None:
    """The error names the file and the tensor as the checkpoint does, and changes nothing."""
    kind, tensors = published
    name = (
        "blocks.7.conv2.bn.bn.weight" if kind == "ofa-resnet50" else "bert.encoder.layer.3.output.dense.bias"
    )
    edit, message = DAMAGES[damage]
    edit(tensors, name)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path)
    with torch.device("meta"):
        model = KINDS[kind].build().model
    with pytest.raises(ConfigError, match=message.format(name=name)) as raised:
        load_checkpoint(model, path, published_name=KINDS[kind].published_name)

    assert str(path) in str(raised.value)


def test_a_file_of_another_model_is_told_in_a_few_lines(tmp_path: Path) -> None:
    """Hundreds of faults are counted, and only the first is shown."""
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with torch.device("meta"):
        model = KINDS["dynabert"].build().model
    with pytest.raises(
        ConfigError, match=r"word_embeddings.weight: missing; .*; and 197 more; its tensors are weight$"
    ):
        load_checkpoint(model, path)


@pytest.mark.parametrize("content", [b"not tensors", b"", b"text", b"(hello", b"X"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    """Random bytes, an empty file and a missing file are refused as no checkpoint."""
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(content)
    for candidate in (path, tmp_path / f"absent{suffix}"):
        with pytest.raises(ConfigError, match=r"expected a safetensors or .pt file"):
            resident(KINDS["digits"], str(candidate))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Only tensors are unpickled: a file that holds anything else is refused before it runs."""
    path = tmp_path / "evil.pt"
    torch.save({"weight": tmp_path}, path)
    with pytest.raises(ConfigError, match=r"expected a safetensors or .pt file"):
        resident(KINDS["digits"], str(path))
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="expected a dictionary of tensors"):
        resident(KINDS["digits"], str(path))


def test_a_kind_without_weights_asks_for_them() -> None:
    """Only digits comes with a checkpoint; the others want a path, or "random"."""
    with pytest.raises(
        ConfigError, match="ofa-resnet50 comes without any: expected a checkpoint's path, or 'random'"
    ):
        resident(KINDS["ofa-resnet50"], None)


def test_mnli_is_bert_base() -> None:
    """768 wide, three classes."""
    assert (MNLI.width, MNLI.n_classes) == (768, 3)
