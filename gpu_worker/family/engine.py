"""FamilyExecutor: every member of a family resident on one device; a subnet is a member.

Behind the same `PaddedExecutor` as a supernet, so that servers, profiles and policies see no difference.
Actuation is choosing a session: all members are resident, and nothing moves.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import psutil  # type: ignore[import-untyped]  # it ships no types
import torch

from gpu_worker.engines.torch_executor import PaddedExecutor, Staged, fill
from gpu_worker.family.file import EXPORTED, ONNX
from gpu_worker.family.member import DIGEST_BYTES, fault
from gpu_worker.family.packing import answering, check_alike, feeds_of, input_spec, inputs_of
from gpu_worker.family.proof import N_QUERIES, DirectRun, FamilyProofError, prove_member
from gpu_worker.models.examples import read_examples
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from gpu_worker.engines.torch_executor import Batch, Placement
    from gpu_worker.family.file import Family, FamilyMember
    from gpu_worker.family.member import Member
    from gpu_worker.family.packing import Feed
    from superserve.subnet import TensorSpec

_LOG = logging.getLogger(__name__)

_SPEC_ROWS = 2  # a batch of two tells which axis is the batch's


class FamilyRow(NamedTuple):
    """A member that can be run.

    Attributes:
        member: Settled where it serves.
        feeds: How its inputs are made of a query.
        output: Which of its outputs answers.
    """

    member: Member
    feeds: tuple[Feed, ...]
    output: str

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Run a batch of queries (B, *input)."""
        return self.member.run(inputs_of(self.feeds, batch), self.output)


@dataclass(frozen=True, slots=True)
class FamilyMemory:
    """What a family occupies.

    Attributes:
        members: Bytes of each member's weights, by name: of its files, or of its tensors.
        grown: By how much memory grew as they were loaded, with the code that runs them: this process's, or
            on CUDA the device's.
        place: "process" or "device".
    """

    members: tuple[tuple[str, int], ...]
    grown: int
    place: str = "process"

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(n_bytes for _, n_bytes in self.members)

    def __str__(self) -> str:
        """Return the report in one line."""
        each = ", ".join(f"{name} {_mb(n_bytes)}" for name, n_bytes in self.members)
        return (
            f"{len(self.members)} members, all resident: {_mb(self.weights)} of weights ({each}); the "
            f"{self.place} grew by {_mb(self.grown)}, runtimes included"
        )


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB"


class FamilyEngine:
    """The engine of a family: rows are members, and each runs on its device by itself."""

    def __init__(self, rows: Sequence[FamilyRow], spec: TensorSpec, batch_sizes: tuple[int, ...]) -> None:
        self.rows = tuple(rows)
        self._spec = spec
        self._sizes = batch_sizes or (1,)

    def stage(self, batch: Batch, size: int) -> Staged:
        """Copy a batch: as received it may be read-only memory, which torch does not take."""
        padded = np.empty((size, *self._spec.shape), dtype=self._spec.dtype)
        fill(padded, batch)
        return Staged(len(batch), padded)

    def run(self, row: int, staged: Staged) -> npt.NDArray[Any]:
        """Run a staged batch on a member."""
        return self.rows[row].run(staged.inputs)[: staged.n]

    def discard(self, staged: Staged) -> None:
        """Nothing is held."""

    def warm_up(self) -> None:
        """Run every member at every size: a runtime plans its memory for each shape the first time."""
        zeros = np.zeros((1, *self._spec.shape), dtype=self._spec.dtype)
        for row, size in ((row, size) for size in self._sizes for row in range(len(self.rows))):
            self.run(row, self.stage(zeros, size))


class FamilyExecutor(PaddedExecutor):
    """Runs batches on any member of a resident family: see `PaddedExecutor`.

    Attributes:
        family: The file.
    """

    def __init__(
        self,
        family: Family,
        engine: FamilyEngine,
        specs: tuple[TensorSpec, TensorSpec],
        placement: Placement,
        grown: int,
    ) -> None:
        self.family = family
        self._rows, self._placement, self._grown = engine.rows, placement, grown
        subnets = tuple(Subnet(row.member.name, {"digest": row.member.digest}) for row in engine.rows)
        super().__init__(
            engine,
            subnets=subnets,
            input_spec=specs[0],
            output_spec=specs[1],
            fingerprint=_fingerprint(subnets, specs),
            device=placement.torch_device(),
            batch_sizes=placement.batch_sizes,
            precision="as exported",
            stages_ahead=False,
        )

    @classmethod
    def load(
        cls,
        family: Family,
        placement: Placement,
        subnets: Sequence[Subnet] | None = None,
        *,
        is_proved: bool = True,
    ) -> Self:
        """Open the members, compare what they take and give, prove them, and make them resident.

        Args:
            family: The file.
            placement: Where and how; precision, graphs and packing are those of the members' files.
            subnets: Those of a profile, to host alone, in this order; None hosts all in the file's order.
            is_proved: Compare each member with a direct run: see `gpu_worker.family.proof`.

        Raises:
            ConfigError: Naming the file, the member and what is wrong.
        """
        device = placement.torch_device()
        if placement.precision not in ("auto", "float32"):
            raise ConfigError("--precision: a member of a family computes in what it was exported in")
        hosted = family.members if subnets is None else [family.member(subnet.name) for subnet in subnets]
        before = _held_bytes(device)
        members = [_opened(family, member) for member in hosted]
        for subnet, member in zip(subnets or (), members, strict=False):
            check_digest(family, subnet, member)
        spec = input_spec(family, {member.name: member.taken for member in members})
        queries = _queries(family, spec)
        rows: list[FamilyRow] = []
        given: dict[str, TensorSpec] = {}
        for asked, member in zip(hosted, members, strict=True):
            row, given[member.name], direct = _direct(family, asked, member, spec, queries)
            member.settle(device, placement.threads)
            if is_proved:
                _prove(family, asked, row, direct, placement)
            rows.append(row)
        specs = (spec, check_alike(family, given))
        for member in members:
            proved = "equal to a direct run" if is_proved else "unproven"
            _LOG.info("member %s: %s, %s, %s", member.name, member.digest, member.runs_by, proved)
        engine = FamilyEngine(rows, spec, placement.batch_sizes)
        return cls(family, engine, specs, placement, max(0, _held_bytes(device) - before))

    def hosting(self, names: Sequence[str]) -> FamilyExecutor:
        """Return one that hosts these members, in this order; they are resident once."""
        rows = {row.member.name: row for row in self._rows}
        engine = FamilyEngine([rows[name] for name in names], self.input_spec, self.batch_sizes)
        specs = (self.input_spec, self.output_spec)
        return FamilyExecutor(self.family, engine, specs, self._placement, self._grown)

    def runs_by(self) -> dict[str, str]:
        """Return what runs each member, in words."""
        return {row.member.name: row.member.runs_by for row in self._rows}

    def memory(self) -> FamilyMemory:
        """Return what the members occupy."""
        members = tuple((row.member.name, row.member.n_bytes) for row in self._rows)
        return FamilyMemory(members, self._grown, "device" if self.device.type == "cuda" else "process")


def check_digest(family: Family, subnet: Subnet, member: Member) -> None:
    """Raise ConfigError if a profile's subnet is another model than the member of that name."""
    measured = (subnet.control or {}).get("digest")
    if measured != member.digest:
        raise family.error(
            f"member {member.name!r}: expected the model that the profile was measured with (digest "
            f"{measured}), got another (digest {member.digest}): measure it again with `profiles measure "
            "--family`, or put the file back"
        )


def _opened(family: Family, member: FamilyMember) -> Member:
    """Open a member in host memory; what a format needs is imported for it alone."""
    if member.origin == ONNX:
        from gpu_worker.family.onnx_member import OnnxMember  # noqa: PLC0415

        return OnnxMember(family, member)
    from gpu_worker.family.torch_member import ExportedMember, FunctionMember  # noqa: PLC0415

    return ExportedMember(family, member) if member.origin == EXPORTED else FunctionMember(family, member)


def _queries(family: Family, spec: TensorSpec) -> npt.NDArray[Any]:
    """Return queries to try members with: the first of the family's examples, or random ones."""
    if family.examples is not None:
        return read_examples(family.examples, spec).calibration[:N_QUERIES]
    rng = np.random.default_rng(0)
    shape = (N_QUERIES, *spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _direct(
    family: Family, asked: FamilyMember, member: Member, spec: TensorSpec, queries: npt.NDArray[Any]
) -> tuple[FamilyRow, TensorSpec, DirectRun]:
    """Run a member directly; return how it is run from now on, what it gives, and what it has answered."""
    feeds = feeds_of(family, member.name, member.taken, spec)

    def run(batch: npt.NDArray[Any]) -> Mapping[str, npt.NDArray[Any]]:
        try:
            return member.direct(inputs_of(feeds, batch))
        except Exception as error:  # the model's, of any kind
            shape = f"{spec.dtype} {list(batch.shape)}"
            raise fault(family, asked, f"it cannot run a batch of {shape}", error) from error

    output, given = answering(family, member.name, run(queries[:_SPEC_ROWS]), _SPEC_ROWS)
    answers = [run(queries[i : i + 1])[output] for i in range(len(queries))]
    for answer in answers:
        if answer.shape != (1, *given.shape):
            raise fault(
                family, asked,
                f"output {output!r}: expected answers of one shape, got {list(given.shape)} and then "
                f"{list(answer.shape[1:])}: export a model that pads them",
            )  # fmt: skip
    return FamilyRow(member, feeds, output), given, DirectRun(queries, np.concatenate(answers))


def _prove(
    family: Family, asked: FamilyMember, row: FamilyRow, direct: DirectRun, placement: Placement
) -> None:
    largest = max(placement.batch_sizes, default=1)
    try:
        prove_member(direct, row.run, placement.batch_sizes)
        row.run(np.resize(direct.queries, (largest, *direct.queries.shape[1:])))
    except FamilyProofError as error:
        raise fault(family, asked, str(error)) from error
    except Exception as error:  # the model's, of any kind
        raise fault(family, asked, f"it cannot run in batches of up to {largest}", error) from error


def _fingerprint(subnets: Sequence[Subnet], specs: tuple[TensorSpec, TensorSpec]) -> str:
    words = repr(([(subnet.name, dict(subnet.control or {})) for subnet in subnets], specs))
    return hashlib.blake2b(words.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _held_bytes(device: torch.device) -> int:
    """Return what is held of the memory in which models are resident on a device."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return int(psutil.Process().memory_info().rss)
