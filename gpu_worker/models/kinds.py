"""The supernets that a worker can host, by name, and others by `package.module:attribute`.

A kind holds what the executor, the profiler and the search need: how to build the supernet, what one
query is, where weights come from, what a subnet costs.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_worker.models import digits
from gpu_worker.models.digits_supernet import DIGITS, digits_supernet
from gpu_worker.models.dynabert import MNLI, dynabert
from gpu_worker.models.encoders import texts
from gpu_worker.models.examples import Data, Examples
from gpu_worker.models.factory import SEED, described
from gpu_worker.models.names import (
    BERT_ENCODER,
    BERT_RERANKER,
    DYNABERT,
    OFA_MOBILENET_V3,
    OFA_MOBILENET_V3_W12,
    OFA_RESNET50,
)
from gpu_worker.models.names import DIGITS as DIGITS_NAME
from gpu_worker.models.ofa_mobilenet_v3 import (
    PIXELS,
    W10,
    W12,
    MobileNetArchitecture,
    architecture_of,
    ofa_mobilenet_v3,
    spelled_as,
)
from gpu_worker.models.ofa_mobilenet_v3 import published_name as mobilenet_name
from gpu_worker.models.ofa_resnet50 import N_CLASSES, ofa_resnet50, published_name
from gpu_worker.supernet.checkpoints import load_checkpoint, shape_of, shapes_in
from superserve.errors import ConfigError
from superserve.plugins import load_attribute
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from gpu_worker.models.encoders.lengths import Lengths
    from gpu_worker.supernet.supernet import Supernet

RANDOM = "random"
"""In place of a checkpoint: seeded random weights. Latencies are realistic, answers are meaningless."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class SupernetKind:
    """A supernet by name.

    Attributes:
        name: What profiles call it.
        build: Returns it with random weights.
        input_spec: One query.
        output_spec: One query's answer.
        preprocess: From a batch of queries (B, *input) on the device to the model's input in a dtype.
        published_name: From a name in the model's state dict to the checkpoint's.
        ignored: Names that checkpoints may have beside the model's.
        weights: The checkpoint that comes with it, if any.
        profile: The shipped profile of its subnets, if any.
        data: Returns what it can be judged on, if it comes with any.
        takes_images: Whether its activations are images: then memory is channels last.
        loads_weights: Whether `build` fills the supernet itself: then a checkpoint is not needed.
        example: One query, where random numbers would be none; None draws random ones.
        of_checkpoint: From a checkpoint's path to the kind that fits its sizes, such as its number of
            classes; None if all checkpoints have the same.
        tensors_in: From what `--weights` names to the file of tensors: itself, or one in a model's folder.
        lengths: What batches of token ids are cut to; None if queries are no texts.
        with_options: From the text behind the name's @ to the kind with these options; None if it has none.
    """

    name: str
    build: Callable[[], Supernet]
    input_spec: TensorSpec
    output_spec: TensorSpec
    preprocess: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    published_name: Callable[[str], str] = str
    ignored: tuple[str, ...] = ()
    weights: Path | None = None
    profile: str | None = None
    data: Callable[[], Data] | None = None
    takes_images: bool = False
    loads_weights: bool = False
    example: npt.NDArray[Any] | None = None
    of_checkpoint: Callable[[Path], SupernetKind] | None = None
    tensors_in: Callable[[Path], Path] | None = None
    lengths: Lengths | None = None
    with_options: Callable[[str], SupernetKind] | None = None


def as_floats(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a batch of numbers in the model's dtype."""
    return batch.to(dtype)


def as_tokens(batch: torch.Tensor, _dtype: torch.dtype) -> torch.Tensor:
    """Return a batch of token ids as they are."""
    return batch


class ImagenetInput:
    """From decoded images (B, H, W, 3), uint8, to normalised ones (B, 3, H, W), channels last in memory."""

    # Of ImageNet's channels, for pixels from 0 to 255.
    MEAN = tuple(255 * mean for mean in (0.485, 0.456, 0.406))
    STD = tuple(255 * std for std in (0.229, 0.224, 0.225))

    def __init__(self) -> None:
        # Copied to each device once: a CUDA graph cannot capture that copy.
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the model's input in `dtype`."""
        if batch.device not in self._constants:
            self._constants[batch.device] = (
                torch.tensor(self.MEAN, device=batch.device),
                torch.tensor(self.STD, device=batch.device),
            )
        mean, std = self._constants[batch.device]
        return ((batch.float() - mean) / std).to(dtype).permute(0, 3, 1, 2)


_CALIBRATION_IMAGES = 1_024


def digits_data() -> Data:
    """Return augmented digits; images of one original are all on one side of each split."""
    selection, held_out = digits.held_out_halves()
    return Data(digits.training(_CALIBRATION_IMAGES, seed=1), Examples(*selection), Examples(*held_out))


def _dynabert_of(path: Path) -> SupernetKind:
    """Return the kind with as many classes as a checkpoint's classifier has."""
    shape = shape_of(path, "classifier.weight")
    if shape is None or len(shape) != 2 or shape[0] == MNLI.n_classes:
        return KINDS[DYNABERT]  # loading names what is wrong
    return replace(
        KINDS[DYNABERT],
        build=functools.partial(dynabert, replace(MNLI, n_classes=shape[0])),
        output_spec=TensorSpec("float32", (shape[0],)),
    )


_TEXTS = {
    BERT_ENCODER: (texts.default_encoder, texts.encoder_in),
    BERT_RERANKER: (texts.default_reranker, texts.reranker_in),
}
"""By name, the model of the default sizes, and the one of a folder."""


def _of_text(name: str, options: texts.TextOptions, model: texts.TextModel) -> SupernetKind:
    return SupernetKind(
        name=options.named(name),
        build=model.build,
        input_spec=model.input_spec,
        output_spec=model.output_spec,
        preprocess=as_tokens,
        published_name=model.published_name,
        ignored=model.ignored,
        of_checkpoint=functools.partial(_text_in, name, options),
        tensors_in=texts.tensors_in,
        lengths=model.lengths,
        with_options=functools.partial(_text_kind, name),
    )


def _text_in(name: str, options: texts.TextOptions, folder: Path) -> SupernetKind:
    return _of_text(name, options, _TEXTS[name][1](folder, options))


def _text_kind(name: str, given: str = "") -> SupernetKind:
    """Return a model of text with the options that a name has behind its @.

    Raises:
        ConfigError: An option is unknown, or too large for the default sizes.
    """
    try:
        options = texts.TextOptions.read(given) if given else texts.TextOptions()
    except ConfigError as error:
        raise ConfigError(f"supernet {name}: {error}") from error
    return _of_text(name, options, _TEXTS[name][0](options))


def _mobilenet(name: str, sizes: MobileNetArchitecture) -> SupernetKind:
    """Return the kind of an OFA-MobileNetV3 of these sizes; a checkpoint's classes and spelling are taken."""
    kind = SupernetKind(
        name=name,
        build=functools.partial(ofa_mobilenet_v3, sizes),
        input_spec=TensorSpec("uint8", (PIXELS, PIXELS, 3)),
        output_spec=TensorSpec("float32", (sizes.n_classes,)),
        preprocess=ImagenetInput(),
        published_name=mobilenet_name,
        takes_images=True,
    )

    def of_checkpoint(path: Path) -> SupernetKind:
        shapes = shapes_in(path)
        try:
            found = architecture_of(sizes, shapes)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return replace(_mobilenet(name, found), published_name=spelled_as(shapes))

    return replace(kind, of_checkpoint=of_checkpoint)


_KINDS = (
    SupernetKind(
        name=DIGITS_NAME,
        build=digits_supernet,
        input_spec=TensorSpec("float32", DIGITS.image_shape),
        output_spec=TensorSpec("float32", (DIGITS.n_classes,)),
        preprocess=as_floats,
        weights=_HERE / "data" / "digits.safetensors",
        profile="digits-cpu",
        data=digits_data,
        takes_images=True,
    ),
    SupernetKind(
        name=OFA_RESNET50,
        build=ofa_resnet50,
        input_spec=TensorSpec("uint8", (224, 224, 3)),
        output_spec=TensorSpec("float32", (N_CLASSES,)),
        preprocess=ImagenetInput(),
        published_name=published_name,
        takes_images=True,
    ),
    SupernetKind(
        name=DYNABERT,
        build=dynabert,
        input_spec=TensorSpec("int32", (2, 128)),
        output_spec=TensorSpec("float32", (MNLI.n_classes,)),
        preprocess=as_tokens,
        ignored=("bert.embeddings.position_ids",),  # a constant that older files hold
        of_checkpoint=_dynabert_of,
    ),
    _mobilenet(OFA_MOBILENET_V3, W10),
    _mobilenet(OFA_MOBILENET_V3_W12, W12),
    *map(_text_kind, _TEXTS),
)
KINDS = {kind.name: kind for kind in _KINDS}
"""The supernets that come with the package."""


def supernet_kind(name: str) -> SupernetKind:
    """Return the kind called `name`, or the one that `package.module:attribute` names.

    Some take options behind an `@`: see `gpu_worker.models.encoders.texts`.
    An attribute may also be a function that returns a supernet, with an example of its input behind an `@`:
    see `gpu_worker.models.factory`.

    Raises:
        ConfigError: If there is none, or it is neither a `SupernetKind` nor such a function.
    """
    if name in KINDS:
        return KINDS[name]
    path, _, example = name.partition("@")
    if example and path in KINDS and (with_options := KINDS[path].with_options) is not None:
        return with_options(example)
    module, colon, attribute = path.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"supernet: expected one of {', '.join(KINDS)}, or package.module:attribute, got {name!r}{hint}"
        )
    try:
        kind = load_attribute(module, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"supernet {path}: {error}") from error
    if callable(kind) and example:
        return _of_function(path, kind, example)
    if not isinstance(kind, SupernetKind):
        hint = "; a function that returns a supernet needs --example-input" if callable(kind) else ""
        raise ConfigError(f"supernet {path}: expected a SupernetKind, got {type(kind).__name__}{hint}")
    if example:
        raise ConfigError(f"--example-input: {path} is a SupernetKind, which states its input itself")
    return kind


@functools.lru_cache(maxsize=8)  # a command asks for a kind several times, and to describe one builds it
def _of_function(name: str, function: Callable[[], object], example: str) -> SupernetKind:
    found = described(name, function, example)
    is_float = np.issubdtype(np.dtype(found.input_spec.dtype), np.floating)
    return SupernetKind(
        name=name,
        build=found.build,
        input_spec=found.input_spec,
        output_spec=found.output_spec,
        preprocess=as_floats if is_float else as_tokens,
        loads_weights=True,
        example=found.example,
    )


def fitted(kind: SupernetKind, weights: str | None) -> SupernetKind:
    """Return the kind that fits the checkpoint `weights`, which `resident` takes too.

    Raises:
        ConfigError: If it is no checkpoint.
    """
    path = kind.weights if weights is None else Path(weights)
    if kind.of_checkpoint is None or weights == RANDOM or path is None:
        return kind
    return kind.of_checkpoint(path)


def resident(kind: SupernetKind, weights: str | None) -> Supernet:
    """Build a supernet, in eval mode and host memory, and fill it.

    Args:
        kind: Which.
        weights: A checkpoint's path, "random", or None for the one that comes with it, or for what `build`
            loads.

    Raises:
        ConfigError: If it comes with none, or the checkpoint does not fit.
    """
    if weights == RANDOM or (weights is None and kind.weights is None and kind.loads_weights):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return kind.build().eval()
    path = kind.weights if weights is None else Path(weights)
    if path is None:
        raise ConfigError(
            f"weights: {kind.name} comes without any: expected a checkpoint's path, or {RANDOM!r}; or "
            "loads_weights=True in its SupernetKind, if its build loads them"
        )
    supernet = kind.build().eval()
    path = path if kind.tensors_in is None else kind.tensors_in(path)
    load_checkpoint(supernet.model, path, published_name=kind.published_name, ignored=kind.ignored)
    return supernet


def fingerprint(supernet: Supernet) -> str:
    """Return a hash of what decides a supernet's answers: tensors, subnets and statistics.

    Workers whose fingerprints are equal answer alike.
    """
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in supernet.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.cpu().clone(memory_format=torch.contiguous_format).view(-1)
        found.update(plain.view(torch.uint8).numpy().data)
    for subnet in supernet.subnets:
        found.update(repr((subnet.name, subnet.control)).encode())
        held = supernet.statistics.get(subnet.name)
        if held is not None:
            found.update(held.values.numpy().data)
    return found.hexdigest()
