"""Train the digits supernet and write the weights that are shipped.

    python -m gpu_worker.models.train_digits

The recipe is `gpu_worker.training`'s. Which subnets are worth serving is another question, which
`profiles search --supernet digits` answers. `training` and `held_out` are also data for `profiles train`:

    profiles train --supernet digits --weights random --epochs 20 --learning-rate 0.003 \
        --data gpu_worker.models.train_digits:training --test-data gpu_worker.models.train_digits:held_out \
        --out digits.safetensors

Deterministic in its seed for one torch build and number of threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
from safetensors.torch import save

from gpu_worker.models import digits
from gpu_worker.models.kinds import KINDS, digits_data
from gpu_worker.models.names import DIGITS
from gpu_worker.training.judge import ends_and_some, judge, settle
from gpu_worker.training.loop import train
from gpu_worker.training.recipe import Recipe
from gpu_worker.training.sandwich import Adapter
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_worker.supernet.supernet import Supernet

    Pair = tuple[torch.Tensor, torch.Tensor]

_BATCH_SIZE = 96
_LEARNING_RATE = 3e-3


class AugmentedDigits:
    """The training originals in batches: drawn again in each pass, turned, shifted and noisy."""

    def __init__(self) -> None:
        self._originals = digits.originals(held_out=False)

    def __len__(self) -> int:
        return len(self._originals.labels) // _BATCH_SIZE

    def __iter__(self) -> Iterator[Pair]:
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        images = torch.from_numpy(digits.augment(self._originals.pixels, rng))
        labels = torch.from_numpy(self._originals.labels)
        order = torch.from_numpy(rng.permutation(len(labels)))[: len(self) * _BATCH_SIZE]
        for chosen in order.view(len(self), _BATCH_SIZE):
            yield images[chosen], labels[chosen]


def training() -> AugmentedDigits:
    """Return the training data."""
    return AugmentedDigits()


def held_out() -> list[Pair]:
    """Return the half of the held-out images that no search sees, as one batch."""
    images = digits_data().held_out
    return [(torch.from_numpy(images.inputs), torch.from_numpy(images.labels))]


@click.command()
@click.option("--epochs", default=55, show_default=True, help="Passes over the training originals.")
@click.option("--seed", default=7, show_default=True, help="Of weights, augmentation and drawn subnets.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
@click.option(
    "--out",
    default=KINDS[DIGITS].weights,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Checkpoint to write; the shipped one by default.",
)
def main(epochs: int, seed: int, threads: int, out: Path) -> None:
    """Train, write the weights, print the accuracy of the smallest and the largest subnet."""
    torch.set_num_threads(threads)
    supernet, batches = new_supernet(seed), training()
    recipe = Recipe(steps=epochs * len(batches), seed=seed, learning_rate=_LEARNING_RATE)

    def say(step: int, loss: float) -> None:
        if step % len(batches) == 0:
            click.echo(f"epoch {step // len(batches)}/{epochs}: loss of the largest {loss:.3f}")

    adapter = Adapter(inputs=lambda images: images.contiguous(memory_format=torch.channels_last))
    train(supernet, batches, recipe, adapter=adapter, on_step=say)
    calibration = [adapter.inputs(torch.from_numpy(digits_data().calibration))]
    save_weights(supernet, out, calibration, {"seed": str(seed), "epochs": str(epochs)})
    ends = ends_and_some(supernet, 0, seed)
    for row in judge(supernet, ends, held_out(), recipe, adapter=adapter, inputs=calibration):
        click.echo(f"{row.subnet.name:<10}{row.score:6.2f} %")
    click.echo(f"wrote {out}; next: profiles search --supernet digits --weights {out}")


def new_supernet(seed: int) -> Supernet:
    """Return the digits supernet with weights drawn from `seed`, channels last."""
    torch.manual_seed(seed)
    supernet = KINDS[DIGITS].build()
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
    return supernet


def save_weights(
    supernet: Supernet, path: Path, calibration: list[torch.Tensor], notes: dict[str, str]
) -> None:
    """Calibrate the whole network's own statistics, round the weights to halves, and write them."""
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(parameter.half())
    settle(supernet, calibration)
    tensors = {
        name: (tensor if "running" in name or not tensor.is_floating_point() else tensor.half()).contiguous()
        for name, tensor in supernet.model.state_dict().items()
    }
    metadata = {**notes, "supernet": DIGITS, "torch": str(torch.__version__)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata=metadata))


if __name__ == "__main__":
    main(prog_name="python -m gpu_worker.models.train_digits")
