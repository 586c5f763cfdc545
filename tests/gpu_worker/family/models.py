"""Small models as people have them: ONNX graphs put together by hand, exported programs, plain modules.

ONNX graphs are made without torch, so that what runs them is not compared with what exported them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

INT64 = int(TensorProto.INT64)

WIDTH, CLASSES = 5, 3
"""What `linear` takes and gives."""

RNG_SEED = 7


def weights_of(seed: int) -> npt.NDArray[np.float32]:
    """Return the weights of a linear model, (WIDTH, CLASSES)."""
    return np.random.default_rng(seed).standard_normal((WIDTH, CLASSES)).astype(np.float32)


def linear(
    path: Path,
    seed: int = 0,
    *,
    batch: int | str = "batch",
    width: int | str = WIDTH,
    dtype: int = TensorProto.FLOAT,
    name: str = "x",
    is_external: bool = False,
    outputs: Sequence[str] = ("logits",),
) -> Path:
    """Write x @ W; of several outputs all but the last are the logits' negatives."""
    weights = numpy_helper.from_array(weights_of(seed), "w")
    nodes = [helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["floats", "w"], [outputs[-1]]))
    nodes += [helper.make_node("Neg", [outputs[-1]], [other]) for other in outputs[:-1]]
    taken = helper.make_tensor_value_info(name, dtype, [batch, width])
    given = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [batch, CLASSES]) for one in outputs]
    return _save(path, nodes, [taken], given, [weights], is_external=is_external)


def centred(path: Path) -> Path:
    """Write x @ W less its mean over the batch: a model whose rows depend on each other."""
    weights = numpy_helper.from_array(weights_of(0), "w")
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["raw"]),
        helper.make_node("ReduceMean", ["raw", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["raw", "mean"], ["logits"]),
    ]
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    return _save(path, nodes, [taken], [given], [weights, axes])


def mapping(path: Path) -> Path:
    """Write x @ W, and beside it a dictionary for each row, as converters of scikit-learn's models do."""
    weights = numpy_helper.from_array(weights_of(0), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["probabilities"]),
        helper.make_node(
            "ZipMap",
            ["probabilities"],
            ["maps"],
            domain="ai.onnx.ml",
            classlabels_int64s=list(range(CLASSES)),
        ),
    ]
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    row = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    maps = helper.make_value_info("maps", helper.make_sequence_type_proto(row))
    given = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", CLASSES])
    return _save(path, nodes, [taken], [maps, given], [weights])


VOCABULARY, LENGTH = 11, 4
"""What `reader` takes: token ids below the first, in rows of the second."""


def reader(path: Path, seed: int, inputs: Sequence[str], length: int | str = LENGTH) -> Path:
    """Write a model of tokens: the sum of the embeddings that the mask keeps, plus the sum of the types.

    Args:
        path: Where to.
        seed: Of the embeddings.
        inputs: In the graph's order: input_ids, attention_mask, and perhaps token_type_ids.
        length: Of a row.
    """
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, CLASSES)).astype(np.float32)
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    last = numpy_helper.from_array(np.array([2], np.int64), "last")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["masks"]),
        helper.make_node("Mul", ["embedded", "masks"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axes"], ["read"], keepdims=0),
    ]
    if "token_type_ids" in inputs:
        nodes += [
            helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["types", "axes"], ["typed"], keepdims=1),
            helper.make_node("Add", ["read", "typed"], ["logits"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["read"], ["logits"]))
    taken = [helper.make_tensor_value_info(one, TensorProto.INT64, ["batch", length]) for one in inputs]
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    return _save(path, nodes, taken, [given], [numpy_helper.from_array(table, "table"), axes, last])


def read_by_hand(
    seed: int, ids: npt.NDArray[Any], mask: npt.NDArray[Any], types: npt.NDArray[Any] | None
) -> npt.NDArray[np.float32]:
    """Return what `reader` answers, by NumPy alone."""
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, CLASSES)).astype(np.float32)
    found = (table[ids] * mask[..., None]).sum(axis=1)
    return np.asarray(found if types is None else found + types.sum(axis=1, keepdims=True), np.float32)


_OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]


def _save(
    path: Path,
    nodes: list[Any],
    taken: list[Any],
    given: list[Any],
    tensors: list[Any],
    *,
    is_external: bool = False,
) -> Path:
    graph = helper.make_graph(nodes, path.stem, taken, given, tensors)
    model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path, save_as_external_data=is_external, location=f"{path.name}.data", size_threshold=0)
    return path


class Linear(nn.Module):
    """The same as `linear`, as a module; `weight` as `nn.Linear` has it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES, bias=False)
        self.layer.weight.data = torch.from_numpy(weights_of(seed).T.copy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ W."""
        return self.layer(x)  # type: ignore[no-any-return]  # torch's


def build() -> nn.Module:
    """Return a module, as a family file names its function."""
    return Linear()


def exported(path: Path, model: nn.Module, example: Any = None, *, is_dynamic: bool = True) -> Path:
    """Write a module as a .pt2 file, for batches of any size."""
    example = (torch.ones(2, WIDTH),) if example is None else example
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in example) if is_dynamic else None
    torch.export.save(torch.export.export(model, example, dynamic_shapes=dynamic), path)
    return path


def queries(n: int, seed: int = RNG_SEED) -> npt.NDArray[np.float32]:
    """Return queries of the linear models, read-only as those from the wire are."""
    found = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    found.flags.writeable = False
    return found


def written(folder: Path, *members: str, head: str = "") -> Path:
    """Write a family file with these members, each without its dash."""
    path = folder / "family.yaml"
    lines = "\n".join(f"  - {{{member}}}" for member in members)
    path.write_text(f"family: tiny\n{head}\nmembers:\n{lines}\n", encoding="utf-8")
    return path
