"""Each kind of layer, given a part of its inputs or asked for a part of its outputs.

What is expected is torch's own layer of that size, with numbers gathered index by index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.insertion import Elastic, insert
from superserve.errors import ConfigError
from tests.gpu_worker.models.published import gather
from tests.gpu_worker.supernet.answers import alike, answer, drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Make = Callable[[int], nn.Module]


def random(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return a module in evaluation, with random doubles."""
    torch.manual_seed(seed)
    module.double().eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
            if tensor.dim() > 1:
                tensor.data.normal_()
    return module


def cut_to(part: nn.Module, whole: nn.Module) -> nn.Module:
    """Return `part`, a smaller layer, with the first numbers of `whole`."""
    part.double().eval()
    state = whole.state_dict()
    part.load_state_dict({name: gather(state[name], tuple(t.shape)) for name, t in part.state_dict().items()})
    return part


# --- a part of the inputs -----------------------------------------------------------------------


class LlamaNorm(nn.Module):
    """An RMSNorm as Hugging Face writes it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale by the root of the mean square."""
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class GemmaNorm(LlamaNorm):
    """One that scales by one plus its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale by the root of the mean square."""
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return (1 + self.weight) * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class OwnLayerNorm(nn.Module):
    """A LayerNorm of a class of its own, with names of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        x = x - x.mean(-1, keepdim=True)
        return self.gamma * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + self.beta


FOLLOWING: dict[str, tuple[Make, tuple[int, ...], int]] = {
    # What makes it of so many channels, the input's shape (0: channels), and the part of 8 channels.
    "linear": (lambda n: nn.Linear(n, 5), (2, 3, 0), 5),
    "conv1d": (lambda n: nn.Conv1d(n, 5, 3), (2, 0, 9), 5),
    "conv2d without a batch": (lambda n: nn.Conv2d(n, 5, 3), (0, 9, 9), 5),
    "transposed 1d": (lambda n: nn.ConvTranspose1d(n, 5, 3, 2, 1, 1), (2, 0, 4), 5),
    "transposed 2d": (lambda n: nn.ConvTranspose2d(n, 5, 3, 2), (2, 0, 4, 4), 3),
    "transposed 3d": (lambda n: nn.ConvTranspose3d(n, 5, 2, dilation=2), (2, 0, 3, 3, 3), 3),
    "transposed, of groups": (lambda n: nn.ConvTranspose2d(n, n // 2 * 3, 3, groups=n // 2), (2, 0, 4, 4), 6),
    "rms norm": (nn.RMSNorm, (2, 3, 0), 5),
    "rms norm, its eps": (lambda n: nn.RMSNorm(n, eps=0.1), (2, 3, 0), 5),
    "llama's norm": (LlamaNorm, (2, 3, 0), 5),
    "gemma's norm": (GemmaNorm, (2, 3, 0), 5),
    "a layer norm of its own": (OwnLayerNorm, (2, 3, 0), 5),
    "group norm": (lambda n: nn.GroupNorm(n // 2, n), (2, 0, 4), 6),
    "instance norm": (lambda n: nn.InstanceNorm2d(n, affine=True), (2, 0, 4, 4), 5),
    "instance norm without a batch": (lambda n: nn.InstanceNorm1d(n, affine=True), (0, 4), 5),
    "instance norm without scales": (nn.InstanceNorm3d, (2, 0, 2, 2, 2), 5),
    "prelu": (nn.PReLU, (2, 0, 4), 5),
    "prelu of one slope": (lambda _: nn.PReLU(), (2, 0, 4), 5),
    "batch norm": (nn.BatchNorm1d, (4, 0), 5),
    "synchronised batch norm": (nn.SyncBatchNorm, (4, 0, 3), 5),
    "lstm": (lambda n: nn.LSTM(n, 4, batch_first=True), (2, 3, 0), 5),
    "gru, both ways": (lambda n: nn.GRU(n, 4, 2, bidirectional=True), (2, 3, 0), 5),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_layer_follows_a_part_of_its_inputs(name: str) -> None:
    """It is torch's own layer of that many inputs; given all, the layer itself."""
    make, shape, kept = FOLLOWING[name]
    layer = random(make(8))
    x = drawn(*(n or 8 for n in shape))
    part = x.narrow(shape.index(0), 0, kept)
    expected, whole = cut_to(make(kept), layer)(part), layer(x)
    supernet = insert(nn.Sequential(layer))

    for _ in range(2):  # the second time by the views of the first
        for given, wanted in ((part, expected), (x, whole)):
            found = answer(supernet, {}, given)
            alike(found if isinstance(found, torch.Tensor) else found[0], first(wanted))


def first(out: Any) -> torch.Tensor:
    """Return a layer's output, without a recurrent one's state."""
    found: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
    return found


@pytest.mark.parametrize("name", FOLLOWING)
def test_gradients_flow_through_a_part(name: str) -> None:
    """With gradients recorded the numbers are the same, and those of the part alone get gradients."""
    make, shape, kept = FOLLOWING[name]
    layer = random(make(8))
    part = drawn(*(n or 8 for n in shape)).narrow(shape.index(0), 0, kept)
    expected = first(cut_to(make(kept), layer)(part))
    supernet = insert(nn.Sequential(layer))
    found = first(supernet(part))
    alike(found.detach(), expected)
    for parameter in layer.parameters():
        (gradient,) = torch.autograd.grad(found.square().sum(), parameter, retain_graph=True)
        assert gradient.count_nonzero() > 0


def test_groups_are_kept_whole() -> None:
    """Five of eight channels do not fill groups of two: refused, with what to do."""
    model = random(nn.Sequential(nn.Conv1d(2, 8, 1), nn.GroupNorm(4, 8)))
    supernet = insert(model, elastic=[Elastic("w", ["0"])])

    with pytest.raises(
        ConfigError, match=r"1: expected whole groups of 2 channels, got 5: give .*multiple_of=2"
    ):
        answer(supernet, {"w": [5 / 8]}, drawn(2, 2, 3))


class ScaledNorm(nn.Module):
    """A norm that multiplies by the root of its whole width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.scale = width**0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        normed: torch.Tensor = F.normalize(x, dim=-1) * self.scale * self.g
        return normed


def test_a_norm_that_knows_its_width_is_not_taken_for_another() -> None:
    """It stays as it is, and fails on a part by its shapes."""
    supernet, x = insert(nn.Sequential(random(ScaledNorm(8)))), drawn(2, 8)
    plain = random(ScaledNorm(8))

    alike(answer(supernet, {}, x), plain(x))
    with pytest.raises(RuntimeError, match="size of tensor"):
        answer(supernet, {}, x[:, :4])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.InstanceNorm2d(4, track_running_stats=True), "0: an InstanceNorm with track_running_stats"),
        (nn.LazyLinear(4), "0: is lazy and has no sizes yet"),
    ],
)
def test_layers_that_cannot_be_followed_are_refused(layer: nn.Module, message: str) -> None:
    """The error names the layer and the cause."""
    with pytest.raises(ConfigError, match=message):
        insert(nn.Sequential(layer))


# --- a part of the outputs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nn.ConvTranspose1d(3, n, 3, 2),
        lambda n: nn.ConvTranspose2d(3, n, 3, 2, bias=False),
        lambda n: nn.ConvTranspose3d(3, n, 2),
    ],
)
def test_a_transposed_convolution_is_cut(make: Make) -> None:
    """Half of eight outputs, and an output size that is asked for."""
    layer = random(make(8))
    n_axes = next(iter(layer.parameters())).dim() - 2
    x = drawn(2, 3, *[4] * n_axes)
    expected = cut_to(make(4), layer)(x)
    supernet = insert(nn.Sequential(layer), elastic=[Elastic("w", ["0"])])

    alike(answer(supernet, {"w": [0.5]}, x), expected)


class Conv1D(nn.Module):
    """Hugging Face's: a linear layer with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to the last axis."""
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


def test_hugging_faces_conv1d_is_cut_both_ways() -> None:
    """Half the outputs of the first are the inputs of the second."""
    model = random(nn.Sequential(Conv1D(12, 6), nn.GELU(), Conv1D(5, 12)))
    x, state = drawn(2, 3, 6), {name: t.clone() for name, t in model.state_dict().items()}
    inner = F.gelu(x @ state["0.weight"][:, :6] + state["0.bias"][:6])
    expected = inner @ state["2.weight"][:6] + state["2.bias"]

    alike(answer(insert(model, elastic=[Elastic("w", ["0"])]), {"w": [0.5]}, x), expected)


class Tagger(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, recurrent: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.out = recurrent, nn.Linear(outputs, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each class."""
        logits: torch.Tensor = self.out(self.recurrent(x)[0])
        return logits


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_layer_is_cut_in_every_gate(kind: type[nn.LSTM], bias: bool) -> None:
    """Two layers of 8 units, of which 3 are kept: each gate's first 3 rows and, behind it, 3 columns."""
    model = random(Tagger(kind(5, 8, 2, batch_first=True, bias=bias), 8))
    plain, x = Tagger(kind(5, 3, 2, batch_first=True, bias=bias), 3).double(), drawn(2, 4, 5)
    state = model.state_dict()
    for name, tensor in plain.recurrent.state_dict().items():
        gates = [gate[:3] for gate in state[f"recurrent.{name}"].split(8)]
        whole = torch.cat(gates)
        tensor.copy_(whole[:, : tensor.shape[1]] if tensor.dim() == 2 else whole)
    plain.out.load_state_dict({"weight": state["out.weight"][:, :3], "bias": state["out.bias"]})
    expected = plain(x)
    supernet = insert(model, elastic=[Elastic("w", ["recurrent"])])

    alike(answer(supernet, {"w": [3 / 8]}, x), expected)
    assert supernet.memory().packed > 0
    found = supernet.run_with(supernet.cursor.settings, x)  # the same with gradients
    alike(found.detach(), expected)


class Attend(nn.Module):
    """Attention to keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=5, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what was attended to."""
        found: torch.Tensor = self.attention(q, k, v)[0]
        return found


def test_heads_are_cut_where_keys_and_values_have_their_own_widths() -> None:
    """Three of four heads, written out head by head."""
    model = random(Attend())
    q, k, v = drawn(2, 3, 8), drawn(2, 7, 6, seed=2), drawn(2, 7, 5, seed=3)
    p = {name.removeprefix("attention."): t.clone() for name, t in model.state_dict().items()}
    attended = []
    for rows in ([0, 1], [2, 3], [4, 5]):
        head = [
            x @ p[f"{part}_proj_weight"][rows].T + p["in_proj_bias"][[8 * i + row for row in rows]]
            for i, (part, x) in enumerate((("q", q), ("k", k), ("v", v)))
        ]
        attended.append((head[0] @ head[1].transpose(1, 2) / 2**0.5).softmax(-1) @ head[2])
    expected = torch.cat(attended, -1) @ p["out_proj.weight"][:, :6].T + p["out_proj.bias"]

    supernet = insert(model, elastic=[Elastic("heads", ["attention"])])
    alike(answer(supernet, {"w": [0.75]}, q, k, v), expected)


class Language(nn.Module):
    """Embeddings, a feed-forward part between residual additions, and a head that may be tied to them."""

    def __init__(self, width: int = 8, *, is_tied: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(11, width, padding_idx=0)
        self.places = nn.Embedding(4, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 11, bias=False)
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return a number for each word."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        logits: torch.Tensor = self.head(x + self.down(F.relu(self.up(self.norm(x)))))
        return logits


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_language_model_is_cut_in_width(is_tied: bool) -> None:
    """Embeddings, residual stream and a tied head keep five of eight features; the tie and the names stay."""
    model = random(Language(is_tied=is_tied))
    ids, names = torch.tensor([[1, 5, 0, 10]]), list(model.state_dict())
    plain = cut_to(Language(5, is_tied=is_tied), model)
    supernet = insert(model, elastic=[Elastic("width", ["words", "places", "down"])])

    alike(answer(supernet, {"w": [0.6]}, ids), plain(ids))
    assert (model.get_parameter("head.weight") is model.get_parameter("words.weight")) == is_tied
    assert list(model.state_dict()) == names
    supernet.trim(ids)
    alike(answer(supernet, {"w": [0.6]}, ids), plain(ids))


def test_an_embedding_that_is_not_elastic_stays_what_it_is() -> None:
    """Its weight may be used without a call, and is trimmed by nobody."""
    model = Language()
    insert(model)

    assert type(model.words) is nn.Embedding


# --- parts --------------------------------------------------------------------------------------


def rows_of(sizes: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Return the numbers of the first rows of each part."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [start + i for start, n in zip(starts, kept, strict=True) for i in range(n)]


class Gated(nn.Module):
    """A gate and what it gates from one layer."""

    def __init__(self, up: nn.Module, down: nn.Module, axis: int) -> None:
        super().__init__()
        self.up, self.down, self.axis = up, down, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate and project."""
        out: torch.Tensor = self.down(F.glu(self.up(x), self.axis))
        return out


@pytest.mark.parametrize(
    ("up", "down", "shape", "axis"),
    [
        (nn.Linear(6, 32), nn.Linear(16, 4), (2, 3, 6), -1),
        (nn.Linear(6, 32, bias=False), nn.Linear(16, 4), (2, 3, 6), -1),
        (nn.Conv2d(6, 32, 3), nn.Conv2d(16, 4, 1), (2, 6, 5, 5), 1),
        (nn.ConvTranspose1d(6, 32, 3), nn.Conv1d(16, 4, 1), (2, 6, 5), 1),
        (Conv1D(32, 6), Conv1D(4, 16), (2, 3, 6), -1),
    ],
)
def test_a_gate_and_what_it_gates_are_cut_alike(
    up: nn.Module, down: nn.Module, shape: tuple[int, ...], axis: int
) -> None:
    """Five of each sixteen: what is left out is zero in the whole network, written out with a mask."""
    model = random(Gated(up, down, axis))
    x = drawn(*shape)
    mask = torch.zeros(16, dtype=torch.float64)
    mask[:5] = 1
    gated = F.glu(model.get_submodule("up")(x), axis)
    expected = model.get_submodule("down")(
        gated * (mask if axis == -1 else mask.view(-1, *[1] * (len(shape) - 2)))
    )
    whole = model(x)
    supernet = insert(model, elastic=[Elastic("hidden", ["up"], parts=2)])

    alike(answer(supernet, {"w": [1.0]}, x), whole)
    assert supernet.memory().packed == 0, "the whole is no copy"
    alike(answer(supernet, {"w": [5 / 16]}, x), expected)
    assert supernet.memory().packed > 0
    found = supernet.run_with(supernet.cursor.settings, x)  # the same with gradients
    alike(found.detach(), expected)


class Fused(nn.Module):
    """Attention with queries, keys and values of one layer, perhaps with fewer heads of keys and values."""

    def __init__(self, width: int, sizes: Sequence[int], head: int) -> None:
        super().__init__()
        self.n_queries = sizes[0] // sizes[1]
        self.qkv, self.out = nn.Linear(width, sum(sizes)), nn.Linear(sizes[0], width)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend; what is in a part follows from what there is in all."""
        projected = self.qkv(x)
        least = projected.shape[-1] // (self.n_queries + 2)
        parts = projected.split([least * self.n_queries, least, least], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.n_queries > 1)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(
    ("sizes", "kept", "parts"),
    [
        ((16, 16, 16), (8, 8, 8), 3),
        ((16, 16, 16), (8, 8, 8), (16, 16, 16)),
        ((32, 8, 8), (16, 4, 4), (32, 8, 8)),
    ],
)
def test_queries_keys_and_values_of_one_layer_are_cut_alike(
    sizes: Sequence[int], kept: Sequence[int], parts: int | Sequence[int]
) -> None:
    """Half the heads of each, in proportion where queries have more."""
    model = random(Fused(12, sizes, 4))
    state, x, rows = model.state_dict(), drawn(2, 5, 12), rows_of(sizes, kept)
    plain = Fused(12, kept, 4).double()
    plain.load_state_dict(
        {
            "qkv.weight": state["qkv.weight"][rows],
            "qkv.bias": state["qkv.bias"][rows],
            "out.weight": state["out.weight"][:, : kept[0]],
            "out.bias": state["out.bias"],
        }
    )
    supernet = insert(model, elastic=[Elastic("heads", ["qkv"], parts=parts, multiple_of=4)])

    alike(answer(supernet, {"w": [0.5]}, x), plain(x))
    supernet.trim(x)
    assert model.get_parameter("qkv.weight").shape == (sum(kept), 12)
    alike(answer(supernet, {"w": [0.5]}, x), plain(x))


@pytest.mark.parametrize(
    ("layer", "parts", "message"),
    [
        (nn.Linear(4, 10), 3, r"size w: parts: expected a number that divides \[10\] outputs, got 3"),
        (nn.Linear(4, 10), 0, "size w: parts: expected a number that divides"),
        (nn.Linear(4, 10), (8, 4), r"size w: parts: expected multiples of the smallest .* \[10\] outputs"),
        (nn.Linear(4, 10), (7, 3), "size w: parts: expected multiples of the smallest"),
        (nn.Linear(4, 10), (), "size w: parts: expected multiples of the smallest"),
        (nn.MultiheadAttention(4, 2), 2, "size w: 0: parts: a MultiheadAttention has its own"),
        (nn.LSTM(4, 2), 2, "size w: 0: parts: a LSTM has its own"),
    ],
)
def test_parts_that_do_not_fit_are_refused(layer: nn.Module, parts: Any, message: str) -> None:
    """The error names the size and the outputs there are."""
    with pytest.raises(ConfigError, match=message):
        insert(nn.Sequential(layer), elastic=[Elastic("w", ["0"], parts=parts)])


# --- subclasses ---------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """A subclass with no forward of its own."""


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return twice what a linear layer does."""
        return 2 * super().forward(x)


def test_a_subclass_without_a_forward_of_its_own_is_its_layer() -> None:
    """It keeps its class beside the operator's; one with its own forward is refused by name."""
    model = random(nn.Sequential(Renamed(4, 8), nn.Linear(8, 3)))
    state, x = {name: t.clone() for name, t in model.state_dict().items()}, drawn(2, 4)
    inner = F.linear(x, state["0.weight"][:4], state["0.bias"][:4])
    supernet = insert(model, elastic=[Elastic("w", ["0"])])

    alike(answer(supernet, {"w": [0.5]}, x), inner @ state["1.weight"][:, :4].T + state["1.bias"])
    assert isinstance(supernet.model.get_submodule("0"), Renamed)
    with pytest.raises(
        ConfigError, match=r"size w: 0: expected one of .*, got Doubled, whose forward is its own"
    ):
        insert(nn.Sequential(Doubled(4, 8)), elastic=[Elastic("w", ["0"])])


def test_an_attention_of_its_own_keeps_its_encoder_layer_from_the_fused_kernel() -> None:
    """That kernel would use all of an elastic layer beside it."""

    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = Own(8, 2, batch_first=True)
    random(layer)
    x, state = drawn(2, 3, 8), {name: t.clone() for name, t in layer.state_dict().items()}
    y = layer.norm1(x + layer.self_attn(x, x, x)[0])
    up = F.relu(F.linear(y, state["linear1.weight"][:4], state["linear1.bias"][:4]))
    expected = layer.norm2(y + up @ state["linear2.weight"][:, :4].T + state["linear2.bias"])
    supernet = insert(nn.Sequential(layer), elastic=[Elastic("hidden", ["0.linear1"])])

    alike(answer(supernet, {"w": [0.25]}, x), expected)


class NormAct(nn.BatchNorm1d):
    """A BatchNorm with an activation, whose forward is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise and rectify."""
        normed = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0,
            self.eps,
        )
        return F.relu(normed)


class SameNorm(nn.BatchNorm1d):
    """A BatchNorm by another name."""


@pytest.mark.parametrize("kind", [NormAct, SameNorm])
def test_a_batch_norm_of_another_class_keeps_its_statistics_in_training(kind: type[nn.BatchNorm1d]) -> None:
    """It normalises by the batch, and its running statistics stay for all subnets."""
    norm = random(kind(4))
    before = {name: t.clone() for name, t in norm.state_dict().items() if "running" in name}
    supernet, x = insert(nn.Sequential(norm)).train(), drawn(16, 3)
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    expected = normed * norm.get_parameter("weight")[:3] + norm.get_parameter("bias")[:3]

    alike(supernet(x).detach(), expected.relu() if kind is NormAct else expected)
    assert all(torch.equal(norm.get_buffer(name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "rectify"), [(NormAct, F.relu), (SameNorm, nn.Identity()), (nn.SyncBatchNorm, nn.Identity())]
)
def test_a_batch_norm_of_another_class_is_calibrated(
    kind: type[nn.BatchNorm1d], rectify: Callable[..., torch.Tensor]
) -> None:
    """The statistics of a subnet are those of its own inputs, and its answers use them."""
    from gpu_worker.supernet.calibration import calibrate  # noqa: PLC0415  only this test needs it
    from superserve.subnet import Subnet  # noqa: PLC0415  as above

    model = random(nn.Sequential(nn.Linear(3, 8), kind(8), nn.Linear(8, 2))).float()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    supernet = insert(model, elastic=[Elastic("w", ["0"])]).eval()
    seen = drawn(64, 3).float()
    subnet = Subnet("s", {"w": [0.5]})
    supernet.set_statistics(calibrate(supernet, [subnet], [seen[:32], seen[32:]]))
    x = drawn(5, 3, seed=3).float()

    inner = [F.linear(part, state["0.weight"][:4], state["0.bias"][:4]) for part in (seen[:32], seen[32:], x)]
    mean = (inner[0].mean(0) + inner[1].mean(0)) / 2
    variance = (inner[0].var(0, correction=0) + inner[1].var(0, correction=0)) / 2
    normed = (inner[2] - mean) / (variance + 1e-5).sqrt() * state["1.weight"][:4] + state["1.bias"][:4]
    expected = rectify(normed) @ state["2.weight"][:, :4].T + state["2.bias"]
    found = answer(supernet, {"w": [0.5]}, x)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_buffer("1.running_mean"), state["1.running_mean"])
