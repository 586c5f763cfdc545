"""Training: what a step learns, that it is exact in its seed, interrupted or not, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gpu_worker.supernet.calibration import calibrate
from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.training.judge import calibration_inputs, ends_and_some, judge, settle
from gpu_worker.training.kept import Position, go_on, keep
from gpu_worker.training.loop import Keeping, train
from gpu_worker.training.recipe import Recipe
from gpu_worker.training.sandwich import Adapter, Lesson, Sandwich
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.training import mine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from gpu_worker.supernet.supernet import Supernet

STEPS = 13  # of 5 in a pass
RECIPE = Recipe(STEPS, seed=3, learning_rate=0.01)


def weights(supernet: Supernet) -> dict[str, torch.Tensor]:
    """Return copies of a supernet's tensors."""
    return {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}


def assert_same(found: Supernet, expected: Supernet) -> None:
    """Compare bit for bit."""
    own, others = weights(found), weights(expected)
    different = [name for name, tensor in own.items() if not torch.equal(tensor, others[name])]
    assert not different


def trained(batches: Iterable[Any], recipe: Recipe = RECIPE, **options: Any) -> Supernet:
    """Train a new supernet."""
    supernet = mine.seeded()
    assert train(supernet, batches, recipe, **options).is_finished
    return supernet


# --- what a step learns -----------------------------------------------------------------------


def two_layers() -> tuple[Supernet, nn.Linear, nn.Linear]:
    """Return a supernet of two layers, and plain copies of them."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 8), nn.Linear(8, 3)
    copies = [nn.Linear(4, 8), nn.Linear(8, 3)]
    for layer, copied in zip((first, last), copies, strict=True):
        copied.load_state_dict(layer.state_dict())
    supernet = insert(nn.Sequential(first, nn.ReLU(), last), elastic=[Elastic("w", ["0"], (0.25, 0.5, 1.0))])
    return supernet, copies[0], copies[1]


def plain(first: nn.Linear, last: nn.Linear, n: int, x: torch.Tensor) -> torch.Tensor:
    """Return what a network of `n` hidden units answers."""
    return F.linear(torch.relu(F.linear(x, first.weight[:n], first.bias[:n])), last.weight[:, :n], last.bias)


TARGETS: dict[str, Callable[[], torch.Tensor]] = {
    "cross-entropy": lambda: torch.tensor([0, 2, 1, 1, 0]),
    "mse": lambda: torch.randn(5, 3, generator=torch.Generator().manual_seed(2)),
    "cosine": lambda: torch.randn(5, 3, generator=torch.Generator().manual_seed(2)),
}


def loss_of(name: str, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss written out."""
    if name == "mse":
        return (outputs - targets).square().mean()
    if name == "cosine":
        lengths: torch.Tensor = outputs.norm(dim=1) * targets.norm(dim=1)
        return (1 - (outputs * targets).sum(1) / lengths).mean()
    if targets.dim() == 1:
        return -outputs.log_softmax(1)[torch.arange(len(targets)), targets].mean()
    return -(targets.softmax(1) * outputs.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("has_targets", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_a_steps_gradients_are_those_of_the_rule(name: str, has_targets: bool) -> None:
    """The largest by the targets, or by the network as it was; the smallest by targets and the largest."""
    supernet, first, last = two_layers()
    recipe = Recipe(4, objective=name, clip_norm=1e9, n_drawn=0, distilled=0.7)
    sandwich = Sandwich(supernet, recipe, Adapter())
    sandwich.keep_the_original()
    if not has_targets:  # else the largest is where it was, and has nothing to learn
        with torch.no_grad():
            for parameter, copied in ((supernet.model[0].weight, first.weight),):  # type: ignore[index]  # a Sequential
                parameter.mul_(1.1)
                copied.mul_(1.1)
    x, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), TARGETS[name]()
    found = sandwich.step(Lesson(x, targets if has_targets else None), 0)

    largest, smallest = plain(first, last, 8, x), plain(first, last, 2, x)
    if has_targets:
        loss = loss_of(name, largest, targets)
        student = 0.7 * loss_of(name, smallest, largest.detach()) + 0.3 * loss_of(name, smallest, targets)
    else:
        original, before = plain(first, last, 8, x), first.weight.detach().clone()
        with torch.no_grad():
            first.weight.div_(1.1)
            original = plain(first, last, 8, x)
            first.weight.copy_(before)
        largest, smallest = plain(first, last, 8, x), plain(first, last, 2, x)
        loss = loss_of(name, largest, original)
        student = loss_of(name, smallest, largest.detach())
    (loss + student).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    assert found == pytest.approx(loss.item(), rel=1e-5)
    own = dict(supernet.model.named_parameters())
    for path, layer in (("0", first), ("2", last)):
        for part in ("weight", "bias"):
            expected = layer.get_parameter(part).grad
            torch.testing.assert_close(own[f"{path}.{part}"].grad, expected, rtol=1e-4, atol=1e-6)


def test_each_subnet_has_a_turn_and_one_can_be_alone() -> None:
    """The largest first, the smallest, then as many drawn as asked; alone, one and no other."""
    space = mine.seeded().controls.space
    drawn = [Recipe(9, n_drawn=3).controls(space, step) for step in range(9)]

    assert all(one[:2] == [space.largest, space.smallest] and len(one) == 5 for one in drawn)
    assert len({str(control) for one in drawn for control in one[2:]}) > 8
    assert Recipe(9, subnets="largest").controls(space, 0) == [space.largest]
    assert Recipe(9, subnets="smallest").controls(space, 0) == [space.smallest]


def test_it_learns() -> None:
    """After some passes the subnets are right far more often than by chance, on data as they are."""
    recipe = Recipe(60, seed=1, learning_rate=0.02)
    supernet = trained(mine.loader(), recipe)
    data = mine.Augmented()
    examples = [(data.inputs, data.labels)]
    inputs = calibration_inputs(mine.loader(), supernet, Adapter(), 0)
    rows = judge(supernet, ends_and_some(supernet, 3, 0), examples, recipe, inputs=inputs)

    assert rows[0].subnet.name == "smallest"
    assert rows[-1].subnet.control == supernet.controls.space.largest
    assert all(row.score > 70 for row in rows)


def test_without_targets_small_subnets_come_nearer_to_the_network_as_it_was() -> None:
    """And it stays where it was: an encoder is made elastic with texts alone."""
    recipe = Recipe(40, objective="cosine", learning_rate=0.01)
    data = mine.unlabelled()
    supernet, before = mine.seeded(), mine.seeded().eval()
    whole = before.settings_of(Subnet("largest", before.controls.space.largest))
    inputs = [torch.cat(data)]
    for one in (supernet, before):
        settle(one, inputs)
    with torch.no_grad():
        original = [before.run_with(whole, batch) for batch in data]
    scores = []
    for _ in range(2):
        rows = judge(
            supernet, ends_and_some(supernet, 0, 0), list(zip(data, original, strict=True)), recipe,
            inputs=inputs,
        )  # fmt: skip
        scores.append([row.score for row in rows])
        train(supernet, data, recipe)

    assert scores[1][0] > scores[0][0] + 0.03
    assert scores[1][1] > 0.9


# --- exactness --------------------------------------------------------------------------------


def test_the_seed_decides_all() -> None:
    """Whatever was drawn before; another seed gives other weights."""
    torch.manual_seed(1)
    first = trained(mine.loader())
    torch.manual_seed(2)
    assert_same(trained(mine.loader()), first)
    other = trained(mine.loader(), Recipe(STEPS, seed=4, learning_rate=0.01))

    assert not torch.equal(other.model.get_parameter("last.weight"), first.model.get_parameter("last.weight"))


@pytest.fixture(scope="module")
def uninterrupted() -> Supernet:
    """One that was trained without a stop."""
    return trained(mine.loader())


@pytest.mark.parametrize("stops_at", [1, 5, 7, 12])
def test_an_interrupted_training_goes_on_exactly(
    stops_at: int, uninterrupted: Supernet, tmp_path: Path
) -> None:
    """In the middle of a pass, at its end, after one step: a new process has the same weights in the end."""
    path, seen = tmp_path / "kept", []
    first = mine.seeded()
    done = train(
        first, mine.loader(), RECIPE, keeping=Keeping(path), on_step=lambda step, _: seen.append(step),
        stops=lambda: len(seen) >= stops_at,
    )  # fmt: skip

    assert (done.steps, done.is_finished, len(done.losses)) == (stops_at, False, stops_at)
    torch.manual_seed(99)
    assert_same(trained(mine.loader(), keeping=Keeping(path, goes_on=True)), uninterrupted)


def test_a_training_that_was_killed_goes_on_from_its_last_checkpoint(
    uninterrupted: Supernet, tmp_path: Path
) -> None:
    """An error in step 10, and checkpoints every 4 steps: steps 9 and 10 are done again."""
    path, steps = tmp_path / "kept", []

    def fail(step: int, _loss: float) -> None:
        steps.append(step)
        if len(steps) == 10:
            raise OSError("the power is gone")

    with pytest.raises(OSError, match="power"):
        trained(mine.loader(), keeping=Keeping(path, 4), on_step=fail)
    found = trained(mine.loader(), keeping=Keeping(path, 4, goes_on=True), on_step=fail)

    assert_same(found, uninterrupted)
    assert steps == [*range(1, 11), *range(9, STEPS + 1)]


@pytest.mark.parametrize("options", [{"n_workers": 2}, {"has_generator": True}])
def test_loaders_with_processes_or_an_own_generator_go_on_exactly(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Their seeds follow the pass, too."""
    expected = trained(mine.loader(**options))
    path, seen = tmp_path / "kept", []
    train(
        mine.seeded(), mine.loader(**options), RECIPE, keeping=Keeping(path),
        on_step=lambda step, _: seen.append(step), stops=lambda: len(seen) >= 8,
    )  # fmt: skip
    assert_same(trained(mine.loader(**options), keeping=Keeping(path, goes_on=True)), expected)


def test_one_that_is_finished_only_loads(uninterrupted: Supernet, tmp_path: Path) -> None:
    """A process that died between the last step and the weights does no step again."""
    path = tmp_path / "kept"
    trained(mine.loader(), keeping=Keeping(path))
    supernet = mine.seeded()
    done = train(supernet, mine.loader(), RECIPE, keeping=Keeping(path, goes_on=True))

    assert done == (STEPS, True, ())
    assert_same(supernet, uninterrupted)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_used_for_products_alone(
    precision: str, uninterrupted: Supernet, tmp_path: Path
) -> None:
    """Weights stay in float32, and differ a little from those of float32; it goes on exactly, too."""
    recipe = Recipe(STEPS, seed=3, learning_rate=0.01, precision=precision)
    precise, halves = uninterrupted, trained(mine.loader(), recipe)
    path, seen = tmp_path / "kept", []
    train(
        mine.seeded(), mine.loader(), recipe, keeping=Keeping(path),
        on_step=lambda step, _: seen.append(step), stops=lambda: len(seen) >= 6,
    )  # fmt: skip
    assert_same(trained(mine.loader(), recipe, keeping=Keeping(path, goes_on=True)), halves)
    own, other = (one.model.get_parameter("last.weight") for one in (halves, precise))

    assert own.dtype == torch.float32
    assert not torch.equal(own, other)
    torch.testing.assert_close(own, other, rtol=0.2, atol=0.1)


def test_the_scale_of_gradients_is_kept(tmp_path: Path) -> None:
    """Half precision's: it grows over thousands of steps."""
    recipe = Recipe(STEPS, precision="float16")
    sandwiches = [Sandwich(mine.seeded(), recipe, Adapter()) for _ in range(2)]
    batch = next(iter(mine.loader()))
    sandwiches[0].step(Lesson(*batch), 0)
    sandwiches[0].scaler.update(512.0)
    keep(tmp_path / "kept", sandwiches[0], Position(1, 0, 1))

    assert go_on(tmp_path / "kept", sandwiches[1]) == Position(1, 0, 1)
    assert sandwiches[1].scaler.get_scale() == 512.0


# --- afterwards -------------------------------------------------------------------------------


def test_the_checkpoints_own_statistics_are_the_largests() -> None:
    """What `settle` writes into the norms is what calibration gathers for the whole network."""
    supernet = trained(mine.loader())
    inputs = calibration_inputs(mine.loader(), supernet, Adapter(), 0)
    whole = Subnet("largest", supernet.controls.space.largest)
    settle(supernet, inputs)
    with torch.inference_mode():
        own = supernet.run_with(supernet.settings_of(whole), inputs[0])
        supernet.host([whole])
        supernet.set_statistics(calibrate(supernet, [whole], inputs))
        torch.testing.assert_close(own, supernet(inputs[0]))
    assert len(inputs) == mine.PER_PASS


def test_subnets_are_judged_by_all_queries_alike() -> None:
    """Batches of unequal sizes: the share of right answers, counted by hand."""
    supernet, first, last = two_layers()
    x, labels = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    right = 100 * float((plain(first, last, 2, x).argmax(1) == labels).float().mean())
    rows = judge(
        supernet, ends_and_some(supernet, 0, 0), [(x[:5], labels[:5]), (x[5:], labels[5:])], Recipe(1)
    )

    assert rows[0].score == pytest.approx(right)
    agreeing = judge(supernet, ends_and_some(supernet, 0, 0), [x], Recipe(1))
    same = plain(first, last, 2, x).argmax(1) == plain(first, last, 8, x).argmax(1)
    assert [row.score for row in agreeing] == [pytest.approx(100 * float(same.float().mean())), 100]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number of at least 0, got -1.0"),
        ({"distilled": 1.5}, "distilled: expected a share from 0 to 1, got 1.5"),
        ({"objective": "l1"}, "objective: expected one of cross-entropy, mse, cosine, got 'l1'"),
        ({"subnets": "all"}, "subnets: expected one of sandwich, largest, smallest, got 'all'"),
        ({"precision": "half"}, "precision: expected one of float32, bfloat16, float16, got 'half'"),
    ],
)
def test_a_recipe_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    """By the field, and what was expected."""
    with pytest.raises(ConfigError, match=message):
        Recipe(**{"steps": 5, **options})


X = torch.zeros(4, 5)
WRONG_DATA: dict[str, tuple[Any, str]] = {
    "an iterator": (iter([(X, X)]), "expected what can be gone through again and again"),
    "nothing": ([], "expected at least 1 batches in each pass over the data, got 0"),
    "a dictionary": (
        [{"x": X}],
        r"expected batches of \(inputs, targets\) or inputs, all tensors, got \(dict\)",
    ),
    "three tensors": ([(X, X, X)], r"got \(Tensor, Tensor, Tensor\)"),
    "an empty batch": ([(X[:0], X[:0, 0].long())], "at least one query"),
    "too few targets": ([(X, torch.zeros(3).long())], "expected a target for each of 4 inputs, got 3"),
    "float labels": ([(X, torch.zeros(4))], "cross-entropy: expected 4 labels, int64, got torch.float32"),
    "labels out of range": ([(X, torch.full((4,), 3))], "expected labels from 0 to 2, got 3 to 3"),
    "some without targets": ([(X, torch.zeros(4).long()), X], "targets in every batch or in none"),
    "not a number": ([(X * float("nan"), torch.zeros(4).long())], "step 1: the loss is nan"),
    "processes that stay": (
        DataLoader(TensorDataset(X), num_workers=1, persistent_workers=True),
        "without persistent_workers",
    ),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_do_not_fit_are_refused(name: str) -> None:
    """In one line that says what was expected."""
    batches, message = WRONG_DATA[name]
    with pytest.raises(ConfigError, match=message):
        trained(batches)


def test_numbers_need_targets_of_their_shape() -> None:
    """A vector beside a matrix would be broadcast, and learnt wrong."""
    for objective in ("mse", "cosine"):
        with pytest.raises(
            ConfigError, match=r"targets: expected floats of shape \(4, 3\), as the outputs have"
        ):
            trained([(X, torch.zeros(4, 1))], Recipe(2, objective=objective))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    """By the file, and by what differs: the recipe's field, the weights, the file's kind."""
    path = tmp_path / "kept"
    trained(mine.loader(), keeping=Keeping(path))
    on = Keeping(path, goes_on=True)
    with pytest.raises(ConfigError, match=r"kept: learning_rate: the training that it holds began with 0.01"):
        train(mine.seeded(), mine.loader(), Recipe(STEPS, seed=3, learning_rate=0.02), keeping=on)
    with pytest.raises(ConfigError, match=r"kept: .* began with other weights, or is of another supernet"):
        train(mine.build(), mine.loader(), RECIPE, keeping=on)
    with pytest.raises(ConfigError, match="absent: there is no checkpoint of a training"):
        train(mine.seeded(), mine.loader(), RECIPE, keeping=Keeping(tmp_path / "absent", goes_on=True))
    for content in (b"", b"PK\x03\x04 cut off", b"text"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="kept: expected a training's checkpoint"):
            train(mine.seeded(), mine.loader(), RECIPE, keeping=on)
    torch.save({"other": 1}, path)
    with pytest.raises(ConfigError, match="kept: expected a training's checkpoint of schema 1"):
        train(mine.seeded(), mine.loader(), RECIPE, keeping=on)


def test_data_that_became_fewer_are_told(tmp_path: Path) -> None:
    """A pass that ends before the batch that is next."""
    path, seen = tmp_path / "kept", []
    train(
        mine.seeded(), mine.loader(), RECIPE, keeping=Keeping(path),
        on_step=lambda step, _: seen.append(step), stops=lambda: len(seen) >= 4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="expected at least 4 batches in each pass over the data, got 2"):
        train(mine.seeded(), list(mine.loader())[:2], RECIPE, keeping=Keeping(path, goes_on=True))


def test_frozen_parameters_stay(uninterrupted: Supernet) -> None:
    """Those that require no gradient are not changed; a network of such alone has nothing to learn."""
    supernet = mine.seeded()
    supernet.model.get_submodule("first").requires_grad_(False)
    train(supernet, mine.loader(), RECIPE)
    first, last = (supernet.model.get_parameter(f"{name}.weight") for name in ("first", "last"))

    assert torch.equal(first, mine.seeded().model.get_parameter("first.weight"))
    assert not torch.equal(last, mine.seeded().model.get_parameter("last.weight"))
    assert not torch.equal(first, uninterrupted.model.get_parameter("first.weight"))
    with pytest.raises(ConfigError, match="expected parameters that require gradients, got none"):
        train(mine.seeded().requires_grad_(False), mine.loader(), RECIPE)
