"""An opened member: what it takes, how it is run directly, and how it is run where it serves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from superserve.files import in_place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt
    import torch

    from gpu_worker.family.file import Family, FamilyMember
    from gpu_worker.family.packing import Taken
    from superserve.errors import ConfigError

_BLOCK = 1 << 22
DIGEST_BYTES = 8


class Member(Protocol):
    """One model of a family, opened in host memory.

    Attributes:
        name: The family file's.
        digest: Changes with anything that could change its answers.
        n_bytes: Of its weights.
        taken: Its inputs; None if nothing is known of them.
        runs_by: What runs it, in words, once it is settled.
    """

    name: str
    digest: str
    n_bytes: int
    taken: tuple[Taken, ...] | None
    runs_by: str

    def direct(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run it on the CPU, as its file has it and without any optimisation; return all outputs by name.

        Called before `settle` only: what serves is compared with it.
        """
        ...

    def settle(self, device: torch.device, threads: int | None) -> None:
        """Make it resident where it serves.

        Raises:
            ConfigError: What would run it there is not installed, or does not take it.
        """
        ...

    def run(self, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> npt.NDArray[Any]:
        """Run it where it is settled; return one output, (B, *output)."""
        ...


def fault(family: Family, member: FamilyMember, what: str, error: BaseException | None = None) -> ConfigError:
    """Return the error for a member's model: what was expected, and the first line of what was raised."""
    words = "" if error is None else f": {first_line(error)}"
    return family.error(f"member {member.name!r}: model: {member.model}: {what}{words}")


def first_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its message."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line[:300]}"


def check_file(family: Family, member: FamilyMember, expected: str) -> None:
    """Raise ConfigError if a model's file cannot be read, or another file stands in its place."""
    try:
        with Path(member.model).open("rb") as file:
            other = in_place_of(file.read(64))
    except OSError as error:
        raise fault(family, member, f"expected {expected}: {error.strerror or error}") from error
    if other:
        raise fault(family, member, f"expected {expected}, got {other}")


def digest_of_files(paths: Iterable[Path]) -> tuple[str, int]:
    """Return a digest of files, in this order, and their bytes together.

    Raises:
        OSError: One cannot be read.
    """
    found, n_bytes = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
                n_bytes += len(block)
        found.update(b"\0")
    return found.hexdigest(), n_bytes
