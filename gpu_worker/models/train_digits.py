"""Train the digits supernet and write the weights that are shipped.

    python -m gpu_worker.models.train_digits

Each step follows the sandwich rule: the largest subnet learns from the labels; the
smallest and two drawn at random learn from the labels and from the largest. Which subnets
are worth serving is another question, which `profiles search --supernet digits` answers.

Deterministic in its seed for one torch build and number of threads.

Source: the sandwich rule and in-place distillation, Yu and Huang, "Universally
Slimmable Networks" (ICCV '19).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from safetensors.torch import save

from gpu_worker.models import digits
from gpu_worker.models.kinds import KINDS, digits_data
from gpu_worker.models.names import DIGITS
from gpu_worker.supernet.calibration import accuracy_percent, calibrate
from superserve.files import write_whole
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_worker.supernet.supernet import Supernet

_DRAWN = 2  # random subnets a step, beside the largest and the smallest
_BATCH_SIZE = 96
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.02
_CLIP_NORM = 2.0


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
    supernet = new_supernet(seed)
    for epoch, loss in enumerate(train(supernet, epochs=epochs, seed=seed), start=1):
        click.echo(f"epoch {epoch}/{epochs}: loss of the largest {loss:.3f}")
    save_weights(supernet, out, {"seed": str(seed), "epochs": str(epochs)})
    for name, accuracy in ends(supernet).items():
        click.echo(f"{name:<10}{accuracy:6.2f} %")
    click.echo(f"wrote {out}; next: profiles search --supernet digits --weights {out}")


def new_supernet(seed: int) -> Supernet:
    """Return the digits supernet with weights drawn from `seed`, channels last."""
    torch.manual_seed(seed)
    supernet = KINDS[DIGITS].build()
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
    return supernet


def train(supernet: Supernet, *, epochs: int, seed: int) -> Iterator[float]:
    """Train in place; yield the mean loss of the largest subnet after each epoch."""
    rng = np.random.default_rng(seed)
    originals = digits.originals(held_out=False)
    labels = torch.from_numpy(originals.labels)
    steps = len(labels) // _BATCH_SIZE
    optimiser = torch.optim.AdamW(supernet.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        supernet.train()
        images = torch.from_numpy(digits.augment(originals.pixels, rng))
        order = torch.from_numpy(rng.permutation(len(labels)))[: steps * _BATCH_SIZE]
        losses = []
        for chosen in order.view(steps, _BATCH_SIZE):
            optimiser.zero_grad()
            losses.append(_sandwich(supernet, images[chosen], labels[chosen], rng))
            torch.nn.utils.clip_grad_norm_(supernet.parameters(), _CLIP_NORM)
            optimiser.step()
            schedule.step()
        yield sum(losses) / steps


def _sandwich(
    supernet: Supernet, images: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
) -> float:
    """Add the gradients of the largest, the smallest and a few drawn subnets; return the largest's loss."""
    images = images.contiguous(memory_format=torch.channels_last)
    space = supernet.controls.space
    logits = supernet.run_with(supernet.settings_of(Subnet("largest", space.largest)), images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    teacher = logits.detach().softmax(1)
    for control in (space.smallest, *(space.random(rng) for _ in range(_DRAWN))):
        logits = supernet.run_with(supernet.settings_of(Subnet("drawn", control)), images)
        student = (F.cross_entropy(logits, labels) + F.cross_entropy(logits, teacher)) / 2
        student.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss.item()


def save_weights(supernet: Supernet, path: Path, notes: dict[str, str]) -> None:
    """Calibrate the whole network's own statistics, round the weights to halves, and write them."""
    (whole,) = supernet.subnets
    batches = [torch.from_numpy(digits_data().calibration)]
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(parameter.half())
    supernet.eval()
    statistics = calibrate(supernet, [whole], batches)[whole.name]
    lengths = [n for channels in statistics.channels for n in (channels, channels)]
    parts = iter(torch.split(statistics.values, lengths))
    for norm in supernet.norms:
        for own in (norm.running_mean, norm.running_var):
            assert own is not None, "it is a BatchNorm that tracks them"
            own.copy_(next(parts))
    tensors = {
        name: (tensor if "running" in name or not tensor.is_floating_point() else tensor.half()).contiguous()
        for name, tensor in supernet.model.state_dict().items()
    }
    metadata = {**notes, "supernet": DIGITS, "torch": str(torch.__version__)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(tensors, metadata=metadata))


def ends(supernet: Supernet) -> dict[str, float]:
    """Return the accuracy of the smallest and the largest subnet, in percent of the held-out images."""
    data, space = digits_data(), supernet.controls.space
    subnets = [Subnet("smallest", space.smallest), Subnet("largest", space.largest)]
    supernet.host(subnets)
    supernet.set_statistics(calibrate(supernet, subnets, [torch.from_numpy(data.calibration)]))
    judged = [(torch.from_numpy(data.held_out.inputs), torch.from_numpy(data.held_out.labels))]
    return {
        subnet.name: accuracy_percent(partial(supernet.run_with, supernet.prepared(row).settings), judged)
        for row, subnet in enumerate(subnets)
    }


if __name__ == "__main__":
    main(prog_name="python -m gpu_worker.models.train_digits")
