"""family.yaml: what it says, and what is said of one that is wrong."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from gpu_worker.family.file import EXPORTED, FUNCTION, ONNX, load_family
from superserve.errors import ConfigError
from superserve.subnet import TensorSpec
from tests.gpu_worker.family.models import written

if TYPE_CHECKING:
    from pathlib import Path

SMALL = "name: small, model: small.onnx, accuracy: 70"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder in which the files are that the tests name."""
    for name in ("small.onnx", "medium.pt2", "large.safetensors", "examples.npz"):
        (tmp_path / name).write_bytes(b"content")
    return tmp_path


def test_a_family_is_read_with_paths_beside_it(folder: Path) -> None:
    """Paths are relative to the file, and each member knows where it comes from."""
    path = written(
        folder, SMALL, "name: medium, model: medium.pt2",
        'name: large, model: "my_models:build", weights: large.safetensors, accuracy: 90.5',
        head="examples: examples.npz\ninput: {dtype: float32, shape: [3, 8]}\noutput: {name: logits}",
    )  # fmt: skip
    family = load_family(path)

    assert (family.name, family.input, family.examples) == (
        "tiny", TensorSpec("float32", (3, 8)), folder / "examples.npz",
    )  # fmt: skip
    assert [member.origin for member in family.members] == [ONNX, EXPORTED, FUNCTION]
    assert [member.model for member in family.members] == [
        str(folder / "small.onnx"), str(folder / "medium.pt2"), "my_models:build",
    ]  # fmt: skip
    assert family.members[2].weights == str(folder / "large.safetensors")
    assert [member.accuracy for member in family.members] == [70, None, 90.5]
    assert family.output.name == "logits"


@pytest.mark.parametrize(
    ("member", "head", "expected"),
    [
        (f"{SMALL}, accurracy: 3", "", "members.0.: unknown key 'accurracy': .*; did you mean 'accuracy'"),
        ("name: small, accuracy: 3", "", "members.0.: model: expected text, got nothing"),
        ("name: small, model: small.onnx, accuracy: high", "", "accuracy: expected a number, got 'high'"),
        ("name: small, model: none.onnx, accuracy: 3", "", "'small': model: .*none.onnx: there is no such"),
        ("name: small, model: a.h5, accuracy: 3", "", "expected a file that ends in .onnx or .pt2, or "),
        ("name: small, model: small.onnx, accuracy: 101", "", "a percentage from 0 to 100, got 101"),
        ("name: small, model: small.onnx, accuracy: .nan", "", "a percentage from 0 to 100, got nan"),
        ("name: small, model: small.onnx", "", "'small': accuracy: expected a percentage, or `examples: F"),
        (f"{SMALL}, weights: large.safetensors", "", "weights: expected none beside an ONNX file, which"),
        ('name: s, model: "a:b", weights: no.pt, accuracy: 3', "", "'s': weights: .*no.pt: there is no such"),
        (SMALL, "examples: no.npz", "examples: .*no.npz: expected a file that np.savez wrote"),
        (SMALL, "inputs: [a, a]", "inputs: expected each name once, got a, a"),
        (SMALL, "input: {dtype: float31, shape: [1]}", "input: expected a dtype and a shape, got .*float31"),
        (SMALL, "input: {dtype: int64, shape: [1, 4]}\ninputs: [a, b]", "input: shape: expected 2 as its"),
        (SMALL, "outputs: {}", "unknown key 'outputs': expected .*; did you mean 'output'"),
        (SMALL, "output: {nam: x}", "output: unknown key 'nam': expected name, shape, dtype"),
        (SMALL, "output: {dtype: float99}", "output: dtype: expected a NumPy dtype name, got 'float99'"),
        ('name: "a/b", model: small.onnx, accuracy: 3', "", "name: expected letters, digits"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, member: str, head: str, expected: str) -> None:
    """The error names the file, the member and the field, and what was expected."""
    path = written(folder, member, head=head)

    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: .*{expected}"):
        load_family(path)


def test_a_name_is_one_member(folder: Path) -> None:
    """Two members of one name could not be told apart."""
    path = written(folder, SMALL, "name: small, model: medium.pt2, accuracy: 3")

    with pytest.raises(ConfigError, match="member 'small': name: expected each name once, got it twice"):
        load_family(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"family: [", "expected YAML: line 1"),
        (b"family: a\nfamily: b\nmembers: []\n", "expected YAML: .*duplicate key"),
        (b"- a\n", "expected keys such as family and members, got list"),
        (b"members: []\n", "family: expected text, got nothing"),
        (b"family: a\nmembers: []\n", "members: expected at least one, got none"),
        (b"family: a/b\nmembers: [{name: a, model: small.onnx, accuracy: 1}]\n", "family: expected a name"),
        (b"\xff\xfea", "expected a family file, got UTF-16 text"),
        (b"family: \xe4\n", "expected UTF-8 text"),
        (b"", "expected a family file, got an empty file"),
    ],
)
def test_a_file_that_is_none_is_named(folder: Path, content: bytes, expected: str) -> None:
    """Whatever stands in the file, the error is one line that names it."""
    path = folder / "family.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=expected) as raised:
        load_family(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    """It is not there."""
    with pytest.raises(ConfigError, match=r"none.yaml: expected a family file: No such file"):
        load_family(tmp_path / "none.yaml")


def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error says how to install it."""
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)

    with pytest.raises(ConfigError, match=r"not installed; try: pip install 'superserve\[family\]'"):
        load_family(written(folder, SMALL))
