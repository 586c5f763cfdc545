"""What both kinds of text requests share: the model of texts behind the gateway, and the fields of a body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from gateway.v2.request import MAX_ROWS, parameters_of
from gateway.v2.verdicts import TOO_LARGE, GatewayError, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.v2.served import ServedModel

MAX_CHARACTERS = 100_000
"""Of one text: a tokenizer reads all of it before it cuts."""
_ID_TYPES = ("int32", "int64")


class TokenModel(NamedTuple):
    """A model of token ids.

    Attributes:
        name: As in requests.
        length: Most tokens of a query.
        dtype: Of a token id.
        is_pairs: Whether a query is two texts with token types, shape (2, length).
        width: Values of an output.
    """

    name: str
    length: int
    dtype: str
    is_pairs: bool
    width: int


def text_model(model: ServedModel) -> TokenModel:
    """Return the served model as one of texts.

    Raises:
        GatewayError: It takes no token ids, or gives no vector.
    """
    takes, gives = model.takes, model.gives
    if takes is not None and gives is not None and gives.dtype == "float32" and len(gives.shape) == 1:
        name, dtype, width = model.name, takes.dtype, gives.shape[0]
        match takes.shape:
            case (length,) if dtype in _ID_TYPES:
                return TokenModel(name, length, dtype, is_pairs=False, width=width)
            case (2, length) if dtype in _ID_TYPES:
                return TokenModel(name, length, dtype, is_pairs=True, width=width)
    got = "any bytes" if takes is None else f"{takes.dtype} {list(takes.shape)}"
    raise invalid(f"model {model.name!r}: expected one of token ids, int32 [T] or [2, T]; it takes {got}")


def document_of(body: bytes | bytearray) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        GatewayError: It is none.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"body: expected JSON: {error}") from None
    if not isinstance(document, dict):
        raise invalid(f"body: expected a JSON object, got {type(document).__name__}")
    return document


def model_name_of(document: Mapping[str, Any], default: str) -> str:
    """Return the name of the model that is asked for; the default if there is none."""
    name = document.get("model", default)
    if not isinstance(name, str):
        raise invalid(f"model: expected a name, got {name!r:.40}")
    return name


def terms_parameters(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `parameters` of a body, as the Open Inference Protocol has them: timeout, priority, floor."""
    return parameters_of("parameters", document)


def checked_text(where: str, value: Any) -> str:
    """Return a text of a usual length.

    Raises:
        GatewayError: It is none, or too long.
    """
    if not isinstance(value, str):
        raise invalid(f"{where}: expected a string, got {type(value).__name__}")
    if len(value) > MAX_CHARACTERS:
        raise GatewayError(
            TOO_LARGE, f"{where}: expected at most {MAX_CHARACTERS:,} characters, got {len(value):,}"
        )
    return value


def checked_number(where: str, value: Any, most: int) -> int:
    """Return a whole number from 1 to `most`.

    Raises:
        GatewayError: It is none.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise invalid(f"{where}: expected a whole number from 1 to {most}, got {value!r:.40}")
    return value


def checked_rows(where: str, found: list[Any]) -> list[Any]:
    """Return a list that is neither empty nor too long.

    Raises:
        GatewayError: It is.
    """
    if not found:
        raise invalid(f"{where}: expected at least one")
    if len(found) > MAX_ROWS:
        raise GatewayError(TOO_LARGE, f"{where}: expected at most {MAX_ROWS}, got {len(found)}")
    return found
