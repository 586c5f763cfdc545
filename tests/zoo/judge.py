"""A row of the zoo, and its outcome: right, refused, or wrong, which no row may be."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpu_worker.supernet.control import Control

TOLERANCE = 5e-5
"""Largest error, relative to the largest number that is expected, of an answer that is right."""

PROOF = "gpu_worker.proof.prove"
IS_PROVEN = importlib.util.find_spec("gpu_worker.proof") is not None
"""Whether a worker proves its subnets at its start: then what insertion cannot follow is refused there."""


class Verdict(Enum):
    """How a row came out."""

    RIGHT = "right"
    REFUSED = "refused"
    WRONG = "WRONG"


class Outcome(NamedTuple):
    """A verdict, the relative error if there was an answer, and why if there was none."""

    verdict: Verdict
    error: float | None = None
    why: str = ""

    def __str__(self) -> str:
        """Return it for a table."""
        if self.verdict is Verdict.REFUSED:
            return f"refused: {self.why}"
        return (
            f"{self.verdict.value} ({self.why or (f'max error {self.error:.0e}' if self.error else 'exact')})"
        )


@dataclass(frozen=True)
class Row:
    """A network, what is elastic of it, and a network that has the subnet's size from the start.

    Attributes:
        network: Its name.
        what: "depth", "hidden units", "heads", ...
        make: Returns it with random weights.
        oracle: From a copy of it to the smaller network; shares no code with the operators.
        control: The subnet.
        stages: What depth chooses from.
        elastic: What width chooses from.
        inputs: Returns the first argument of the network, for several queries.
    """

    network: str
    what: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    oracle: Callable[[nn.Module], nn.Module]
    control: Control
    stages: Sequence[Stage] = ()
    elastic: Sequence[Elastic] = field(default=())

    @property
    def name(self) -> str:
        """A name for the test."""
        return f"{self.network}, {self.what}"


def judge(row: Row) -> Outcome:
    """Return how the subnet of a row answers, whole and trimmed, and the largest subnet beside it."""
    torch.manual_seed(0)
    model = randomized(row.make().eval())
    plain, x = copy.deepcopy(model), row.inputs()
    with torch.no_grad():
        whole, expected = first_tensor(plain(x)), first_tensor(row.oracle(copy.deepcopy(plain)).eval()(x))
    apart = relative_error(whole, expected)
    assert apart > 2 * TOLERANCE, f"{row.name}: expected an answer apart from the whole's, got {apart}"
    try:
        supernet = insert(model, stages=row.stages, elastic=row.elastic).eval()
        subnets = [Subnet("smaller", row.control), Subnet("whole", supernet.controls.space.largest)]
        if IS_PROVEN:
            importlib.import_module(PROOF).prove(supernet, x, subnets=subnets)
        supernet.host(subnets)
        answers = [_answer(supernet, number, x) for number in range(2)]
        supernet.host([Subnet("smaller", row.control)])
        supernet.trim(x, x[:1])
        answers.append(_answer(supernet, 0, x))
    except Exception as error:  # noqa: BLE001  a loud error of any kind is a refusal
        return Outcome(Verdict.REFUSED, why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    errors = [
        relative_error(answer, right)
        for answer, right in zip(answers, (expected, whole, expected), strict=True)
    ]
    verdict = Verdict.RIGHT if max(errors) <= TOLERANCE else Verdict.WRONG
    return Outcome(verdict, max(errors), "" if verdict is Verdict.RIGHT else f"errors {errors}")


def _answer(supernet: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    actuate(supernet, number)
    with torch.inference_mode():
        return first_tensor(supernet(x))


def first_tensor(output: Any) -> torch.Tensor:
    """Return a network's main output: itself, or the first of a tuple, a list or a dictionary."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest number; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


def randomized(model: nn.Module) -> nn.Module:
    """Draw weights that keep activations at about one, and what layers begin with as zeros or ones.

    As networks are initialised, much of them has hardly a say in the answer.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if not tensor.is_floating_point() or not tensor.numel() or "inv_freq" in name:
                    continue
                if name == "running_var":
                    tensor.uniform_(0.5, 1.5)
                elif tensor.dim() > 1 and not isinstance(module, nn.Embedding):
                    tensor.normal_(0, 1.5 * tensor[0].numel() ** -0.5)
                elif float(tensor.min()) == float(tensor.max()):
                    tensor.add_(0.3 * torch.randn_like(tensor))
    return model


# --- oracles --------------------------------------------------------------------------------


def built_smaller(make: Callable[[], nn.Module], renamed: Callable[[str], str] = str) -> Any:
    """Return an oracle: a network that `make` builds smaller, filled with the first part of each tensor.

    Args:
        make: Builds it.
        renamed: From a name in the smaller network's state dict to the whole's.
    """

    def oracle(whole: nn.Module) -> nn.Module:
        small, state = make(), whole.state_dict()
        small.load_state_dict(
            {
                name: state[renamed(name)][tuple(slice(n) for n in tensor.shape)]
                for name, tensor in small.state_dict().items()
            }
        )
        return small

    return oracle


def kept_blocks(prefix: str, kept: Sequence[int]) -> Callable[[str], str]:
    """Return what renames block i below `prefix` to block kept[i]."""

    def renamed(name: str) -> str:
        if not name.startswith(prefix):
            return name
        number, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{kept[int(number)]}{dot}{rest}"

    return renamed


def ignoring(kept: Mapping[str, int | Sequence[int]]) -> Any:
    """Return an oracle: the whole, in which some layers multiply all other inputs by 0.

    Args:
        kept: By a layer's path, in which each `*` stands for any one name: the inputs that count, or
            the number of first ones.
    """

    def oracle(whole: nn.Module) -> nn.Module:
        with torch.no_grad():
            for pattern, inputs in kept.items():
                layers = [module for path, module in whole.named_modules() if _matches(path, pattern)]
                assert layers, pattern
                for layer in layers:
                    weight = layer.weight
                    assert isinstance(weight, torch.Tensor)
                    axis = 0 if type(layer).__name__ == "Conv1D" else 1  # GPT-2's has inputs first
                    counts = list(range(inputs)) if isinstance(inputs, int) else list(inputs)
                    others = [n for n in range(weight.shape[axis]) if n not in set(counts)]
                    assert others, pattern
                    weight.index_fill_(axis, torch.tensor(others), 0)
        return whole

    return oracle


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        want in ("*", part) for part, want in zip(parts, wanted, strict=True)
    )


def without(container: str, kept: Sequence[int]) -> Any:
    """Return an oracle: the whole, in which a container has only these of its blocks."""

    def oracle(whole: nn.Module) -> nn.Module:
        blocks = whole.get_submodule(container)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        fewer = type(blocks)(
            *([blocks[n] for n in kept],) if isinstance(blocks, nn.ModuleList) else (blocks[n] for n in kept)
        )
        parent, _, name = container.rpartition(".")
        setattr(whole.get_submodule(parent), name, fewer)
        return whole

    return oracle
