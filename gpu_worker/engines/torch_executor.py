"""TorchExecutor: a supernet resident on one device, and the batches that run on it.

A batch is staged (padded to a profiled size, brought to the device) and then run on a subnet. What a
device needs for both is its engine: `CpuEngine` here, `gpu_worker.engines.cuda_engine.CudaEngine` for CUDA,
`gpu_worker.family.engine.FamilyEngine` for ordinary models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from gpu_worker.models.kinds import SupernetKind, fingerprint, fitted, resident, supernet_kind
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.calibration import load_statistics
from gpu_worker.supernet.operators import operators_in
from superserve.errors import ConfigError, InvalidQueryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from gpu_worker.models.encoders.lengths import Lengths
    from gpu_worker.supernet.supernet import MemoryReport, SubnetStatistics, Supernet
    from superserve.subnet import Subnet, TensorSpec

    Batch = npt.NDArray[Any] | Sequence[npt.NDArray[Any]]
    """Queries as one array (B, *input), or B arrays that lie apart."""

_LOG = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""By name, what a supernet may compute in; "auto" is float16 on CUDA if it holds, else float32."""

PACKED_SHARE = 0.25
"""Packed slices take at most this share of the shared weights, without another budget."""

HALF_TOLERANCE = 0.02
"""Largest relative error of the logits at which "auto" still chooses half precision."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a supernet is resident.

    Attributes:
        device: "cpu", "cuda" or "cuda:<n>".
        threads: CPU threads of torch in this process; None does not change them.
        batch_sizes: Sizes that batches are padded to, ascending: the device sees no other size, so that
            none is slow the first time. Empty pads none.
        precision: "auto", or one of `PRECISIONS`.
        uses_graphs: Capture a CUDA graph for each subnet and batch size.
        packed_bytes: Budget of packed slices; None for `PACKED_SHARE` of the weights on CUDA, and for none
            on a CPU, where it was measured to gain nothing.
        trims: Drop what no hosted subnet uses, as far as a trace proves it.
    """

    device: str = "cpu"
    threads: int | None = None
    batch_sizes: tuple[int, ...] = ()
    precision: str = "auto"
    uses_graphs: bool = True
    packed_bytes: int | None = None
    trims: bool = True

    def __post_init__(self) -> None:
        sizes = list(self.batch_sizes)
        if any(size < 1 for size in sizes) or sizes != sorted(set(sizes)):
            raise ConfigError(f"batch_sizes: expected ascending sizes of at least 1, got {sizes}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {self.threads}")
        if self.precision not in ("auto", *PRECISIONS):
            raise ConfigError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {self.precision!r}")

    def torch_device(self) -> torch.device:
        """Return the device; ConfigError if this machine does not have it."""
        try:
            target = torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"device: expected cpu, cuda or cuda:<n>, got {self.device!r}") from error
        if target.type not in ("cpu", "cuda"):
            raise ConfigError(f"device: expected cpu, cuda or cuda:<n>, got {self.device!r}")
        if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"device: {self.device}: this machine has {torch.cuda.device_count()} CUDA devices"
            )
        return target


class Staged(NamedTuple):
    """A batch that is ready to run.

    Attributes:
        n: Queries in it.
        inputs: (padded size, *input), where and as the engine has it.
        buffer: What the engine has to reclaim, if anything.
    """

    n: int
    inputs: Any
    buffer: Any = None


class Engine(Protocol):
    """One kind of device."""

    def stage(self, batch: Batch, size: int) -> Staged:
        """Bring a batch to the device, padded with zeros to `size`; may be called while another runs.

        Texts may be shorter than a query is on the wire, all of a batch alike.
        """
        ...

    def run(self, row: int, staged: Staged) -> npt.NDArray[Any]:
        """Run a staged batch on a hosted subnet, once; return its outputs (n, *output)."""
        ...

    def discard(self, staged: Staged) -> None:
        """Take back a staged batch that will not run."""
        ...

    def warm_up(self) -> None:
        """Run, or capture, every subnet at every padded size, so that no query pays for a first time."""
        ...


class CpuEngine:
    """A CPU: batches are copied into one tensor, and run by torch's threads."""

    def __init__(
        self, supernet: Supernet, kind: SupernetKind, placement: Placement, dtype: torch.dtype
    ) -> None:
        self._supernet = supernet
        self._kind = kind
        self._dtype = dtype
        self._sizes = placement.batch_sizes or (1,)

    def stage(self, batch: Batch, size: int) -> Staged:
        """Copy a batch: as received it may be read-only memory, which torch does not take."""
        padded = np.empty((size, *batch[0].shape), dtype=self._kind.input_spec.dtype)
        fill(padded, batch)
        return Staged(len(batch), torch.from_numpy(padded))

    def run(self, row: int, staged: Staged) -> npt.NDArray[Any]:
        """Actuate and run."""
        actuate(self._supernet, row)
        with torch.inference_mode():
            outputs = self._supernet(model_input(self._kind, staged.inputs, self._dtype))
        found: npt.NDArray[Any] = answer(self._kind, outputs)[: staged.n].numpy()
        return found

    def discard(self, staged: Staged) -> None:
        """Nothing is held."""

    def warm_up(self) -> None:
        """Run every subnet once at the smallest size, and the smallest one at every size.

        A CPU has no kernels to choose: only memory, and each layer's slices, are new the first time.
        """
        spec = self._kind.input_spec
        cells = [(row, self._sizes[0]) for row in range(len(self._supernet.subnets))]
        for row, size in (*cells, *((0, size) for size in self._sizes)):
            self.run(row, self.stage(np.zeros((1, *spec.shape), spec.dtype), size))


def fill(rows: npt.NDArray[Any], batch: Batch) -> None:
    """Copy a batch into the first of `rows` (size, *input), and zeros into the rest.

    Separate queries are copied one by one, each once; numpy lets other threads run meanwhile.
    """
    n = len(batch)
    if isinstance(batch, np.ndarray):
        rows[:n] = batch
    else:
        for row, query in zip(rows, batch, strict=False):
            row[...] = query
    rows[n:] = 0


def model_input(kind: SupernetKind, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what the model takes, from queries as they were sent."""
    inputs = kind.preprocess(batch, dtype)
    # Channels last: measured up to twice as fast as channels first at batch 16 on a CPU.
    return inputs.contiguous(memory_format=torch.channels_last) if kind.takes_images else inputs


def answer(kind: SupernetKind, outputs: Any) -> torch.Tensor:
    """Return a batch's answers (B, *output) from what the model returned, in the dtype of the output spec.

    The model returns a tensor, or tuples, lists and dictionaries of tensors, of which one fits the spec.

    Raises:
        TypeError: If none fits or several do, or its numbers are of another kind: class numbers are not
            made of floats, nor floats of whole numbers.
    """
    spec = kind.output_spec
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    fitting = [tensor for tensor in tensors if tensor.shape[1:] == spec.shape and tensor.dim()]
    if len(fitting) != 1:
        shapes = ", ".join(f"(B, {', '.join(map(str, tensor.shape[1:]))})" for tensor in tensors) or "none"
        raise TypeError(
            f"output: expected one tensor of shape (B, {', '.join(map(str, spec.shape))}), got {shapes}"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if _sort_of(fitting[0].dtype) != _sort_of(dtype):
        raise TypeError(f"output: expected {spec.dtype}, got {fitting[0].dtype}: say so in its output_spec")
    return fitting[0].to(dtype)


def _sort_of(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "whole"


class PaddedExecutor:
    """Runs batches on any of an engine's subnets, one at a time, padded to a profiled size.

    Attributes:
        subnets: Those hosted, by row.
        input_spec: One query.
        output_spec: One query's answer.
        fingerprint: Workers whose fingerprints are equal answer alike.
        device: Where the model is resident.
        batch_sizes: Sizes that batches are padded to, ascending; () pads none.
        precision: What it computes in.
        stages_ahead: Whether a batch may be staged while another one runs.
        lengths: What batches of token ids are cut to; None if queries are no texts.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        subnets: tuple[Subnet, ...],
        input_spec: TensorSpec,
        output_spec: TensorSpec,
        fingerprint: str,
        device: torch.device,
        batch_sizes: tuple[int, ...],
        precision: str,
        stages_ahead: bool,
        lengths: Lengths | None = None,
    ) -> None:
        self.subnets = subnets
        self.input_spec, self.output_spec = input_spec, output_spec
        self.fingerprint = fingerprint
        self.device = device
        self.batch_sizes = batch_sizes
        self.precision = precision
        self.stages_ahead = stages_ahead
        self.lengths = lengths
        self._engine = engine

    def stage(self, batch: Batch) -> Staged:
        """Pad B queries (B, *input), or B that lie apart, to a profiled size and bring them to the device.

        Texts are cut to the bucket that holds the longest of them.

        Raises:
            InvalidQueryError: If its size, dtype or shape is not what the supernet takes.
        """
        n = len(batch) if not isinstance(batch, np.ndarray) or batch.ndim else 0
        if n < 1:
            raise InvalidQueryError("batch: expected at least 1 query, got none")
        for query in batch[:1] if isinstance(batch, np.ndarray) else batch:
            self.input_spec.check(query, "batch")
        fitting = [size for size in self.batch_sizes if size >= n] if self.batch_sizes else [n]
        if not fitting:
            raise InvalidQueryError(f"batch: expected at most {self.batch_sizes[-1]} queries, got {n}")
        return self._engine.stage(batch if self.lengths is None else self.lengths.cut(batch), fitting[0])

    def run(self, subnet: int, staged: Staged) -> npt.NDArray[Any]:
        """Run a staged batch on row `subnet` and return its outputs (B, *output).

        Raises:
            ConfigError: If there is no such row.
        """
        if not 0 <= subnet < len(self.subnets):
            self._engine.discard(staged)
            raise ConfigError(f"subnet: expected a row from 0 to {len(self.subnets) - 1}, got {subnet}")
        return self._engine.run(subnet, staged)

    def discard(self, staged: Staged) -> None:
        """Forget a staged batch that will not run."""
        self._engine.discard(staged)

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stage `batch` (B, *input), run it on row `subnet` and return its outputs (B, *output)."""
        return self.run(subnet, self.stage(batch))

    def warm_up(self) -> None:
        """Run every subnet and every padded size once, so that no query pays for a first time."""
        self._engine.warm_up()

    def memory(self) -> object:
        """Return what the model occupies; as text, one line."""
        raise NotImplementedError


class TorchExecutor(PaddedExecutor):
    """Runs batches on any subnet of a resident supernet: see `PaddedExecutor`.

    Attributes:
        kind: Which supernet.
    """

    def __init__(
        self,
        supernet: Supernet,
        kind: SupernetKind,
        engine: Engine,
        *,
        placement: Placement,
        fingerprint: str,
        precision: str,
    ) -> None:
        super().__init__(
            engine,
            subnets=supernet.subnets,
            input_spec=kind.input_spec,
            output_spec=kind.output_spec,
            fingerprint=fingerprint,
            device=supernet.device,
            batch_sizes=placement.batch_sizes,
            precision=precision,
            stages_ahead=supernet.device.type == "cuda",
            lengths=kind.lengths,
        )
        self.kind = kind
        self._supernet = supernet

    @classmethod
    def load(
        cls,
        name: str,
        subnets: Sequence[Subnet],
        *,
        weights: str | None = None,
        statistics: Mapping[str, SubnetStatistics] | Path | None = None,
        placement: Placement | None = None,
        check: Callable[[Supernet, torch.Tensor], None] | None = None,
    ) -> Self:
        """Build a supernet, fill it, and make it resident.

        Args:
            name: Of the supernet: see `gpu_worker.models.kinds`.
            subnets: Those to host, in the order of their rows.
            weights: A checkpoint's path, "random", or None for the one that comes with it.
            statistics: SubnetNorm's, by subnet name, or the file that holds them; None, or a subnet left
                out, uses the checkpoint's own.
            placement: Where and how; the CPU by default.
            check: Called with the whole supernet and two random queries as the model takes them, before what
                no subnet uses is dropped; it raises if the supernet should not be served.

        Raises:
            ConfigError: Naming the option, or the file and what is wrong in it.
        """
        placement = placement or Placement()
        device = placement.torch_device()
        if placement.threads is not None:
            torch.set_num_threads(placement.threads)
        kind = fitted(supernet_kind(name), weights)
        supernet = resident(kind, weights)
        supernet.host(subnets)
        if isinstance(statistics, Path):
            statistics = load_statistics(statistics, supernet, kind.name, subnets)
        supernet.set_statistics(statistics or {})
        if check is not None:
            check(supernet, example_input(supernet, kind, torch.float32, n=2))
        # Before anything is cut or cast: what a worker leaves out changes no answer.
        found = fingerprint(supernet)
        if placement.trims:
            supernet.trim(*_unlike_inputs(supernet, kind))
        layout = {"memory_format": torch.channels_last} if kind.takes_images else {}
        supernet.to(device, **layout)  # type: ignore[call-overload]  # the stub lacks memory_format
        precision = _settle_precision(supernet, kind, placement)
        mark = "" if precision == "float32" else f"-{precision}"
        return cls(
            supernet,
            kind,
            _engine(supernet, kind, placement, precision),
            placement=placement,
            fingerprint=found + mark,
            precision=precision,
        )

    def memory(self) -> MemoryReport:
        """Return what the supernet occupies."""
        return self._supernet.memory()


def _engine(supernet: Supernet, kind: SupernetKind, placement: Placement, precision: str) -> Engine:
    dtype = PRECISIONS[precision]
    _pack(supernet, kind, placement, dtype)
    if supernet.device.type == "cpu":
        return CpuEngine(supernet, kind, placement, dtype)
    from gpu_worker.engines.cuda_engine import CudaEngine  # noqa: PLC0415  it imports this module

    return CudaEngine(supernet, kind, placement, dtype)


def _pack(supernet: Supernet, kind: SupernetKind, placement: Placement, dtype: torch.dtype) -> None:
    budget = placement.packed_bytes
    if budget is None:
        budget = int(PACKED_SHARE * supernet.memory().shared) if supernet.device.type == "cuda" else 0
    if not budget:
        return
    packed = supernet.pack(
        range(len(supernet.subnets)), example_input(supernet, kind, dtype), budget_bytes=budget
    )
    _LOG.info("packed %.1f MB of slices; %s", packed / 1e6, supernet.memory())


def example_input(
    supernet: Supernet, kind: SupernetKind, dtype: torch.dtype, n: int = 1, seed: int = 0
) -> torch.Tensor:
    """Return `n` queries as the model takes them: of seed 0 the kind's example if it has one, else random."""
    spec = kind.input_spec
    rng = np.random.default_rng(seed)
    if kind.example is not None and seed == 0:
        batch = np.stack([kind.example] * n)
    elif np.issubdtype(np.dtype(spec.dtype), np.integer):
        batch = rng.integers(0, 2, (n, *spec.shape)).astype(spec.dtype)
    else:
        batch = rng.standard_normal((n, *spec.shape)).astype(spec.dtype)
    return model_input(kind, torch.from_numpy(batch).to(supernet.device), dtype)


def _unlike_inputs(supernet: Supernet, kind: SupernetKind) -> list[torch.Tensor]:
    """Return inputs for a trace: an example, zeros, as padding has, and a batch of two."""
    zeros = torch.zeros((1, *kind.input_spec.shape), dtype=getattr(torch, kind.input_spec.dtype))
    random = [example_input(supernet, kind, torch.float32, n, seed) for seed, n in ((0, 1), (1, 2))]
    return [random[0], model_input(kind, zeros.to(supernet.device), torch.float32), random[1]]


def _settle_precision(supernet: Supernet, kind: SupernetKind, placement: Placement) -> str:
    """Cast the supernet to the precision asked for; on "auto", to half precision if it holds on CUDA."""
    precision = placement.precision
    if precision == "auto" and supernet.device.type == "cpu":
        return "float32"  # few CPUs compute halves faster
    if precision == "auto":
        return "float16" if half_holds(supernet, kind) else "float32"
    if precision != "float32":
        supernet.to_half(PRECISIONS[precision])
    return precision


def half_holds(supernet: Supernet, kind: SupernetKind) -> bool:
    """Cast a supernet to half precision and return True; or leave it as it was, and log why."""
    before = _ends(supernet, kind, torch.float32)
    masters = [(module, dict(module._parameters)) for module in supernet.model.modules()]
    supernet.to_half()
    try:
        error = relative_error(_ends(supernet, kind, torch.float16), before)
        why = f"it is {error:.3f} off"
    except Exception as raised:  # noqa: BLE001  the model's, of any kind
        error, why = float("inf"), f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
    if error <= HALF_TOLERANCE:
        return True
    _LOG.warning("float16 does not hold (%s): staying in float32", why)
    for module, parameters in masters:
        module._parameters.update(parameters)
    for op in operators_in(supernet.model):
        op.renew()
    return False


def _ends(supernet: Supernet, kind: SupernetKind, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of the first and the last hosted subnet, float32, for a few random queries."""
    inputs = example_input(supernet, kind, dtype, n=8)
    found = []
    with torch.inference_mode():
        for row in (0, len(supernet.subnets) - 1):
            actuate(supernet, row)
            found.append(answer(kind, supernet(inputs)).float())
    return torch.stack(found)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |got - expected| / |expected|, of all numbers together; infinite if one is not finite."""
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-12))
    return error if error == error else float("inf")
