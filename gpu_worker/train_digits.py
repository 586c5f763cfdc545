"""Train the digits supernet, calibrate its subnets and write the file that is shipped.

    python -m gpu_worker.train_digits

Each step follows the sandwich rule: the largest subnet learns from the labels; the
smallest and two drawn at random learn from the labels and from the largest.
Then each subnet gets its own SubnetNorm statistics by passes over training data,
and those that are pareto and far enough apart are kept.

Deterministic in its seed for one torch build and number of threads.

Source: the sandwich rule and in-place distillation, Yu and Huang, "Universally
Slimmable Networks" (ICCV '19); SubnetNorm, SuperServe (NSDI '25).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch.utils.flop_counter import FlopCounterMode

from gpu_worker import digits
from gpu_worker.actuation import actuate
from gpu_worker.supernet import Architecture, DigitsSupernet
from gpu_worker.torch_executor import SHIPPED_PATH, Card, save
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ARCHITECTURE = Architecture(
    image_shape=(1, digits.IMAGE_SIZE, digits.IMAGE_SIZE),
    channels=(32, 64, 64),
    depths=(2, 2, 2),
    n_classes=10,
    min_width=0.125,
)

# Widths that give multiples of 8 channels in the later stages: a CPU's vectors compute the others padded.
_CANDIDATES = (
    ((1, 1, 1), (0.125, 0.125, 0.125)),
    ((1, 1, 1), (0.25, 0.25, 0.25)),
    ((1, 2, 2), (0.25, 0.25, 0.25)),
    ((1, 2, 2), (0.25, 0.5, 0.5)),
    ((2, 2, 2), (0.5, 0.5, 0.5)),
    ((2, 2, 2), (0.5, 1.0, 1.0)),
    ((2, 2, 2), (1.0, 1.0, 1.0)),
)
_DRAWN = 2  # random subnets a step, beside the largest and the smallest
_BATCH_SIZE = 96
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.02
_CLIP_NORM = 2.0
_CALIBRATION_BATCHES = 16
_CALIBRATION_BATCH_SIZE = 256

_LEAST_GAP = 0.3  # points of accuracy between neighbours that are both kept
_LEAST_ACCURACY = 80.0  # below it nobody would want the answer


@click.command()
@click.option("--epochs", default=55, show_default=True, help="Passes over the training originals.")
@click.option("--seed", default=7, show_default=True, help="Of weights, augmentation and drawn subnets.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
@click.option(
    "--out",
    default=SHIPPED_PATH,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; the shipped one by default.",
)
def main(epochs: int, seed: int, threads: int, out: Path) -> None:
    """Train, calibrate, print each subnet's accuracy with and without SubnetNorm, write the file."""
    torch.set_num_threads(threads)
    supernet = new_supernet(seed)
    for epoch, loss in enumerate(train(supernet, epochs=epochs, seed=seed), start=1):
        click.echo(f"epoch {epoch}/{epochs}: loss of the largest {loss:.3f}")
    round_to_half(supernet)
    calibrate(supernet, calibration_batches(seed))
    cards = kept(describe(supernet))
    for card in cards:
        click.echo(
            f"{card.name}: {card.accuracy:.2f} %, "
            f"{card.accuracy_without_subnet_norm:.2f} % without SubnetNorm, {card.gflops:.4f} G multiply-adds"
        )
    notes = {"seed": str(seed), "epochs": str(epochs), "torch": str(torch.__version__)}
    save(supernet, cards, out, notes=notes)
    click.echo(f"{out}: {out.stat().st_size} bytes")


def new_supernet(seed: int) -> DigitsSupernet:
    """Return an untrained supernet that hosts every candidate, smallest first and largest last."""
    torch.manual_seed(seed)
    supernet = DigitsSupernet(ARCHITECTURE)
    supernet.host([_subnet(depths, widths) for depths, widths in _CANDIDATES])
    return supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch's stub knows it for tensors only


def _subnet(depths: tuple[int, ...], widths: tuple[float, ...]) -> Subnet:
    kept_percent = "-".join(f"{100 * width:g}" for width in widths)
    return Subnet(f"d{''.join(map(str, depths))}-w{kept_percent}", {"d": list(depths), "w": list(widths)})


def train(supernet: DigitsSupernet, *, epochs: int, seed: int) -> Iterator[float]:
    """Train in place; yield the mean loss of the largest subnet after each epoch."""
    rng = np.random.default_rng(seed)
    originals = digits.originals(held_out=False)
    labels = torch.from_numpy(originals.labels)
    steps = len(labels) // _BATCH_SIZE
    optimiser = torch.optim.AdamW(supernet.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        supernet.train()
        images = _tensor(digits.augment(originals.pixels, rng))
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
    supernet: DigitsSupernet, images: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
) -> float:
    """Add the gradients of the largest, the smallest and a few drawn subnets; return the largest's loss."""
    largest = len(supernet.subnets) - 1
    actuate(supernet, largest)
    logits = supernet(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    teacher = logits.detach().softmax(1)
    drawn = rng.choice(np.arange(1, largest), _DRAWN, replace=False)
    for row in (0, *drawn.tolist()):
        actuate(supernet, row)
        logits = supernet(images)
        student = (F.cross_entropy(logits, labels) + F.cross_entropy(logits, teacher)) / 2
        student.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss.item()


def round_to_half(supernet: DigitsSupernet) -> None:
    """Round the weights to what the file holds, so that statistics and accuracies are the file's own."""
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(parameter.half())


def calibration_batches(seed: int) -> list[torch.Tensor]:
    """Return freshly augmented training images, for SubnetNorm's statistics."""
    rng = np.random.default_rng((seed, 1))
    pixels = digits.originals(held_out=False).pixels
    size = _CALIBRATION_BATCH_SIZE
    return [
        _tensor(digits.augment(pixels[rng.choice(len(pixels), size, replace=False)], rng))
        for _ in range(_CALIBRATION_BATCHES)
    ]


def calibrate(supernet: DigitsSupernet, batches: Iterable[torch.Tensor]) -> None:
    """Set the statistics of every hosted subnet to their mean over `batches`."""
    batches = list(batches)
    norms = supernet.norms()
    supernet.train()
    with torch.no_grad():
        for row in range(len(supernet.subnets)):
            actuate(supernet, row)
            for n_before, batch in enumerate(batches):
                for norm in norms:
                    norm.momentum = 1 / (n_before + 1)  # a running mean over all batches
                supernet(batch)
    for norm in norms:
        norm.momentum = None
    supernet.eval()


def share_statistics(supernet: DigitsSupernet) -> None:
    """Give every subnet the largest's statistics: what a supernet without SubnetNorm has."""
    for norm in supernet.norms():
        norm.mean.copy_(norm.mean[-1:].clone())
        norm.variance.copy_(norm.variance[-1:].clone())


def accuracies(supernet: DigitsSupernet) -> list[float]:
    """Return the percentage of held-out images that each hosted subnet reads rightly."""
    images, labels = digits.held_out()
    batches = torch.split(_tensor(images), _CALIBRATION_BATCH_SIZE)
    found = []
    with torch.inference_mode():
        for row in range(len(supernet.subnets)):
            actuate(supernet, row)
            read = torch.cat([supernet(batch).argmax(1) for batch in batches])
            found.append(100 * float((read.numpy() == labels).mean()))
    return found


def describe(supernet: DigitsSupernet) -> list[Card]:
    """Measure every hosted subnet; its statistics are as before afterwards."""
    own = accuracies(supernet)
    statistics = {key: value.clone() for key, value in supernet.state_dict().items()}
    share_statistics(supernet)
    shared = accuracies(supernet)
    supernet.load_state_dict(statistics)
    return [
        Card(
            subnet.name,
            dict(subnet.control or {}),
            round(with_, 2),
            round(without, 2),
            _gflops(supernet, row),
        )
        for row, (subnet, with_, without) in enumerate(zip(supernet.subnets, own, shared, strict=True))
    ]


def kept(cards: list[Card]) -> list[Card]:
    """Return the cards that are pareto and at least a gap apart, by ascending accuracy."""
    chosen: list[Card] = []
    for card in sorted(cards, key=lambda card: -card.accuracy):
        if card.accuracy < _LEAST_ACCURACY:
            continue
        if not chosen or (
            card.accuracy <= chosen[-1].accuracy - _LEAST_GAP and card.gflops < chosen[-1].gflops
        ):
            chosen.append(card)
    return chosen[::-1]


def _gflops(supernet: DigitsSupernet, row: int) -> float:
    actuate(supernet, row)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        supernet(torch.zeros(1, *supernet.architecture.image_shape))
    return round(counter.get_total_flops() / 2 / 1e9, 5)  # a multiply-add counts as two


def _tensor(images: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
    return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
