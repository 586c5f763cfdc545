"""Which inputs a layer uses behind calls that join, divide or reorder channels.

What is expected is a network of plain torch with numbers gathered by index, or the whole network with the
channels that a subnet lacks set to zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.calibration import calibrate
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.supernet.answers import alike, answer, drawn

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet

Between = Callable[..., torch.Tensor]


def random(module: nn.Module) -> Any:
    """Return a module in evaluation, with random doubles."""
    torch.manual_seed(0)
    module.double().eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
            if tensor.dim() > 1:
                tensor.data.normal_()
    return module


def masked(x: torch.Tensor, n: int, axis: int) -> torch.Tensor:
    """Return x with all but the first n entries of an axis at zero."""
    keep = torch.arange(x.shape[axis]) < n
    return x * keep.view(-1, *[1] * (-1 - axis if axis < 0 else x.dim() - 1 - axis))


def checked(
    supernet: Supernet, control: dict[str, list[Any]], expected: torch.Tensor, *args: torch.Tensor
) -> None:
    """Compare the first pass, later ones, and one with gradients."""
    alike(answer(supernet, control, *args), expected)
    alike(answer(supernet, control, *args), expected)
    found = supernet.run_with(supernet.settings_of(Subnet("s", control)), *args)
    alike(found.detach(), expected)


# --- two layers and what is between them --------------------------------------------------------


class Between2(nn.Module):
    """A layer that is cut, something without parameters, and a layer that follows."""

    def __init__(self, first: nn.Module, between: Between, last: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = first, between, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the three."""
        out: torch.Tensor = self.last(self.between(self.first(x)))
        return out


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Flatten (B, C, H, W) with channels last."""
    return x.permute(0, 2, 3, 1).flatten(1)


RIGHT: dict[str, tuple[Callable[[], nn.Module], Between, Callable[[], nn.Module], tuple[int, ...], int]] = {
    # The layer that is cut to 5 of 8 outputs, what is between, the layer behind it, the input, the cut axis.
    "flattened": (
        lambda: nn.Conv2d(2, 8, 1),
        lambda x: x.flatten(1),
        lambda: nn.Linear(48, 3),
        (2, 2, 2, 3),
        1,
    ),
    "channels last": (lambda: nn.Conv2d(2, 8, 1), channels_last, lambda: nn.Linear(48, 3), (2, 2, 2, 3), 1),
    "channels last, viewed": (
        lambda: nn.Conv2d(2, 8, 1),
        lambda x: x.movedim(1, -1).reshape(len(x), -1),
        lambda: nn.Linear(48, 3),
        (2, 2, 2, 3),
        1,
    ),
    "joined with itself": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.cat([x, x.tanh()], -1),
        lambda: nn.Linear(16, 3),
        (2, 4),
        -1,
    ),
    "joined behind whole ones": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.cat([x.new_ones(len(x), 3), x], 1),
        lambda: nn.Linear(11, 3),
        (2, 4),
        -1,
    ),
    "joined behind an empty cache": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.cat([torch.tensor([], dtype=x.dtype), x], dim=-2),
        lambda: nn.Linear(8, 3),
        (2, 4, 4),
        -1,
    ),
    "stacked and unbound": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.stack([x, 2 * x], 1).unbind(1)[1],
        lambda: nn.Linear(8, 3),
        (2, 4),
        -1,
    ),
    "mean and largest": (
        lambda: nn.Conv1d(4, 8, 1),
        lambda x: torch.cat([x.mean(-1), x.amax(2)], 1),
        lambda: nn.Linear(16, 3),
        (2, 4, 5),
        1,
    ),
    "tokens become channels": (
        lambda: nn.Linear(4, 8),
        lambda x: x.transpose(1, 2).mean(-1),
        lambda: nn.Linear(8, 3),
        (2, 5, 4),
        -1,
    ),
    "indexed": (
        lambda: nn.Linear(4, 8),
        lambda x: x[:, 0] + x[:, None, -1].squeeze(1),
        lambda: nn.Linear(8, 3),
        (2, 5, 4),
        -1,
    ),
    "picked rows": (
        lambda: nn.Linear(4, 8),
        lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 0])],
        lambda: nn.Linear(8, 3),
        (2, 5, 4),
        -1,
    ),
    "joined behind itself shuffled by pixels": (
        lambda: nn.Conv2d(2, 8, 1),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda: nn.Conv2d(32, 3, 1),
        (2, 2, 4, 4),
        1,
    ),
    "weighted by einsum": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.einsum("btc,bsc->bst", x, x) @ torch.einsum("btc->btc", x),
        lambda: nn.Linear(8, 3),
        (2, 5, 4),
        -1,
    ),
    "folded and unfolded": (
        lambda: nn.Linear(4, 8),
        lambda x: x.reshape(-1, 1).tanh().reshape(len(x), -1),
        lambda: nn.Linear(8, 3),
        (2, 4),
        -1,
    ),
    "the first four": (
        lambda: nn.Linear(4, 8),
        lambda x: x[..., :4] + x.narrow(-1, 0, 4) + x[:, :1],
        lambda: nn.Linear(4, 3),
        (2, 4),
        -1,
    ),
    "by size from the shape": (
        lambda: nn.Linear(4, 8),
        lambda x: torch.cat([x[..., : x.shape[-1]], x.narrow(-1, 0, x.shape[-1])], -1),
        lambda: nn.Linear(16, 3),
        (2, 4),
        -1,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_layer_uses_what_it_is_given(name: str) -> None:
    """As the whole network with channels at zero: nothing between the layers mixes them or adds to them."""
    first, between, last, shape, axis = RIGHT[name]
    model = random(Between2(first(), between, last()))
    x = drawn(*shape)
    if name == "joined behind whole ones":
        cut = masked(model.first(x), 5, axis)
        expected = model.last(torch.cat([torch.ones(2, 3).double(), cut], 1))
    else:
        expected = model.last(between(masked(model.first(x), 5, axis)))
    if name == "mean and largest":  # negative numbers are not larger than a zero
        whole = model.first(x)
        both = torch.cat([masked(whole.mean(-1), 5, 1), masked(whole.amax(2), 5, 1)], 1)
        expected = model.last(both)
    whole = model(x)
    supernet = insert(model, elastic=[Elastic("w", ["first"])])

    checked(supernet, {"w": [5 / 8]}, expected, x)
    checked(supernet, {"w": [1.0]}, whole, x)


def written_into(x: torch.Tensor) -> torch.Tensor:
    """Put x behind numbers of the same tensor, which is as wide as in the whole network."""
    whole = torch.zeros(len(x), 20, dtype=x.dtype)
    whole[:, : x.shape[1]] = x
    whole[:, x.shape[1] : x.shape[1] + 4] = 1
    return whole


WRONG: dict[str, tuple[Between, int, str]] = {
    # What is between, the inputs behind it, and the call that is named.
    "halves": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 8, "chunk"),
    "split by size": (lambda x: torch.mul(*x.split(x.shape[-1] // 2, -1)), 8, "split"),
    "gated": (F.glu, 8, "glu"),
    "the last eight": (lambda x: x[..., -8:], 8, "__getitem__"),
    "the last eight by shape": (lambda x: x[..., x.shape[-1] - 8 : x.shape[-1]], 8, "__getitem__"),
    "the last one": (lambda x: x[..., -1:] + x[..., -1][:, None], 1, "__getitem__"),
    "narrowed": (lambda x: x.narrow(-1, x.shape[-1] - 8, 8), 8, "narrow"),
    "as many heads": (lambda x: x.view(len(x), 4, -1).transpose(1, 2).flatten(1), 16, "view"),
    "as many heads by shape": (lambda x: x.view(len(x), 4, x.shape[-1] // 4).sin().flatten(1), 16, "view"),
    "written into another": (written_into, 20, "an assignment"),
    "flipped": (lambda x: x.flip(-1), 16, "flip"),
    "rolled": (lambda x: x.roll(1, -1), 16, "roll"),
    "sorted": (lambda x: x.sort(-1).values, 16, "sort"),
    "every other": (lambda x: x[:, ::2], 8, "__getitem__"),
    "picked": (lambda x: x[:, torch.arange(x.shape[1])], 16, "__getitem__"),
    "padded": (lambda x: F.pad(x, (0, 4)), 20, "pad"),
    "shuffled": (lambda x: F.channel_shuffle(x[..., None, None], 2).flatten(1), 16, "channel_shuffle"),
    "added in another order": (
        lambda x: x + torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
        16,
        "",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_where_it_is_not_known_a_part_is_refused(name: str) -> None:
    """The error names the layer and the call, each time; the whole network runs."""
    between, inputs, call = WRONG[name]
    model = random(Between2(nn.Linear(4, 16), between, nn.Linear(inputs, 3)))
    x = drawn(2, 4)
    expected = model(x)
    supernet = insert(model, elastic=[Elastic("w", ["first"])])

    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"^last: given \d+ .*{call}"):
            answer(supernet, {"w": [0.5]}, x)
    alike(answer(supernet, {"w": [1.0]}, x), expected)


# --- whole networks -----------------------------------------------------------------------------


class Dense(nn.Module):
    """A DenseNet's block: each layer is given all before it."""

    def __init__(self, growth: int, n: int = 3, inputs: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, inputs, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(inputs + growth * i) for i in range(n))
        self.convs = nn.ModuleList(nn.Conv2d(inputs + growth * i, growth, 3, padding=1) for i in range(n))
        self.depthwise = nn.Conv2d(inputs + growth * n, inputs + growth * n, 1, groups=inputs + growth * n)
        self.head = nn.Linear(inputs + growth * n, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 3)."""
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        logits: torch.Tensor = self.head(self.depthwise(x).mean((2, 3)))
        return logits


def dense_rows(sizes: list[int], kept: list[int]) -> list[int]:
    """Return the numbers of the first channels of each piece."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [start + i for start, n in zip(starts, kept, strict=True) for i in range(n)]


def plain_dense(model: Dense, kept: int) -> Dense:
    """Return the network of its own size, with 3 of 4 stem channels and `kept` of 5 in each layer."""
    plain: Dense = random(Dense(kept, inputs=3))
    state, own = model.state_dict(), {}
    for name, tensor in plain.state_dict().items():
        layer, number = name.split(".")[0], name.split(".")[1]
        n = int(number) if number.isdigit() else 3
        rows = dense_rows([4] + [5] * n, [3] + [kept] * n)
        value = state[name]
        if layer in ("norms", "depthwise"):
            value = value[rows] if value.dim() else value
        elif layer == "convs":
            value = value[:kept][:, rows] if value.dim() > 1 else value[:kept]
        elif layer == "stem":
            value = value[:3]
        elif name == "head.weight":
            value = value[:, rows]
        own[name] = value.reshape(tensor.shape)
    plain.load_state_dict(own)
    return plain


def test_a_dense_net_is_cut_in_its_stem_and_its_growth() -> None:
    """Norms, convolutions, a depthwise one and the head use what they are given, packed, trimmed or not."""
    model, x = random(Dense(5)), drawn(2, 2, 4, 4)
    expected = plain_dense(model, 2)(x)
    supernet = insert(model, elastic=[Elastic("stem", ["stem"]), Elastic("growth", ["convs.*"])])
    control = {"w": [0.75, 0.4]}

    checked(supernet, control, expected, x)
    supernet.pack([0], x, budget_bytes=10**6)
    alike(answer(supernet, control, x), expected)
    supernet.trim(x)
    alike(answer(supernet, control, x), expected)
    assert model.stem.weight.shape[0] == 3


class Growing(nn.Module):
    """A block that appends to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, growth, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input and what is new."""
        return torch.cat([x, self.conv(x).relu()], 1)


def test_a_dense_net_is_cut_in_depth_and_growth() -> None:
    """Blocks left out in the middle and at the end leave gaps, which what is behind them does without."""
    blocks = [Growing(4 + 3 * i, 3) for i in range(4)]
    model, x = random(nn.Sequential(nn.Sequential(*blocks), nn.Conv1d(16, 2, 1))), drawn(2, 4, 5)
    p = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Blocks 0 and 2, with 2 of 3 new channels each: 0 .. 3, then 4 and 5, and 10 and 11 of the whole's.
    first = F.conv1d(x, p["0.0.conv.weight"][:2], p["0.0.conv.bias"][:2]).relu()
    rows = [0, 1, 2, 3, 4, 5]
    joined = torch.cat([x, first], 1)
    second = F.conv1d(joined, p["0.2.conv.weight"][:2][:, rows], p["0.2.conv.bias"][:2]).relu()
    rows += [10, 11]
    expected = F.conv1d(torch.cat([joined, second], 1), p["1.weight"][:, rows], p["1.bias"])
    supernet = insert(
        model,
        stages=[Stage("0", rule=lambda d, _: (0, 2) if d == 2 else tuple(range(d)))],
        elastic=[Elastic("growth", ["0.*.conv"])],
    )

    checked(supernet, {"d": [2], "w": [2 / 3]}, expected, x)


def test_a_dense_net_is_calibrated() -> None:
    """A norm behind a concatenation keeps statistics in the order of what it is given."""
    model, x = random(Dense(5)).float(), drawn(4, 2, 4, 4).float()
    seen = drawn(32, 2, 4, 4, seed=2).float()
    plain = plain_dense(model, 2).float().train()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    plain(seen)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
            norm.running_var.mul_(1 - 1 / (32 * 4 * 4))  # calibration keeps the biased variance
    supernet = insert(model, elastic=[Elastic("stem", ["stem"]), Elastic("growth", ["convs.*"])]).eval()
    supernet.set_statistics(calibrate(supernet, [Subnet("s", {"w": [0.75, 0.4]})], [seen]))

    found = answer(supernet, {"w": [0.75, 0.4]}, x)
    torch.testing.assert_close(found, plain.eval()(x).detach(), rtol=1e-4, atol=1e-4)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip that is joined."""

    def __init__(self, outer: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(2, outer, 3, padding=1), nn.Conv2d(outer, inner, 2, 2)
        self.norm = nn.GroupNorm(inner // 2, inner)
        self.up, self.join = nn.ConvTranspose2d(inner, outer, 2, 2), nn.Conv2d(2 * outer, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W)."""
        skip = self.enter(x).relu()
        joined: torch.Tensor = self.join(torch.cat([self.up(self.norm(self.down(skip)).relu()), skip], 1))
        return joined


def test_a_u_net_is_cut_on_both_sides_of_its_skip() -> None:
    """Half the outer and two thirds of the inner channels, written out."""
    model, x = random(UNet()), drawn(2, 2, 4, 4)
    p = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    skip = F.conv2d(x, p["enter.weight"][:4], p["enter.bias"][:4], padding=1).relu()
    inner = F.conv2d(skip, p["down.weight"][:8, :4], p["down.bias"][:8], 2)
    inner = F.group_norm(inner, 4, p["norm.weight"][:8], p["norm.bias"][:8]).relu()
    up = F.conv_transpose2d(inner, p["up.weight"][:8, :6], p["up.bias"][:6], 2)
    rows = [*range(6), *range(8, 12)]
    expected = F.conv2d(torch.cat([up, skip], 1), p["join.weight"][:, rows], p["join.bias"], padding=1)
    supernet = insert(
        model,
        elastic=[
            Elastic("outer", ["enter"]),
            Elastic("inner", ["down"], multiple_of=2),
            Elastic("up", ["up"]),
        ],
    )

    checked(supernet, {"w": [0.5, 2 / 3, 0.75]}, expected, x)
    swapped = answer(supernet, {"w": [0.75, 2 / 3, 0.5]}, x)  # as many inputs, and not the same ones
    assert swapped.shape == expected.shape
    assert not torch.allclose(swapped, expected)


class Fused(nn.Module):
    """Queries, keys and values of one convolution, with a norm and a depthwise convolution on all of them."""

    def __init__(self, width: int, head: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(6, 3 * width, 1)
        self.norm = nn.BatchNorm1d(3 * width)
        self.mix = nn.Conv1d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.slope = nn.PReLU(3 * width)
        self.out = nn.Linear(width, 5)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over places: (B, 6, T) to (B, T, 5)."""
        qkv = self.slope(self.mix(self.norm(self.qkv(x))))
        q, k, v = qkv.reshape(len(x), 3, -1, self.head, x.shape[-1]).transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, head)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


def test_what_works_on_all_parts_of_a_fused_layer_uses_the_kept_ones() -> None:
    """One of two heads of each: the norm, the depthwise convolution and the slopes follow the parts."""
    model, x = random(Fused(8)), drawn(2, 6, 5)
    rows = [8 * part + i for part in range(3) for i in range(4)]
    plain = random(Fused(4))
    state = model.state_dict()
    own = {
        name: state[name] if not tensor.dim() or tensor.shape == state[name].shape else state[name][rows]
        for name, tensor in plain.state_dict().items()
        if not name.startswith("out.")
    }
    own |= {"out.weight": state["out.weight"][:, :4], "out.bias": state["out.bias"]}
    plain.load_state_dict(own)
    supernet = insert(model, elastic=[Elastic("heads", ["qkv"], parts=3, multiple_of=4)])

    checked(supernet, {"w": [0.5]}, plain(x), x)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_both_directions_of_a_recurrent_layer_are_followed(n_layers: int) -> None:
    """Its outputs are two parts: what is behind it uses the first of each."""

    class Both(nn.Module):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.memory = nn.GRU(4, units, n_layers, bidirectional=True, batch_first=True)
            self.norm, self.out = nn.LayerNorm(2 * units), nn.Linear(2 * units, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.out(self.norm(self.memory(x)[0]))
            return logits

    model, x = random(Both(6)), drawn(2, 5, 4)
    plain, state, columns = random(Both(2)), model.state_dict(), [0, 1, 6, 7]
    own = {}
    for name, tensor in plain.state_dict().items():
        value = state[name]
        if name.startswith("memory."):
            value = value[[6 * gate + i for gate in range(3) for i in range(2)]]
            if "weight_hh" in name:
                value = value[:, :2]
            elif "weight_ih_l1" in name:
                value = value[:, columns]
        elif name != "out.bias":
            value = value[..., columns]
        own[name] = value.reshape(tensor.shape)
    plain.load_state_dict(own)
    supernet = insert(model, elastic=[Elastic("units", ["memory"])])

    checked(supernet, {"w": [1 / 3]}, plain(x), x)


class Attention(nn.Module):
    """Attention as it is often written, its heads by `heads`."""

    def __init__(self, heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.out, self.heads = nn.Linear(16, 6), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        q, k, v = (self.heads(part(x)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        mixed = (weights @ v).transpose(1, 2)
        out: torch.Tensor = self.out(mixed.reshape(*x.shape[:2], -1))
        return out


def test_heads_are_cut_where_their_width_stays_and_refused_where_their_number_does() -> None:
    """`view(..., -1, 4)` keeps whole heads; `view(..., 4, width // 4)` would cut each of four heads."""
    x, sizes = drawn(2, 5, 6), [Elastic("heads", ["q", "k", "v"], multiple_of=4)]
    model = random(Attention(lambda t: t.view(*t.shape[:2], -1, 4)))
    p = model.state_dict()
    heads = []
    for rows in (slice(0, 4), slice(4, 8)):
        q, k, v = (F.linear(x, p[f"{n}.weight"][rows], p[f"{n}.bias"][rows]) for n in "qkv")
        heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    expected = F.linear(torch.cat(heads, -1), p["out.weight"][:, :8], p["out.bias"])

    checked(insert(model, elastic=sizes), {"w": [0.5]}, expected, x)
    for fixed in (lambda t: t.view(2, 5, 4, t.shape[-1] // 4), lambda t: t.view(2, 5, 4, -1)):
        supernet = insert(random(Attention(fixed)), elastic=sizes)
        with pytest.raises(ConfigError, match="out: given 8 of 16 inputs through view"):
            answer(supernet, {"w": [0.5]}, x)


# --- what a caller adds to a block that is left out ---------------------------------------------


class Adds(nn.Module):
    """Calls each branch as `call` says."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call one branch after the other."""
        for branch in self.layers:
            x = self.call(branch, x)
        return x


def own_norm(x: torch.Tensor) -> torch.Tensor:
    """Normalise without a layer."""
    return F.layer_norm(x, (8,))


@pytest.mark.parametrize(
    "call",
    [
        lambda branch, x: x + branch(x),
        lambda branch, x: branch(x) + x,
        lambda branch, x: torch.add(x, branch(x)),
        lambda branch, x: x - branch(x),
        lambda branch, x: x.add(F.relu(branch(x)), alpha=0.5),
        lambda branch, x: x + 0.1 * F.dropout(branch(x), 0.5, training=False),
        lambda branch, x: x + branch(own_norm(x)),
        lambda branch, x: own_norm(x + branch(x.tanh())),
    ],
)
def test_a_caller_that_adds_what_stands_for_a_block_is_seen(call: Callable[..., torch.Tensor]) -> None:
    """Each time the block's input would count twice; with zeros in its place the answer is right."""
    x = drawn(2, 8)
    supernet = insert(random(Adds(call)), stages=[Stage("layers")])
    with pytest.raises(ConfigError, match=r'layers.1: when it is left out .* give its stage skipped="zero"'):
        answer(supernet, {"d": [1]}, x)
    model = random(Adds(call))
    expected = call(model.layers[0], x)
    for _ in range(2):
        expected = call(torch.zeros_like, expected)

    checked(insert(model, stages=[Stage("layers", skipped="zero")]), {"d": [1]}, expected, x)


def test_blocks_that_add_by_themselves_are_not_taken_for_branches() -> None:
    """A pre-norm block adds its input inside; later ones add to what stands for it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: torch.Tensor = self.linear(self.norm(x)).relu()
            return x + inner

    model, x = random(nn.Sequential(*(Block() for _ in range(4)))), drawn(2, 8)
    expected = model[3](model[0](x))
    supernet = insert(model, stages=[Stage("", rule=lambda d, n: (0, n - 1) if d == 2 else tuple(range(d)))])

    checked(supernet, {"d": [2]}, expected, x)


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("is_scripted", [True, False])
def test_what_no_call_of_torch_gave_is_refused(is_scripted: bool) -> None:
    """Code that is scripted or goes by way of numpy may do anything with channels."""

    def reordered(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)

    def by_numpy(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy()[:, ::-1].copy())

    between = torch.jit.script(reordered) if is_scripted else by_numpy
    model, x = random(Between2(nn.Linear(4, 8), between, nn.Linear(8, 3))), drawn(2, 4)
    with torch.inference_mode():
        whole = model(x)
    supernet = insert(model, elastic=[Elastic("w", ["first"])])

    alike(answer(supernet, {"w": [1.0]}, x), whole)
    with pytest.raises(ConfigError, match="last: given 4 of 8 inputs, which came by no call of torch"):
        answer(supernet, {"w": [0.5]}, x)


@pytest.mark.parametrize("skipped", ["input", lambda x: 1 * x])
def test_what_stands_for_a_block_is_no_part_of_the_pass(skipped: Any) -> None:
    """Calls are compared with the whole network's by their number, and a block that is left out has none."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.qkv, self.out = Same(), nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.block(x)
            cut = self.qkv(x).view(*x.shape[:2], -1, 4).tanh()
            out: torch.Tensor = self.out(cut.flatten(2))
            return out

    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:2], 3, 2).flip(2).flatten(2)

    model, x = random(Heads()), drawn(2, 5, 6)
    expected = model.out(masked(model.qkv(x).tanh(), 8, -1))
    supernet = insert(
        model,
        stages=[Stage(["block"], least=0, skipped=skipped)],
        elastic=[Elastic("w", ["qkv"], multiple_of=4)],
    )

    checked(supernet, {"d": [0], "w": [0.5]}, expected, x)


def test_a_block_that_changes_the_channels_is_not_left_out_unseen() -> None:
    """The next one is given fewer inputs than in the whole network, and they are not the first of those."""
    widths = [(4, 4), (4, 8), (8, 8)]
    model, x = random(nn.Sequential(*(nn.Linear(*width) for width in widths))), drawn(2, 4)
    supernet = insert(model, stages=[Stage("", rule=lambda d, n: (0, n - 1) if d == 2 else tuple(range(d)))])

    with pytest.raises(
        ConfigError, match=r"2: given 4 of 8 inputs, .* a block was left out that changes their"
    ):
        answer(supernet, {"d": [2]}, x)


@pytest.mark.parametrize("is_alike", [True, False])
def test_a_layer_that_is_called_twice_is_given_the_same_parts(is_alike: bool) -> None:
    """Later passes know one layout for each layer: two are refused, twice the same is right."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cut = self.first(x)
            both = torch.cat([cut, x], 1), torch.cat([x, cut], 1)
            out: torch.Tensor = self.last(both[0]) + self.last(both[0] if is_alike else both[1])
            return out

    model, x = random(Shared()), drawn(2, 4)
    expected = 2 * model.last(torch.cat([masked(model.first(x), 4, -1), x], 1))
    supernet = insert(model, elastic=[Elastic("w", ["first"])])

    if is_alike:
        checked(supernet, {"w": [0.5]}, expected, x)
        return
    with pytest.raises(ConfigError, match="last: called more than once in a pass, with other parts"):
        answer(supernet, {"w": [0.5]}, x)


def test_what_fails_in_a_subnet_alone_names_the_module() -> None:
    """A bias of eight does not fit four: torch's own error, and where it came up."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    supernet = insert(random(nn.Sequential(nn.Linear(4, 8), Biased())), elastic=[Elastic("w", ["0"])])
    with pytest.raises(ConfigError, match="1: runs in the whole network and not in this subnet: The size of"):
        answer(supernet, {"w": [0.5]}, drawn(2, 4))
    with pytest.raises(ConfigError, match="0: expected at most 4 inputs, got 5"):
        answer(supernet, {"w": [0.5]}, drawn(2, 5))


def test_a_first_pass_keeps_no_activation_for_longer() -> None:
    """What later passes free while they run, the first frees too: at each layer one activation is there."""
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def count(_layer: nn.Module, _args: Any, out: torch.Tensor) -> None:
        counts.append(sum(one() is not None for one in alive))
        alive.append(weakref.ref(out))

    model = random(nn.Sequential(nn.Linear(8, 8), *(nn.Tanh() for _ in range(6))))
    supernet = insert(model, elastic=[Elastic("w", ["0"])]).eval()
    for layer in model:
        layer.register_forward_hook(count)
    supernet.host([Subnet("s", {"w": [0.5]})])
    with torch.inference_mode():
        out = supernet(drawn(2, 8))

    assert max(counts) <= 1
    assert not vars(out), "the answer carries nothing along"
