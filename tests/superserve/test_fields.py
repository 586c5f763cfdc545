"""A dataclass is the description of its JSON: what is wrong is named by its field."""

from __future__ import annotations

import enum
from collections.abc import Mapping  # noqa: TC003  read at run time: the fields' types are the format
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from superserve.errors import ConfigError, WireError
from superserve.fields import AtLeast, Count, check_schema, read, read_file

pytestmark = pytest.mark.timeout(30)


class Colour(enum.StrEnum):
    """A few."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Part:
    """One of each kind of field."""

    n: Count
    offset: Annotated[int, AtLeast(-2)] | None
    colour: Colour
    kind: Literal["small", "large"]
    shares: Mapping[str, float]
    note: str = ""


GOOD: dict[str, Any] = {"n": 0, "offset": -2, "colour": "blue", "kind": "large", "shares": {"a": 0.5}}


def test_each_kind_of_field_is_read() -> None:
    """Keys that are not known are left to later releases."""
    assert read(Part, {**GOOD, "later": 1}, "part") == Part(0, -2, Colour.BLUE, "large", {"a": 0.5})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": -1}, "part: n: expected an integer from 0 on, got -1"),
        ({"n": True}, "part: n: expected an integer from 0 on, got True"),
        ({"n": 2**63}, "part: n: expected an integer from 0 on"),
        ({"offset": -3}, "part: offset: expected an integer from -2 on, got -3"),
        ({"colour": "green"}, "part: colour: expected one of red, blue, got 'green'"),
        ({"kind": "huge"}, "part: kind: expected 'small' or 'large', got 'huge'"),
        ({"shares": {"a": "b"}}, "part: shares: a: expected a number, got 'b'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(wrong: dict[str, Any], says: str) -> None:
    """In a file it is a ConfigError; without a name for the whole the field stands alone."""
    with pytest.raises(WireError) as caught:
        read(Part, GOOD | wrong, "part")
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: "):
        read_file(Part, GOOD | wrong, "")

    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("found", [{"schema": 2}, {"schema": True}, {}])
def test_a_file_of_another_version_is_refused(found: dict[str, Any]) -> None:
    """Before anything else of it is looked at."""
    check_schema({"schema": 1}, 1, "file")
    with pytest.raises(ConfigError, match=r"file: schema: expected 1, got (2|True|nothing): written by"):
        check_schema(found, 1, "file")
