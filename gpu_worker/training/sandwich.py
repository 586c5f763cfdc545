"""One step: the largest subnet, the smallest and a few that are drawn learn from one batch."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from gpu_worker.training.recipe import PRECISIONS, apart, seed_all, seed_of
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.supernet.control import Control
    from gpu_worker.supernet.supernet import Supernet
    from gpu_worker.training.recipe import Recipe

    Settings = tuple[Any, ...]


def _as_it_is(value: Any) -> Any:
    return value


class Adapter(NamedTuple):
    """What lies between data and model.

    Attributes:
        inputs: From a batch's inputs, on the device, to the model's.
        outputs: From what the model returns to the tensor that is judged.
    """

    inputs: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    outputs: Callable[[Any], torch.Tensor] = _as_it_is


class Lesson(NamedTuple):
    """One batch, on the device.

    Attributes:
        inputs: As the model takes them.
        targets: Labels or numbers; None if there are none, and the network as it was teaches.
    """

    inputs: torch.Tensor
    targets: torch.Tensor | None


def batch_of(given: Any, device: torch.device, adapter: Adapter) -> Lesson:
    """Return what an iterable of batches gave, on the device.

    Raises:
        ConfigError: It is neither a tensor, nor a pair of tensors.
    """
    pair = given if isinstance(given, tuple | list) else (given,)
    if not 1 <= len(pair) <= 2 or not all(isinstance(one, torch.Tensor) for one in pair):
        kinds = ", ".join(type(one).__name__ for one in pair)
        raise ConfigError(
            f"data: expected batches of (inputs, targets) or inputs, all tensors, got ({kinds})"
        )
    if not len(pair[0]):
        raise ConfigError("data: expected batches of at least one query, got an empty one")
    inputs, *targets = (one.to(device, non_blocking=True) for one in pair)
    if targets and len(targets[0]) != len(inputs):
        raise ConfigError(f"data: expected a target for each of {len(inputs)} inputs, got {len(targets[0])}")
    return Lesson(adapter.inputs(inputs), targets[0] if targets else None)


class Sandwich:
    """What steps change: weights, optimiser, learning rate.

    Args:
        supernet: In float32, on its device; changed in place.
        recipe: How it is trained.
        adapter: What lies between data and model.
    """

    def __init__(self, supernet: Supernet, recipe: Recipe, adapter: Adapter) -> None:
        self.supernet, self.recipe, self.adapter = supernet, recipe, adapter
        self.began = fingerprint(supernet)
        learning = [parameter for parameter in supernet.parameters() if parameter.requires_grad]
        if not learning:
            raise ConfigError("training: expected parameters that require gradients, got none")
        self._learning = learning
        self.optimiser = torch.optim.AdamW(
            learning, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, recipe.learning_rate, total_steps=max(2, recipe.steps)
        )
        device = supernet.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "float16")
        self._autocast = PRECISIONS[recipe.precision]
        self._device = device
        self._before: Supernet | None = None
        self._has_targets: bool | None = None

    def keep_the_original(self) -> None:
        """Keep a copy of the network as it is: it teaches the largest where batches have no targets."""
        self._before = copy.deepcopy(self.supernet).eval().requires_grad_(False)

    def step(self, batch: Lesson, number: int) -> float:
        """Learn from a batch; return the loss of the first subnet, the largest of a sandwich.

        Raises:
            ConfigError: The batch's targets do not fit, or the loss is no number.
        """
        has_targets = batch.targets is not None
        if self._has_targets not in (None, has_targets):
            raise ConfigError("data: expected targets in every batch or in none, got some of each")
        self._has_targets = has_targets
        if has_targets:
            self._before = None  # nothing needs it
        with apart():
            return self._step(batch, number)

    def _step(self, batch: Lesson, number: int) -> float:
        self.supernet.train()
        self.optimiser.zero_grad()
        first, *others = self.recipe.controls(self.supernet.controls.space, number)
        learnt, share = self.recipe.learnt(), self.recipe.distilled
        outputs = self._outputs(first, batch.inputs, seed_of(self.recipe.seed, "step", number, 0))
        if batch.targets is None:
            loss = learnt.from_teacher(outputs, self.original(batch.inputs))
        else:
            learnt.check(outputs, batch.targets)
            loss = learnt.from_targets(outputs, batch.targets)
        self._backward(loss)
        teacher = outputs.detach()
        for place, control in enumerate(others, start=1):
            outputs = self._outputs(control, batch.inputs, seed_of(self.recipe.seed, "step", number, place))
            student = learnt.from_teacher(outputs, teacher)
            if batch.targets is not None:
                student = share * student + (1 - share) * learnt.from_targets(outputs, batch.targets)
            self._backward(student)
        self._update()
        found = float(loss.detach())
        if not math.isfinite(found):
            raise ConfigError(
                f"step {number + 1}: the loss is {found}: expected a number; try a lower learning rate"
            )
        return found

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _update(self) -> None:
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self._learning, self.recipe.clip_norm)
        self.scaler.step(self.optimiser)
        scale = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else gradients overflowed, and nothing was learnt
            self.schedule.step()

    def _outputs(self, control: Control, inputs: torch.Tensor, seed: int) -> torch.Tensor:
        """Run a subnet with random numbers of its own.

        A subnet's first pass may begin again, or run a block apart, and draw more for that: where it has
        drawn at all it is repeated, or what is drawn would depend on what had run before.
        """
        settings = self.supernet.settings_of(Subnet("learning", control))
        is_known = self.supernet.is_followed(settings)
        seed_all(seed)
        before = None if is_known else self._generators()
        outputs = self._run(self.supernet, settings, inputs)
        if before is not None and self._generators() != before:
            seed_all(seed)
            outputs = self._run(self.supernet, settings, inputs)
        return outputs

    def _generators(self) -> tuple[object, ...]:
        """Return where every generator is that a model may draw from."""
        states = [torch.random.get_rng_state()]
        if self._device == "cuda":
            states.append(torch.cuda.get_rng_state(self.supernet.device))
        numpys: Any = np.random.get_state(legacy=False)["state"]
        drawn = (numpys["key"].tobytes(), numpys["pos"], random.getstate())
        return (*(state.numpy().tobytes() for state in states), *drawn)

    def _run(self, supernet: Supernet, settings: Settings, inputs: torch.Tensor) -> torch.Tensor:
        is_cast = self._autocast is not None
        with torch.autocast(self._device, dtype=self._autocast or torch.bfloat16, enabled=is_cast):
            outputs = self.adapter.outputs(supernet.run_with(settings, inputs))
        if not isinstance(outputs, torch.Tensor) or len(outputs) != len(inputs):
            raise ConfigError(
                f"training: expected a model that gives one tensor with {len(inputs)} answers, got "
                f"{type(outputs).__name__}"
            )
        return outputs.float() if outputs.is_floating_point() else outputs

    def original(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the whole network answered before it was trained."""
        assert self._before is not None, "the caller has kept it"
        whole = Subnet("largest", self._before.controls.space.largest)
        with torch.no_grad():
            return self._run(self._before, self._before.settings_of(whole), inputs)

    # --- its state ----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that further steps depend on."""
        return {
            "model": self.supernet.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same recipe and model."""
        self.supernet.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def fingerprint(supernet: Supernet) -> str:
    """Return a hash of a supernet's tensors: names, shapes and numbers."""
    found = hashlib.blake2b(digest_size=16)
    tensors = itertools.chain(supernet.model.named_parameters(), supernet.model.named_buffers())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
        found.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return found.hexdigest()
