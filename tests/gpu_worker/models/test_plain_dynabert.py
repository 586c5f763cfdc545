"""The plain DynaBERT subnets have the sizes worked out by hand, and attend to tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.gpu_worker.models.plain_dynabert import PlainBlock, kept_blocks, plain_dynabert, round_to_nearest
from tests.gpu_worker.models.published import dynabert_shapes, n_parameters, random_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


N_WORDS = 100
SHAPES = dynabert_shapes(n_words=N_WORDS)
FULL = [1.0] * 12
MIXED = [0.25, 0.5, 0.75, 1.0] * 3


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Return random tensors of the published names, with a small vocabulary."""
    return random_tensors(SHAPES, seed=0)


def queries(n: int = 2, length: int = 7) -> torch.Tensor:
    """Return token ids without padding, and token types: (n, 2, length)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, N_WORDS, (n, length), generator=generator)
    types = torch.randint(0, 2, (n, length), generator=generator)
    return torch.stack([ids, types], dim=1)


@torch.inference_mode()
def logits(
    tensors: Mapping[str, torch.Tensor], depth: int, widths: Sequence[float], asked: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the queries asked (B, 3)."""
    out: torch.Tensor = plain_dynabert(tensors, depth, widths)(asked)
    return out


@pytest.mark.parametrize(
    ("depth", "kept"),
    [
        (12, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)),
        (9, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (6, (0, 2, 4, 6, 8, 10)),
        (5, (0, 2, 4, 7, 9)),
        (1, (0,)),
    ],
)
def test_kept_blocks_are_spread_evenly(depth: int, kept: tuple[int, ...]) -> None:
    """Of 12 blocks, floor(i * 12 / D) are kept: at 9, every fourth is skipped."""
    assert kept_blocks(depth) == kept


@pytest.mark.parametrize(
    ("width", "features", "units"),
    [
        (1.0, 768, 3072),
        (0.25, 192, 768),
        (0.3, 256, 1024),  # 3.6 heads: 4
        (0.35, 256, 1024),  # 4.2 heads: 4
        (0.375, 256, 1024),  # 4.5 heads: 4, the even one
        (0.55, 448, 1792),  # 6.6 heads: 7
        (5 / 12, 320, 1280),
    ],
)
def test_a_width_means_the_nearest_number_of_heads(width: float, features: int, units: int) -> None:
    """Worked out by hand for 12 heads of 64, 256 units each."""
    assert (round_to_nearest(768, width), round_to_nearest(3072, width)) == (features, units)


def test_sizes_are_those_worked_out_by_hand(tensors: dict[str, torch.Tensor]) -> None:
    """A block's width is that of its position among all 12, not among the kept."""
    network = plain_dynabert(tensors, 6, [0.25, 0.5, 0.3, 1.0, 0.55, 1.0, 0.75, 0.5, 1.0, 0.5, 5 / 12, 0.5])

    # Kept are 0, 2, 4, 6, 8, 10, of widths 0.25, 0.3, 0.55, 0.75, 1.0, 5 / 12.
    # Heads: 3, 3.6 -> 4, 6.6 -> 7, 9, 12, 5, of 64 each, and 256 units for each.
    heads_wide = [192, 256, 448, 576, 768, 320]
    units = [768, 1024, 1792, 2304, 3072, 1280]
    sizes = [
        *((768, 768), (768, 3)),
        *[
            size
            for wide, n_units in zip(heads_wide, units, strict=True)
            for size in (*[(768, wide)] * 3, (wide, 768), (768, n_units), (n_units, 768))
        ],
    ]
    layers = list(network.modules())
    linears = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    norms = [layer for layer in layers if isinstance(layer, nn.LayerNorm)]
    assert sorted(linears) == sorted(sizes)
    assert [block_sizes(block) for block in layers if isinstance(block, PlainBlock)] == [
        *zip(heads_wide, units, strict=True)
    ]
    assert [(norm.normalized_shape, norm.eps) for norm in norms] == [((768,), 1e-12)] * 13


def block_sizes(block: PlainBlock) -> tuple[int, int]:
    """Return the features of all heads, and the hidden units."""
    widened = block.feed_forward.get_submodule("0")
    assert isinstance(widened, nn.Linear)
    return block.attention.query.out_features, widened.out_features


def test_the_largest_subnet_has_every_published_parameter(tensors: dict[str, torch.Tensor]) -> None:
    """At full depth and width every tensor is used whole."""
    count = sum(parameter.numel() for parameter in plain_dynabert(tensors, 12, FULL).parameters())

    assert count == n_parameters(SHAPES) == 109_484_547 - (30_522 - N_WORDS) * 768


def test_logits_are_of_a_sane_scale(tensors: dict[str, torch.Tensor]) -> None:
    """Three logits a query, that neither explode nor vanish, and differ by query."""
    for depth, widths in ((12, FULL), (12, [0.25] * 12), (1, FULL)):
        out = logits(tensors, depth, widths, queries(n=8, length=16))
        assert out.shape == (8, 3)
        assert out.std(dim=0).min() > 0.05
        assert out.abs().max() < 50


@pytest.mark.parametrize("n_padding", [1, 9])
def test_padding_changes_no_logit(tensors: dict[str, torch.Tensor], n_padding: int) -> None:
    """A query has the same logits alone and with padding behind it, whatever the padding's type."""
    asked = queries()
    padding = torch.zeros(2, 2, n_padding, dtype=asked.dtype)
    padding.select(1, 1).fill_(1)

    padded = logits(tensors, 6, MIXED, torch.cat([asked, padding], dim=2))
    torch.testing.assert_close(padded, logits(tensors, 6, MIXED, asked))


def test_padding_changes_no_other_query(tensors: dict[str, torch.Tensor]) -> None:
    """In a batch, the shorter query's padding touches neither the longer query nor itself."""
    asked = queries()
    asked.index_fill_(2, torch.tensor([5, 6]), 0)
    asked.select(0, 1).copy_(queries().select(0, 1))

    both = logits(tensors, 3, MIXED, asked)
    short = asked.select(0, 0).unsqueeze(0).index_select(2, torch.arange(5))
    torch.testing.assert_close(both.select(0, 0), logits(tensors, 3, MIXED, short).select(0, 0))
    alone = [logits(tensors, 3, MIXED, query.unsqueeze(0)) for query in asked]
    torch.testing.assert_close(both, torch.cat(alone))


def test_every_token_counts(tensors: dict[str, torch.Tensor]) -> None:
    """Another last token, another type of it, or another order changes the logits."""
    ids, types = (row.tolist() for row in queries(n=1).select(0, 0))
    variants = [
        [ids, types],
        [[*ids[:-1], ids[-1] % (N_WORDS - 1) + 1], types],
        [ids, [*types[:-1], 1 - types[-1]]],
        [[ids[0], ids[2], ids[1], *ids[3:]], types],
    ]

    first, *others = logits(tensors, 6, MIXED, torch.tensor(variants))
    assert not any(torch.allclose(first, other, rtol=0.01, atol=0.001) for other in others)


def test_a_query_of_padding_alone_is_answered(tensors: dict[str, torch.Tensor]) -> None:
    """With nothing to attend to, logits are still finite."""
    assert logits(tensors, 6, MIXED, torch.zeros(1, 2, 4, dtype=torch.int64)).isfinite().all()


def test_only_the_first_heads_and_units_of_the_kept_blocks_are_used(tensors: dict[str, torch.Tensor]) -> None:
    """NaN in every weight outside the subnet changes no logit."""
    poisoned = dict(tensors)
    for position in range(12):
        is_kept = position in (0, 1, 2, 4, 5, 6, 8, 9, 10)
        heads_wide, units = (192, 768) if is_kept else (0, 0)  # of width 0.25
        block = f"bert.encoder.layer.{position}"
        cuts = {
            **{f"attention.self.{name}": (0, heads_wide) for name in ("query", "key", "value")},
            "attention.output.dense": (1, heads_wide),
            "intermediate.dense": (0, units),
            "output.dense": (1, units),
        }
        for name, (axis, size) in cuts.items():
            whole = tensors[f"{block}.{name}.weight"]
            rest = torch.arange(size, whole.shape[axis])
            poisoned[f"{block}.{name}.weight"] = whole.index_fill(axis, rest, torch.nan)
            if axis == 0:
                bias = tensors[f"{block}.{name}.bias"]
                poisoned[f"{block}.{name}.bias"] = bias.index_fill(0, rest, torch.nan)

    narrow = [0.25] * 12
    expected = logits(tensors, 9, narrow, queries())
    torch.testing.assert_close(logits(poisoned, 9, narrow, queries()), expected)


def test_a_full_block_is_torchs_own_encoder_layer(tensors: dict[str, torch.Tensor]) -> None:
    """At full width, a block gives what nn.TransformerEncoderLayer gives with the same weights."""
    block = "bert.encoder.layer.0"
    heads = [f"{block}.attention.self.{name}" for name in ("query", "key", "value")]
    named = {
        "self_attn.out_proj": f"{block}.attention.output.dense",
        "linear1": f"{block}.intermediate.dense",
        "linear2": f"{block}.output.dense",
        "norm1": f"{block}.attention.output.LayerNorm",
        "norm2": f"{block}.output.LayerNorm",
    }
    state = {
        f"{ours}.{part}": tensors[f"{theirs}.{part}"]
        for ours, theirs in named.items()
        for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        state[f"self_attn.in_proj_{part}"] = torch.cat([tensors[f"{head}.{part}"] for head in heads])
    theirs = nn.TransformerEncoderLayer(
        768, 12, 3072, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )
    theirs.load_state_dict(state)
    ours = plain_dynabert(tensors, 1, FULL).get_submodule("blocks.0")
    x = torch.randn(2, 7, 768, generator=torch.Generator().manual_seed(2))
    is_token = torch.ones(2, 7, dtype=torch.bool)
    is_token.select(0, 1).index_fill_(0, torch.tensor([4, 5, 6]), 0)

    with torch.inference_mode():
        expected = theirs.eval().forward(x, src_key_padding_mask=~is_token)
        actual = ours(x, is_token)
    for query, n_tokens in ((0, 7), (1, 4)):
        kept = torch.arange(n_tokens)
        torch.testing.assert_close(actual[query, kept], expected[query, kept], rtol=1e-4, atol=1e-5)
