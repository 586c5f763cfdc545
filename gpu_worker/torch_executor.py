"""TorchExecutor: the digits supernet resident on one device, and the file it comes from.

The file is safetensors: weights as float16, SubnetNorm's statistics as float32 with
a row for each subnet, and metadata

    supernet      "digits"
    architecture  JSON, the fields of `Architecture`
    subnets       JSON, a list of `Card`, by ascending accuracy
    and, for people, seed, epochs and torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpu_worker.actuation import actuate
from gpu_worker.supernet import Architecture, DigitsSupernet
from superserve.errors import ConfigError, InvalidQueryError
from superserve.subnet import Subnet, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

SHIPPED_PATH = Path(__file__).with_name("data") / "digits-supernet.safetensors"
"""The supernet that comes with the package."""

SUPERNET_NAME = "digits"
"""What profiles and files call this supernet."""

_STATISTICS = (".mean", ".variance")  # ends of the tensors that stay float32


@dataclass(frozen=True, slots=True)
class Card:
    """What a supernet file says of one subnet.

    Attributes:
        name: Unique within the file.
        control: The control tuple, {"d": ..., "w": ...}.
        accuracy: Percent of the held-out set.
        accuracy_without_subnet_norm: The same with the largest subnet's statistics.
        gflops: Billions of multiply-adds an image.
    """

    name: str
    control: dict[str, list[Any]]
    accuracy: float
    accuracy_without_subnet_norm: float
    gflops: float


class TorchExecutor:
    """Runs batches on any subnet of a resident supernet, one at a time.

    Attributes:
        input_spec: One query's image.
        output_spec: One query's logits.
        cards: What is known of each subnet, by ascending accuracy.
        subnets: Their names and control tuples.
        accuracies: Their accuracies in percent.
        fingerprint: Of the file: workers whose fingerprints are equal answer alike.
        device: Where the supernet is resident.
        batch_sizes: Sizes that batches are padded to, ascending; () pads none.
    """

    def __init__(
        self,
        supernet: DigitsSupernet,
        cards: Sequence[Card],
        *,
        fingerprint: str,
        device: torch.device,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        self.cards = tuple(cards)
        self.subnets = supernet.subnets
        self.accuracies = tuple(card.accuracy for card in cards)
        self.input_spec = TensorSpec("float32", supernet.architecture.image_shape)
        self.output_spec = TensorSpec("float32", (supernet.architecture.n_classes,))
        self.fingerprint = fingerprint
        self.device = device
        self.batch_sizes = tuple(batch_sizes)
        self._supernet = supernet
        self._hosted = tuple(range(len(self.subnets)))  # by row, the supernet's own row

    @classmethod
    def load(
        cls,
        path: Path = SHIPPED_PATH,
        *,
        device: str = "cpu",
        threads: int | None = None,
        batch_sizes: Sequence[int] = (),
    ) -> Self:
        """Read a supernet file and make it resident.

        Args:
            path: The file; the shipped one by default.
            device: "cpu", "cuda" or "cuda:<n>".
            threads: CPU threads of torch in this process; None leaves them be.
            batch_sizes: Sizes to pad batches to; the device meets no other size, so
                none is slow for being new. Empty pads none.

        Raises:
            ConfigError: Naming the option, or the file and what is wrong in it.
        """
        target = _device(device)
        _check_batch_sizes(batch_sizes)
        _set_threads(threads)
        supernet, cards = _read(path)
        supernet.eval()
        # Channels last: measured up to twice as fast as channels first at batch 16 on a CPU.
        supernet.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return cls(supernet, cards, fingerprint=fingerprint, device=target, batch_sizes=batch_sizes)

    def select(self, names: Sequence[str]) -> None:
        """Serve the subnets called `names` alone, as rows 0, 1, ... in that order.

        A profile measured here may leave out a subnet that is no faster than a better one.

        Raises:
            ConfigError: If the file has no such subnet.
        """
        known = {card.name: row for row, card in enumerate(self.cards)}
        missing = [name for name in names if name not in known]
        if missing:
            raise ConfigError(f"subnets: expected names among {', '.join(known)}, got {missing[0]}")
        rows = [known[name] for name in names]
        self._hosted = tuple(self._hosted[row] for row in rows)
        self.cards = tuple(self.cards[row] for row in rows)
        self.subnets = tuple(self.subnets[row] for row in rows)
        self.accuracies = tuple(card.accuracy for card in self.cards)

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Actuate row `subnet`, run `batch` (B, *input) and return its outputs (B, *output).

        Raises:
            ConfigError: If there is no such row.
            InvalidQueryError: If the batch's size, dtype or shape is not what the supernet takes.
        """
        padded = self._padded(batch)
        if not 0 <= subnet < len(self._hosted):
            raise ConfigError(f"subnet: expected a row from 0 to {len(self._hosted) - 1}, got {subnet}")
        actuate(self._supernet, self._hosted[subnet])
        with torch.inference_mode():
            images = torch.from_numpy(padded).to(self.device).to(memory_format=torch.channels_last)
            logits = self._supernet(images)[: len(batch)]  # (B, classes)
            outputs: npt.NDArray[Any] = logits.cpu().numpy()
        return outputs

    def warm_up(self) -> None:
        """Run every subnet once at every padded size, so that no query pays for a first time."""
        for size in self.batch_sizes or (1,):
            images = np.zeros((size, *self.input_spec.shape), dtype=self.input_spec.dtype)
            for row in range(len(self.subnets)):
                self.execute(row, images)

    def _padded(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a copy of `batch`, then zeros up to the next of the batch sizes."""
        n_queries = len(batch) if batch.ndim else 0
        if n_queries < 1:
            raise InvalidQueryError("batch: expected at least 1 query, got none")
        self.input_spec.check(batch[0], "batch")
        size = n_queries
        if self.batch_sizes:
            fitting = [size for size in self.batch_sizes if size >= n_queries]
            if not fitting:
                raise InvalidQueryError(
                    f"batch: expected at most {self.batch_sizes[-1]} queries, got {n_queries}"
                )
            size = fitting[0]
        # Copied even when full: a batch from the wire may be read-only, which torch does not take.
        padded = np.zeros((size, *self.input_spec.shape), dtype=self.input_spec.dtype)
        padded[:n_queries] = batch
        return padded


def save(supernet: DigitsSupernet, cards: Sequence[Card], path: Path, *, notes: Mapping[str, str]) -> None:
    """Write a supernet file with the cards' subnets, which `supernet` hosts among others."""
    names = [subnet.name for subnet in supernet.subnets]
    rows = [names.index(card.name) for card in cards]
    tensors = {
        name: (tensor[rows] if name.endswith(_STATISTICS) else tensor.half()).contiguous()
        for name, tensor in supernet.state_dict().items()
    }
    metadata = {
        **notes,
        "supernet": SUPERNET_NAME,
        "architecture": json.dumps(asdict(supernet.architecture)),
        "subnets": json.dumps([asdict(card) for card in cards]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)


def _read(path: Path) -> tuple[DigitsSupernet, tuple[Card, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: expected a safetensors file: {error}") from error
    try:
        architecture = _architecture(metadata)
        cards = _cards(metadata)
        supernet = DigitsSupernet(architecture)
        supernet.host([Subnet(card.name, card.control) for card in cards])
        _check_tensors(supernet, tensors)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    supernet.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return supernet, cards


def _architecture(metadata: Mapping[str, str]) -> Architecture:
    try:
        fields = json.loads(metadata["architecture"])
        return Architecture(
            image_shape=tuple(fields["image_shape"]),
            channels=tuple(fields["channels"]),
            depths=tuple(fields["depths"]),
            n_classes=fields["n_classes"],
            min_width=fields["min_width"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"metadata architecture: expected the fields of Architecture as JSON: {error!r}"
        ) from error


def _cards(metadata: Mapping[str, str]) -> tuple[Card, ...]:
    try:
        cards = tuple(Card(**fields) for fields in json.loads(metadata["subnets"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"metadata subnets: expected a JSON list of cards: {error!r}") from error
    if any(a.accuracy >= b.accuracy for a, b in itertools.pairwise(cards)):
        raise ConfigError("metadata subnets: expected ascending accuracies")
    return cards


def _check_tensors(supernet: DigitsSupernet, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = supernet.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise ConfigError(f"tensor {name}: missing")
        if tensors[name].shape != tensor.shape:
            raise ConfigError(
                f"tensor {name}: expected shape {tuple(tensor.shape)}, got {tuple(tensors[name].shape)}"
            )
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise ConfigError(f"tensor {unknown[0]}: not one of this architecture's")


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: expected cpu, cuda or cuda:<n>, got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu, cuda or cuda:<n>, got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return target


def _check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    if any(size < 1 for size in batch_sizes) or list(batch_sizes) != sorted(set(batch_sizes)):
        raise ConfigError(f"batch_sizes: expected ascending sizes of at least 1, got {list(batch_sizes)}")


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)
