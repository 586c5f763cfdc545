"""A plain function that returns a supernet, served by an example of what it takes.

    --supernet my_package.my_module:build --example-input 3x224x224:float32

The example is the shape and dtype of one query, without the batch axis, or a .npy file that holds one. What
the supernet answers is found by running it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from gpu_worker.supernet.supernet import Supernet
from superserve.errors import ConfigError
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

SEED = 20250428
"""Of the random numbers that a function draws weights from: every worker builds the same."""

_BATCH = 2  # queries that the example is run with, which shows the batch axis of the output


class Described(NamedTuple):
    """What a kind needs to know of a function.

    Attributes:
        build: Returns the supernet, the first time the one that was run.
        example: One query.
        input_spec: Its dtype and shape.
        output_spec: Those of its answer.
    """

    build: Callable[[], Supernet]
    example: npt.NDArray[Any]
    input_spec: TensorSpec
    output_spec: TensorSpec


def described(name: str, function: Callable[[], object], text: str) -> Described:
    """Call a function and run what it returns on an example.

    Args:
        name: Of the function, for errors.
        function: Returns a supernet; it takes nothing.
        text: The example, as the command line has it.

    Raises:
        ConfigError: Naming the function, and what it returned, or why that could not run the example.
    """
    example = read_example(text)
    supernet = _built(name, function)
    batch = torch.from_numpy(np.stack([example] * _BATCH))
    try:
        with torch.inference_mode():
            outputs = supernet(batch)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"supernet {name}: it cannot run the example input {example.dtype} {example.shape}: {reason}"
        ) from error
    return Described(
        _FirstOnce(name, function, supernet),
        example,
        TensorSpec(str(example.dtype), example.shape),
        _output_spec(name, outputs),
    )


def read_example(text: str) -> npt.NDArray[Any]:
    """Return one query: of a .npy file, or random of a shape and dtype such as "3x224x224:float32".

    Raises:
        ConfigError: If there is no such file, or it is no shape and dtype.
    """
    if text.endswith(".npy"):
        try:
            return np.ascontiguousarray(np.load(text, allow_pickle=False))
        except (OSError, EOFError, ValueError) as error:
            raise ConfigError(
                f"--example-input: {text}: expected a file that np.save wrote: {error}"
            ) from error
    shape, _, dtype = text.partition(":")
    try:
        spec = TensorSpec(dtype or "float32", tuple(int(size) for size in shape.split("x")))
    except ValueError as error:
        raise ConfigError(
            "--example-input: expected a shape and dtype such as 3x224x224:float32, or a .npy file, "
            f"got {text!r}"
        ) from error
    rng = np.random.default_rng(0)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(spec.shape).astype(spec.dtype)
    return rng.integers(0, 2, spec.shape).astype(spec.dtype)


def _built(name: str, function: Callable[[], object]) -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        built = function()
    if not isinstance(built, Supernet):
        raise ConfigError(
            f"supernet {name}: expected a function that returns a Supernet, as `insert` does, got "
            f"{type(built).__name__}"
        )
    return built.eval()


def _output_spec(name: str, outputs: object) -> TensorSpec:
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    answers = [tensor for tensor in tensors if tensor.dim() and len(tensor) == _BATCH]
    if len(answers) != 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ConfigError(
            f"supernet {name}: expected one tensor with an answer for each of {_BATCH} queries, "
            f"got {shapes}: return that one, or describe it as a SupernetKind, whose output_spec tells which"
        )
    dtype = torch.float32 if answers[0].dtype == torch.bfloat16 else answers[0].dtype  # NumPy has no bfloat16
    return TensorSpec(str(dtype).removeprefix("torch."), tuple(answers[0].shape[1:]))


class _FirstOnce:
    """Builds a supernet: gives out the one that was built already, and calls the function from then on."""

    def __init__(self, name: str, function: Callable[[], object], first: Supernet) -> None:
        self._name, self._function = name, function
        self._first: Supernet | None = first

    def __call__(self) -> Supernet:
        if torch.get_default_device().type == "cpu" and self._first is not None:
            first, self._first = self._first, None
            return first
        return _built(self._name, self._function)
