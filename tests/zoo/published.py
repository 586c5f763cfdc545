"""Rows for the architectures of transformers: random, small, from a configuration alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.supernet.control import spread_blocks
from gpu_worker.supernet.insertion import Elastic, Stage
from tests.zoo.judge import Row, built_smaller, ignoring, kept_blocks, without

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from gpu_worker.supernet.operators.switch import Skipped

WIDTH, HEADS, UNITS, BLOCKS, TOKENS = 32, 4, 48, 4, 50
KEPT = (0, 2)  # of 4 blocks 2, spread evenly
DEPTH: dict[str, list[Any]] = {"d": [2]}
HALF: dict[str, list[Any]] = {"w": [0.5]}


def _build(model: str, config: str, options: Mapping[str, Any]) -> nn.Module:
    import transformers  # noqa: PLC0415  an extra, and slow to import

    transformers.logging.set_verbosity_error()
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    return made


def _tokens() -> torch.Tensor:
    return torch.randint(1, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _encoder_rows(
    network: str,
    options: Mapping[str, Any],
    *,
    blocks: str,
    up: str | list[str],
    attention: tuple[list[str], str],
    model: str | None = None,
    units: str = "intermediate_size",
    depth: str = "num_hidden_layers",
    image: int | None = None,
    groups: int = 1,
    down: str | None = None,
    parts: tuple[int, int | tuple[int, ...]] = (1, 1),
    skipped: Skipped = "input",
) -> list[Row]:
    """Return rows for depth, hidden units and heads of a transformer of equal blocks.

    Args:
        network: Its name, from which those of the classes follow.
        options: Of the configuration.
        blocks: The container of the blocks.
        up: In each block, the layers whose outputs are the hidden units.
        attention: In each block, the projections whose outputs are heads, and the one whose inputs are.
        model: The class, where the name does not give it.
        units: The option for hidden units.
        depth: The option for blocks.
        image: Height and width, for images.
        groups: Query heads that share a head of keys and values.
        down: In each block, the layer whose inputs are the hidden units, where the first part of each
            tensor is not what a smaller network has.
        parts: Of the outputs of the layers of `up`, and of the projections.
        skipped: What a block gives that is left out.
    """
    build = functools.partial(_build, model or f"{network}Model", f"{network.removesuffix('Encoder')}Config")
    heads, out = attention
    ups = [up] if isinstance(up, str) else up
    sizes = [Elastic("w", [f"{blocks}.*.{layer}" for layer in heads], parts=parts[1])]
    control = HALF
    if groups > 1:  # queries have more heads than keys and values
        sizes = [
            Elastic("q", [f"{blocks}.*.{heads[0]}"]),
            Elastic("kv", [f"{blocks}.*.{layer}" for layer in heads[1:]]),
        ]
        control = {"w": [0.5, 0.5]}

    def row(what: str, oracle: Any, control: dict[str, list[Any]], **elastic: Any) -> Row:
        inputs = _tokens if image is None else functools.partial(_images, image)
        return Row(network, what, functools.partial(build, options), inputs, oracle, control, **elastic)

    def smaller(**changed: Any) -> Callable[[], nn.Module]:
        return functools.partial(build, {**options, **changed})

    return [
        row(
            "depth",
            built_smaller(smaller(**{depth: len(KEPT)}), kept_blocks(f"{blocks}.", KEPT)),
            DEPTH,
            stages=[Stage(blocks, rule=spread_blocks, skipped=skipped)],
        ),
        row(
            "hidden units",
            built_smaller(smaller(**{units: UNITS // 2}))
            if down is None
            else ignoring({f"{blocks}.*.{down}": UNITS // 2}),
            HALF,
            elastic=[Elastic("w", [f"{blocks}.*.{layer}" for layer in ups], parts=parts[0])],
        ),
        row("heads", ignoring({f"{blocks}.*.{out}": WIDTH // 2}), control, elastic=sizes),
    ]


_BERT = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": UNITS,
    "num_hidden_layers": BLOCKS,
}
_TEXT = {**_BERT, "vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_VISION = {**_BERT, "image_size": 16, "patch_size": 8}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS, "use_cache": False}
_BERT_ATTENTION = (
    ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.output.dense",
)
_NEW_ATTENTION = ([f"attention.{x}_proj" for x in "qkv"], "attention.o_proj")
_LLAMA_ATTENTION = ([f"self_attn.{x}_proj" for x in "qkv"], "self_attn.o_proj")


def _decoder_rows(network: str, options: Mapping[str, Any] = _DECODER, **changed: Any) -> list[Row]:
    given: dict[str, Any] = {
        "blocks": "layers",
        "up": ["mlp.gate_proj", "mlp.up_proj"],
        "attention": _LLAMA_ATTENTION,
        "groups": 2,
        **changed,
    }
    return _encoder_rows(network, options, **given)


def _transformers() -> list[Row]:
    distil = {
        "dim": WIDTH, "n_heads": HEADS, "hidden_dim": UNITS, "n_layers": BLOCKS, "vocab_size": TOKENS,
    }  # fmt: skip
    gpt2 = {
        "n_embd": WIDTH, "n_head": HEADS, "n_inner": UNITS, "n_layer": BLOCKS, "vocab_size": TOKENS,
        "use_cache": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    t5 = {
        "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": UNITS, "num_layers": BLOCKS, "num_heads": HEADS,
        "vocab_size": TOKENS,
    }  # fmt: skip
    bert = {"blocks": "encoder.layer", "up": "intermediate.dense", "attention": _BERT_ATTENTION}
    return [
        *_encoder_rows("Bert", _TEXT, **bert),  # type: ignore[arg-type]  # a dictionary of options
        *_encoder_rows("Roberta", {**_TEXT, "pad_token_id": 1}, **bert),  # type: ignore[arg-type]  # as above
        *_encoder_rows(
            "DistilBert", distil, blocks="transformer.layer", up="ffn.lin1", units="hidden_dim",
            depth="n_layers", attention=([f"attention.{x}_lin" for x in "qkv"], "attention.out_lin"),
        ),
        *_encoder_rows("ViT", _VISION, blocks="layers", up="mlp.fc1", attention=_NEW_ATTENTION, image=16),
        *_encoder_rows("DeiT", _VISION, blocks="layers", up="mlp.fc1", attention=_NEW_ATTENTION, image=16),
        *_encoder_rows(
            "GPT2", gpt2, blocks="h", up="mlp.c_fc", units="n_inner", depth="n_layer", parts=(1, 3),
            attention=(["attn.c_attn"], "attn.c_proj"),
        ),
        *_decoder_rows("Llama"),
        *_decoder_rows("Qwen2"),
        *_decoder_rows("Mistral"),
        *_fused(
            _decoder_rows(
                "Phi3", up="mlp.gate_up_proj", down="mlp.down_proj", groups=1,
                attention=(["self_attn.qkv_proj"], "self_attn.o_proj"), parts=(2, (32, 16, 16)),
            )
        ),
        *_one_head(
            _with_its_bias(
                _encoder_rows(
                "T5Encoder", t5, blocks="encoder.block", up="layer.1.DenseReluDense.wi", units="d_ff",
                depth="num_layers", skipped=_with_bias,
                attention=([f"layer.0.SelfAttention.{x}" for x in "qkv"], "layer.0.SelfAttention.o"),
                ),
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            ),
            "encoder.block.*.layer.0.SelfAttention.o",
        ),
        *_decoder_rows("Mixtral", {**_DECODER, "num_local_experts": 3}, up="mlp.experts"),
    ]  # fmt: skip


def _mamba() -> list[Row]:
    options = {
        "hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": BLOCKS, "vocab_size": TOKENS,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "use_cache": False,
    }  # fmt: skip
    make = functools.partial(_build, "MambaModel", "MambaConfig", options)
    fewer = functools.partial(_build, "MambaModel", "MambaConfig", {**options, "num_hidden_layers": 2})
    return [
        Row(
            "Mamba", "depth", make, _tokens, built_smaller(fewer, kept_blocks("layers.", KEPT)), DEPTH,
            stages=[Stage("layers", rule=spread_blocks)],
        ),
        Row(
            "Mamba", "hidden units", make, _tokens, ignoring({"layers.*.mixer.out_proj": 32}), HALF,
            elastic=[Elastic("w", ["layers.*.mixer.in_proj"])],
        ),
    ]  # fmt: skip


# --- convolutions, and transformers in stages -----------------------------------------------


def _staged_rows(
    network: str,
    options: Mapping[str, Any],
    *,
    depths: str,
    stage: str | list[str],
    fewer: list[int],
    image: int,
    widths: list[tuple[str, list[Elastic], Any]],
    skipped: Skipped = "input",
) -> list[Row]:
    """Return a row for the depth of the last stage, and one for each width."""
    build = functools.partial(_build, f"{network}Model", f"{network}Config")
    make, inputs = functools.partial(build, options), functools.partial(_images, image)
    smaller = functools.partial(build, {**options, depths: fewer})
    return [
        Row(
            network,
            "depth",
            make,
            inputs,
            built_smaller(smaller),
            {"d": [fewer[-1]]},
            stages=[Stage(stage, skipped=skipped)],
        ),
        *(
            Row(network, what, make, inputs, oracle, {"w": [0.5] * len(elastic)}, elastic=elastic)
            for what, elastic, oracle in widths
        ),
    ]


def _convolutional() -> list[Row]:
    layer = "encoder.stages.1.layers.*.layer"
    convolutions = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 3]}
    return [
        *_staged_rows(
            "ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 3], "num_stages": 2},
            depths="depths", stage="encoder.stages.1.layers", fewer=[1, 2], image=32,
            widths=[
                (
                    "hidden units",
                    [Elastic("w", ["encoder.stages.1.layers.*.pwconv1"])],
                    ignoring({"encoder.stages.1.layers.*.pwconv2": 32}),
                )
            ],
        ),
        *_staged_rows(
            "ResNet", {**convolutions, "layer_type": "bottleneck"},
            depths="depths", stage="encoder.stages.1.layers", fewer=[1, 2], image=32,
            widths=[
                (
                    "channels",
                    [Elastic("w", [f"{layer}.0.convolution", f"{layer}.1.convolution"])],
                    ignoring({f"{layer}.1.convolution": 4, f"{layer}.2.convolution": 4}),
                )
            ],
        ),
        *_staged_rows(
            "RegNet",
            {**convolutions, "groups_width": 8, "layer_type": "y"},
            depths="depths", stage="encoder.stages.1.layers", fewer=[1, 2], image=32,
            widths=[
                (
                    "channels",
                    [Elastic("w", [f"{layer}.0.convolution", f"{layer}.2.attention.2"])],
                    ignoring({f"{layer}.3.convolution": 16, f"{layer}.2.attention.0": 16}),
                )
            ],
        ),
    ]  # fmt: skip


def _mobile() -> list[Row]:
    mobilenet = functools.partial(
        _build, "MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 32}
    )
    images, last = functools.partial(_images, 32), [f"encoder.blocks.{n}" for n in (2, 3)]
    outs, ins = (
        ("expansion.expand_conv", "squeeze_excite.expand"),
        ("projection.project_conv", "squeeze_excite.reduce"),
    )
    return [
        Row(
            "MobileNetV2", "depth", mobilenet, images,
            without("layer", [n for n in range(16) if n not in (7, 8)]), {"d": [1]},
            stages=[Stage(["layer.6", "layer.7", "layer.8"])],
        ),
        Row(
            "MobileNetV2", "channels", mobilenet, images, ignoring({"layer.4.reduce_1x1.convolution": 48}),
            HALF,
            elastic=[Elastic("w", ["layer.4.expand_1x1.convolution"])],
        ),
        *_staged_rows(
            "EfficientNet",
            {
                "width_coefficient": 1.0, "depth_coefficient": 1.0, "depth_divisor": 8, "hidden_dim": 1280,
                "in_channels": [32, 8], "out_channels": [8, 16], "kernel_sizes": [3, 3], "strides": [1, 2],
                "num_block_repeats": [1, 3], "expand_ratios": [1, 4], "depthwise_padding": [],
            },
            depths="num_block_repeats", stage=["encoder.blocks.1", "encoder.blocks.2", "encoder.blocks.3"],
            fewer=[1, 2], image=32,
            widths=[
                (
                    "channels",
                    [Elastic("w", [f"{b}.{x}" for b in last for x in outs])],
                    ignoring({f"{b}.{x}": 32 for b in last for x in ins}),
                )
            ],
        ),
    ]  # fmt: skip


def _windowed() -> list[Row]:
    return [
        *_staged_rows(
            "Swin",
            {
                "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 3], "num_heads": [2, 4],
                "window_size": 2,
            },
            depths="depths", stage="encoder.layers.1.blocks", fewer=[1, 2], image=32, skipped=_with_nothing,
            widths=[
                (
                    "hidden units",
                    [Elastic("w", ["encoder.layers.1.blocks.*.mlp.fc1"])],
                    ignoring({"encoder.layers.1.blocks.*.mlp.fc2": 32}),
                ),
                (
                    "heads",
                    [Elastic("w", [f"encoder.layers.1.blocks.*.attention.{x}_proj" for x in "qkv"])],
                    ignoring({"encoder.layers.1.blocks.*.attention.o_proj": 8}),
                ),
            ],
        ),
        *_staged_rows(
            "Segformer",
            {
                "depths": [1, 3], "num_encoder_blocks": 2, "hidden_sizes": [16, 32],
                "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
                "strides": [4, 2], "mlp_ratios": [2, 2],
            },
            depths="depths", stage="stages.1.blocks", fewer=[1, 2], image=32,
            widths=[
                (
                    "hidden units",
                    [Elastic("w", ["stages.1.blocks.*.mlp.fc1"])],
                    ignoring({"stages.1.blocks.*.mlp.fc2": 32}),
                ),
                (
                    "heads",
                    [Elastic("w", [f"stages.1.blocks.*.attention.{x}_proj" for x in "qkv"])],
                    ignoring({"stages.1.blocks.*.attention.o_proj": 16}),
                ),
            ],
        ),
    ]  # fmt: skip


def _with_bias(
    hidden: torch.Tensor, _mask: object = None, bias: object = None, *_more: object, **_others: object
) -> Any:
    """Return what a block of T5 gives that is left out: later ones add the positions' bias too."""
    return hidden, bias, None


def _with_nothing(hidden: torch.Tensor, *_more: object, **_others: object) -> Any:
    """Return what a block of Swin gives that is left out: no attentions beside its input."""
    return hidden, None


def _fused(rows: list[Row]) -> list[Row]:
    """Return rows and what they are if it is forgotten that a layer's outputs have parts."""
    forgotten = [
        dataclasses.replace(
            row,
            what=f"{row.what}, without parts",
            elastic=[dataclasses.replace(size, parts=1) for size in row.elastic],
        )
        for row in rows
        if row.elastic
    ]
    return [*rows, *forgotten]


def _with_its_bias(rows: list[Row], bias: str) -> list[Row]:
    """Return rows and one for heads of which the positions' bias is cut too."""
    [heads] = [row for row in rows if row.what == "heads"]
    return [
        *rows,
        dataclasses.replace(
            heads,
            what="heads and their bias",
            elastic=[*heads.elastic, Elastic("bias", [bias])],
            control={"w": [0.5, 0.5]},
        ),
    ]


def _one_head(rows: list[Row], out: str) -> list[Row]:
    """Return the row for heads with one head of four, which broadcasts against a bias for each head."""
    [heads] = [row for row in rows if row.what == "heads"]
    return [
        *rows,
        dataclasses.replace(
            heads, what="one head", control={"w": [1 / HEADS]}, oracle=ignoring({out: WIDTH // HEADS})
        ),
    ]


def rows() -> list[Row]:
    """Return all rows."""
    return [*_transformers(), *_mamba(), *_convolutional(), *_mobile(), *_windowed()]
