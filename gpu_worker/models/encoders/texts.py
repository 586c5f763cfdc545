"""What a supernet of text needs to know: of a published folder, or of the default sizes with random weights.

    bert-encoder@length=64,dim=256

The options behind the @ hold for all subnets, and so does a profile: `length` is the longest query in tokens,
`dim` the features of a vector.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_worker.models.encoders.folder import Pooling, pooling_of, sizes_of, tensors_file, transformer_folder
from gpu_worker.models.encoders.lengths import Lengths
from gpu_worker.models.encoders.reranker import (
    MINILM_RERANKER,
    RerankerSizes,
    classifier_of,
    ignored_names,
    layout_of,
    published_name,
    reranker,
)
from gpu_worker.models.encoders.sentence import MINILM, MINILM_POOLING, sentence_encoder
from gpu_worker.supernet.checkpoints import shapes_in
from superserve.errors import ConfigError
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu_worker.models.encoders.bert import BertSizes
    from gpu_worker.supernet.supernet import Supernet

_LENGTH, _DIMENSION = "length", "dim"
_DEFAULT_LENGTH = 128


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What the user chooses.

    Attributes:
        length: Tokens of the longest query.
        dimension: Features of a vector; None for all.
    """

    length: int = _DEFAULT_LENGTH
    dimension: int | None = None

    @classmethod
    def read(cls, text: str) -> TextOptions:
        """Read options such as "length=64,dim=256".

        Raises:
            ConfigError: Naming the option that is unknown or no number above 0.
        """
        given: dict[str, int] = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in (_LENGTH, _DIMENSION):
                raise ConfigError(f"{part!r}: expected {_LENGTH}=TOKENS or {_DIMENSION}=FEATURES")
            if not value.isdecimal() or not int(value) or key in given:
                raise ConfigError(f"{key}: expected one whole number above 0, got {value!r}")
            given[key] = int(value)
        return cls(given.get(_LENGTH, _DEFAULT_LENGTH), given.get(_DIMENSION))

    def named(self, name: str) -> str:
        """Return a supernet's name with these options, always in the same order and without defaults."""
        length = [f"{_LENGTH}={self.length}"] if self.length != _DEFAULT_LENGTH else []
        dimension = [f"{_DIMENSION}={self.dimension}"] if self.dimension is not None else []
        options = ",".join([*length, *dimension])
        return f"{name}@{options}" if options else name


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a kind of supernet needs to know of a model of text.

    Attributes:
        build: Returns the supernet with random weights.
        input_spec: One query.
        output_spec: Its answer.
        lengths: What batches are cut to.
        published_name: From a name in the model's state dict to the folder's tensor.
        ignored: Tensors that the folder may hold beside the model's.
    """

    build: Callable[[], Supernet]
    input_spec: TensorSpec
    output_spec: TensorSpec
    lengths: Lengths
    published_name: Callable[[str], str] = str
    ignored: tuple[str, ...] = ()


def tensors_in(folder: Path) -> Path:
    """Return the file of tensors of a model's folder.

    Raises:
        ConfigError: There is none.
    """
    return tensors_file(transformer_folder(folder))


# --- sentence encoders ----------------------------------------------------------------------


def default_encoder(options: TextOptions) -> TextModel:
    """Return an encoder of all-MiniLM-L6-v2's sizes."""
    return _encoder(MINILM, MINILM_POOLING, options, "default sizes")


def encoder_in(folder: Path, options: TextOptions) -> TextModel:
    """Return the encoder that a folder holds.

    Raises:
        ConfigError: Naming the file and the field that is not served, or the option that is too large.
    """
    of_model = transformer_folder(folder)
    sizes, names = sizes_of(of_model), shapes_in(tensors_file(of_model))
    # A whole pretrained model has a prefix, and heads beside the encoder.
    prefix = "" if "embeddings.word_embeddings.weight" in names else "bert."
    unused = [name for name in names if name.startswith((f"{prefix}pooler.", "cls."))]
    found = _encoder(sizes, pooling_of(folder), options, str(folder))
    return TextModel(
        found.build,
        found.input_spec,
        found.output_spec,
        found.lengths,
        lambda name: f"{prefix}{name}",
        (f"{prefix}embeddings.position_ids", *unused),
    )


def _encoder(sizes: BertSizes, pooling: Pooling, options: TextOptions, where: str) -> TextModel:
    dimension = options.dimension or sizes.width
    if dimension > sizes.width:
        raise ConfigError(f"{where}: {_DIMENSION}: expected at most {sizes.width} features, got {dimension}")
    return TextModel(
        functools.partial(sentence_encoder, sizes, pooling, dimension),
        TensorSpec("int32", (options.length,)),
        TensorSpec("float32", (dimension,)),
        _lengths(sizes, options, (sizes.n_tokens,), where),
    )


def _lengths(sizes: BertSizes, options: TextOptions, limits: tuple[int, ...], where: str) -> Lengths:
    if options.length > sizes.max_length:
        raise ConfigError(
            f"{where}: {_LENGTH}: expected at most {sizes.max_length} tokens, got {options.length}"
        )
    return Lengths.up_to(options.length, sizes.padding, limits)


# --- rerankers ------------------------------------------------------------------------------


def default_reranker(options: TextOptions) -> TextModel:
    """Return a reranker of ms-marco-MiniLM-L6-v2's sizes."""
    return _reranker(MINILM_RERANKER, options, "default sizes")


def reranker_in(folder: Path, options: TextOptions) -> TextModel:
    """Return the reranker that a folder holds.

    Raises:
        ConfigError: Naming the file and the field or tensor that is not served.
    """
    of_model = transformer_folder(folder)
    sizes, file = sizes_of(of_model), tensors_file(of_model)
    shapes = shapes_in(file)
    layout = layout_of(shapes)
    classifier = shapes.get(classifier_of(layout), ())
    if len(classifier) != 2:
        raise ConfigError(
            f"{file}: tensor {classifier_of(layout)}: expected (labels, {sizes.width}), "
            f"got {classifier or 'nothing'}"
        )
    return _reranker(RerankerSizes(sizes, classifier[0], layout), options, str(folder))


def _reranker(sizes: RerankerSizes, options: TextOptions, where: str) -> TextModel:
    if options.dimension is not None:
        raise ConfigError(f"{where}: {_DIMENSION}: a reranker gives scores, and no vector to cut")
    if sizes.bert.n_types < 2:
        raise ConfigError(
            f"{where}: type_vocab_size: expected 2, one for each text, got {sizes.bert.n_types}"
        )
    return TextModel(
        functools.partial(reranker, sizes),
        TensorSpec("int32", (2, options.length)),
        TensorSpec("float32", (sizes.n_labels,)),
        _lengths(sizes.bert, options, (sizes.bert.n_tokens, sizes.bert.n_types), where),
        functools.partial(published_name, sizes),
        ignored_names(sizes),
    )
