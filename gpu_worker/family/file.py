"""family.yaml: the members of a family, and what they have in common. No torch.

    family: resnets                                # what profiles call it
    input: {dtype: float32, shape: [3, 224, 224]}  # one query; left out, what the files state
    output: {shape: [1000]}                        # or name: logits; which answers, if there are several
    examples: examples.npz                         # labelled queries, for accuracies that are not given
    members:
      - {name: small, model: resnet18.onnx, accuracy: 69.8}
      - {name: medium, model: resnet34.pt2}
      - {name: large, model: "my_models:resnet50", weights: resnet50.safetensors}

A model of several inputs lists their names, and one query holds them one after the other:

    inputs: [input_ids, attention_mask]
    input: {dtype: int64, shape: [2, 128]}      # the first axis has an entry for each name

Paths are relative to the file. Accuracy is in percent, or any score from 0 to 100 that ranks the members.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError
from superserve.fields import read_file
from superserve.files import in_place_of
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiles.table import Profile

EXTRA = "superserve[family]"
"""What has to be installed for families, beside a worker's own packages."""

NEEDS_PROFILE = "a family comes without one: expected one, from `profiles measure --family`"

ONNX, EXPORTED, FUNCTION = "an ONNX file", "a torch.export file", "a function"
"""Where a member comes from."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ENDS = {".onnx": ONNX, ".pt2": EXPORTED}


@dataclass(frozen=True, slots=True)
class FamilyMember:
    """One model of a family.

    Attributes:
        name: Unique in the family.
        model: An absolute path, or `package.module:function`.
        weights: The checkpoint of a function's module, an absolute path; None leaves what it returns.
        accuracy: Percent; None is measured on the family's examples.
    """

    name: str
    model: str
    weights: str | None = None
    accuracy: float | None = None

    @property
    def origin(self) -> str:
        """Where it comes from: `ONNX`, `EXPORTED` or `FUNCTION`."""
        return FUNCTION if _FUNCTION.fullmatch(self.model) else _ENDS[Path(self.model).suffix]


@dataclass(frozen=True, slots=True)
class FamilyOutput:
    """Which of a member's outputs answers, where it has several; what is None is what the members state.

    Attributes:
        name: The output's name: in the graph, or the key of a dictionary; of a tuple its place, from "0".
        shape: Of one query's answer.
        dtype: Of one query's answer.
    """

    name: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A family file.

    Attributes:
        path: The file.
        name: What profiles call it.
        members: At least one, in the file's order.
        input: One query; None is what the members' files state.
        inputs: Names of the inputs that a query holds one after the other; () for models of one input.
        output: Which output answers.
        examples: Labelled queries, an absolute path.
    """

    path: Path
    name: str
    members: tuple[FamilyMember, ...]
    input: TensorSpec | None = None
    inputs: tuple[str, ...] = ()
    output: FamilyOutput = FamilyOutput()
    examples: Path | None = None

    def error(self, text: str) -> ConfigError:
        """Return an error that names the file."""
        return ConfigError(f"{self.path}: {text}")

    def member(self, name: str) -> FamilyMember:
        """Return the member called `name`.

        Raises:
            ConfigError: There is none; the message suggests the nearest name.
        """
        found = next((member for member in self.members if member.name == name), None)
        if found is None:
            raise self.error(f"no member is called {name!r}{_nearest(name, [m.name for m in self.members])}")
        return found


@dataclass(frozen=True, slots=True)
class _File:
    """A family file's keys."""

    family: str
    members: tuple[FamilyMember, ...]
    input: TensorSpec | None = None
    inputs: tuple[str, ...] = ()
    output: FamilyOutput = FamilyOutput()
    examples: str | None = None


def load_family(path: Path) -> Family:
    """Read and check a family file; the models that it names need only be there.

    Raises:
        ConfigError: Naming the file, the member and the field that is not as expected.
    """
    path = Path(path).absolute()
    body = _parsed(path)
    where = str(path)
    _check_keys(_File, body, where)
    for key, kind in (("input", TensorSpec), ("output", FamilyOutput)):
        _check_keys(kind, body.get(key), f"{where}: {key}")
    for i, member in enumerate(body["members"] if isinstance(body.get("members"), list) else ()):
        _check_keys(FamilyMember, member, f"{where}: members[{i}]")
    file = read_file(_File, body, where)
    family = Family(
        path, file.family, tuple(_found(member, path) for member in file.members), file.input, file.inputs,
        file.output, None if file.examples is None else _beside(path, file.examples),
    )  # fmt: skip
    _check(family)
    return family


def check_profile(family: Family, profile: Profile) -> None:
    """Raise ConfigError unless a profile's subnets are members of the family; their digests aside."""
    if profile.supernet != family.name:
        raise ConfigError(
            f"profile {profile.name!r}: expected one of the family {family.name!r}, got one of "
            f"{profile.supernet!r}"
        )
    for row in profile.subnets:
        family.member(row.name)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        from ruamel.yaml import YAML  # noqa: PLC0415  an extra's
        from ruamel.yaml.error import YAMLError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(f"--family: {error.name}: not installed; try: pip install '{EXTRA}'") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a family file: {error.strerror or error}") from error
    if other := in_place_of(content[:64]):
        raise ConfigError(f"{path}: expected a family file, got {other}")
    try:
        body = YAML(typ="safe", pure=True).load(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error.reason}") from error
    except YAMLError as error:
        raise ConfigError(f"{path}: expected YAML: {_yaml_words(error)}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected keys such as family and members, got {type(body).__name__}")
    return body


def _yaml_words(error: Exception) -> str:
    """Return a YAML error in one line, with the line number."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    words = (problem or str(error)).strip().partition("\n")[0]
    return words if mark is None else f"line {mark.line + 1}: {words}"


def _check_keys(kind: type[Any], body: object, where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in body if isinstance(body, dict) else ():
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}: expected {', '.join(known)}{_nearest(str(key), known)}"
            )


def _nearest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _beside(path: Path, text: str) -> Path:
    return path.parent / Path(text)


def _found(member: FamilyMember, path: Path) -> FamilyMember:
    """Return a member with absolute paths."""
    is_function = _FUNCTION.fullmatch(member.model) is not None
    return dataclasses.replace(
        member,
        model=member.model if is_function else str(_beside(path, member.model)),
        weights=None if member.weights is None else str(_beside(path, member.weights)),
    )


def _check(family: Family) -> None:
    if not _NAME.fullmatch(family.name):
        raise family.error(
            f"family: expected a name of letters, digits, '.', '_' and '-', got {family.name!r}"
        )
    if not family.members:
        raise family.error("members: expected at least one, got none")
    names: set[str] = set()
    for member in family.members:
        _check_member(family, member)
        if member.name in names:
            raise family.error(f"member {member.name!r}: name: expected each name once, got it twice")
        names.add(member.name)
    if family.examples is not None and not family.examples.is_file():
        raise family.error(f"examples: {family.examples}: expected a file that np.savez wrote, got none")
    _check_inputs(family)


def _check_member(family: Family, member: FamilyMember) -> None:
    where = f"member {member.name!r}"
    if not _NAME.fullmatch(member.name):
        raise family.error(f"{where}: name: expected letters, digits, '.', '_' and '-'")
    if _FUNCTION.fullmatch(member.model) is None:
        if Path(member.model).suffix not in _ENDS:
            raise family.error(
                f"{where}: model: expected a file that ends in .onnx or .pt2, or package.module:function, "
                f"got {member.model!r}"
            )
        if not Path(member.model).is_file():
            raise family.error(f"{where}: model: {member.model}: there is no such file")
        if member.weights is not None:
            raise family.error(f"{where}: weights: expected none beside {member.origin}, which holds its own")
    if member.weights is not None and not Path(member.weights).is_file():
        raise family.error(f"{where}: weights: {member.weights}: there is no such file")
    accuracy = member.accuracy
    if accuracy is None and family.examples is None:
        raise family.error(
            f"{where}: accuracy: expected a percentage, or `examples: FILE` in the family to measure it on, "
            "got neither"
        )
    if accuracy is not None and not (math.isfinite(accuracy) and 0 <= accuracy <= 100):
        raise family.error(f"{where}: accuracy: expected a percentage from 0 to 100, got {accuracy}")


def _check_inputs(family: Family) -> None:
    names = family.inputs
    if len(set(names)) < len(names):
        raise family.error(f"inputs: expected each name once, got {', '.join(names)}")
    if len(names) > 1 and family.input is not None and family.input.shape[:1] != (len(names),):
        raise family.error(
            f"input: shape: expected {len(names)} as its first size, one for each of inputs "
            f"({', '.join(names)}), got {list(family.input.shape)}"
        )
    if family.output.dtype is not None:
        try:
            TensorSpec(family.output.dtype, family.output.shape or ())
        except ConfigError as error:
            raise family.error(f"output: {error}") from error
