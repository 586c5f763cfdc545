"""The tensors of published supernet checkpoints: names, shapes, and random values.

The names and shapes are generated here, so that no test needs a download, and can be
read from the published lists where those lie beside the repository. Plain layers are
filled with the first channels of the tensors, taken index by index.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from tests.paths import SHARED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Layer = TypeVar("Layer", bound=nn.Module)

Shapes = dict[str, tuple[int, ...]]

STATE_DICTS = SHARED / "state-dicts"
OFA_RESNET50 = STATE_DICTS / "ofa_resnet50.tsv"
DYNABERT = STATE_DICTS / "dynabert_mnli.tsv"

# Of each stage at full size: blocks, output channels, and the middle channels of a block.
OFA_STAGES = ((4, 256, 88), (4, 512, 176), (6, 1024, 360), (4, 2048, 720))

# What batch normalisation keeps of the data, and no optimiser moves.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def read_shapes(path: Path) -> Shapes:
    """Read a published list: a name, a tab, and sizes joined by "x" or "scalar" on each line."""
    shapes: Shapes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, sizes = line.split("\t")
            assert name not in shapes, f"{path.name}: {name} is listed twice"
            shapes[name] = () if sizes == "scalar" else tuple(int(size) for size in sizes.split("x"))
    return shapes


def n_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many parameters the tensors hold, without the statistics of the data."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS))


def ofa_resnet50_shapes() -> Shapes:
    """Return the names and shapes of the published OFA-ResNet50 supernet."""
    return dict(_ofa_resnet50())


def _ofa_resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv_and_norm("input_stem.0.conv", "input_stem.0.bn", 32, 3, 3)
    yield from _conv_and_norm("input_stem.1.conv.conv", "input_stem.1.conv.bn", 32, 32, 3)
    yield from _conv_and_norm("input_stem.2.conv", "input_stem.2.bn", 64, 32, 3)
    inputs, position = 64, 0
    for n_blocks, outputs, middle in OFA_STAGES:
        for index in range(n_blocks):
            block = f"blocks.{position}"
            yield from _conv_and_norm(f"{block}.conv1.conv", f"{block}.conv1.bn", middle, inputs, 1)
            yield from _conv_and_norm(f"{block}.conv2.conv", f"{block}.conv2.bn", middle, middle, 3)
            yield from _conv_and_norm(f"{block}.conv3.conv", f"{block}.conv3.bn", outputs, middle, 1)
            if index == 0:
                shortcut = f"{block}.downsample"
                yield from _conv_and_norm(f"{shortcut}.conv", f"{shortcut}.bn", outputs, inputs, 1)
            inputs, position = outputs, position + 1
    yield "classifier.linear.linear.weight", (1000, inputs)
    yield "classifier.linear.linear.bias", (1000,)


def _conv_and_norm(
    conv: str, norm: str, outputs: int, inputs: int, kernel: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{conv}.conv.weight", (outputs, inputs, kernel, kernel)
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.bn.{name}", (outputs,)
    yield f"{norm}.bn.num_batches_tracked", ()


def dynabert_shapes(n_words: int = 30_522) -> Shapes:
    """Return the names and shapes of a BERT base classifier of three classes.

    Args:
        n_words: Size of the vocabulary; the published one is the default, and a small one saves time.
    """
    return dict(_dynabert(n_words))


def _dynabert(n_words: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, units = 768, 3072
    yield "bert.embeddings.word_embeddings.weight", (n_words, hidden)
    yield "bert.embeddings.position_embeddings.weight", (512, hidden)
    yield "bert.embeddings.token_type_embeddings.weight", (2, hidden)
    yield from _layer("bert.embeddings.LayerNorm", hidden)
    for position in range(12):
        block = f"bert.encoder.layer.{position}"
        for name in ("query", "key", "value"):
            yield from _layer(f"{block}.attention.self.{name}", hidden, hidden)
        yield from _layer(f"{block}.attention.output.dense", hidden, hidden)
        yield from _layer(f"{block}.attention.output.LayerNorm", hidden)
        yield from _layer(f"{block}.intermediate.dense", units, hidden)
        yield from _layer(f"{block}.output.dense", hidden, units)
        yield from _layer(f"{block}.output.LayerNorm", hidden)
    yield from _layer("bert.pooler.dense", hidden, hidden)
    yield from _layer("classifier", 3, hidden)


def _layer(name: str, outputs: int, *inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, *inputs)
    yield f"{name}.bias", (outputs,)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Return random tensors of these names and shapes, the same for the same seed.

    Layers keep the scale of what they are given, so that a forward pass through all
    blocks neither explodes nor vanishes; no two channels are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_tensor(name, shape, generator) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000, dtype=torch.int64)
    if name.endswith("running_var"):
        return torch.empty(shape).uniform_(0.5, 2, generator=generator)
    if name.endswith((".bias", "running_mean")):
        return torch.empty(shape).normal_(0, 0.1, generator=generator)
    if len(shape) == 1:  # the weight of a norm
        return torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
    # An embedding is looked up, not summed over; convolutions and linear layers sum over fan_in.
    fan_in = 1 if "embeddings" in name else math.prod(shape[1:])
    # ReLU halves what a convolution passes on, and shortcuts add up: between 1 and 2, the largest
    # OFA-ResNet50 does not explode, nor does the image drown in the biases of the smallest.
    gain = 1.5 if len(shape) == 4 else 1
    return torch.empty(shape).normal_(0, math.sqrt(gain / fan_in), generator=generator)


def gather(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return a copy of the first `sizes` entries along the first axes, picked index by index."""
    for axis, size in enumerate(sizes):
        tensor = tensor.index_select(axis, torch.tensor(list(range(size))))
    return tensor


def filled(layer: Layer, state: Mapping[str, torch.Tensor]) -> Layer:
    """Return the layer with `state` in place of all it holds; names and shapes must match."""
    layer.load_state_dict(state, strict=True, assign=True)
    return layer


def filled_linear(tensors: Mapping[str, torch.Tensor], name: str, *, inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer of these sizes, made of the first entries of the tensors."""
    # On the meta device no weight is made only to be replaced.
    layer = nn.Linear(inputs, outputs, device="meta")
    weight = gather(tensors[f"{name}.weight"], (outputs, inputs))
    return filled(layer, {"weight": weight, "bias": gather(tensors[f"{name}.bias"], (outputs,))})
