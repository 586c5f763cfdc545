"""A user's own module: a small network with all that draws random numbers, and data that draw too."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gpu_worker.supernet.insertion import Elastic, Stage, insert

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

N_EXAMPLES, BATCH, N_CLASSES = 40, 8, 3
PER_PASS = N_EXAMPLES // BATCH


class Block(nn.Module):
    """A residual block with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)
        self.back = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 6)."""
        middle = self.drop(torch.relu(self.norm(self.wide(x))))
        # For this a subnet's first pass looks at the whole network's, and begins again: it draws twice.
        middle = middle[:, : middle.shape[1]]
        if self.training:  # noise of the other generators, too
            middle = middle * (1 + 0.1 * np.random.random() + 0.1 * random.random())
        out: torch.Tensor = x + self.back(middle)
        return out


class Network(nn.Module):
    """Three blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(6, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, (B, 3)."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.last(x)
        return logits


def build() -> Supernet:
    """Return the supernet: some of the blocks, and a part of their middles."""
    elastic = [Elastic("middle", ["blocks.*.wide"], (0.25, 0.5, 0.75, 1.0))]
    return insert(Network(), stages=[Stage("blocks")], elastic=elastic)


def seeded() -> Supernet:
    """Return the supernet with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build()


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Examples that are changed at random, by each of the generators that data sets use."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.inputs = torch.from_numpy(rng.standard_normal((N_EXAMPLES, 5)).astype(np.float32))
        self.labels = (self.inputs[:, 0] > 0).long() + (self.inputs[:, 1] > 0).long()

    def __len__(self) -> int:
        return N_EXAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(5) * 0.1 + float(np.random.normal(0, 0.1)) + random.gauss(0, 0.1)
        return self.inputs[index] + noise, self.labels[index]


def loader(
    n_workers: int = 0, *, has_generator: bool = False
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Return a DataLoader that shuffles."""
    generator = torch.Generator().manual_seed(3) if has_generator else None
    return DataLoader(
        Augmented(), BATCH, shuffle=True, num_workers=n_workers, generator=generator,
        multiprocessing_context="fork" if n_workers else None,
    )  # fmt: skip


class Interrupting:
    """The same batches, of which one is never given: Ctrl-C is pressed, as often as asked, while it is made.

    Attributes:
        at: The batch, of all that are given; None for none.
        times: How often.
        signal: Which signal.
    """

    at: int | None = None
    times = 1
    signal = signal.SIGINT

    def __init__(self) -> None:
        self._loader = loader()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> object:
        for batch in self._loader:
            if Interrupting.at is not None:
                Interrupting.at -= 1
                if Interrupting.at < 0:
                    Interrupting.at = None
                    for _ in range(Interrupting.times):
                        os.kill(os.getpid(), Interrupting.signal)
            yield batch


def interrupting() -> Interrupting:
    """Return batches of which one presses Ctrl-C."""
    return Interrupting()


def unlabelled() -> list[torch.Tensor]:
    """Return inputs alone."""
    return [batch[0] for batch in loader()]
