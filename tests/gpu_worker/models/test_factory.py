"""A plain function that returns a supernet, and an example of its input: served without a SupernetKind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpu_worker.cli import Asked, load_executor
from gpu_worker.engines.torch_executor import TorchExecutor, example_input
from gpu_worker.models.factory import read_example
from gpu_worker.models.kinds import as_floats, as_tokens, resident, supernet_kind
from gpu_worker.models.names import with_example
from gpu_worker.supernet.insertion import Elastic, insert
from profiles.measuring.declared import subnets_of
from superserve.errors import ConfigError
from superserve.subnet import Subnet, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_worker.supernet.supernet import Supernet

BUILT: list[torch.device] = []
"""Where `filled` has built a supernet, in order."""

WHOLE = [Subnet("whole", {"w": [1.0]})]


def layers() -> nn.Sequential:
    """Return a small network."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def filled() -> Supernet:
    """Build a supernet that is filled by hand: the first logit is the input's first number, rectified."""
    BUILT.append(torch.get_default_device())
    model = layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight[0, 0] = 1
    return insert(model, elastic=[Elastic("w", ["0"])])


def drawn() -> Supernet:
    """Build a supernet of random weights."""
    return insert(layers(), elastic=[Elastic("w", ["0"])])


class Classes(nn.Module):
    """Returns class numbers of tokens, and the length of the batch's sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(50, 4), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return (B,) and T."""
        return self.head(self.linear(self.embedding(tokens)).mean(1)).argmax(-1), tokens.shape[1]


def classes() -> Supernet:
    """Build a supernet that answers with whole numbers."""
    return insert(Classes(), elastic=[Elastic("w", ["linear"])])


def plain() -> nn.Module:
    """Build what is no supernet."""
    return layers()


class Twice(nn.Module):
    """Returns two tensors of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return both."""
        return [self.linear(x), x]


def twice() -> Supernet:
    """Build a supernet whose answer is one of two."""
    return insert(Twice(), elastic=[Elastic("w", ["linear"])])


def named(function: str, example: str | None) -> str:
    """Return the supernet's name, as the commands put it together."""
    return with_example(f"{__name__}:{function}", example)


def test_what_it_takes_and_answers_is_found_by_running_it() -> None:
    """The specs, and a name for profiles that holds no example."""
    kind = supernet_kind(named("filled", "4:float32"))
    tokens = supernet_kind(named("classes", "7:int64"))

    assert (kind.name, kind.preprocess) == (f"{__name__}:filled", as_floats)
    assert (kind.input_spec, kind.output_spec) == (TensorSpec("float32", (4,)), TensorSpec("float32", (3,)))
    assert tokens.preprocess is as_tokens
    assert (tokens.input_spec, tokens.output_spec) == (TensorSpec("int64", (7,)), TensorSpec("int64", ()))


def test_it_is_served_with_the_weights_that_it_loads() -> None:
    """Without --weights; it is built once to be described and served, however often its name is read."""
    BUILT.clear()
    name = named("filled", "4")  # float32 is the default
    for _ in range(3):
        supernet_kind(name)
    executor = TorchExecutor.load(name, WHOLE)
    answer = executor.execute(0, np.array([[5, 1, 1, 1], [-5, 1, 1, 1]], dtype=np.float32))

    assert answer.tolist() == [[5, 0, 0], [0, 0, 0]]
    assert [torch.device("cpu")] == BUILT


@pytest.mark.parametrize("no_trim", [None, True])
def test_a_worker_is_given_it_by_options(no_trim: bool | None, tmp_path: Path) -> None:
    """--supernet, --example-input and a profile that names the function; --no-trim keeps what is unused."""
    listed, path = tmp_path / "subnets.json", tmp_path / "profile.json"
    listed.write_text('[{"name": "half", "control": {"w": [0.5]}, "accuracy": 50}]')
    path.write_bytes(subnets_of(str(listed), f"{__name__}:filled").to_json())
    asked = Asked(f"{__name__}:filled", example_input="4:float32", profile=str(path), no_trim=no_trim)
    profile, executor = load_executor(asked, threads=1)

    assert isinstance(executor, TorchExecutor)
    assert profile.supernet == executor.kind.name
    assert executor.execute(0, np.full((1, 4), 7, np.float32)).tolist() == [[7, 0, 0]]
    n_numbers = 3 * 4 + 3 + 3 * 3 + 3 if no_trim is None else 6 * 4 + 6 + 3 * 6 + 3
    assert executor.memory().shared == 4 * n_numbers


def test_a_checkpoint_still_replaces_its_weights(tmp_path: Path) -> None:
    """--weights FILE fills it as it fills a kind."""
    path = tmp_path / "weights.safetensors"
    state = {name: torch.zeros_like(tensor) for name, tensor in layers().state_dict().items()}
    state["2.bias"] = torch.tensor([1.0, 2.0, 3.0])
    save_file(state, path)
    executor = TorchExecutor.load(named("filled", "4:float32"), WHOLE, weights=str(path))

    assert executor.execute(0, np.ones((1, 4), np.float32)).tolist() == [[1, 2, 3]]


def test_random_weights_are_the_same_in_every_process() -> None:
    """Two workers draw the same: their answers may replace each other."""
    first, second = (TorchExecutor.load(named("drawn", f"4:{dtype}"), WHOLE) for dtype in ("float32", "<f4"))

    assert first.fingerprint == second.fingerprint


def test_on_the_meta_device_it_is_built_again() -> None:
    """What was built to be described has numbers."""
    kind = supernet_kind(named("drawn", "1x4:float32"))
    with torch.device("meta"):
        assert kind.build().device.type == "meta"
    assert resident(kind, None).device.type == "cpu"


def test_a_file_is_an_example(tmp_path: Path) -> None:
    """Its numbers are what the worker tries the model with."""
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([49, 48, 47]))
    kind = supernet_kind(named("classes", str(path)))

    assert kind.input_spec == TensorSpec("int64", (3,))
    assert example_input(resident(kind, None), kind, torch.float32, 2).tolist() == [[49, 48, 47]] * 2


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [("3x2", "float32", (3, 2)), ("3x2:int32", "int32", (3, 2)), ("5:uint8", "uint8", (5,))],
)
def test_an_example_is_a_shape_and_a_dtype(text: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Random numbers: of whole ones 0 and 1, which every vocabulary has."""
    example = read_example(text)

    assert (example.dtype, example.shape) == (np.dtype(dtype), shape)
    assert np.isfinite(example.astype(np.float64)).all()


@pytest.mark.parametrize(
    ("function", "example", "message"),
    [
        ("filled", None, "expected a SupernetKind, got function; a function that returns a supernet needs"),
        ("filled", "axb", "--example-input: expected a shape and dtype such as .*, got 'axb'"),
        ("filled", "4:float33", "dtype: expected a NumPy dtype name, got 'float33'"),
        ("filled", "0", r"shape: expected sizes of at least 1, got \(0,\)"),
        ("filled", "none.npy", "--example-input: none.npy: expected a file that np.save wrote"),
        ("filled", "5:float32", r"it cannot run the example input float32 \(5,\): \w+: "),
        ("plain", "4", "expected a function that returns a Supernet, as `insert` does, got Sequential"),
        ("twice", "4", r"an answer for each of 2 queries, got \[\(2, 4\), \(2, 4\)\]: return that one"),
        ("KIND", "4", "--example-input: .*:KIND is a SupernetKind, which states its input itself"),
    ],
)
def test_what_cannot_be_described_is_refused(function: str, example: str | None, message: str) -> None:
    """The error names the function, or the option, and what was expected."""
    with pytest.raises(ConfigError, match=message):
        supernet_kind(named(function, example))


KIND: Any = supernet_kind("digits")
