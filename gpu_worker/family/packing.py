"""What members take and give, compared, and how one query becomes a member's inputs.

The wire has one tensor for a query. A model of one input takes it as it is. Several inputs of the same shape
lie in it one after the other, (n_inputs, *shape), in the order of the family file's `inputs`; a member that
lacks one of them, such as a distilled model without token types, is not given it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from gpu_worker.family.file import Family


class Taken(NamedTuple):
    """One input of a model, as its file states it.

    Attributes:
        name: In the graph, or of the function's argument.
        dtype: NumPy's name; None if it is not stated.
        shape: Without the batch axis, None for a size that may vary; None if it is not stated.
        is_required: Whether the model runs without it.
    """

    name: str
    dtype: str | None
    shape: tuple[int | None, ...] | None
    is_required: bool = True


class Feed(NamedTuple):
    """How one input of a model is made of a query.

    Attributes:
        name: The input's.
        place: Its index in the query's first axis; None if the query is the input.
        dtype: What it is converted to.
    """

    name: str
    place: int | None
    dtype: str

    def of(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return this input of a batch of queries (B, *input)."""
        part = batch if self.place is None else batch[:, self.place]
        return np.ascontiguousarray(part, dtype=self.dtype)


def inputs_of(feeds: Sequence[Feed], batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Return a model's inputs by name, from a batch of queries (B, *input)."""
    return {feed.name: feed.of(batch) for feed in feeds}


def input_spec(family: Family, taken: Mapping[str, Sequence[Taken] | None]) -> TensorSpec:
    """Return one query: what the family file says, or else what the first member's file states.

    Args:
        family: The file.
        taken: By member, its inputs; None if nothing is known of them.

    Raises:
        ConfigError: Neither says it, or a size varies.
    """
    if family.input is not None:
        return family.input
    for name, inputs in taken.items():
        stated = _stated(family, name, inputs)
        if stated is not None:
            return stated
    raise family.error(
        "input: expected one query's dtype and shape, such as {dtype: float32, shape: [3, 224, 224]}: no "
        "member's file states them"
    )


def _stated(family: Family, member: str, inputs: Sequence[Taken] | None) -> TensorSpec | None:
    """Return what a member's file says of one query; None if it does not say it."""
    if not inputs:
        return None
    if len(inputs) > 1 and not family.inputs:
        raise family.error(
            f"member {member!r}: it takes {_names(inputs)}, and a query is one tensor: write `inputs: "
            f"[{', '.join(one.name for one in inputs)}]` in the order in which queries hold them"
        )
    known = [one for one in inputs if not family.inputs or one.name in family.inputs]
    shapes = {one.shape for one in known}
    if not known or known[0].dtype is None or shapes == {None}:
        return None
    shape = known[0].shape
    if len(shapes) > 1:
        raise family.error(
            f"member {member!r}: its inputs differ in shape ({_listed(known)}), and a query holds them one "
            "after the other, in one tensor: export it with inputs of one shape"
        )
    if shape is None or None in shape:
        raise family.error(
            f"input: expected one query's dtype and shape: those of member {member!r} vary: {_listed(known)}"
        )
    sizes = tuple(size for size in shape if size is not None)
    packed = (len(family.inputs), *sizes) if len(family.inputs) > 1 else sizes
    return TensorSpec(known[0].dtype, packed)


def feeds_of(
    family: Family, member: str, inputs: Sequence[Taken] | None, spec: TensorSpec
) -> tuple[Feed, ...]:
    """Return how a member's inputs are made of a query of this spec.

    Raises:
        ConfigError: It takes something else; the error names the member and the input.
    """
    named = family.inputs if len(family.inputs) > 1 else ()
    if inputs is None:  # a function's module: it takes what it is given
        names = named or family.inputs or ("",)
        return tuple(Feed(name, i if named else None, spec.dtype) for i, name in enumerate(names))
    needed = [one for one in inputs if one.is_required]
    if not named:
        chosen = [one for one in inputs if one.name in family.inputs] or (needed or list(inputs))[:1]
        lacking = [one for one in needed if one not in chosen]
    else:
        chosen = [one for one in inputs if one.name in named]
        lacking = [one for one in needed if one.name not in named]
    if lacking or not chosen:
        raise family.error(
            f"member {member!r}: expected a model of {', '.join(named or family.inputs) or 'one input'}, got "
            f"one that takes {_names(inputs)}: list them under `inputs`"
        )
    part = spec.shape[1:] if named else spec.shape
    return tuple(
        _feed(family, member, one, spec.dtype, part, named.index(one.name) if named else None)
        for one in chosen
    )


def _feed(
    family: Family, member: str, one: Taken, dtype: str, shape: tuple[int, ...], place: int | None
) -> Feed:
    own = one.shape
    fits = own is None or (
        len(own) == len(shape) and all(size in (None, got) for size, got in zip(own, shape, strict=True))
    )
    if not fits:
        raise family.error(
            f"member {member!r}: input {one.name!r}: expected {dtype} {list(shape)}, as the family takes, "
            f"got a model of {_listed([one])}"
        )
    # int32 on the wire may be int64 to the model; what could lose a number is refused.
    if one.dtype is not None and not np.can_cast(np.dtype(dtype), np.dtype(one.dtype), "safe"):
        raise family.error(
            f"member {member!r}: input {one.name!r}: expected {dtype}, as the family takes, got a model of "
            f"{one.dtype}"
        )
    return Feed(one.name, place, one.dtype or dtype)


def _names(inputs: Sequence[Taken]) -> str:
    return ", ".join(one.name for one in inputs) or "no input"


def _listed(inputs: Sequence[Taken]) -> str:
    def sizes(one: Taken) -> str:
        return ", ".join("?" if size is None else str(size) for size in one.shape or ())

    return ", ".join(f"{one.name} {one.dtype} [{sizes(one)}]" for one in inputs)


def answering(
    family: Family, member: str, outputs: Mapping[str, npt.NDArray[Any]], n: int
) -> tuple[str, TensorSpec]:
    """Return which of a member's outputs for a batch of `n` answers its queries: its name, and one answer.

    Raises:
        ConfigError: None does, or several; the error names the member and what it gives.
    """
    wanted = family.output
    fitting = {
        name: output
        for name, output in outputs.items()
        if output.ndim
        and len(output) == n
        and (wanted.name is None or name == wanted.name)
        and (wanted.shape is None or output.shape[1:] == wanted.shape)
    }
    shapes = ", ".join(f"{name} {output.dtype} {list(output.shape)}" for name, output in outputs.items())
    if len(fitting) != 1:
        asked = " ".join(
            words
            for words in (
                "" if wanted.name is None else f"called {wanted.name!r}",
                "" if wanted.shape is None else f"of shape {list(wanted.shape)}",
            )
            if words
        )
        raise family.error(
            f"member {member!r}: output: expected one with an answer for each of {n} queries"
            f"{f', {asked}' if asked else ''}, got {shapes or 'none'}: `output: {{name: ...}}` or "
            "`output: {shape: [...]}` tells which"
        )
    ((name, output),) = fitting.items()
    if wanted.dtype is not None and output.dtype != np.dtype(wanted.dtype):
        raise family.error(
            f"member {member!r}: output: dtype: expected {wanted.dtype}, as the family says, got "
            f"{output.dtype}"
        )
    return name, TensorSpec(str(output.dtype), output.shape[1:])


def check_alike(family: Family, given: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return what every member gives.

    Raises:
        ConfigError: Two differ; the error names both.
    """
    (first, spec), *others = given.items()
    for name, other in others:
        if other != spec:
            raise family.error(
                f"member {name!r}: output: expected {spec.dtype} {list(spec.shape)}, as {first!r} gives, got "
                f"{other.dtype} {list(other.shape)}"
            )
    return spec


def parsed_dtype(name: str, where: str) -> str:
    """Return NumPy's name of an element type.

    Raises:
        ConfigError: NumPy has none, such as of bfloat16.
    """
    try:
        return str(np.dtype(name))
    except TypeError as error:
        raise ConfigError(f"{where}: expected a dtype that NumPy has, got {name}") from error
