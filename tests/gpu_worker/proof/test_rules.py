"""What each operation means for absent elements, compared with the same operation on a tensor without them.

The oracle runs at full width with marks. Each operation here is also run on the channels that are kept alone,
in plain torch: what the oracle says is present must be that.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.proof.absence import ProofError, UnjudgedError, UnsliceableError
from gpu_worker.proof.whole import SubnetCut, WholeNetwork, tensors_of
from gpu_worker.supernet.insertion import Elastic
from gpu_worker.supernet.original import original_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[torch.Tensor], torch.Tensor]

CHANNELS, KEPT = 20, 12


class Applied(nn.Module):
    """A 1 x 1 convolution, and a function of what it gives."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the function's value."""
        return self.function(self.conv(x))


def oracle(model: nn.Module, x: torch.Tensor, layer: str, kept: int) -> torch.Tensor:
    """Return what the oracle says is present of the output if `layer` keeps its first outputs."""
    model = model.double().eval()
    original = original_of(model, (), [Elastic("size", [layer])])
    whole = WholeNetwork(original, tensors_of(model), {})
    return whole.run((x,), {}, SubnetCut(kept={"size": kept})).output.outputs[0]


def closely(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare in double precision."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def in_place(x: torch.Tensor) -> torch.Tensor:
    """Write into a view of a tensor, and read another view of it."""
    y = x.clone()
    y.permute(0, 2, 3, 1).mul_(2).add_(1)
    return y.flatten(2).relu_()


def squeeze_and_excite(x: torch.Tensor) -> torch.Tensor:
    """Scale channels by what is in them."""
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """Normalise over channels, as models with norms of their own do."""
    variance, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
    deviation, _ = torch.std_mean(x, (1, 2))
    return (x - mean) / (variance + 1e-5).sqrt() + deviation[:, None, None]


def own_attention(x: torch.Tensor) -> torch.Tensor:
    """Attend between positions with heads of 2 channels."""
    heads = torch.unflatten(x.flatten(2), 1, (-1, 2)).transpose(2, 3)
    return F.scaled_dot_product_attention(heads, heads, heads)


EXACT: dict[str, Function] = {
    "relu": F.relu,
    "in place": in_place,
    "gelu of a scaled sum": lambda x: F.gelu(2 * x + 1),
    "channel gate": squeeze_and_excite,
    "mean over channels": lambda x: x.mean(1),
    "mean over all": lambda x: x.mean(),
    "mean over space": lambda x: x.mean((2, 3)),
    "a number of what is kept": lambda x: x * float(x.sum()),
    "sum": lambda x: x.sum(1, keepdim=True),
    "variance": lambda x: x.var(1),
    "standard deviation": lambda x: x.std((1, 2), keepdim=True),
    "normalised by hand": by_hand,
    "largest": lambda x: x.amax(1),
    "smallest": lambda x: x.amin((1, 2)),
    "max with its place": lambda x: x.max(1).values,
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "norm": lambda x: F.normalize(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)),
    "rms norm": lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],)),
    "rms norm with eps": lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=0.1),
    "group norm of whole groups": lambda x: F.group_norm(x, x.shape[1] // 2),
    "instance norm": F.instance_norm,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "padding": lambda x: F.pad(x, (1, 1, 0, 2)),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "flatten": lambda x: x.flatten(1),
    "flatten, channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "concatenation": lambda x: torch.cat([x, 2 * x], 1),
    "concatenation with what is whole": lambda x: torch.cat([x, x.mean(1, keepdim=True)], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "split heads": lambda x: torch.unflatten(x, 1, (-1, 2)).softmax(2),
    "gram matrix": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "product of positions": lambda x: x.flatten(2).transpose(1, 2) @ x.flatten(2),
    "einsum": lambda x: torch.einsum("bchw,bchv->bwv", x, x),
    "attention of heads": own_attention,
    "rolled in space": lambda x: x.roll(1, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "glu over space": lambda x: F.glu(x, 3),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "depthwise": lambda x: F.conv2d(x, torch.full((x.shape[1], 1, 1, 1), 2.0).double(), groups=x.shape[1]),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_present_is_what_the_kept_part_alone_gives(name: str) -> None:
    """Reductions use the kept part, moves keep its order, products leave the rest out."""
    torch.manual_seed(0)
    model, function = Applied(EXACT[name]), EXACT[name]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = oracle(model, x, "conv", KEPT)
    with torch.no_grad():
        expected = function(model.conv(x)[:, :KEPT].contiguous())

    closely(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: F.glu(x, 1), UnsliceableError),
        (lambda x: x[:, :10] * x[:, 10:], UnsliceableError),
        (lambda x: x[:, :8].flatten(2) @ x[:, 12:].flatten(2).transpose(1, 2), UnsliceableError),
        (lambda x: x + x.flip(1), UnsliceableError),
        (lambda x: x.sort(1).values, UnjudgedError),
        (lambda x: x.cumsum(1).flip(1), UnjudgedError),
        (lambda x: x * float(x[0, -1, 0, 0]), UnjudgedError),
        (lambda x: x.view(torch.int32).float(), UnjudgedError),
    ],
)
def test_what_pairs_kept_with_cut_elements_is_refused(function: Function, error: type[ProofError]) -> None:
    """A fused layer cut in one piece, and operations without a rule; the error names file and line."""
    with pytest.raises(error, match=r"test_rules\.py:\d+"):
        oracle(Applied(function), torch.randn(2, 3, 4, 4, dtype=torch.float64), "conv", KEPT)


def test_a_consumer_uses_zero_for_what_is_absent() -> None:
    """Which inputs are masked follows from where elements went: every second, behind a transposition."""
    torch.manual_seed(0)

    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 8)
            self.b = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(torch.unflatten(self.a(x), -1, (2, 4)).transpose(1, 2).flatten(1))
            return y

    model = Interleaved().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    # Outputs 0..3 of `a` are its first row of two; transposed, they are inputs 0, 2, 4, 6 of `b`.
    inner = model.a(x)
    weight = model.b.weight[:, ::2]
    expected = inner[:, :4] @ weight.T + model.b.bias

    closely(oracle(model, x, "a", 4), expected.detach())


class Recurrent(nn.Module):
    """A linear layer, a recurrent one, and what follows it."""

    def __init__(self, kind: Callable[..., nn.RNNBase], *, bidirectional: bool) -> None:
        super().__init__()
        self.a = nn.Linear(3, 6)
        self.rnn = kind(6, 8, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.b = nn.Linear(16 if bidirectional else 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, 5), with the last hidden state added."""
        found, state = self.rnn(self.a(x))
        hidden = state[0] if isinstance(state, tuple) else state
        last: torch.Tensor = self.b(found) + hidden.mean()
        return last


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "n_gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layer", "kept"), [("rnn", 3), ("a", 4)])
def test_a_recurrent_layer_is_that_of_its_kept_units(
    kind: Callable[..., nn.RNNBase], n_gates: int, bidirectional: bool, layer: str, kept: int
) -> None:
    """Two layers, both directions, every cell: as a smaller one whose weights are gathered by index."""
    torch.manual_seed(0)
    model = Recurrent(kind, bidirectional=bidirectional).double()
    inputs, hidden = (6, kept) if layer == "rnn" else (kept, 8)
    small = Recurrent(kind, bidirectional=bidirectional).double()
    small.a = nn.Linear(3, inputs).double()
    small.rnn = kind(inputs, hidden, num_layers=2, bidirectional=bidirectional, batch_first=True).double()
    small.b = nn.Linear((1 + bidirectional) * hidden, 5).double()
    units = torch.arange(hidden)
    rows = torch.cat([8 * gate + units for gate in range(n_gates)])
    both = torch.cat([units, 8 + units]) if bidirectional else units
    state = {}
    for name, whole in model.state_dict().items():
        if "rnn" in name:
            columns = units if "_hh" in name else torch.arange(inputs) if "_l0" in name else both
            state[name] = whole[rows] if whole.dim() == 1 else whole[rows][:, columns]
        else:
            state[name] = (
                whole[:inputs] if name.startswith("a.") else whole[..., both] if whole.dim() == 2 else whole
            )
    small.load_state_dict(state)
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    with torch.no_grad():
        closely(oracle(model, x, layer, kept), small(x))


# --- what the oracle knows of layers --------------------------------------------------------------


class Fused(nn.Module):
    """One layer for several parts."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.a = sizes, nn.Linear(3, sum(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the parts after another, each squared."""
        return torch.cat([part.square() for part in self.a(x).split(self.sizes, -1)], -1)


@pytest.mark.parametrize(
    ("sizes", "declared", "kept", "rows"),
    [
        ((4, 4), 2, 3, [0, 1, 2, 4, 5, 6]),
        ((8, 4, 4), (8, 4, 4), 3, [0, 1, 2, 3, 4, 5, 8, 9, 10, 12, 13, 14]),
        ((8,), (), 3, [0, 1, 2]),
    ],
)
def test_of_each_part_the_first_outputs_are_present(
    sizes: tuple[int, ...], declared: int | tuple[int, ...], kept: int, rows: list[int]
) -> None:
    """A size counts the smallest part, and larger ones keep in proportion."""
    torch.manual_seed(0)
    model = Fused(sizes).double()
    size: Any = SimpleNamespace(name="size", layers=["a"], parts=declared)
    whole = WholeNetwork(original_of(model, (), [size]), tensors_of(model), {})
    x = torch.randn(2, 3, dtype=torch.float64)
    found = whole.run((x,), {}, SubnetCut(kept={"size": kept})).output.outputs[0]

    closely(found, model.a(x)[:, rows].square().detach())


class Doubled(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return twice what the norm gives."""
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("kind", "tracks"), [(nn.BatchNorm2d, True), (nn.BatchNorm2d, False), (Doubled, True)]
)
def test_statistics_are_those_of_the_channels_that_are_present(
    kind: type[nn.BatchNorm2d], tracks: bool
) -> None:
    """Behind a concatenation these are not the first ones; and the norm keeps its own."""
    torch.manual_seed(0)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.norm = kind(8, track_running_stats=tracks)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.a(x)
            normed: torch.Tensor = self.norm(torch.cat([inner, -inner], 1))
            return normed

    model = Joined().double().eval()
    nn.init.uniform_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    mean, variance = torch.randn(4).double(), 0.5 + torch.rand(4).double()
    asked: list[tuple[str, int]] = []

    def statistics(path: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((path, channels))
        return mean, variance

    whole = WholeNetwork(original_of(model, (), [Elastic("size", ["a"])]), tensors_of(model), {})
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = whole.run((x,), {}, SubnetCut(kept={"size": 2}, statistics=statistics)).output.outputs[0]
    rows = [0, 1, 4, 5]
    inner = model.a(x)[:, :2]
    parts = mean, variance, model.norm.weight[rows], model.norm.bias[rows]
    expected = F.batch_norm(torch.cat([inner, -inner], 1), *parts, eps=model.norm.eps)

    closely(found, ((2 if kind is Doubled else 1) * expected).detach())
    assert asked == [("norm", 4)]
    own = model.norm.running_mean
    assert own is None or torch.equal(own, torch.zeros_like(own))


@pytest.mark.parametrize("averages", [True, False])
def test_attention_weights_are_those_of_the_kept_heads(averages: bool) -> None:
    """And their mean is over these alone."""
    torch.manual_seed(0)

    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x, x, x, average_attn_weights=averages)

    model = Weights().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        heads = model.a(x, x, x, average_attn_weights=False)[1][:, :3]
    whole = WholeNetwork(original_of(model, (), [Elastic("size", ["a"])]), tensors_of(model), {})
    found = whole.run((x,), {}, SubnetCut(kept={"size": 3})).output.outputs[1]

    closely(found, heads.mean(1) if averages else heads)
