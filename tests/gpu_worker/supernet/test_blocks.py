"""Blocks that a subnet leaves out, in models that call them in unusual ways.

What is expected is written out by hand: the blocks that stay, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.control import spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from superserve.errors import ConfigError
from tests.gpu_worker.supernet.answers import alike, answer, drawn

if TYPE_CHECKING:
    from collections.abc import Callable


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Add a rectified projection."""
        return x + scale * F.relu(self.linear(x))


class Caller(nn.Module):
    """Calls each block as `call` says."""

    def __init__(self, blocks: list[nn.Module], call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call one block after the other."""
        for block in self.layers:
            x = self.call(block, x)
        return x


def blocks() -> list[nn.Module]:
    """Return four random blocks, the same each time."""
    torch.manual_seed(0)
    return [Block().double() for _ in range(4)]


def expected_of(x: torch.Tensor, kept: tuple[int, ...] = (0,)) -> torch.Tensor:
    """Run those of `blocks` that are kept, by their weights alone."""
    for state in [blocks()[number].state_dict() for number in kept]:
        x = x + F.relu(x @ state["linear.weight"].T + state["linear.bias"])
    return x


# --- forward that is not the class's ------------------------------------------------------------


def compiled(block: nn.Module) -> nn.Module:
    """Compile a block into a module around it."""
    module: nn.Module = torch.compile(block, backend="eager")  # type: ignore[assignment]  # torch says a function
    return module


def compiled_in_place(block: nn.Module) -> nn.Module:
    """Compile a block's call in place."""
    block.compile(backend="eager")
    return block


def compiled_forward(block: nn.Module) -> nn.Module:
    """Set a block's compiled forward on it."""
    block.forward = torch.compile(block.forward, backend="eager")
    return block


def traced(block: nn.Module) -> nn.Module:
    """Trace a block."""
    module: nn.Module = torch.jit.trace(block, torch.zeros(2, 8).double())  # type: ignore[no-untyped-call]  # torch's
    return module


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("change", [compiled, compiled_in_place, compiled_forward, traced])
def test_blocks_whose_code_is_fixed_are_refused(change: Callable[[nn.Module], nn.Module]) -> None:
    """What is compiled or traced may run whatever the switch says: the error names block and cause."""
    model = nn.Sequential(nn.Sequential(*map(change, blocks())))

    with pytest.raises(ConfigError, match=r"^0.0: is (compiled by torch.compile|scripted or traced)"):
        insert(model, stages=[Stage("0")])


def hooked(module: nn.Module) -> None:
    """Wrap forward on the instance, as accelerate's add_hook_to_module does."""
    old = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    module.forward = forward


def test_a_forward_that_is_set_on_a_block_is_switched_too() -> None:
    """The switch is around it: one block of four runs, though each has a forward of its own."""
    hooked_blocks, x = blocks(), drawn(2, 8)
    for block in hooked_blocks:
        hooked(block)
    supernet = insert(nn.Sequential(*hooked_blocks), stages=[Stage("", rule=spread_blocks)])

    alike(answer(supernet, {"d": [2]}, x), expected_of(x, (0, 2)))


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.BatchNorm1d(8)])
def test_a_forward_that_is_set_on_a_layer_is_refused(layer: nn.Module) -> None:
    """It would go around the operator, and compute the whole layer."""
    hooked(layer)

    with pytest.raises(ConfigError, match="0: its forward was replaced on the instance"):
        insert(nn.Sequential(layer))


def test_a_block_that_is_called_by_its_forward_is_switched_too() -> None:
    """A caller that goes around `__call__` meets the switch as well."""
    model = Caller(blocks(), lambda block, x: block.forward(x)).double()
    x = drawn(2, 8)

    alike(answer(insert(model, stages=[Stage("layers")]), {"d": [1]}, x), expected_of(x))


def test_hooks_of_a_block_that_is_left_out_do_not_run() -> None:
    """Neither before nor after: a hook that changes what a block returns changes only what runs."""
    model, x = nn.Sequential(*blocks()), drawn(2, 8)
    seen: list[int] = []
    for number, block in enumerate(model):
        block.register_forward_pre_hook(lambda *_, n=number: seen.append(n))
        block.register_forward_hook(lambda *_, n=number: seen.append(n))
    supernet = insert(model, stages=[Stage("")])

    alike(answer(supernet, {"d": [1]}, x), expected_of(x))
    assert seen == [0, 0] * 2  # two passes


# --- how a block is called ----------------------------------------------------------------------


def test_blocks_may_be_called_by_keyword() -> None:
    """The first argument is known by its name."""
    model = Caller(blocks(), lambda block, x: block(scale=1.0, x=x)).double()
    x = drawn(2, 8)

    alike(answer(insert(model, stages=[Stage("layers")]), {"d": [1]}, x), expected_of(x))


def test_a_block_without_its_first_argument_is_refused() -> None:
    """Nothing is known to stand for it; the error names the block and what it was called with."""
    model = Caller([Free() for _ in range(2)], lambda block, x: block(scale=1.0, x=x))

    with pytest.raises(ConfigError, match=r"layers.1: called without its first argument .*scale, x"):
        answer(insert(model, stages=[Stage("layers")]), {"d": [1]}, drawn(2, 8))


class Free(nn.Module):
    """A block that takes anything."""

    def forward(self, **kwargs: Any) -> torch.Tensor:
        """Return x."""
        x: torch.Tensor = kwargs["x"]
        return x


class Tupled(Block):
    """A block that returns a tuple, as Hugging Face's layers do."""

    extra: tuple[Any, ...] = ()

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        """Return the sum and what is extra."""
        return super().forward(x, scale=scale), *self.extra


def tupled(extra: tuple[Any, ...] = (), *, first: int = 4) -> Caller:
    """Return a caller of blocks that return tuples; it takes the first value."""
    torch.manual_seed(0)
    made = [Tupled() for _ in range(first)]
    for block in made:
        block.extra = extra
    return Caller(list(made), lambda block, x: block(x)[0]).double()


@pytest.mark.parametrize("extra", [(), (None,), (None, None)])
@pytest.mark.parametrize("least", [0, 1])
def test_a_tuple_is_left_out_as_a_tuple(extra: tuple[None, ...], least: int) -> None:
    """Its first value is the block's input; no row of the batch is taken for it, even if no block has run."""
    model, x = tupled(extra), drawn(2, 8)
    expected = expected_of(x, tuple(range(least)))
    supernet = insert(model, stages=[Stage("layers", least=0)])

    alike(answer(supernet, {"d": [least]}, x), expected)


def test_a_tuple_with_more_in_it_is_refused_or_given() -> None:
    """Nothing stands for a second tensor, unless the stage says what does."""
    x = drawn(2, 8)
    supernet = insert(tupled((drawn(1),)), stages=[Stage("layers")])
    with pytest.raises(ConfigError, match=r"layers.1: returns a tuple of 2 values, for which"):
        answer(supernet, {"d": [1]}, x)

    given = Stage("layers", skipped=lambda x, **_: (x, None))
    alike(answer(insert(tupled((drawn(1),)), stages=[given]), {"d": [1]}, x), expected_of(x))


class Dicts(Block):
    """A block that returns a dictionary."""

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        """Return the sum by a name."""
        return {"out": super().forward(x, scale=scale)}


def test_a_dictionary_is_refused() -> None:
    """A caller that looks into what it gets would look into the input."""
    model = Caller([Dicts().double() for _ in range(2)], lambda block, x: block(x)["out"])

    with pytest.raises(ConfigError, match=r"layers.1: returns a dict, for which"):
        answer(insert(model, stages=[Stage("layers")]), {"d": [1]}, drawn(2, 8))


class Passing(nn.Module):
    """A block that takes and returns two tensors in a tuple."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Add them up."""
        return pair[0] + pair[1], pair[1]


def test_a_tuple_that_is_passed_on_stays_as_it_is() -> None:
    """A block of pairs that is left out gives the pair."""
    supernet = insert(nn.Sequential(Passing(), Passing(), Passing()), stages=[Stage("")])
    x, y = drawn(2, 8), drawn(2, 8, seed=2)
    found = answer(supernet, {"d": [2]}, (x, y))

    alike(found[0], x + 2 * y)
    alike(found[1], y)


def test_looking_at_a_block_that_never_ran_changes_nothing_else() -> None:
    """A norm in it gathers nothing while others are calibrated."""
    from gpu_worker.supernet.calibration import calibrate  # noqa: PLC0415  only this test needs it
    from superserve.subnet import Subnet  # noqa: PLC0415  as above

    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    supernet = insert(model, stages=[Stage("", least=0)]).eval()
    (found,) = calibrate(supernet, [Subnet("s", {"d": [0]})], [torch.randn(4, 8)]).values()

    assert found.channels == (0, 0)


# --- what the caller adds -----------------------------------------------------------------------


def branches() -> list[nn.Module]:
    """Return branches without a residual of their own."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double() for _ in range(4)]


@pytest.mark.parametrize("skipped", ["zero", torch.zeros_like])
def test_a_branch_that_is_left_out_adds_nothing(skipped: Any) -> None:
    """With `x = x + branch(x)` in the caller zero stands for the branch, and not x."""
    model, x = Caller(branches(), lambda branch, x: x + branch(x)), drawn(2, 8)
    first = branches()[0]

    found = answer(insert(model, stages=[Stage("layers", skipped=skipped)]), {"d": [1]}, x)
    alike(found, x + first(x))


class Pairs(nn.Module):
    """Blocks that are lists, of which the caller calls the members."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what each member of each pair gives."""
        for pair in self.layers:
            attend, feed = pair.children()
            x = x + attend(x)
            x = x + feed(x)
        return x


def pairs() -> list[tuple[nn.Module, nn.Module]]:
    """Return four pairs of branches, the same each time."""
    torch.manual_seed(0)
    return [
        (
            nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double(),
        )
        for _ in range(4)
    ]


def test_a_list_of_lists_is_left_out_pair_by_pair() -> None:
    """A pair's switch is that of both members; without saying what they give it is refused."""
    x = drawn(2, 8)
    expected = x
    for attend, feed in (pairs()[0], pairs()[2]):
        expected = expected + attend(expected)
        expected = expected + feed(expected)
    with pytest.raises(ConfigError, match=r"stage layers: layers.0 is a ModuleList, which is never called"):
        insert(Pairs(), stages=[Stage("layers")])
    supernet = insert(Pairs(), stages=[Stage("layers", rule=spread_blocks, skipped="zero")])

    assert supernet.controls.space.largest == {"d": [4]}
    alike(answer(supernet, {"d": [2]}, x), expected)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(["0.0", "0.0"])], "0.0 is a block of a stage already"),
        ([Stage("0"), Stage(["0.1"])], "0.1 is a block of a stage already"),
        ([Stage("0", skipped="none")], 'skipped: expected "input", "zero" or a function'),  # type: ignore[arg-type]
    ],
)
def test_stages_that_contradict_each_other_are_refused(stages: list[Stage], message: str) -> None:
    """Two switches around one block, or no word for what it gives."""
    model = nn.Sequential(nn.Sequential(*blocks()))
    with pytest.raises(ConfigError, match=message):
        insert(model, stages=stages)

    assert {type(module) for module in model.modules()} == {nn.Sequential, Block, nn.Linear}


# --- an insertion that fails --------------------------------------------------------------------


def everything(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Return every module's path, class, and all that it holds."""
    return [
        (path, type(module), {
            name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()
        })
        for path, module in model.named_modules()
    ]  # fmt: skip


def test_an_insertion_that_fails_leaves_the_model_as_it_was() -> None:
    """Control tuples that name no size fail when all is in place: classes, hooks and flags come back."""
    from gpu_worker.supernet.control import Controls, ControlSpace, Sizes  # noqa: PLC0415  only this test

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
    model[1].register_forward_hook(lambda *_: None)
    before = everything(model)
    wrong = Controls(ControlSpace({}), lambda _: Sizes(((0,),), {"no such size": 1}))
    with pytest.raises(KeyError):
        insert(model, stages=[Stage("0.layers")], elastic=[Elastic("a", ["1"])], controls=wrong)

    after = everything(model)
    assert [(path, cls) for path, cls, _ in after] == [(path, cls) for path, cls, _ in before]
    for (path, _, held), (_, _, was) in zip(after, before, strict=True):
        assert list(held) == list(was), path
        for name, value in held.items():
            assert value is was[name] or (isinstance(value, dict) and value == was[name]), (path, name)
