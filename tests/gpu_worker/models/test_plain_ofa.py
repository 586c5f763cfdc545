"""The plain OFA-ResNet50 subnets have the sizes worked out by hand, and use only what is theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.gpu_worker.models.plain_ofa import plain_ofa, round_channels
from tests.gpu_worker.models.published import (
    OFA_RESNET50,
    n_parameters,
    ofa_resnet50_shapes,
    random_tensors,
    read_shapes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


Control = dict[str, list[float]]

LARGEST: Control = {"d": [2] * 5, "e": [0.35] * 18, "w": [2] * 6}
SMALLEST: Control = {"d": [0] * 5, "e": [0.2] * 18, "w": [0] * 6}
# Slots of the four stages: 0 to 3, 4 to 7, 8 to 13, 14 to 17.
MIXED: Control = {
    "d": [2, 1, 0, 1, 0],
    "e": [
        *(0.2, 0.35, 0.25, 0.35),
        *(0.25, 0.35, 0.2, 0.2),
        *(0.35, 0.2, 0.25, 0.2, 0.35, 0.2),
        *(0.2, 0.25, 0.35, 0.35),
    ],
    "w": [1, 0, 2, 0, 1, 0],
}


def bottleneck(inputs: int, middle: int, outputs: int) -> list[tuple[int, int]]:
    """Return inputs and outputs of a block's convolutions."""
    return [(inputs, middle), (middle, middle), (middle, outputs)]


# Stem 64, its middle 32; middles 89.6, 179.2, 358.4, 716.8 are 90, 179, 358, 717 and so
# (94, 183, 362, 721) // 8 * 8 = 88, 176, 360, 720. A stage's first block has a shortcut.
LARGEST_CONVS = [
    *[(3, 32), (32, 32), (32, 64)],
    *[*bottleneck(64, 88, 256), (64, 256)],
    *bottleneck(256, 88, 256) * 3,
    *[*bottleneck(256, 176, 512), (256, 512)],
    *bottleneck(512, 176, 512) * 3,
    *[*bottleneck(512, 360, 1024), (512, 1024)],
    *bottleneck(1024, 360, 1024) * 5,
    *[*bottleneck(1024, 720, 2048), (1024, 2048)],
    *bottleneck(2048, 720, 2048) * 3,
]

# Stem 41.6 -> 45.6 -> 40, its middle 20.8 -> 24.8 -> 24; stages 166.4, 332.8, 665.6, 1331.2
# -> (170.4, 336.8, 669.6, 1335.2) // 8 * 8 = 168, 336, 664, 1328; middles 33.6, 67.2, 132.8,
# 265.6 are 34, 67, 133, 266 -> (38, 71, 137, 270) // 8 * 8 = 32, 64, 136, 264, and none of
# them is below 0.9 of what it was.
SMALLEST_CONVS = [
    *[(3, 24), (24, 40)],
    *[*bottleneck(40, 32, 168), (40, 168), *bottleneck(168, 32, 168)],
    *[*bottleneck(168, 64, 336), (168, 336), *bottleneck(336, 64, 336)],
    *[*bottleneck(336, 136, 664), (336, 664)],
    *bottleneck(664, 136, 664) * 3,
    *[*bottleneck(664, 264, 1328), (664, 1328), *bottleneck(1328, 264, 1328)],
]

# Stem 0.65: 40, its middle 0.8: 25.6 -> 29.6 -> 24. Stages 1.0, 0.65, 0.8, 0.65: 256, 336,
# 816 (819.2 -> 823.2), 1328. Middles by slot, out * e -> rounded -> multiple of 8:
#   0: 51.2 -> 51 -> 48     1: 89.6 -> 90 -> 88      2: 64 -> 64
#   4: 84 -> 88             5: 117.6 -> 118 -> 120
#   8: 285.6 -> 286 -> 288  9: 163.2 -> 163 -> 160  10: 204 -> 208  11: 163 -> 160  12: as 8
#  14: 265.6 -> 266 -> 264  15: 332 -> 336
MIXED_CONVS = [
    *[(3, 24), (24, 24), (24, 40)],
    *[*bottleneck(40, 48, 256), (40, 256), *bottleneck(256, 88, 256), *bottleneck(256, 64, 256)],
    *[*bottleneck(256, 88, 336), (256, 336), *bottleneck(336, 120, 336)],
    *[*bottleneck(336, 288, 816), (336, 816), *bottleneck(816, 160, 816), *bottleneck(816, 208, 816)],
    *[*bottleneck(816, 160, 816), *bottleneck(816, 288, 816)],
    *[*bottleneck(816, 264, 1328), (816, 1328), *bottleneck(1328, 336, 1328)],
]

BY_HAND = ((LARGEST, LARGEST_CONVS), (SMALLEST, SMALLEST_CONVS), (MIXED, MIXED_CONVS))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Return random tensors of the published names and shapes."""
    return random_tensors(ofa_resnet50_shapes(), seed=0)


def images(size: int = 32) -> torch.Tensor:
    """Return two random images (2, 3, size, size), each with a tint that no pooling averages out."""
    generator = torch.Generator().manual_seed(1)
    tints = torch.randn(2, 3, 1, 1, generator=generator)
    return tints + torch.randn(2, 3, size, size, generator=generator)


@torch.inference_mode()
def logits(tensors: Mapping[str, torch.Tensor], control: Control, size: int = 32) -> torch.Tensor:
    """Return the logits of two random images (2, 1000)."""
    out: torch.Tensor = plain_ofa(tensors, control)(images(size))
    return out


@pytest.mark.parametrize(
    ("value", "channels"), [(1, 8), (11, 16), (12, 16), (20, 24), (33, 32), (36, 40), (179, 176)]
)
def test_channels_are_rounded_to_eights(value: int, channels: int) -> None:
    """The nearest multiple of 8, at least 8; 11 would become 8, less than 0.9 of it, and gets 16."""
    assert round_channels(value) == channels


@pytest.mark.parametrize(("control", "sizes"), BY_HAND, ids=["largest", "smallest", "mixed"])
def test_sizes_are_those_worked_out_by_hand(
    tensors: dict[str, torch.Tensor], control: Control, sizes: Sequence[tuple[int, int]]
) -> None:
    """Every convolution, batch norm and the classifier have exactly the subnet's channels."""
    layers = list(plain_ofa(tensors, control).modules())

    convs = [(layer.in_channels, layer.out_channels) for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer.num_features for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    heads = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert convs == sizes
    assert norms == [outputs for _, outputs in sizes]
    assert heads == [(sizes[-1][1], 1000)]


def test_the_largest_subnet_has_every_published_parameter(tensors: dict[str, torch.Tensor]) -> None:
    """48.1 M parameters, as many as the published list sums to."""
    count = sum(parameter.numel() for parameter in plain_ofa(tensors, LARGEST).parameters())

    assert count == n_parameters(ofa_resnet50_shapes()) == 48_105_992
    if OFA_RESNET50.is_file():
        assert count == n_parameters(read_shapes(OFA_RESNET50))


@pytest.mark.parametrize("size", [32, 64, 75])
def test_images_become_logits_of_a_sane_scale(tensors: dict[str, torch.Tensor], size: int) -> None:
    """Any image size gives 1000 logits that neither explode nor vanish, and differ by image."""
    for control in (LARGEST, SMALLEST, MIXED):
        out = logits(tensors, control, size)
        assert out.shape == (2, 1000)
        assert 0.05 < out.std().item() < 50
        assert (out.select(0, 0) - out.select(0, 1)).std() > 0.05 * out.std()


def test_a_stage_halves_the_image_but_the_first(tensors: dict[str, torch.Tensor]) -> None:
    """Stem 64 to 16 pixels, then strides 1, 2, 2, 2, each in the first block of its stage."""
    network, x, sides = plain_ofa(tensors, SMALLEST), images(64), []
    for layer in network.children():
        x = layer(x)
        if x.dim() == 4:
            sides.append(x.shape[-1])

    assert sides == [32, 32, 16, *[16] * 2, *[8] * 2, *[4] * 4, *[2] * 2, 1]
    strided = [
        layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)
    ]
    assert [conv.kernel_size for conv in strided] == [(3, 3)] * 4  # a 1x1 would skip pixels


def test_grey_images_use_the_first_channel_of_the_weights(tensors: dict[str, torch.Tensor]) -> None:
    """With one image channel, logits are those of a colour image that is 0 in the others."""
    colour = images().index_fill(1, torch.tensor([1, 2]), 0)
    grey = colour.index_select(1, torch.tensor([0]))

    with torch.inference_mode():
        out = plain_ofa(tensors, SMALLEST, image_channels=1)(grey)
        torch.testing.assert_close(out, plain_ofa(tensors, SMALLEST)(colour))


@pytest.mark.parametrize("control", [SMALLEST, MIXED], ids=["smallest", "mixed"])
def test_only_the_first_channels_of_the_kept_blocks_are_used(
    tensors: dict[str, torch.Tensor], control: Control
) -> None:
    """NaN in every weight and statistic outside the subnet changes no logit."""
    state = plain_ofa(tensors, control).state_dict()
    owned = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in tensors if _is_kept(name, control)]
    poisoned = {
        name: torch.full_like(tensors[name], torch.nan) for name in tensors if tensors[name].dim() > 0
    }
    for name, part in zip(names, owned, strict=True):
        corner = tuple(torch.arange(size) for size in part.shape)
        poisoned[name].index_put_(torch.meshgrid(*corner, indexing="ij"), part)
    counters = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 0}

    torch.testing.assert_close(logits(poisoned | counters, control), logits(tensors, control))


def _is_kept(name: str, control: Control) -> bool:
    if name.endswith("num_batches_tracked"):
        return False
    if name.startswith("input_stem.1."):
        return control["d"][0] == 2
    if not name.startswith("blocks."):
        return True
    slot = int(name.split(".")[1])
    stage = sum(slot >= first for first in (4, 8, 14))
    return slot - (0, 4, 8, 14)[stage] < (2, 2, 4, 2)[stage] + control["d"][1 + stage]


def test_the_stem_block_runs_at_depth_two_only(tensors: dict[str, torch.Tensor]) -> None:
    """d[0] = 1 is as good as 0; 2 adds the residual convolution."""
    zero, one, two = (logits(tensors, SMALLEST | {"d": [d, 0, 0, 0, 0]}) for d in (0, 1, 2))

    torch.testing.assert_close(zero, one)
    assert not torch.allclose(zero, two)


def test_expand_ratios_are_counted_at_full_depth(tensors: dict[str, torch.Tensor]) -> None:
    """The ratio of a slot that is not kept changes nothing, the next stage's first does."""
    before = logits(tensors, SMALLEST)
    unkept, first_of_stage = list(SMALLEST["e"]), list(SMALLEST["e"])
    for slot in (2, 3, 6, 7, 12, 13, 16, 17):
        unkept[slot] = 0.35
    first_of_stage[4] = 0.35

    torch.testing.assert_close(logits(tensors, SMALLEST | {"e": unkept}), before)
    assert not torch.allclose(logits(tensors, SMALLEST | {"e": first_of_stage}), before)


def test_the_plain_network_has_weights_of_its_own(tensors: dict[str, torch.Tensor]) -> None:
    """No tensor of the network shares memory with the published ones."""
    published = {tensor.data_ptr() for tensor in tensors.values()}

    assert published.isdisjoint(t.data_ptr() for t in plain_ofa(tensors, LARGEST).state_dict().values())
