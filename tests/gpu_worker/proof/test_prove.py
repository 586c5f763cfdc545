"""What a proof refuses: modules of users that used to answer wrong without an error, each by its reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.proof.absence import ProofError, UnjudgedError, UnsliceableError
from gpu_worker.proof.flow import DataFlow
from gpu_worker.proof.prove import prove
from gpu_worker.proof.whole import SubnetCut, WholeNetwork, tensors_of
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import Switched
from gpu_worker.supernet.original import original_of
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.proof.models import IMAGES, WORDS, convolutional, encoder
from tests.test_architecture import MODULES, imports

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.supernet.supernet import Supernet

HALF = Subnet("half", {"w": [0.5]})
ONE = Subnet("one", {"d": [1]})


class Residual(nn.Module):
    """A block with a residual path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return x and more."""
        return x + scale * F.relu(self.inner(x))


class Calls(nn.Module):
    """Blocks, and a function that says how their caller calls them."""

    def __init__(
        self, blocks: Sequence[nn.Module], call: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the caller's loop."""
        return self.call(self, x)


def residuals() -> nn.Module:
    """Return four residual blocks in a row, as 0.0 to 0.3."""
    return nn.Sequential(nn.Sequential(*(Residual() for _ in range(4))))


def at(model: nn.Module, x: torch.Tensor, subnet: Subnet, **declared: Any) -> Supernet:
    """Insert, and prove one subnet."""
    supernet = insert(model, **declared).eval()
    prove(supernet, x, subnets=[subnet])
    return supernet


def answer(supernet: Supernet, subnet: Subnet, x: torch.Tensor) -> torch.Tensor:
    """Return a subnet's answer in place."""
    supernet.host([subnet])
    actuate(supernet, 0)
    with torch.inference_mode():
        found: torch.Tensor = supernet(x)
    return found


# --- modules that run past what insertion changes ------------------------------------------------


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


# --- blocks --------------------------------------------------------------------------------------


def plainly(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Call one after the other."""
    for block in model.layers:
        x = block(x)
    return x


def around(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Add outside of the block."""
    for block in model.layers:
        x = x + block(x)
    return x


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


def branch() -> nn.Module:
    """A block without a residual path."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


@pytest.mark.parametrize("call", [around, around_in_place, pre_norm, post_norm, dense])
def test_a_sum_around_a_block_is_refused(call: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    """Left out it would give x + x; the error names the block, and the line of the sum."""
    model = Calls([branch() for _ in range(4)], call)

    with pytest.raises(UnsliceableError, match=r"block layers\.1: .*test_prove\.py:\d+.*skipped=\"zero\""):
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


def refused_or_right(
    model: nn.Module, x: torch.Tensor, subnet: Subnet, expected: torch.Tensor, **declared: Any
) -> None:
    """What is proved answers right; what is not proved is refused."""
    supernet = insert(model, **declared).eval()
    try:
        prove(supernet, x, subnets=[subnet])
    except ProofError:
        return
    torch.testing.assert_close(answer(supernet, subnet, x), expected, rtol=1e-4, atol=1e-4)


# --- sizes ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, and what lies between them."""

    def __init__(
        self, a: nn.Module, b: nn.Module, between: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.a, self.b, self.between = a, b, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return b of what lies between of a of x."""
        found: torch.Tensor = self.b(self.between(self, self.a(x)))
        return found


def attended(_model: Any, fused: torch.Tensor) -> torch.Tensor:
    """Attend with q, k and v of one projection."""
    q, k, v = (torch.unflatten(part, -1, (-1, 8)).transpose(1, 2) for part in fused.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def viewed_by_a_constant(_model: Any, fused: torch.Tensor) -> torch.Tensor:
    """Attend with 4 heads, however wide they are."""
    q, k, v = (part.view(*part.shape[:2], 4, -1).transpose(1, 2) for part in fused.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def scaled_by_width(_model: Any, x: torch.Tensor) -> torch.Tensor:
    """A scale of the width that there is, and not of that which is declared."""
    scaled: torch.Tensor = x / x.shape[-1] ** 0.5
    return scaled


def channels_last(_model: Any, x: torch.Tensor) -> torch.Tensor:
    """Flatten positions first, so that a channel's inputs are not the first."""
    return x.permute(0, 2, 3, 1).flatten(1)


def concatenated(_model: Any, x: torch.Tensor) -> torch.Tensor:
    """Two elastic parts after another, as in a U-Net."""
    return torch.cat([x, torch.tanh(x)], -1)


def used_elsewhere(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Use the first layer's weight outside of it."""
    return x + F.linear(torch.ones(len(x), 8, dtype=x.dtype), model.a.weight)[:, : x.shape[-1]]


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "fused GLU": (
        lambda: Net(nn.Linear(8, 64), nn.Linear(32, 4), lambda _, x: F.glu(x, -1)), (3, 8), "parts=N",
    ),
    "fused gate and up": (
        lambda: Net(
            nn.Linear(8, 64), nn.Linear(32, 4), lambda _, x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
        ),
        (3, 8),
        r"size 'h' cut.*parts=N",
    ),
    "fused q, k, v": (lambda: Net(nn.Linear(32, 96), nn.Linear(32, 32), attended), (2, 5, 32), "parts=N"),
    "heads by a constant": (
        lambda: Net(nn.Linear(32, 96), nn.Linear(32, 32), viewed_by_a_constant), (2, 5, 32), "parts=N",
    ),
    "a scale of the width": (
        lambda: Net(nn.Linear(8, 16), nn.Linear(16, 4), scaled_by_width), (3, 8),
    r"layer b: .*deviates by 0\.\d+", ),
    "a parameter elsewhere": (
        lambda: Net(nn.Linear(8, 16), nn.Linear(16, 4), used_elsewhere), (3, 8),
        r"layer a: a parameter is used outside .*test_prove\.py:\d+",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_size_that_insertion_does_not_follow_is_refused(name: str) -> None:
    """The error names the layer, the size, or the line, and what to declare."""
    build, shape, message = REFUSED[name]
    torch.manual_seed(0)

    with pytest.raises(ProofError, match=message):
        at(build(), torch.randn(shape), HALF, elastic=[Elastic("h", ["a"])])


def test_images_flattened_channels_last_are_refused_or_right() -> None:
    """A channel's inputs are then not the first, but every second half."""
    torch.manual_seed(0)
    a, b = nn.Conv2d(3, 8, 1), nn.Linear(32, 4)
    x = torch.randn(2, 3, 2, 2)
    columns = [8 * place + channel for place in range(4) for channel in range(4)]
    inner = a(x)[:, :4].permute(0, 2, 3, 1).flatten(1)
    expected = inner @ b.weight[:, columns].T + b.bias
    model = Net(copy.deepcopy(a), copy.deepcopy(b), channels_last)

    refused_or_right(model, x, HALF, expected.detach(), elastic=[Elastic("h", ["a"])])


def test_a_concatenation_is_refused_or_right() -> None:
    """The first n of it are not the first of each part."""
    torch.manual_seed(0)
    a, b = nn.Linear(8, 16), nn.Linear(32, 4)
    model = Net(copy.deepcopy(a), copy.deepcopy(b), concatenated)
    x = torch.randn(3, 8)
    inner = a(x)[:, :8]
    weight = torch.cat([b.weight[:, :8], b.weight[:, 16:24]], 1)
    expected = torch.cat([inner, torch.tanh(inner)], 1) @ weight.T + b.bias

    refused_or_right(model, x, HALF, expected.detach(), elastic=[Elastic("h", ["a"])])


class Custom(torch.autograd.Function):
    """An operation in a kernel of a user's own: torch sees what it does."""

    @staticmethod
    def forward(_context: Any, x: torch.Tensor) -> torch.Tensor:
        """Double it."""
        return 2 * x


@torch.library.custom_op("superserve_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Double it where torch does not see it."""
    return 2 * x


def autograd_function(_model: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply it."""
    found: torch.Tensor = Custom.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return found


def test_a_custom_kernel_on_a_cut_size_cannot_be_judged() -> None:
    """What it does is not seen; an autograd function of torch's operations is."""
    with pytest.raises(UnjudgedError, match=r"test_prove\.py:\d+: the custom operation superserve_tests"):
        at(
            Net(nn.Linear(8, 16), nn.Linear(16, 4), lambda _, x: doubled(x)),
            torch.randn(3, 8),
            HALF,
            elastic=[Elastic("h", ["a"])],
        )
    at(
        Net(nn.Linear(8, 16), nn.Linear(16, 4), autograd_function),
        torch.randn(3, 8),
        HALF,
        elastic=[Elastic("h", ["a"])],
    )


# --- numbers, statistics, and what stays as it was -----------------------------------------------


def test_statistics_that_are_not_of_a_subnets_width_are_named() -> None:
    """They are placed by the oracle, which counts the channels that are present."""
    supernet = insert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), elastic=[Elastic("h", ["0"])])
    supernet.set_statistics({"half": SubnetStatistics((3,), torch.ones(6))})

    with pytest.raises(ProofError, match="statistics of half, 1: expected 4 channels, got 3"):
        prove(supernet.eval(), torch.randn(IMAGES), subnets=[HALF], checks_resident=False)


def test_weights_that_are_all_equal_hide_nothing() -> None:
    """A layer of ones answers right whichever ones it uses; the proof gives it noise, in its own copy."""

    def reversed_half(_model: Any, x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)

    model = Net(nn.Linear(8, 16), nn.Linear(16, 4), reversed_half)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    with pytest.raises(ProofError, match=r"layer b: .*deviates|: b: given"):
        at(model, torch.randn(3, 8), HALF, elastic=[Elastic("h", ["a"])])

    assert all(bool((parameter == 1).all()) for parameter in model.parameters())


@pytest.mark.parametrize(("build", "shape"), [(convolutional, IMAGES), (encoder, WORDS)])
def test_a_proof_leaves_the_supernet_as_it_was(build: Callable[[], Supernet], shape: tuple[int, ...]) -> None:
    """Same tensors, same hosted subnets, same answer, same mode."""
    supernet, x = build(), torch.randn(shape)
    with torch.inference_mode():
        before = supernet(x)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in supernet.state_dict().items()}
    held = supernet.subnets, dict(supernet.statistics), supernet.cursor.chosen.row
    prove(supernet, x, most=4)

    assert (supernet.subnets, dict(supernet.statistics), supernet.cursor.chosen.row) == held
    assert not supernet.training
    for name, tensor in supernet.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])
    with torch.inference_mode():
        assert torch.equal(supernet(x), before)


def test_a_model_that_cannot_be_copied_cannot_be_judged() -> None:
    """The reason is that of the copy."""

    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
            raise TypeError("held open")

    supernet = insert(nn.Sequential(nn.Linear(8, 4), Uncopied(4, 4)), elastic=[Elastic("h", ["0"])])
    with pytest.raises(ProofError, match="cannot be copied: TypeError: held open"):
        prove(supernet, torch.randn(2, 8))


def test_numbers_that_are_not_finite_prove_nothing() -> None:
    """NaN equals NaN everywhere."""
    with pytest.raises(UnjudgedError, match="no finite numbers"):
        at(
            nn.Sequential(nn.Linear(8, 4)),
            torch.full((2, 8), float("nan")),
            HALF,
            elastic=[Elastic("h", ["0"])],
        )


# --- what other networks do -----------------------------------------------------------------------


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
    """The next layer then uses the inputs that are left; a block in the middle would move those behind it."""
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
    again = nn.Sequential(nn.Sequential(*(Dense(8 + 4 * i) for i in range(3))), nn.Linear(20, 5))
    with pytest.raises(ProofError):
        at(again, x, Subnet("two", {"d": [2]}), stages=[Stage("0", rule=lambda _d, _n: (0, 2))])


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


@torch.library.custom_op("superserve_tests::singly", mutates_args=())
def singly(x: torch.Tensor) -> torch.Tensor:
    """Take float32 alone, as some kernels do."""
    if x.dtype != torch.float32:
        raise RuntimeError("expected Float32")
    return x.clone()


def test_a_model_that_takes_no_doubles_is_proved_in_float32() -> None:
    """To what float32 gives, which is enough to see a fault."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.b(self.a(singly(x)).tanh())
            return found

    supernet = insert(Head(), elastic=[Elastic("h", ["a"])]).eval()
    proof = prove(supernet, torch.randn(3, 8))

    assert 0 <= proof.deviation < 1e-5


def test_a_trimmed_supernet_cannot_be_judged() -> None:
    """What the whole network needs is gone."""
    supernet, x = convolutional(), torch.randn(IMAGES)
    supernet.host([Subnet("small", supernet.controls.space.smallest)])
    supernet.trim(x)

    with pytest.raises(UnjudgedError, match="prove a supernet before it is trimmed"):
        prove(supernet, x)


def test_a_supernet_in_halves_is_compared_with_its_copy() -> None:
    """To what halves give; and every module keeps its mode."""
    supernet = encoder().train()
    supernet.model[0].eval()  # type: ignore[index]  # torch says Tensor or Module
    supernet.to_half(torch.bfloat16)
    modes = [module.training for module in supernet.modules()]
    prove(supernet, torch.randn(WORDS), most=2)

    assert [module.training for module in supernet.modules()] == modes


def test_what_adds_nothing_is_left_out_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subnets in which each size and each depth occurs are compared, however long it takes."""
    supernet, x = encoder(), torch.randn(WORDS)
    space = supernet.controls.space
    hosted = [Subnet("large", space.largest), Subnet("small", space.smallest)]
    hosted += [Subnet(f"{w}", {"d": [4], "w": [w, 1.0, 1.0]}) for w in (0.25, 1.0)]
    assert set(prove(supernet, x, subnets=hosted).subnets) == {"large", "small", "0.25", "1.0"}
    monkeypatch.setattr("gpu_worker.proof.prove.EXTRA_S", 0.0)

    assert set(prove(supernet, x, subnets=hosted).subnets) == {"large", "small"}


def test_a_network_that_draws_random_numbers_cannot_be_judged() -> None:
    """The error says so, and blames no layer."""
    model = Net(nn.Linear(8, 16), nn.Linear(16, 4), lambda _, x: x + torch.rand_like(x))

    with pytest.raises(UnjudgedError, match="answers the same batch differently each time"):
        at(model, torch.randn(3, 8), HALF, elastic=[Elastic("h", ["a"])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_casts_on_its_own_is_proved_to_that_precision(dtype: torch.dtype) -> None:
    """As norms of Hugging Face's do; a fault is still seen."""

    def build(*, flips: bool) -> nn.Module:
        def between(_model: Any, x: torch.Tensor) -> torch.Tensor:
            inner = x.to(dtype).tanh()
            return (inner.flip(-1) if flips else inner).to(x.dtype)

        return Net(nn.Linear(8, 16), nn.Linear(16, 4), between)

    at(build(flips=False), torch.randn(3, 8), HALF, elastic=[Elastic("h", ["a"])])
    with pytest.raises(ProofError, match=r"layer b: |: b: given"):
        at(build(flips=True), torch.randn(3, 8), HALF, elastic=[Elastic("h", ["a"])])


@dataclass
class Answer:
    """What a model may return."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def test_outputs_in_dataclasses_and_dictionaries_are_compared() -> None:
    """And arguments by name are passed."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, *, x: torch.Tensor, flipped: bool = False) -> Answer:
            inner = self.a(x)
            return Answer(self.b(inner.flip(-1) if flipped else inner))

    supernet = insert(Named(), elastic=[Elastic("h", ["a"])]).eval()
    x = torch.randn(3, 8)

    assert prove(supernet, {"x": x}, subnets=[HALF]).n_layers == 3
    with pytest.raises(ProofError, match=r"layer b: |: b: given"):
        prove(supernet, {"x": x, "flipped": True}, subnets=[HALF])


def test_a_supernet_that_does_not_fit_twice_cannot_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line, and not torch's traceback."""

    def deepcopy(_supernet: Supernet) -> Supernet:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    supernet = convolutional()
    monkeypatch.setattr("gpu_worker.proof.prove.copy.deepcopy", deepcopy)
    with pytest.raises(UnjudgedError, match=r"cannot be copied in .*: RuntimeError: DefaultCPUAllocator"):
        prove(supernet, torch.randn(IMAGES))


# --- what a stage declares, and who the oracle asks -------------------------------------------------


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


def test_the_oracle_imports_nothing_of_the_slicer() -> None:
    """It has no way to believe what the slicer believes."""
    oracle = ["absence", "rules", "flow", "references", "whole"]
    found = {
        one.target
        for name in oracle
        for one in imports(f"gpu_worker.proof.{name}", MODULES[f"gpu_worker.proof.{name}"])
        if one.target.startswith("gpu_worker.")
    }

    assert found <= {"gpu_worker.supernet.original", *(f"gpu_worker.proof.{name}" for name in oracle)}
