"""What a proof says of blocks that may be left out, and of modules that run past insertion."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.proof.absence import ProofError, UnsliceableError
from gpu_worker.proof.flow import DataFlow
from gpu_worker.proof.prove import prove
from gpu_worker.proof.whole import SubnetCut, WholeNetwork, tensors_of
from gpu_worker.supernet.insertion import Stage, insert
from gpu_worker.supernet.operators import Switched
from gpu_worker.supernet.original import original_of
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.proof.users import (
    ONE,
    Calls,
    Residual,
    answer,
    around,
    at,
    branch,
    plainly,
    refused_or_right,
    residuals,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def compiled(model: Any) -> None:
    """Wrap each block."""
    for i in range(4):
        model[0][i] = torch.compile(model[0][i], backend="eager")


def compiled_forward(model: Any) -> None:
    """Compile each block's forward."""
    for block in model[0]:
        block.forward = torch.compile(block.forward, backend="eager")


def compiled_in_place(model: Any) -> None:
    """Compile each block's call."""
    for block in model[0]:
        block.compile(backend="eager")


def hooked(model: Any) -> None:
    """Replace each block's forward on the instance, as accelerate does."""

    def wrap(forward: Any) -> Any:
        def hook(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return hook

    for block in model[0]:
        block.forward = wrap(block.forward)


def scripted(model: Any) -> None:
    """Script each block."""
    for i in range(4):
        model[0][i] = torch.jit.trace(model[0][i], torch.zeros(2, 8))  # type: ignore[no-untyped-call]  # torch's


def traced(model: Any) -> None:
    """Trace each block by torch.fx."""
    for i in range(4):
        model[0][i] = torch.fx.symbolic_trace(model[0][i])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (compiled, "compiled code"),
        (compiled_forward, "compiled code"),
        (compiled_in_place, "compiled code"),
        (hooked, "replaced on the instance"),
        (scripted, "got a scripted one"),
        (traced, r"traced by torch\.fx"),
    ],
)
def test_code_that_runs_past_the_changed_classes_is_refused(
    change: Callable[[Any], None], reason: str
) -> None:
    """By type, whatever the answers are: the error names the block; insertion may be the one that refuses."""
    model = residuals()
    change(model)

    with pytest.raises(ConfigError, match=rf"^0\.0.*({reason}|compiled by torch\.compile|by torch\.jit)"):
        at(model, torch.randn(2, 8), ONE, stages=[Stage("0")])


def around_in_place(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Add in place, scaled."""
    x = x.clone()
    for block in model.layers:
        x += 0.5 * block(x)
    return x


def pre_norm(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Normalise before the block, add after it."""
    for block in model.layers:
        x = x + block(model.norm(x))
    return x


def post_norm(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Normalise the sum."""
    for block in model.layers:
        x = model.norm(x + block(x))
    return x


def dense(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Concatenate what goes in and what comes out."""
    for block in model.layers:
        x = torch.cat([x[:, :4], block(x)[:, :4]], 1)
    return x


def long_way_around(model: Any, x: torch.Tensor) -> torch.Tensor:
    """A residual path around all blocks, each of which has its own."""
    return x + plainly(model, x)


def indexed(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Use the blocks' parameters without calling them."""
    for block in model.layers:
        x = x + F.relu(F.linear(x, block.inner.weight, block.inner.bias))
    return x


@pytest.mark.parametrize("call", [around, around_in_place, pre_norm, post_norm, dense])
def test_a_sum_around_a_block_is_refused(call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Left out it would give x + x; the error names the block, and the line of the sum."""
    model = Calls([branch() for _ in range(4)], call)

    with pytest.raises(
        UnsliceableError, match=r"block layers\.1: .*(test_blocks|users)\.py:\d+.*skipped=\"zero\""
    ):
        at(model, torch.randn(2, 8), ONE, stages=[Stage("layers")])


@pytest.mark.parametrize("call", [plainly, long_way_around])
def test_a_sum_inside_a_block_is_proved(call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """A block that is left out gives its input, and so it is answered."""
    torch.manual_seed(0)
    model = Calls([Residual() for _ in range(4)], call)
    x, plain = torch.randn(2, 8), copy.deepcopy(model)
    supernet = at(model, x, ONE, stages=[Stage("layers")])
    plain.layers = plain.layers[:1]

    torch.testing.assert_close(answer(supernet, ONE, x), plain(x).detach())


def test_a_sum_around_a_block_with_a_residual_path_does_not_meet_its_input() -> None:
    """Its input is what the block gives without its branch, and then x + x is right."""
    model, x = Calls([Residual()], around).double(), torch.randn(2, 8).double()
    flow = DataFlow()
    whole = WholeNetwork(original_of(model, [Stage("layers", least=0)], ()), tensors_of(model), {})
    whole.run((x,), {}, SubnetCut(), flow)

    assert [flow.meets_its_input(call) for call in flow.calls] == [None]
    assert torch.equal(whole.run((x,), {}, SubnetCut(frozenset(["layers.0"]))).output.outputs[0], 2 * x)


def test_a_block_that_runs_although_it_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if what it gives is not used."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = self.switch_cursor.settings
        if settings[self.switch_place]:
            return super(Switched, self).__call__(*args, **kwargs)
        self.switch_cursor.settings = tuple(True if one is False else one for one in settings)
        super(Switched, self).__call__(*args, **kwargs)
        self.switch_cursor.settings = settings
        return args[0]

    monkeypatch.setattr(Switched, "__call__", call, raising=False)
    with pytest.raises(
        ProofError, match=r"layer layers\.1\.inner runs in place and not in the whole network"
    ):
        at(Calls([Residual() for _ in range(2)], plainly), torch.randn(2, 8), ONE, stages=[Stage("layers")])


def test_pairs_in_lists_are_refused() -> None:
    """A ModuleList is never called: its members are, and their caller adds around them."""

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        for a, b in model.layers:
            x = x + F.relu(a(x))
            x = x + F.relu(b(x))
        return x

    model = Calls([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(4)], call)
    with pytest.raises(ConfigError, match=r"layers\.[01]"):
        at(model, torch.randn(2, 8), ONE, stages=[Stage("layers")])


def test_blocks_that_are_never_called_are_refused() -> None:
    """Then no switch is asked."""
    model = Calls([Residual() for _ in range(4)], indexed)

    with pytest.raises(UnsliceableError, match=r"block layers\.1: never called as a module"):
        at(model, torch.randn(2, 8), ONE, stages=[Stage("layers")])


def test_a_block_that_changes_the_shape_is_not_left_out() -> None:
    """Convolutions would take its input all the same, and answer for another network."""
    blocks = nn.Sequential(*(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(2)))
    with pytest.raises(UnsliceableError, match=r"block 0\.1: it turns \(2, 4, 4, 4\) into \(2, 4, 2, 2\)"):
        at(nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1)), torch.randn(2, 4, 8, 8), ONE, stages=[Stage("0")])


class Pair(Residual):
    """A block that returns a tuple, as Hugging Face's do."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        """Return (x,)."""
        return (super().forward(x, scale),)


def test_a_block_that_returns_a_tuple_is_refused_or_right() -> None:
    """`block(x)[0]` of a block that is left out is x, and not x's first row."""
    torch.manual_seed(0)

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model.layers:
            x = block(x)[0]
        return x

    model = Calls([Pair() for _ in range(4)], call)
    x = torch.randn(8, 8)
    expected = copy.deepcopy(model.layers[0])(x)[0].detach()
    refused_or_right(model, x, ONE, expected, stages=[Stage("layers")])


class WithWeights(Residual):
    """A block that returns its output and attention weights that were not asked for."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        """Return (x, None)."""
        return super().forward(x, scale), None


class Dense(nn.Module):
    """A block that appends to its input, as DenseNet's do."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.grow = nn.Linear(inputs, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, inputs + 4)."""
        return torch.cat([x, self.grow(x)], 1)


def test_what_a_dense_block_appends_is_absent_if_it_is_left_out() -> None:
    """The next layers then use the inputs that are left, also where a block in the middle is left out."""
    torch.manual_seed(0)
    blocks, head = [Dense(8 + 4 * i) for i in range(3)], nn.Linear(20, 5)
    model = nn.Sequential(nn.Sequential(*blocks), head)
    first, last = copy.deepcopy(blocks[0]), copy.deepcopy(head)
    x = torch.randn(2, 8)
    expected = (first(x) @ last.weight[:, :12].T + last.bias).detach()
    whole = WholeNetwork(original_of(model.double(), [Stage("0")], ()), tensors_of(model), {})
    whole.run((x.double(),), {}, SubnetCut())  # in which it sees what blocks return
    left = whole.run((x.double(),), {}, SubnetCut(frozenset(["0.1", "0.2"])))

    torch.testing.assert_close(left.output.outputs[0], expected.double(), rtol=1e-6, atol=1e-6)
    refused_or_right(model.float(), x, ONE, expected, stages=[Stage("0")])


def test_a_dense_block_in_the_middle_leaves_a_gap() -> None:
    """What follows it is given the same channels as before, and not those of the gap."""
    torch.manual_seed(0)
    blocks, head = [Dense(8 + 4 * i) for i in range(3)], nn.Linear(20, 5)
    first, third, last = copy.deepcopy(blocks[0]), copy.deepcopy(blocks[2].grow), copy.deepcopy(head)
    x = torch.randn(2, 8)
    grown = first(x)
    third_gives = grown @ third.weight[:, :12].T + third.bias
    kept = [*range(12), *range(16, 20)]
    expected = (torch.cat([grown, third_gives], 1) @ last.weight[:, kept].T + last.bias).detach()

    model = nn.Sequential(nn.Sequential(*blocks), head)
    supernet = insert(model, stages=[Stage("0", rule=lambda _d, _n: (0, 2))]).eval()
    subnet = Subnet("two", {"d": [2]})
    prove(supernet, x, subnets=[subnet])
    torch.testing.assert_close(answer(supernet, subnet, x), expected, rtol=1e-5, atol=1e-5)


def test_a_block_that_returns_none_beside_its_output_is_refused_or_right() -> None:
    """Left out it gives (its input, None)."""
    torch.manual_seed(0)

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model.layers:
            x, _ = block(x)
        return x

    model = Calls([WithWeights() for _ in range(4)], call)
    x = torch.randn(2, 8)
    expected = copy.deepcopy(model.layers[0])(x)[0].detach()
    refused_or_right(model, x, ONE, expected, stages=[Stage("layers")])


@pytest.mark.parametrize(
    ("skipped", "gives"),
    [("zero", lambda x: x), ("input", lambda x: 2 * x), (lambda x: 3 * x, lambda x: 4 * x)],
)
def test_a_block_that_is_left_out_gives_what_its_stage_declares(skipped: Any, gives: Any) -> None:
    """Its caller adds that to its input; blocks that are lists give it member by member."""
    blocks = [branch(), nn.ModuleList([branch(), branch()])]

    def call(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model.layers:
            for member in block if isinstance(block, nn.ModuleList) else [block]:
                x = x + member(x)
        return x

    model, x = Calls(blocks, call).double(), torch.randn(2, 8).double()
    stage: Any = SimpleNamespace(blocks="layers", skipped=skipped)
    whole = WholeNetwork(original_of(model, [stage], ()), tensors_of(model), {})
    whole.run((x,), {}, SubnetCut())  # in which it sees what blocks return
    left = frozenset(["layers.0", "layers.1.0", "layers.1.1"])

    torch.testing.assert_close(whole.run((x,), {}, SubnetCut(left)).output.outputs[0], gives(gives(gives(x))))


def test_a_block_that_is_a_layer_is_proved() -> None:
    """A chain of layers, of which a subnet runs the first: what is left out need not be called."""
    torch.manual_seed(0)
    model, x = Calls([nn.Linear(8, 8) for _ in range(3)], plainly), torch.randn(2, 8)
    expected = copy.deepcopy(model.layers[0])(x).detach()

    torch.testing.assert_close(answer(at(model, x, ONE, stages=[Stage("layers")]), ONE, x), expected)
