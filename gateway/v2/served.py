"""The model behind the gateway, as the protocol names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.v2.verdicts import NOT_FOUND, UNAVAILABLE, GatewayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superserve.subnet import TensorSpec

INPUT, OUTPUT = "input", "output"
VERSION = "1"
UNNAMED = "model"
"""The name of a model whose workers give none."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router's workers serve.

    Attributes:
        name: As in the paths of requests.
        takes: One query's input; None for any bytes.
        gives: One query's output; None for any bytes.
        subnets: Name and accuracy, percent, of each.
    """

    name: str
    takes: TensorSpec | None = None
    gives: TensorSpec | None = None
    subnets: tuple[tuple[str, float], ...] = ()


def found_model(model: ServedModel | None, name: str, version: str = "") -> ServedModel:
    """Return the model if it is the one asked for.

    Raises:
        GatewayError: No worker has joined yet, or the model has another name or version.
    """
    if model is None:
        raise GatewayError(UNAVAILABLE, f"model {name!r}: no worker has joined yet")
    if name != model.name:
        raise GatewayError(NOT_FOUND, f"model {name!r:.100}: not found; this gateway serves {model.name!r}")
    if version not in ("", VERSION):
        raise GatewayError(
            NOT_FOUND, f"model {name!r}: version {version!r:.40}: not found; there is {VERSION!r}"
        )
    return model


def served_model(
    name: str | None, supernet: str, takes: TensorSpec | None, gives: TensorSpec | None,
    subnets: Sequence[tuple[str, float]],
) -> ServedModel:  # fmt: skip
    """Return the model under the given name, or else under its supernet's."""
    return ServedModel(name or supernet or UNNAMED, takes, gives, tuple(subnets))
