"""Trim drops only what a trace proves unused: answers stay, memory never grows, the rest is left whole."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own convention
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpu_worker.supernet.supernet import Supernet

WIDTH = 8
HALF = Subnet("half", {"w": [0.5]})
SMALLER = Subnet("smaller", {"w": [0.25]})


def elastic(model: nn.Module, *layers: str) -> Supernet:
    """Return a supernet that hosts a half and a quarter of these layers' outputs."""
    supernet = insert(model, elastic=[Elastic("w", layers)]).eval()
    supernet.host([HALF, SMALLER])
    return supernet


def shallow(model: nn.Module, *, depth: int = 1) -> Supernet:
    """Return a supernet that hosts the first blocks of `layers`."""
    supernet = insert(model, stages=[Stage("layers")]).eval()
    supernet.host([Subnet("shallow", {"d": [depth]})])
    return supernet


def inputs(seed: int, n: int = 4, *shape: int) -> torch.Tensor:
    """Return n random inputs."""
    return torch.randn(n, *(shape or (WIDTH,)), generator=torch.Generator().manual_seed(seed))


def answers(supernet: Supernet, x: torch.Tensor) -> list[torch.Tensor]:
    """Return what each hosted subnet answers."""
    found = []
    with torch.inference_mode():
        for row in range(len(supernet.subnets)):
            actuate(supernet, row)
            found.append(supernet(x))
    return found


def bytes_of(supernet: Supernet) -> int:
    """Return the bytes of all different tensors' storages."""
    tensors = (*supernet.model.parameters(), *supernet.model.buffers())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Gated(nn.Module):
    """Two experts, of which the sign of the first feature picks one for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        out = torch.zeros_like(x)
        for number, is_its in enumerate((x[:, 0] <= 0, x[:, 0] > 0)):
            if is_its.any():
                out[is_its] = self.down[number](self.up[number](x[is_its]).relu())
        return out


class ByHand(nn.Module):
    """A projection whose weight its parent multiplies by, as Mamba does, beside one that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(WIDTH, 16)
        self.read = nn.Linear(16, 16)
        self.out = nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        x = self.called(x)
        out: torch.Tensor = self.out(x + F.linear(x, self.read.weight[: x.shape[1], : x.shape[1]]))
        return out


class Keywords(nn.Module):
    """Attention that is given its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        x = x[:, None]
        x = x + self.attention(query=x, key=x, value=x)[0]
        out: torch.Tensor = (x + self.down(self.up(x).relu()))[:, 0]
        return out


class Spectral(nn.Module):
    """A layer with a spectral norm between two plain ones."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.down(self.up(x).relu())
        return out


class Tied(nn.Module):
    """A language model whose head is its embedding, beside a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 50); what x is in tokens is of no matter."""
        tokens = (x.abs() * 10).long() % 50
        hidden = self.embedding(tokens).mean(1)
        out: torch.Tensor = self.head(hidden + self.down(self.up(hidden).relu()))
        return out


class Narrowed(nn.Module):
    """The second layer sees as much of the first as the sign of the input's sum says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        hidden = self.up(x)
        out: torch.Tensor = self.down(hidden if x.sum() > 0 else hidden[:, :1])
        return out


class Hooked(nn.Module):
    """A hook reads the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.up.register_forward_hook(lambda layer, _args, output: output + layer.weight.sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        out: torch.Tensor = self.down(self.up(x))
        return out


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        out: torch.Tensor = x + self.layer(x).relu()
        return out


class Peeking(nn.Module):
    """The last block's layer also runs outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        for block in self.layers:
            x = block(x)
        last = self.layers[-1]
        assert isinstance(last, Block)
        out: torch.Tensor = x + last.layer(x)
        return out


class FlatWeights(nn.Module):
    """Both layers' weights are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, WIDTH, bias=False)
        both = torch.cat([self.up.weight.detach().flatten(), self.down.weight.detach().flatten()])
        self.up.weight = nn.Parameter(both[: 16 * WIDTH].view(16, WIDTH))
        self.down.weight = nn.Parameter(both[16 * WIDTH :].view(WIDTH, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        out: torch.Tensor = self.down(self.up(x).relu())
        return out


class Forwarded(Peeking):
    """The last block's layer also runs outside it, without a call that hooks would see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        for block in self.layers:
            x = block(x)
        last = self.layers[-1]
        assert isinstance(last, Block)
        return x + last.layer.forward(x)


class Asking(nn.Module):
    """Converts its input to the layer's dtype, which reads nothing of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        out: torch.Tensor = self.down(self.up(x.to(self.up.weight.dtype)))
        return out


def with_weight(change: Callable[[nn.Linear], None]) -> Supernet:
    """Return a supernet of two layers, of which the first is changed."""
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH))
    first = model[0]
    assert isinstance(first, nn.Linear)
    change(first)
    return elastic(model, "0")


def computed(layer: nn.Linear) -> None:
    """Have a plain tensor for a weight, as functional calls leave it."""
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def part_of_more(layer: nn.Linear) -> None:
    """Have a weight that is a view of a tensor of which nothing else is used."""
    layer.weight = nn.Parameter(torch.randn(100, WIDTH)[:16])


def positive(seed: int) -> torch.Tensor:
    """Return inputs that Gated sends to its second expert alone, and of which Narrowed keeps all."""
    return inputs(seed).abs()


HAND = "its parameters are read from outside it"
SHARED = "other modules have its parameters too"
CASES: Mapping[str, tuple[Callable[[], Supernet], Mapping[str, str]]] = {
    "plain": (lambda: elastic(nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)), "0"), {}),
    "experts": (
        lambda: elastic(Gated(), "up.*"),
        dict.fromkeys(("up.0", "down.0"), "it does not run on every input"),
    ),
    "read by hand": (lambda: elastic(ByHand(), "called"), {"read": HAND}),
    "attention by keywords": (lambda: elastic(Keywords(), "up"), {}),
    "spectral norm": (lambda: elastic(Spectral(parametrizations.spectral_norm), "up"), {}),
    "old spectral norm": (lambda: elastic(Spectral(old_spectral_norm), "up"), {}),
    "tied": (lambda: elastic(Tied(), "up"), {}),
    "a width that depends on the input": (
        lambda: elastic(Narrowed(), "up"),
        {"down": "its width depends on the input"},
    ),
    "hooks": (lambda: elastic(Hooked(), "up"), {"up": "it has hooks"}),
    "outside its block": (lambda: shallow(Peeking()), {"layers.2.layer": "it runs outside its blocks"}),
    "outside its block, by forward": (lambda: shallow(Forwarded()), {"layers.2.layer": HAND}),
    "asked for its dtype": (lambda: elastic(Asking(), "up"), {}),
    "a tensor that is no parameter": (
        lambda: with_weight(computed),
        {"0": "its weight is computed, or its forward replaced"},
    ),
    "part of more": (lambda: with_weight(part_of_more), {"0": "its parameters are part of a larger tensor"}),
    "one tensor": (lambda: elastic(FlatWeights(), "up"), dict.fromkeys(("up", "down"), SHARED)),
}


@pytest.mark.parametrize("name", CASES)
def test_served_answers_stay_and_memory_never_grows(name: str) -> None:
    """Each kind: other inputs than the traced ones have the same answers, and what is whole says why."""
    make, whole = CASES[name]
    torch.manual_seed(0)
    supernet = make()
    shown = [positive(seed) for seed in range(2)]
    if name == "a width that depends on the input":
        shown.append(-shown[0])
    others = [inputs(seed) for seed in range(10, 14)]
    before, weighed = [answers(supernet, x) for x in others], bytes_of(supernet)
    found = supernet.trim(*shown)

    assert dict(found.whole) == whole
    assert bytes_of(supernet) <= weighed
    assert (bytes_of(supernet) < weighed) == (name != "one tensor")
    for x, expected in zip(others, before, strict=True):
        torch.testing.assert_close(answers(supernet, x), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_stays_tied() -> None:
    """Also where the head could be cut because a subnet has fewer features."""
    model = Tied()
    supernet = insert(model, elastic=[Elastic("w", ["head"])]).eval()
    supernet.host([HALF])
    before, weighed = answers(supernet, inputs(1)), bytes_of(supernet)
    found = supernet.trim(inputs(2), inputs(3))

    assert dict(found.whole) == {"head": SHARED}
    assert model.head.weight is model.embedding.weight
    assert bytes_of(supernet) == weighed
    torch.testing.assert_close(answers(supernet, inputs(1)), before)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, old_spectral_norm], ids=["new", "old"])
def test_a_spectral_norm_in_a_block_that_never_runs_stays(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Its weight is computed before each run: there is no parameter to cut."""
    torch.manual_seed(0)
    supernet = shallow(Spectral(norm))
    before, weighed = answers(supernet, inputs(1)), bytes_of(supernet)
    supernet.trim(inputs(2), inputs(3))

    assert bytes_of(supernet) <= weighed
    torch.testing.assert_close(answers(supernet, inputs(1)), before)


def test_blocks_that_never_run_are_dropped() -> None:
    """Of three blocks two go, and nothing else."""
    model = nn.Sequential()
    model.layers = nn.Sequential(*(Block() for _ in range(3)))
    model.head = nn.Linear(WIDTH, 2)
    supernet = shallow(model)
    names = [f"layers.{number}.layer.weight" for number in range(3)]
    kept = model.get_parameter(names[0])
    found = supernet.trim(inputs(1), inputs(2))

    assert (found.n_cut, dict(found.whole)) == (2, {})
    assert [model.get_parameter(name).numel() for name in names] == [WIDTH**2, 0, 0]
    assert model.get_parameter(names[0]) is kept  # what is whole is not copied


def test_with_the_largest_among_them_nothing_is_traced() -> None:
    """Where every block and every output is in use there is nothing to gain, and no pass runs."""
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH))
    supernet = insert(model, elastic=[Elastic("w", ["0"])]).eval()
    supernet.host([HALF, Subnet("whole", {"w": [1.0]})])
    ran = []
    model.register_forward_hook(lambda *_: ran.append(True))
    found = supernet.trim(inputs(1))

    assert (found.n_cut, ran) == (0, [])
    supernet.host([SMALLER])  # nothing is gone


class Looking(nn.Module):
    """At one width it looks at its input's numbers, and then uses more or less of the hidden ones."""

    def __init__(self, look: Callable[[torch.Tensor], bool], at: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.look, self.at = look, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        hidden = self.up(x)
        if hidden.shape[1] == self.at and self.look(x):
            hidden = hidden[:, :1]
        out: torch.Tensor = self.down(hidden)
        return out


LOOKS: Mapping[str, Callable[[torch.Tensor], bool]] = {
    "bool": lambda x: bool(x.sum() < 0),
    "item": lambda x: x.sum().item() < 0,
    "tolist": lambda x: sum(x.flatten().tolist()) < 0,
    "numpy": lambda x: float(x.numpy().sum()) < 0,
    "nonzero": lambda x: len((x < 0).nonzero()) > 0,
    "mask": lambda x: len(x[x < 0]) > 0,
}


@pytest.mark.parametrize("look", [*LOOKS, "never"])
def test_if_a_model_looks_at_numbers_all_subnets_run_on_all_inputs(look: str) -> None:
    """The middle one of three subnets looks; else only the first and the last run on every input."""
    model = Looking(LOOKS.get(look, bool), 8 if look in LOOKS else 0)
    supernet = insert(model, elastic=[Elastic("w", ["up"])]).eval()
    supernet.host([SMALLER, HALF, Subnet("larger", {"w": [0.75]})])
    ran = []
    model.register_forward_hook(lambda *_: ran.append(True))
    found = supernet.trim(positive(1), positive(2), -positive(3))

    assert dict(found.whole) == ({"down": "its width depends on the input"} if look in LOOKS else {})
    # Each subnet's first, in which its channels are followed, the trace, and each subnet again in the end.
    assert len(ran) == 3 + (3 * 3 if look in LOOKS else 3 + 2 * 2) + 3


class Sized(nn.Module):
    """Divides by the number of outputs that the layer has in all, which only `__dict__` shows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        with torch._C.DisableTorchFunction():
            n = self.up.weight.shape[0]
        out: torch.Tensor = self.down(self.up(x)) / n
        return out


class Failing(Sized):
    """Raises where the layer is smaller."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        with torch._C.DisableTorchFunction():
            if self.up.weight.shape[0] < 16:
                raise ValueError("too small")
        out: torch.Tensor = self.down(self.up(x))
        return out


@pytest.mark.parametrize(("model", "why"), [(Sized, "an answer changed"), (Failing, "ValueError: too small")])
def test_everything_is_put_back_if_an_answer_changes(
    model: type[Sized], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What no trace could see shows when all subnets run again."""
    supernet = elastic(model(), "up")
    before, kept = answers(supernet, inputs(1)), supernet.model.get_parameter("up.weight")
    with caplog.at_level(logging.WARNING):
        found = supernet.trim(inputs(2), inputs(3))

    assert found.n_cut == 0
    assert supernet.model.get_parameter("up.weight") is kept
    assert f"the model depends on sizes that were cut: {why}" in caplog.text
    torch.testing.assert_close(answers(supernet, inputs(1)), before)
    supernet.host([Subnet("whole", {"w": [1.0]})])


class Untraceable(Sized):
    """Runs on one input alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, WIDTH)."""
        if len(x) > 1:
            raise RuntimeError("one at a time")
        out: torch.Tensor = self.down(self.up(x))
        return out


def test_a_model_that_cannot_be_traced_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    """The log says why."""
    supernet = elastic(Untraceable(), "up")
    weighed = bytes_of(supernet)
    with caplog.at_level(logging.WARNING):
        supernet.trim(inputs(1, 1), inputs(2, 2))

    assert bytes_of(supernet) == weighed
    assert "not trimmed: the model cannot be traced: RuntimeError: one at a time" in caplog.text
    assert len(answers(supernet, inputs(1, 1))) == 2


def test_what_is_left_whole_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """By path and reason."""
    supernet = elastic(Gated(), "up.*")
    with caplog.at_level(logging.INFO):
        supernet.trim(positive(1), positive(2))

    assert "trim leaves these layers whole: up.0: it does not run on every input; down.0" in caplog.text
