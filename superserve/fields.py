"""Read JSON objects into dataclasses, once, where they arrive; errors name the field at fault.

The class is the schema: each field's name is the key, its type the expected type, and a field with a
default may be missing. Unknown keys are ignored, so that a newer peer can send more. `Annotated` with an
`AtLeast` bounds a number.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Reader: TypeAlias = Callable[[object, str], Any]

T = TypeVar("T")

_MAX_SHOWN = 200
"""Most characters of a wrong value that an error quotes."""

KEY = "key"
"""In a field's metadata: the key to read it from, if that is not the field's name."""
OMITTED = {"omitted": True}
"""Metadata of a field that is None if unknown, and then has no key in the object."""


class AtLeast(NamedTuple):
    """The least integer that a field accepts; the most is what 64 bits hold."""

    least: int


_MOST = 2**63 - 1
Count = Annotated[int, AtLeast(0)]
"""An integer from 0 on."""


def body_of(message: Any) -> dict[str, Any]:
    """Return the JSON object of a dataclass; nested dataclasses stay, since orjson writes them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if value is not None or field.metadata != OMITTED:
            found[field.name] = value
    return found


def read(kind: type[T], body: object, where: str) -> T:
    """Return the `kind`, a dataclass, that a JSON object describes.

    Args:
        kind: The class.
        body: The parsed JSON.
        where: What the object is; errors read `where: field: expected ..., got ...`.

    Raises:
            WireError: A field without a default is missing, or one has another type; the error names it.
    """
    if not isinstance(body, dict):
        raise WireError(_at(where, f"expected an object, got {shown(body)}"))
    values: dict[str, Any] = {}
    plan = _PLANS.get(kind)
    if plan is None:
        plan = _PLANS[kind] = _readers(kind)
    for name, key, reader, is_optional in plan:
        if key in body:
            values[name] = reader(body[key], _at(where, key))
        elif not is_optional:
            raise WireError(f"{_at(where, key)}: expected {_words(reader)}, got nothing")
    return kind(**values)


def read_file(kind: type[T], body: object, where: str) -> T:
    """Read a file's object like `read`, but raise ConfigError for what is wrong there."""
    try:
        return read(kind, body, where)
    except WireError as error:
        raise ConfigError(str(error)) from None


def check_schema(body: object, expected: int, where: str) -> None:
    """Raise ConfigError unless a file's object has the schema version that this release reads."""
    found = body.get("schema", "nothing") if isinstance(body, dict) else expected
    if found != expected or isinstance(found, bool):
        raise ConfigError(_at(where, f"schema: expected {expected}, got {found}: written by another version"))


def _at(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what


def shown(value: object) -> str:
    """Return a value for an error, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


_PLANS: dict[Any, tuple[tuple[str, str, Reader, bool], ...]] = {}
"""The result of `_readers`, by class: a STATUS of a thousand GPUs reads the same class a thousand times."""


def _readers(kind: type[Any]) -> tuple[tuple[str, str, Reader, bool], ...]:
    """Return each field of a class: its name, its key, its reader, and whether it may be missing."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        (
            field.name,
            field.metadata.get(KEY, field.name),
            _reader(hints[field.name]),
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    )


def _reader(hint: Any) -> Reader:
    """Return the reader of a type: a scalar, a dataclass, or a tuple, dict or optional of those."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is Any:
        return _anything
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type), "a class"
        return functools.partial(_object, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return functools.partial(_member, hint)
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return functools.partial(_choice, of)
    if origin is Annotated:
        assert isinstance(of[1], AtLeast), "the one bound there is"
        return functools.partial(_bounded, of[1].least)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (one for one in of if one is not type(None))
        return functools.partial(_optional, _reader(inner))
    if origin is tuple and of[-1] is Ellipsis:
        return functools.partial(_list, _reader(of[0]))
    if origin is tuple:
        return functools.partial(_row, tuple(map(_reader, of)))
    assert origin in (dict, collections.abc.Mapping), f"no reader for {hint}"
    assert of[0] is str, "keys of JSON objects are text"
    return functools.partial(_mapping, _reader(of[1]))


def _words(reader: Reader) -> str:
    """Return what a reader expects, in words."""
    if isinstance(reader, functools.partial):
        if reader.func is _bounded:
            return f"an integer from {reader.args[0]} on"
        if reader.func is _choice:
            return " or ".join(map(repr, reader.args[0]))
        if reader.func is _member:
            return f"one of {', '.join(one.value for one in reader.args[0])}"
        return _words(reader.args[0]) if reader.func is _optional else _WORDS[reader.func]
    return _WORDS[reader]


def _wrong(reader: Reader, value: object, where: str) -> WireError:
    return WireError(f"{where}: expected {_words(reader)}, got {shown(value)}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(_text, value, where)
    return value


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(_integer, value, where)
    return value


def _bounded(least: int, value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise _wrong(functools.partial(_bounded, least), value, where)
    return value


def _choice(of: tuple[Any, ...], value: object, where: str) -> object:
    if value not in of:
        raise _wrong(functools.partial(_choice, of), value, where)
    return value


def _member(kind: type[enum.Enum], value: object, where: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError:
        raise _wrong(functools.partial(_member, kind), value, where) from None


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(_number, value, where)
    return value  # unconverted: an integer stays an integer when it is written again


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(_flag, value, where)
    return value


def _anything(value: object, where: str) -> object:
    del where
    return value


def _spec(value: object, where: str) -> TensorSpec:
    """Read a tensor's dtype and shape; a dtype unknown to NumPy is an error like a missing one."""
    try:
        if isinstance(value, dict):
            shape = _list(_integer, value.get("shape"), "shape")
            return TensorSpec(_text(value.get("dtype"), "dtype"), shape)
        why = "expected an object"
    except SuperServeError as error:
        why = str(error)
    raise WireError(f"{where}: expected {_words(_spec)}, got {shown(value)}: {why}")


def _optional(inner: Reader, value: object, where: str) -> Any:
    return None if value is None else inner(value, where)


def _list(inner: Reader, value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(functools.partial(_list, inner), value, where)
    return tuple([inner(one, f"{where}[{i}]") for i, one in enumerate(value)])


def _row(inner: tuple[Reader, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(inner):
        raise WireError(f"{where}: expected a list of {len(inner)}, got {shown(value)}")
    return tuple(
        [reader(one, f"{where}[{i}]") for i, (reader, one) in enumerate(zip(inner, value, strict=True))]
    )


def _mapping(inner: Reader, value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(functools.partial(_mapping, inner), value, where)
    return {str(key): inner(one, f"{where}: {key}") for key, one in value.items()}


def _object(kind: type[Any], value: object, where: str) -> Any:
    return read(kind, value, where)


_SCALARS: dict[Any, Reader] = {
    str: _text, int: _integer, float: _number, bool: _flag, TensorSpec: _spec
}  # fmt: skip
_WORDS: dict[Any, str] = {
    _text: "text", _integer: "an integer", _number: "a number", _flag: "true or false",
    _anything: "a value", _spec: "a dtype and a shape", _list: "a list", _row: "a list",
    _mapping: "an object", _object: "an object",
}  # fmt: skip
