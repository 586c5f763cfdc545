"""What a proof refuses: modules of users that used to answer wrong without an error, each by its reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import library, nn

from gpu_worker.proof.absence import ProofError, UnjudgedError
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.subnet import Subnet
from tests.gpu_worker.proof.models import IMAGES, WORDS, convolutional, encoder
from tests.gpu_worker.proof.users import HALF, Net, at, refused_or_right
from tests.test_architecture import MODULES, imports

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.supernet.supernet import Supernet


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


@library.custom_op("superserve_tests::doubled", mutates_args=())
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


@library.custom_op("superserve_tests::singly", mutates_args=())
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
    """The error names that, and blames no layer."""
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
