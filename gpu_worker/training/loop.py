"""Train a supernet: step after step, kept on disk, interrupted and gone on with.

train(supernet, DataLoader(...), Recipe(steps=1_000))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_worker.training.kept import Position, go_on, keep
from gpu_worker.training.recipe import seed_all, seed_of
from gpu_worker.training.sandwich import Adapter, Sandwich, batch_of
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu_worker.supernet.supernet import Supernet
    from gpu_worker.training.recipe import Recipe

KEPT_EVERY = 200
"""Steps between two checkpoints, if nothing else is said."""


class Trained(NamedTuple):
    """How a training ended.

    Attributes:
        steps: Done in all, those before an interruption too.
        is_finished: Whether all are done.
        losses: Of the first subnet, one for each step done this time.
    """

    steps: int
    is_finished: bool
    losses: tuple[float, ...]


class Keeping(NamedTuple):
    """Where a training is kept.

    Attributes:
        path: Of the checkpoint.
        every: Steps between two of them; one more is written at the end, and when it is stopped.
        goes_on: Whether to go on with the one that is there.
    """

    path: Path
    every: int = KEPT_EVERY
    goes_on: bool = False


def train(
    supernet: Supernet,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    adapter: Adapter | None = None,
    keeping: Keeping | None = None,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    stops: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train a supernet in place.

    Args:
        supernet: In float32, on the device that it is trained on. BatchNorm's statistics are left as they
            are: `gpu_worker.training.judge.settle` gathers them at the end.
        batches: Gone through again and again, such as a DataLoader: each batch is (inputs, targets), or
            inputs alone. Without targets the largest subnet learns to answer as the network did at the
            start. All random numbers that it draws from torch, NumPy or Python follow the recipe's seed.
        recipe: How.
        adapter: What lies between data and model; nothing by default.
        keeping: Where the training is kept; nowhere by default.
        on_step: Receives how many steps are done, and the last one's loss.
        stops: Whether to stop after this step.

    Raises:
        ConfigError: Data, recipe, model or checkpoint do not fit each other.
    """
    if keeping is not None and keeping.every < 1:
        raise ConfigError(f"every: expected at least 1 step between checkpoints, got {keeping.every}")
    _look_at_loader(batches)
    adapter = adapter or Adapter()
    sandwich = Sandwich(supernet, recipe, adapter)
    sandwich.keep_the_original()
    at = Position()
    if keeping is not None and keeping.goes_on:
        at = go_on(keeping.path, sandwich)
    losses: list[float] = []
    kept_at = -1
    for given in _endless(batches, recipe, at, stops):
        losses.append(sandwich.step(batch_of(given, supernet.device, adapter), at.step))
        at.step += 1
        at.batch += 1
        on_step(at.step, losses[-1])
        if keeping is not None and at.step % keeping.every == 0:
            keep(keeping.path, sandwich, at)
            kept_at = at.step
        if stops():
            break
    if keeping is not None and kept_at != at.step:
        keep(keeping.path, sandwich, at)
    supernet.eval()
    return Trained(at.step, at.step >= recipe.steps, tuple(losses))


def _endless(
    batches: Iterable[Any], recipe: Recipe, at: Position, stops: Callable[[], bool]
) -> Iterator[Any]:
    """Yield batch after batch until all steps are done; those of this epoch that are done are passed over."""
    while at.step < recipe.steps:
        begin_epoch(batches, recipe.seed, at.epoch)
        n_seen = 0
        for given in _fetched(batches, stops):
            n_seen += 1
            if n_seen > at.batch:
                yield given
                if at.step >= recipe.steps:
                    return
            if stops():
                return
        if stops():
            return
        if n_seen < max(1, at.batch):
            raise ConfigError(
                f"data: expected at least {max(1, at.batch)} batches in each pass over the data, got {n_seen}"
            )
        at.epoch += 1
        at.batch = 0


def _fetched(batches: Iterable[Any], stops: Callable[[], bool]) -> Iterator[Any]:
    """Yield the batches of one pass; a Ctrl-C that ends a DataLoader's processes too ends it, as no error."""
    iterator = iter(batches)
    while True:
        try:
            given = next(iterator)
        except StopIteration:
            return
        except RuntimeError:
            if stops():
                return
            raise
        yield given


def begin_epoch(batches: Iterable[Any], seed: int, epoch: int) -> None:
    """Seed what the data draw from in this pass over them."""
    seed_all(seed_of(seed, "data", epoch))
    for owner in (batches, getattr(batches, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if generator is not None:  # a generator of its own would go on from epoch to epoch
            generator.manual_seed(seed_of(seed, "generator", epoch))
        set_epoch = getattr(owner, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def _look_at_loader(batches: Iterable[Any]) -> None:
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise ConfigError(
            "data: expected what can be gone through again and again, such as a DataLoader or a list, got "
            f"a {type(batches).__name__}"
        )
    if getattr(batches, "persistent_workers", False):
        raise ConfigError(
            "data: expected a DataLoader without persistent_workers: their random numbers go on from pass to "
            "pass, and a training that was interrupted could not go on exactly"
        )
