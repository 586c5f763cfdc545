"""Insertion into modules that know nothing of it: torch's own encoder, and a MobileNet of plain torch.nn.

Each subnet is compared with a module of its own sizes, whose weights are gathered by index.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.control import sliced_size, spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.gpu_worker.models.published import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_worker.supernet.supernet import Supernet

E, HEADS, HIDDEN, N_LAYERS = 24, 6, 40, 4


def closely(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare within a relative 1e-4 of the largest number."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def run(supernet: Supernet, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """Run what is actuated, without gradients."""
    with torch.inference_mode():
        output: torch.Tensor = supernet(*args, **kwargs)
    return output


# --- a transformer encoder ----------------------------------------------------------------------


def encoder(*, norm_first: bool = False, activation: str = "relu") -> nn.TransformerEncoder:
    """Return torch's own encoder with random weights and norms."""
    layer = nn.TransformerEncoderLayer(
        E, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first, activation=activation
    )
    with warnings.catch_warnings():  # it says that it cannot nest tensors with norm_first
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, N_LAYERS)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def encoder_supernet(model: nn.Module) -> Supernet:
    """Insert by one call."""
    return insert(
        model,
        stages=[Stage("layers", rule=spread_blocks)],
        elastic=[
            *(Elastic(f"heads {i}", [f"layers.{i}.self_attn"]) for i in range(N_LAYERS)),
            *(Elastic(f"hidden {i}", [f"layers.{i}.linear1"]) for i in range(N_LAYERS)),
        ],
    )


def plain_encoder_layer(
    state: dict[str, torch.Tensor],
    layer: int,
    n_heads: int,
    hidden: int,
    x: torch.Tensor,
    padding: torch.Tensor,
) -> torch.Tensor:
    """Compute one post-norm layer with the given numbers of heads and hidden units, written out."""
    p = {
        name.removeprefix(f"layers.{layer}."): t
        for name, t in state.items()
        if name.startswith(f"layers.{layer}.")
    }
    size = E // HEADS
    attended = []
    for head in range(n_heads):
        q, k, v = (
            x @ p["self_attn.in_proj_weight"][rows].T + p["self_attn.in_proj_bias"][rows]
            for rows in ([part * E + head * size + i for i in range(size)] for part in range(3))
        )
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(padding[:, None, :], float("-inf"))
        attended.append(scores.softmax(-1) @ v)
    out = gather(p["self_attn.out_proj.weight"], (E, n_heads * size))
    x = norm(x + torch.cat(attended, -1) @ out.T + p["self_attn.out_proj.bias"], p, "norm1")
    up = torch.relu(x @ gather(p["linear1.weight"], (hidden, E)).T + gather(p["linear1.bias"], (hidden,)))
    return norm(x + up @ gather(p["linear2.weight"], (E, hidden)).T + p["linear2.bias"], p, "norm2")


def norm(x: torch.Tensor, p: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Apply a LayerNorm."""
    return nn.functional.layer_norm(x, (E,), p[f"{name}.weight"], p[f"{name}.bias"])


def test_a_transformer_encoder_becomes_a_supernet_by_one_call() -> None:
    """Forty random subnets of torch's own encoder answer as the same layers written out."""
    torch.manual_seed(0)
    model = encoder()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    supernet = encoder_supernet(model)
    rng = np.random.default_rng(1)
    controls = [supernet.controls.space.random(rng) for _ in range(40)]
    supernet.host([Subnet(str(i), control) for i, control in enumerate(controls)])
    x = torch.randn(3, 7, E)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True

    for row, control in enumerate(controls):
        actuate(supernet, row)
        found = run(supernet, x, src_key_padding_mask=padding)
        expected, widths = x, control["w"]
        for layer in [i * N_LAYERS // control["d"][0] for i in range(control["d"][0])]:
            n_heads = sliced_size(widths[layer], HEADS)
            hidden = sliced_size(widths[N_LAYERS + layer], HIDDEN)
            expected = plain_encoder_layer(state, layer, n_heads, hidden, expected, padding)
        closely(found[~padding], expected[~padding])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_whole_encoder_is_torchs_own(norm_first: bool, activation: str) -> None:
    """With nothing cut it gives what it gave before, and its state dict has the same names."""
    torch.manual_seed(0)
    model = encoder(norm_first=norm_first, activation=activation)
    x, names = torch.randn(2, 5, E), list(model.state_dict())
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    with torch.inference_mode():
        expected, causal = model(x), model(x, mask=mask, is_causal=True)
    supernet = encoder_supernet(model)

    closely(run(supernet, x), expected)
    closely(run(supernet, x, mask=mask), causal)
    assert list(supernet.model.state_dict()) == names


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_attention_takes_what_torchs_own_takes(batch_first: bool, bias: bool, average: bool) -> None:
    """Weights, masks of every kind, and queries without a batch give what nn.MultiheadAttention gives."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)}).eval()
    attention = model["a"]
    q, kv = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    masks = [
        {"attn_mask": torch.randn(4, 5)},
        {"attn_mask": torch.rand(4, 5) > 0.7},
        {"attn_mask": torch.randn(6, 4, 5)},
        {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
        {"attn_mask": torch.randn(4, 5), "key_padding_mask": torch.zeros(3, 5)},
        {},
    ]
    asked = {"need_weights": True, "average_attn_weights": average}
    with torch.inference_mode():
        expected = [attention(q, kv, kv, **mask, **asked) for mask in masks]
        expected.append(attention(q[:, 0], kv[:, 0], kv[:, 0], **asked))
        without = attention(q, kv, kv, need_weights=False)
    insert(model, elastic=[Elastic("heads", ["a"])])
    with torch.inference_mode():
        found = [attention(q, kv, kv, **mask, **asked) for mask in masks]
        found.append(attention(q[:, 0], kv[:, 0], kv[:, 0], **asked))
        output, no_weights = attention(q, kv, kv, need_weights=False)

    for one, other in zip(found, expected, strict=True):
        closely(one[0], other[0])
        closely(one[1], other[1])
    closely(output, without[0])
    assert no_weights is None


# --- a depthwise convolutional network ----------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, convolve each channel, narrow, and add."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.adds = stride == 1 and channels == out
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        body: torch.Tensor = self.body(x)
        return x + body if self.adds else body


def mobile_net(widths: Sequence[int], hidden: Sequence[Sequence[int]], n_classes: int = 5) -> nn.Sequential:
    """Return a network whose stages are so wide, with blocks that are inside as wide as `hidden` says."""
    stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU6())
    stages, before = [], widths[0]
    for stage, (width, inside) in enumerate(zip(widths, hidden, strict=True)):
        blocks = []
        for block, units in enumerate(inside):
            blocks.append(InvertedResidual(before, units, width, 2 if stage and not block else 1))
            before = width
        stages.append(nn.Sequential(*blocks))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, n_classes))
    return nn.Sequential(stem, *stages, head)


WIDTHS, DEPTH, EXPANSION = (8, 12, 16), 3, 4


def test_a_mobile_net_becomes_a_supernet_by_one_call() -> None:
    """Forty random subnets, depthwise convolutions and all, answer as plain networks of their own sizes."""
    torch.manual_seed(0)
    whole = mobile_net(WIDTHS, [[EXPANSION * width] * DEPTH for width in WIDTHS]).eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor, 0.5, 0.5)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    stages = range(len(WIDTHS))
    supernet = insert(
        whole,
        stages=[Stage(f"{m + 1}") for m in stages],
        elastic=[
            *(Elastic(f"out {m}", [*(["0.0"] if m == 0 else []), f"{m + 1}.*.body.6"]) for m in stages),
            *(Elastic(f"in {m}.{k}", [f"{m + 1}.{k}.body.0"]) for m in stages for k in range(DEPTH)),
        ],
    )
    rng = np.random.default_rng(2)
    controls = [supernet.controls.space.random(rng) for _ in range(40)]
    supernet.host([Subnet(str(i), control) for i, control in enumerate(controls)])
    x = torch.randn(4, 3, 32, 32)

    for row, control in enumerate(controls):
        actuate(supernet, row)
        closely(run(supernet, x), plain_mobile_net(state, control["d"], control["w"])(x).detach())


def plain_mobile_net(
    state: dict[str, torch.Tensor], depths: Sequence[int], fractions: Sequence[float]
) -> nn.Module:
    """Return the network of a subnet's own sizes."""
    widths = [sliced_size(f, w) for f, w in zip(fractions, WIDTHS, strict=False)]
    inside = [
        [
            sliced_size(fractions[len(WIDTHS) + stage * DEPTH + block], EXPANSION * WIDTHS[stage])
            for block in range(depth)
        ]
        for stage, depth in enumerate(depths)
    ]
    plain = mobile_net(widths, inside).eval()
    plain.load_state_dict(
        {
            name: gather(state[name], tuple(tensor.shape)) if tensor.dim() else state[name]
            for name, tensor in plain.state_dict().items()
        }
    )
    return plain


# --- what is refused ----------------------------------------------------------------------------


def small() -> nn.Sequential:
    """Return something to insert into."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Flatten(),
        nn.Linear(4, 2),
        nn.Sequential(nn.ReLU()),
    )


@pytest.mark.parametrize(
    ("stages", "elastic", "message"),
    [
        ([Stage("5")], [], "stage 5: expected the path of a module"),
        ([Stage("3")], [], "stage 3: expected a Sequential or ModuleList with blocks, got Linear"),
        ([Stage(["4.0", "4.1"])], [], "stage 4.1: expected the path of a module"),
        ([], [Elastic("a", ["nobody"])], "size a: layers: no module of the model is called 'nobody'"),
        ([], [Elastic("a", ["nobody.*"])], "size a: layers: no module of the model is called"),
        ([], [Elastic("a", ["2"])], "size a: 2: expected one of Conv1d, .*MultiheadAttention.*, got Flatten"),
        ([], [Elastic("a", ["1"])], "size a: 1: a convolution with groups keeps those that its input fills"),
        ([], [Elastic("a", ["0", "3"])], "size a: expected layers with equally many outputs"),
        ([], [Elastic("a", ["0"]), Elastic("a", ["3"])], "expected unique names"),
        ([], [Elastic("a", ["0"]), Elastic("b", ["0"])], "size b: 0 has the size a already"),
        ([], [Elastic("a", "0")], "size a: layers: expected a list of paths, got the text '0'"),
        ([], [Elastic("a", ["0"], fractions=(1.0, 0.5))], "size a: expected ascending choices"),
    ],
)
def test_what_cannot_be_inserted_is_named(stages: list[Stage], elastic: list[Elastic], message: str) -> None:
    """The error names the stage or the size and the path, and the model stays what it was."""
    model = small()
    with pytest.raises(ConfigError, match=message):
        insert(model, stages=stages, elastic=elastic)

    assert {type(module) for module in model.modules()} == {type(module) for module in small().modules()}


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_of_which_heads_cannot_be_cut_is_named(options: dict[str, bool]) -> None:
    """Added rows are refused by the layer's path."""
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, **options)})
    with pytest.raises(ConfigError, match=r"^a: expected"):
        insert(model)

    assert type(model["a"]) is nn.MultiheadAttention


def test_a_supernet_is_not_inserted_into_again() -> None:
    """Two cursors would fight over one operator."""
    model = small()
    insert(model)
    with pytest.raises(ConfigError, match="0: the model is a supernet already"):
        insert(model)


def test_sizes_are_rounded_up_to_a_multiple() -> None:
    """5 of 10 channels in multiples of 4 are 8; all of them are 10, which is no multiple."""
    supernet = insert(nn.Sequential(nn.Linear(1, 10)), elastic=[Elastic("w", ["0"], multiple_of=4)])
    outputs = [supernet.controls.sizes_of({"w": [width]}).outputs["w"] for width in (0.25, 0.5, 0.9, 1.0)]

    assert outputs == [4, 8, 10, 10]
