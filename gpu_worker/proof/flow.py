"""Where data went in one pass of the whole network: what a block's caller does with the block's output.

`x = block(x)` may leave out the block by giving it back its input. `x = x + branch(x)` may not: it would
become x + x. Both are seen in the operations that ran. A step is *soft* if it treats elements one by one, or
moves or normalises them: a residual stream passes through soft steps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gpu_worker.proof.absence import address

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SOFT = frozenset(
    {
        "native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "native_group_norm",
        "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_fused_rms_norm", "clone",
        "_to_copy", "cat", "stack", "copy_", "native_dropout", "hardswish", "hardswish_",
    }
)  # fmt: skip
_JOINS = frozenset({"cat", "stack"})


@dataclass(frozen=True, slots=True)
class _Step:
    output: int
    inputs: tuple[int, ...]
    is_soft: bool
    joins: bool
    blocks: tuple[str, ...]  # those of the stages in which it ran
    where: str


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a stage's block: the nodes of its first input and its first output."""

    path: str
    given: int
    returned: int


class DataFlow:
    """The steps of one pass, and the calls of blocks in it."""

    def __init__(self) -> None:
        self._nodes: dict[int, int] = {}
        self._n_nodes = 0
        self._keeps: list[torch.Tensor] = []  # an address must not be used again
        self._steps: list[_Step] = []
        self.calls: list[BlockCall] = []

    def node(self, tensor: torch.Tensor) -> int:
        """Return the node of what is in a tensor's storage now."""
        key = address(tensor)
        return self._nodes[key] if key in self._nodes else self._new(tensor)

    def _new(self, tensor: torch.Tensor) -> int:
        self._keeps.append(tensor)
        self._n_nodes += 1
        self._nodes[address(tensor)] = self._n_nodes
        return self._n_nodes

    def step(
        self,
        func: Any,
        inputs: Sequence[torch.Tensor],
        before: Sequence[int],
        outputs: Iterable[torch.Tensor],
        *,
        blocks: tuple[str, ...],
        where: str,
    ) -> None:
        """Note one operation; `before` are the nodes of its inputs when it began."""
        name = func.overloadpacket.__name__
        writes = any(
            given.alias_info is not None and given.alias_info.is_write for given in func._schema.arguments
        )
        soft = is_soft(func)
        joins = name in _JOINS or (torch.Tag.pointwise in func.tags and len(set(before)) > 1)
        known = {address(tensor) for tensor in inputs}
        for output in outputs:
            if writes or address(output) not in known:
                step = _Step(self._new(output), tuple(dict.fromkeys(before)), soft, joins, blocks, where)
                self._steps.append(step)

    def meets_its_input(self, call: BlockCall) -> str | None:
        """Return where a block's caller combines the block's output with what the block was given.

        None if it does so nowhere, or if the block has a residual path of its own.
        """
        inside = [step for step in self._steps if call.path in step.blocks]
        if call.returned in _after({call.given}, inside):
            return None
        outside = [step for step in self._steps if not step.blocks]
        around = _after(_before({call.given}, outside), outside)
        behind = _after({call.returned}, outside)
        for step in outside:
            if not step.joins:
                continue
            given = set(step.inputs)
            if given & behind and (given - behind) & around:
                return step.where
        return None


def is_soft(func: Any) -> bool:
    """Return whether an operation treats elements one by one, or moves or normalises them."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _SOFT


def _after(nodes: set[int], steps: Iterable[_Step]) -> set[int]:
    """Return the nodes, and those that soft steps make of them."""
    found = set(nodes)
    for step in steps:  # in the order in which they ran
        if step.is_soft and found.intersection(step.inputs):
            found.add(step.output)
    return found


def _before(nodes: set[int], steps: Sequence[_Step]) -> set[int]:
    """Return the nodes, and those of which soft steps made them."""
    found = set(nodes)
    for step in reversed(steps):
        if step.is_soft and step.output in found:
            found.update(step.inputs)
    return found
