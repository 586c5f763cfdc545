"""What of a module can be made elastic, and how: each candidate is inserted into a copy, and proved.

Candidates are containers whose blocks are of one class, and layers that have the same place in each of them.
What fails alone is tried with its siblings (queries with keys and values), in parts (a fused projection), and
by whole heads. Candidates are taken one after the other, so that all that is advised holds together.

A module that passes answers as its subnets' labels say. How accurate they are depends on its training.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from gpu_worker.models.factory import SEED, read_example
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.insertion import Elastic, Stage, insert
from gpu_worker.supernet.operators import SubnetNorm
from gpu_worker.supernet.recognition import is_elastic_kind, layers_in, operator_of
from superserve.errors import ConfigError
from superserve.plugins import load_attribute
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_TRIED = 48
"""Most candidates that are tried: each takes a copy of the module, and some passes."""

_SUBNETS = 4  # that a trial compares: the smallest, the largest, and two between
_HEADS = ("head_dim", "head_size", "attention_head_size", "dim_head", "head_width")
"""Attributes in which modules keep the width of an attention head."""


class SamePlace(NamedTuple):
    """Layers of one place in several blocks.

    Attributes:
        pattern: Their paths, with * for numbers.
        paths: Each of them.
        outputs: Of each layer.
        inputs: The same; 0 if unknown.
        head: Width of a head that the module beside them keeps; 1 without any.
    """

    pattern: str
    paths: tuple[str, ...]
    outputs: int
    inputs: int
    head: int

    @property
    def parent(self) -> str:
        """The pattern of the module that holds it."""
        return self.pattern.rpartition(".")[0]


class StaysWhole(NamedTuple):
    """What stays whole, and why."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What can be made elastic.

    Attributes:
        kinds: Classes of the layers that become operators, and how many there are.
        n_norms: BatchNorms, which need statistics for each subnet.
        stages: Blocks that may be left out.
        elastic: Layers that may be cut.
        refused: What was tried in vain.
        n_left: Candidates that were not tried, since there are so many.
        proof: What was proved of all together; None if nothing is elastic.
        is_instance: Whether the user named a module, and not what builds one.
    """

    kinds: dict[str, int]
    n_norms: int
    stages: tuple[Stage, ...]
    elastic: tuple[Elastic, ...]
    refused: tuple[StaysWhole, ...]
    n_left: int
    proof: str | None
    is_instance: bool = False


def advise(
    model: nn.Module, example: torch.Tensor, on_progress: Callable[[str], None] = lambda _what: None
) -> Advice:
    """Try what of `model` can be made elastic; the model stays as it is.

    Args:
        model: Any module, in host memory.
        example: At least two inputs.
        on_progress: Called with what is tried next.

    Raises:
        ConfigError: The module does not run on the example, or cannot be followed at all.
    """
    model = model.eval()
    trial = _Trial(model, example)
    layers = layers_in(model, ())
    stages: list[Stage] = []
    elastic: list[Elastic] = []
    refused: list[StaysWhole] = []
    containers, groups = list(_containers(model)), _candidates(model)
    n_left = len(containers) + len(groups) - MAX_TRIED
    for path in containers[:MAX_TRIED]:
        on_progress(path)
        found, why = _first_that_holds(trial, stages, elastic, [[_stage(path)], [_stage(path, zero=True)]])
        if found is None:
            refused.append(StaysWhole(path or "the module", why))
        stages += found or []
    taken: set[str] = set()
    for group in groups[: max(0, MAX_TRIED - len(containers))]:
        if group.pattern in taken:
            continue
        on_progress(group.pattern)
        ways = list(_ways(group, [one for one in groups if one.pattern not in taken]))
        found, why = _first_that_holds(trial, stages, elastic, [[size] for size, _ in ways])
        if found is None:
            refused.append(StaysWhole(group.pattern, why))
            continue
        elastic += found
        taken |= next(patterns for size, patterns in ways if size is found[0])
    is_any = bool(stages or elastic)
    return Advice(
        kinds=dict(Counter(type(layer.module).__name__ for layer in layers)),
        n_norms=sum(issubclass(layer.cls, SubnetNorm) for layer in layers),
        stages=tuple(stages),
        elastic=tuple(elastic),
        refused=tuple(one for one in refused if one.what not in taken),
        n_left=max(0, n_left),
        proof=trial.proved(stages, elastic) if is_any else None,
    )


def _first_that_holds(
    trial: _Trial, stages: Sequence[Stage], elastic: Sequence[Elastic], ways: Sequence[Sequence[Any]]
) -> tuple[list[Any] | None, str]:
    """Return the first way that holds together with what is taken, or the reason against the first one."""
    first = ""
    for way in ways:
        more_stages = [one for one in way if isinstance(one, Stage)]
        sizes = [one for one in way if isinstance(one, Elastic)]
        try:
            trial.proved([*stages, *more_stages], [*elastic, *sizes])
        except Exception as error:  # noqa: BLE001  a user's module may fail in a subnet in any way
            named = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            first = first or _plain(f"{named}{error}")
        else:
            return list(way), ""
    return None, first


def _plain(why: str) -> str:
    if "must match the size of tensor" in why:  # torch's words for a sum
        return "it is added to what stays whole, as in a residual stream"
    return why.partition("\n")[0]


class _Trial:
    """Inserts into copies of a module and proves them on an example."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self._model, self._example = model, example
        try:
            with torch.no_grad():
                self._shapes = _shapes(model(example))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(
                f"the module does not run on an example {tuple(example.shape)} {example.dtype}: {reason}"
            ) from error

    def proved(self, stages: Sequence[Stage], elastic: Sequence[Elastic]) -> str:
        """Return what was proved.

        Raises:
            ConfigError: It cannot be inserted, or its subnets answer wrong or with less than the whole.
        """
        supernet = insert(copy.deepcopy(self._model), stages=stages, elastic=elastic).eval()
        settings = supernet.settings_of(Subnet("smallest", supernet.controls.space.smallest))
        with torch.no_grad():
            shapes = _shapes(supernet.run_with(settings, self._example))
        if shapes != self._shapes:
            raise ConfigError("it is the module's output, of which a subnet would answer with a part")
        return str(prove(supernet, self._example, most=_SUBNETS, checks_resident=False))


def _shapes(outputs: object) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


# --- the user's module ----------------------------------------------------------------------


def advise_on(
    name: str, example_input: str, on_progress: Callable[[str], None] = lambda _what: None
) -> tuple[Advice, str, str]:
    """Build the module that `package.module:attribute` names, and advise on it.

    Args:
        name: Of a function or class that takes nothing and gives a module, or of a module.
        example_input: One input: its shape and dtype, or a .npy file.
        on_progress: Called with what is tried next.

    Returns:
        The advice, and the two parts of the name.

    Raises:
        ConfigError: There is no such attribute, or it gives no module; or as `advise`.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"expected package.module:function, which returns a module, got {name!r}")
    try:
        found = load_attribute(module, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name}: {error}") from error
    is_instance = isinstance(found, nn.Module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            built = found if is_instance or not callable(found) else found()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(f"{name}: expected a function that takes nothing: {reason}") from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{name}: expected what gives a torch.nn.Module, got {type(built).__name__}")
    one = read_example(example_input)
    example = torch.from_numpy(np.stack([one, np.roll(one, 1)]))
    try:
        advice = advise(built, example, on_progress)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return replace(advice, is_instance=is_instance), module, attribute


# --- candidates -----------------------------------------------------------------------------


def _containers(model: nn.Module) -> Iterator[str]:
    """Yield the paths of containers that hold at least two blocks, all of one class and more than a layer."""
    for path, module in model.named_modules():
        blocks = list(module.children())
        is_container = isinstance(module, nn.Sequential | nn.ModuleList) and len(blocks) > 1
        if is_container and len({type(block) for block in blocks}) == 1 and any(blocks[0].children()):
            yield path


def _stage(path: str, *, zero: bool = False) -> Stage:
    return Stage(path, skipped="zero") if zero else Stage(path)


def _candidates(model: nn.Module) -> list[SamePlace]:
    """Return the layers of which outputs can be chosen, those of one place together, in the model's order."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        try:
            kind = operator_of(module, path)
        except ConfigError:
            continue  # `layers_in` has named it
        is_grouped = getattr(module, "groups", 1) > 1
        if not path or not is_elastic_kind(kind) or isinstance(module, nn.Embedding) or is_grouped:
            continue
        layers[path] = module
        found[_pattern(path), _outputs(module)].append(path)
    return [
        SamePlace(pattern, tuple(paths), outputs, _inputs(layers[paths[0]]), _head(model, paths[0]))
        for (pattern, outputs), paths in found.items()
    ]


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _outputs(module: nn.Module) -> int:
    return _number(module, "num_heads", "hidden_size", "out_channels", "out_features", "nf")


def _inputs(module: nn.Module) -> int:
    return _number(module, "in_features", "in_channels", "nx")


def _number(module: nn.Module, *names: str) -> int:
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), 0)


def _head(model: nn.Module, path: str) -> int:
    """Return the width of a head, if the module that holds a layer keeps one."""
    parent = model.get_submodule(path.rpartition(".")[0])
    widths = [value for name in _HEADS if isinstance(value := getattr(parent, name, None), int)]
    return next((width for width in widths if width > 1), 1)


def _ways(group: SamePlace, others: Sequence[SamePlace]) -> Iterator[tuple[Elastic, set[str]]]:
    """Yield how a group of layers may be cut, and the patterns that are cut then; the simplest first."""
    siblings = [
        one
        for one in others
        if one.parent == group.parent and one.outputs == group.outputs and one is not group
    ]
    together = [[group]]
    for n in range(len(siblings), 0, -1):
        together += [[group, *some] for some in itertools.combinations(siblings, n)][:_MOST_COMBINATIONS]
    for groups in together:
        paths = [path for one in groups for path in _layers_of(one)]
        patterns = {one.pattern for one in groups}
        for multiple in sorted({group.head, 1}, reverse=True):
            if group.outputs > multiple:
                yield Elastic(_name(groups), paths, multiple_of=multiple), patterns
    for parts in (3, 2):
        if group.outputs % parts == 0 and group.inputs and group.outputs > group.inputs:
            multiple = group.head if (group.outputs // parts) > group.head else 1
            yield (
                Elastic(_name([group]), _layers_of(group), parts=parts, multiple_of=multiple),
                {group.pattern},
            )


_MOST_COMBINATIONS = 4  # of as many siblings: a block has few


def _layers_of(group: SamePlace) -> list[str]:
    """Return the pattern of a group, or its paths if there is only one of them."""
    return [group.pattern] if len(group.paths) > 1 else list(group.paths)


def _name(groups: Sequence[SamePlace]) -> str:
    """Return a name such as "layer.attention.query+key+value"."""
    place = groups[0].parent.replace(".*", "").removeprefix("*.")
    layers = "+".join(group.pattern.rpartition(".")[2] for group in groups)
    return f"{place}.{layers}" if place and place != "*" else layers


# --- in words -------------------------------------------------------------------------------


def code_of(advice: Advice, module: str, attribute: str) -> str:
    """Return a file that makes a supernet of what `module:attribute` builds, by the name `supernet`."""
    made = attribute if advice.is_instance else f"{attribute}()"
    declared: list[tuple[str, tuple[Stage | Elastic, ...]]] = [
        ("stages", advice.stages),
        ("elastic", advice.elastic),
    ]
    used = sorted({type(one).__name__ for _, all_of_it in declared for one in all_of_it})
    lines = [
        f"from gpu_worker.supernet.insertion import {', '.join([*used, 'insert'])}",
        "from gpu_worker.supernet.supernet import Supernet",
        f"from {module} import {attribute}",
        "",
        "",
        "def supernet() -> Supernet:",
        "    return insert(",
        f"        {made},",
    ]
    for name, all_of_it in declared:
        if all_of_it:
            lines += [
                f"        {name}=[",
                *(f"            {_words(one)}," for one in all_of_it),
                "        ],",
            ]
    return "\n".join([*lines, "    )", ""])


def _words(declared: Stage | Elastic) -> str:
    """Return a stage or a size as it is declared."""
    if isinstance(declared, Stage):
        skipped = "" if declared.skipped == "input" else f', skipped="{declared.skipped}"'
        return f'Stage("{declared.blocks}"{skipped})'
    parts = f", parts={declared.parts}" if declared.parts != 1 else ""
    multiple = f", multiple_of={declared.multiple_of}" if declared.multiple_of != 1 else ""
    layers = ", ".join(f'"{layer}"' for layer in declared.layers)
    return f'Elastic("{declared.name}", [{layers}]{parts}{multiple})'


def lines_of(advice: Advice) -> Iterator[str]:
    """Yield what was found, line by line."""
    kinds = ", ".join(f"{n} {name}" for name, n in advice.kinds.items()) or "none"
    yield f"layers that follow a part of their inputs: {kinds}"
    for title, all_of_it in (("may be left out", advice.stages), ("may be cut", advice.elastic)):
        yield f"{title}:" if all_of_it else f"{title}: nothing"
        yield from (f"  {_words(one)}" for one in all_of_it)
    if advice.refused:
        yield "stays whole:"
        yield from (f"  {one.what}: {one.why}" for one in advice.refused)
    if advice.n_left:
        yield f"not tried: {advice.n_left} more candidates"
    if advice.proof is not None:
        yield f"proved together: {advice.proof}"
    if advice.n_norms and advice.proof is not None:
        yield f"{advice.n_norms} BatchNorms need statistics for each subnet: `profiles search` gathers them"
