"""What is wrong in a model's folder or in options is named: the file, the field, and what was expected."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gpu_worker.models.encoders.folder import config_of, pooling_of, sizes_of, tensors_file
from gpu_worker.models.encoders.texts import TextOptions
from gpu_worker.models.kinds import KINDS, fitted, resident, supernet_kind
from superserve.errors import ConfigError
from tests.gpu_worker.models.encoders.folders import config, saved_encoder, write_modules

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, **changed: Any) -> Path:
    """Write a config.json with changed fields; None leaves one out."""
    fields = {**config().to_dict(), "model_type": "bert", **changed}
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "roberta"}, "model_type: expected 'bert', got 'roberta'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: expected 'absolute', got 'relative",
        ),
        ({"is_decoder": True}, "is_decoder: expected False, got True"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of gelu, gelu_new, .*, got 'mish'"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of 5 heads, got 24"),
        ({"hidden_size": None}, "hidden_size: expected a whole number of at least 1, got nothing"),
        ({"vocab_size": "99"}, "vocab_size: expected a whole number of at least 1, got '99'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a whole number of at least 1, got True"),
        ({"pad_token_id": -1}, "pad_token_id: expected a whole number of at least 0, got -1"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: expected a number above 0, got 0"),
    ],
)
def test_a_config_that_is_not_served_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    """By the file and the field."""
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        sizes_of(written(tmp_path, **changed))


def test_fields_that_older_files_leave_out_have_defaults(tmp_path: Path) -> None:
    """Hugging Face's own."""
    found = sizes_of(
        written(
            tmp_path,
            **dict.fromkeys(
                ("hidden_act", "layer_norm_eps", "type_vocab_size", "pad_token_id", "is_decoder")
            ),
        )
    )

    assert (found.activation, found.epsilon, found.n_types, found.padding) == ("gelu", 1e-12, 2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"config\.json: expected a JSON file"), ("[]", r"config\.json: expected a JSON object, got \[\]")],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    """By its file."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path)


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    """A file of tensors, nothing, and a folder without any."""
    (tmp_path / "model.safetensors").touch()
    for path, got in ((tmp_path / "model.safetensors", "a file"), (tmp_path / "absent", "nothing")):
        with pytest.raises(
            ConfigError, match=f"expected a model's folder, with config.json and .*; got {got}"
        ):
            fitted(KINDS["bert-encoder"], str(path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"expected a file model\.safetensors or pytorch_model\.bin there"):
        tensors_file(tmp_path)


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (
            ("Transformer", "Pooling", "Dense"),
            {"pooling_mode": "mean"},
            "modules.json: expected .*, got Dense",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode": "max"},
            "1_Pooling/config.json: pooling_mode: .* got 'max'",
        ),
        (("Transformer", "Pooling"), {}, r"pooling_mode: expected 'mean' or 'cls', got \[\]"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            r"pooling_mode: expected 'mean' or 'cls', got \['mean_tokens', 'cls_token'\]",
        ),
        (("Transformer", "Pooling"), None, "1_Pooling/config.json: expected a JSON file"),
    ],
)
def test_a_way_to_pool_that_is_not_served_is_named(
    tmp_path: Path, kinds: tuple[str, ...], pooling: dict[str, Any] | None, message: str
) -> None:
    """By the file, and not taken for another."""
    write_modules(tmp_path, *kinds, pooling=pooling)
    with pytest.raises(ConfigError, match=message):
        pooling_of(tmp_path)


def test_modules_that_are_no_list_are_named(tmp_path: Path) -> None:
    """By their file."""
    (tmp_path / "modules.json").write_text('{"0": 1}')
    with pytest.raises(ConfigError, match=r"modules\.json: expected a list of modules, got {'0': 1}"):
        pooling_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-encoder@size=3", "supernet bert-encoder: 'size=3': expected length=TOKENS or dim=FEATURES"),
        ("bert-encoder@length=", "length: expected one whole number above 0, got ''"),
        ("bert-encoder@length=0", "length: expected one whole number above 0, got '0'"),
        ("bert-encoder@dim=8,dim=9", "dim: expected one whole number above 0, got '9'"),
        ("bert-encoder@length=513", "length: expected at most 512 tokens, got 513"),
        ("bert-encoder@dim=385", "dim: expected at most 384 features, got 385"),
        ("bert-reranker@dim=4", "dim: a reranker gives scores, and no vector to cut"),
        ("digits@length=4", "expected one of digits, .*, or package.module:attribute"),
    ],
)
def test_an_option_that_is_none_is_named(name: str, message: str) -> None:
    """Before anything is built or read."""
    with pytest.raises(ConfigError, match=message):
        supernet_kind(name)


def test_options_have_one_name(tmp_path: Path) -> None:
    """A profile's supernet does not depend on the order in which they were given; defaults are left out."""
    saved_encoder(tmp_path)
    names = ("bert-encoder@dim=8,length=40", "bert-encoder@length=40,dim=8")

    assert {fitted(supernet_kind(name), str(tmp_path)).name for name in names} == {names[1]}
    assert supernet_kind("bert-encoder@length=128").name == "bert-encoder"
    assert TextOptions.read("dim=8") == TextOptions(dimension=8)


def test_a_length_that_the_model_does_not_take_is_named(tmp_path: Path) -> None:
    """It has no positions for more."""
    saved_encoder(tmp_path)
    with pytest.raises(ConfigError, match="length: expected at most 48 tokens, got 64"):
        fitted(supernet_kind("bert-encoder@length=64"), str(tmp_path))


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    """A config.json of other sizes beside them."""
    saved_encoder(tmp_path)
    written(tmp_path, num_hidden_layers=5, max_position_embeddings=200)
    kind = fitted(supernet_kind("bert-encoder"), str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"tensor embeddings\.position_embeddings\.weight: expected shape \(200"
    ):
        resident(kind, str(tmp_path))
