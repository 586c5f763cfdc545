"""A member from an ONNX file, run by ONNX Runtime. Large files keep their tensors in files beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_worker.family.file import EXTRA
from gpu_worker.family.member import check_file, digest_of_files, fault
from gpu_worker.family.packing import Taken, parsed_dtype
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt
    import torch

    from gpu_worker.family.file import Family, FamilyMember

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
"""ONNX Runtime's names of what runs a model."""

_DTYPES = {"float": "float32", "double": "float64"}  # others are NumPy's names
_QUIET = 3  # errors alone: its warnings are about optimisations

HOW = (
    "torch.onnx.export(model, (example,), FILE, dynamo=True, "
    "dynamic_shapes=({0: torch.export.Dim('batch')},)), with an example of two rows"
)
"""How a model is exported so that it takes batches of any size."""


class OnnxMember:
    """A model in an ONNX file; attributes as of `Member`."""

    taken: tuple[Taken, ...] | None

    def __init__(self, family: Family, member: FamilyMember) -> None:
        self._onnx, self._runtime = _installed()
        self._family, self._member = family, member
        self.name = member.name
        check_file(family, member, "an ONNX file")
        self.digest, self.n_bytes = self._digest()
        self._session = self._new_session([CPU], optimised=False)
        self.taken = tuple(self._taken(one) for one in self._session.get_inputs())
        self.runs_by = "ONNX Runtime"

    def direct(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run it on the CPU, without optimisations; outputs that are no tensors, such as maps, are left."""
        names = [one.name for one in self._session.get_outputs() if one.type.startswith("tensor")]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def settle(self, device: torch.device, threads: int | None) -> None:
        """Make the session that serves, and drop the one that does not optimise."""
        provider: Any = CPU
        if device.type == "cuda":
            if CUDA not in self._runtime.get_available_providers():
                raise ConfigError(
                    f"--device {device}: ONNX Runtime here has no {CUDA}: expected the package "
                    "onnxruntime-gpu instead of onnxruntime, or --device cpu"
                )
            provider = (CUDA, {"device_id": str(device.index or 0)})
        wanted = provider if isinstance(provider, str) else provider[0]
        providers = [provider] if provider == CPU else [provider, CPU]
        self._session = self._new_session(providers, optimised=True, threads=threads)
        got = self._session.get_providers()
        if got[0] != wanted:  # it falls back without an error where CUDA's libraries cannot be loaded
            raise ConfigError(
                f"--device {device}: ONNX Runtime could not load {wanted} and would run on {got[0]}: "
                "expected the CUDA and cuDNN that its release needs, or --device cpu"
            )
        self.runs_by = f"ONNX Runtime {self._runtime.__version__}, {wanted}"

    def run(self, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> npt.NDArray[Any]:
        """Run it; nothing that only other outputs need is computed."""
        found: npt.NDArray[Any] = self._session.run([output], dict(inputs))[0]
        return found

    def _new_session(self, providers: list[Any], *, optimised: bool, threads: int | None = None) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or 1
        # Threads that wait for work would use the cores of the next member's, and of the sockets' thread.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimised:
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._runtime.InferenceSession(self._member.model, options, providers=providers)
        except Exception as error:  # its classes have no common base but Exception
            raise fault(
                self._family, self._member, "expected an ONNX file that ONNX Runtime takes", error
            ) from error

    def _digest(self) -> tuple[str, int]:
        """Return the digest of the file and of those beside it with its tensors, and their bytes."""
        path = Path(self._member.model)
        try:
            model = self._onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's, which is not imported here
            raise fault(self._family, self._member, "expected an ONNX file", error) from error
        beside = sorted({path.parent / location for location in _locations(self._onnx, model)})
        lacking = [one.name for one in beside if not one.is_file()]
        if lacking:
            raise fault(
                self._family, self._member,
                f"its tensors are in {', '.join(lacking)}, expected beside it: copy the files together, "
                "under the names that they were exported with",
            )  # fmt: skip
        try:
            return digest_of_files([path, *beside])
        except OSError as error:
            raise fault(self._family, self._member, "expected readable files", error) from error

    def _taken(self, one: Any) -> Taken:
        """Return an input of the graph, whose first axis has to be of any size."""
        word = str(one.type).removeprefix("tensor(").removesuffix(")")
        dtype = parsed_dtype(_DTYPES.get(word, word), f"member {self.name!r}: input {one.name!r}")
        shape = [size if isinstance(size, int) else None for size in one.shape]
        if not shape or shape[0] is not None:
            raise fault(
                self._family, self._member,
                f"input {one.name!r}: expected a first axis of any size, for batches, got shape {one.shape}: "
                f"export it again: {HOW}",
            )  # fmt: skip
        return Taken(one.name, dtype, tuple(shape[1:]))


def _installed() -> tuple[Any, Any]:
    """Return the modules onnx and onnxruntime."""
    try:
        import onnx  # noqa: PLC0415  an extra's
        import onnxruntime  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"an ONNX member: {error.name}: not installed; try: pip install '{EXTRA}'; for GPUs "
            "onnxruntime-gpu instead of onnxruntime"
        ) from error
    return onnx, onnxruntime


def _locations(onnx: Any, model: Any) -> Iterator[str]:
    """Yield the files with tensors of a model, once for each tensor, of subgraphs and functions too."""
    for tensor in _tensors(model.graph):
        yield from _location(onnx, tensor)
    for function in model.functions:
        for node in function.node:
            for tensor in _of_node(node):
                yield from _location(onnx, tensor)


def _location(onnx: Any, tensor: Any) -> Iterator[str]:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield attribute.t
        yield from attribute.tensors
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)
