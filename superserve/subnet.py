"""A subnet's name and control tuple, and the dtype and shape of a model's input and output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.errors import ConfigError, InvalidQueryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Subnet:
    """A subnet of a supernet: its name and its control tuple.

    The control tuple is the supernet's own (depths `d`, widths `w`, ...); None
    if the profile is modelled and there are no weights.
    """

    name: str
    control: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The dtype and shape of one query's input or output, without the batch axis.

    Attributes:
        dtype: A NumPy dtype name with fixed size, such as "float32".
        shape: Sizes of the axes of one query; () is a scalar.
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            numpy_dtype = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError) as error:
            raise ConfigError(f"dtype: expected a NumPy dtype name, got {self.dtype!r}") from error
        if numpy_dtype.hasobject or numpy_dtype.itemsize == 0:
            raise ConfigError(f"dtype: expected a dtype of fixed size, got {self.dtype!r}")
        if any(size < 1 for size in self.shape):
            raise ConfigError(f"shape: expected sizes of at least 1, got {self.shape}")

    @property
    def n_bytes(self) -> int:
        """Bytes of one query's tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: npt.NDArray[Any], field: str = "input") -> None:
        """Raise InvalidQueryError unless `array` has this dtype and shape."""
        if array.dtype != np.dtype(self.dtype):
            raise InvalidQueryError(f"{field}: expected dtype {self.dtype}, got {array.dtype}")
        if array.shape != self.shape:
            raise InvalidQueryError(f"{field}: expected shape {self.shape}, got {array.shape}")
