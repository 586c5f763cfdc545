"""Checkpoints as people save them: wrapped, compiled, with other things beside; what is refused says why."""

from __future__ import annotations

import argparse
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpu_worker.supernet.checkpoints import load_checkpoint, read_tensors
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def model() -> nn.Module:
    """Return a model of four tensors whose names begin differently."""
    return nn.ModuleDict({"stem": nn.Linear(2, 3), "head": nn.Linear(3, 2)})


def tensors(prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors, each of other values."""
    return {
        f"{prefix}{name}": torch.full_like(tensor, i)
        for i, (name, tensor) in enumerate(model().state_dict().items())
    }


def saved(path: Path, content: Any) -> Path:
    """Write what a test's checkpoint holds."""
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "net.backbone."]
)
@pytest.mark.parametrize("kind", ["pt", "wrapped", "safetensors"])
def test_a_beginning_that_all_names_share_is_taken_off(tmp_path: Path, prefix: str, kind: str) -> None:
    """As DistributedDataParallel, torch.compile and training frameworks put before them."""
    path, own = tmp_path / f"weights.{kind}", model()
    if kind == "safetensors":
        save_file(tensors(prefix), path)
    else:
        saved(path, {"state_dict": tensors(prefix), "epoch": 3} if kind == "wrapped" else tensors(prefix))
    load_checkpoint(own, path)

    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, tensors()[name]), name


def test_a_beginning_of_the_models_own_stays(tmp_path: Path) -> None:
    """A model whose names all begin alike is filled from names that do, with or without one more."""
    for prefix in ("model.", "module.model."):
        own = nn.ModuleDict({"model": model()})
        load_checkpoint(own, saved(tmp_path / "weights.pt", tensors(prefix)))
        assert torch.equal(own.state_dict()["model.head.bias"], tensors()["head.bias"])


def test_names_that_do_not_fit_are_listed_with_the_files_own(tmp_path: Path) -> None:
    """With five missing tensors the error does not list the tensors that exist."""
    path = saved(
        tmp_path / "weights.pt", {"encoder.weight": torch.zeros(1), "decoder.weight": torch.zeros(1)}
    )
    with pytest.raises(ConfigError, match=r"stem\.weight: missing") as caught:
        load_checkpoint(model(), path)

    assert str(caught.value).endswith("; its tensors are encoder.weight, decoder.weight")


def test_a_prefix_on_some_names_only_is_not_taken_off(tmp_path: Path) -> None:
    """Two models in one file: which is meant, only their owner knows."""
    path = saved(tmp_path / "weights.pt", {**tensors("student."), **tensors("teacher.")})
    with pytest.raises(
        ConfigError, match=r"stem.weight: missing.* its tensors are student.stem.weight, .* 3 more$"
    ):
        load_checkpoint(model(), path)


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"best": np.float64(0.5)}, r"numpy\._?core\.multiarray\.scalar"),
        ({"arguments": argparse.Namespace(lr=1)}, r"argparse\.Namespace"),
    ],
)
def test_what_stands_beside_the_tensors_is_named(tmp_path: Path, beside: dict[str, Any], named: str) -> None:
    """The class that is refused, in one line that a terminal and a log both show."""
    path = saved(tmp_path / "weights.pt", {"state_dict": tensors(), **beside})
    with pytest.raises(
        ConfigError, match=rf"it holds objects of .*{named}.*save the model's state_dict"
    ) as caught:
        load_checkpoint(model(), path)

    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.zeros(1)], "got a list"),
        ({"model": tensors(), "epoch": 3}, "got a dictionary with model, epoch"),
    ],
)
def test_what_is_no_dictionary_of_tensors_says_what_it_is(tmp_path: Path, content: Any, got: str) -> None:
    """The keys that are there show where the tensors are."""
    path = saved(tmp_path / "weights.pt", content)
    with pytest.raises(
        ConfigError, match=f"expected a dictionary of tensors, perhaps under 'state_dict', {got}$"
    ):
        load_checkpoint(model(), path)


def test_a_pickle_of_something_else_is_one_line(tmp_path: Path) -> None:
    """Neither torch's advice nor its colours."""
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(argparse.Namespace(lr=1), protocol=2))
    with pytest.raises(ConfigError, match=r"expected a .* file of tensors") as caught:
        load_checkpoint(model(), path)

    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    ("content", "got"),
    [
        (LFS, "got a pointer of Git LFS"),
        (b"", "got an empty file"),
        (b"<!DOCTYPE html><title>404</title>", "got a web page"),
    ],
)
def test_what_stands_in_a_checkpoints_place_is_named(
    tmp_path: Path, name: str, content: bytes, got: str
) -> None:
    """What a clone without LFS, or a download that failed, leaves: not a header that is too large."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=got):
        read_tensors(tmp_path / name)


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    """In words that help a user who copied it."""
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-3])
    with pytest.raises(ConfigError, match="it is cut off, or goes on behind its last tensor"):
        read_tensors(tmp_path / "w.safetensors")


def test_a_format_is_known_by_what_a_file_holds(tmp_path: Path) -> None:
    """Not by its name, which a converter or a download chose."""
    save_file({"weight": torch.ones(2)}, tmp_path / "safe.bin")
    torch.save({"weight": torch.ones(2)}, tmp_path / "torch.safetensors")
    for name in ("safe.bin", "torch.safetensors"):
        assert read_tensors(tmp_path / name)["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("weight", "fault"),
    [
        (torch.tensor([[1.0, float("nan"), 2.0]] * 2), "expected numbers, got NaN in 2 of 6"),
        (torch.ones(2, 3).to_sparse(), "expected a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 3, device="meta"), "expected a dense tensor, got one without data"),
    ],
)
def test_a_tensor_that_cannot_serve_is_named(tmp_path: Path, weight: torch.Tensor, fault: str) -> None:
    """NaN would answer every query with NaN; the others cannot be copied."""
    torch.save({"weight": weight, "bias": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=f"tensor weight: {fault}"):
        load_checkpoint(torch.nn.Linear(3, 2), tmp_path / "w.pt")
