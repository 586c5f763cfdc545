"""Members that torch runs: a program that `torch.export` wrote, and a function that returns a module."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import tree_unflatten

from gpu_worker.family.member import DIGEST_BYTES, check_file, digest_of_files, fault
from gpu_worker.family.packing import Taken
from gpu_worker.models.factory import SEED
from gpu_worker.supernet.checkpoints import load_checkpoint
from superserve.plugins import load_attribute

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from gpu_worker.family.file import Family, FamilyMember

HOW = (
    "torch.export.save(torch.export.export(model, (example,), "
    "dynamic_shapes=({0: torch.export.Dim('batch')},)), FILE), with an example of two rows"
)
"""How a program is exported so that it takes batches of any size."""

Arrays = Mapping[str, "npt.NDArray[Any]"]


class _TorchMember:
    """What torch runs; subclasses say what is called, and with what. Attributes as of `Member`."""

    def __init__(self, name: str, digest: str, n_bytes: int, taken: tuple[Taken, ...] | None) -> None:
        self.name, self.digest, self.n_bytes, self.taken = name, digest, n_bytes, taken
        self.runs_by = "torch"
        self._device = torch.device("cpu")

    def direct(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Run it on the CPU."""
        return {name: _array(output) for name, output in self._outputs(inputs).items()}

    def settle(self, device: torch.device, threads: int | None) -> None:
        """Move it to its device."""
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = device
        if device.type != "cpu":
            self._move(device)
        self.runs_by = f"torch {torch.__version__}, {device}"

    def run(self, inputs: Arrays, output: str) -> npt.NDArray[Any]:
        """Run it."""
        return _array(self._outputs(inputs)[output])

    def _outputs(self, inputs: Arrays) -> dict[str, torch.Tensor]:
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        with torch.inference_mode():
            return _named(self._call(tensors))

    def _call(self, tensors: dict[str, torch.Tensor]) -> object:
        raise NotImplementedError

    def _move(self, device: torch.device) -> None:
        raise NotImplementedError


class ExportedMember(_TorchMember):
    """A program in a .pt2 file."""

    def __init__(self, family: Family, member: FamilyMember) -> None:
        check_file(family, member, "a torch.export file")
        self._program = _loaded(family, member)
        self._run = self._program.module()
        self._user = [
            spec.arg
            for spec in self._program.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
        digest, n_bytes = digest_of_files([Path(member.model)])
        super().__init__(member.name, digest, n_bytes, self._stated(family, member))

    def _stated(self, family: Family, member: FamilyMember) -> tuple[Taken, ...]:
        examples = {
            node.name: node.meta["val"] for node in self._program.graph.nodes if node.op == "placeholder"
        }
        found = []
        for name in self._tensor_names():
            shape = [size if isinstance(size, int) else None for size in examples[name].shape]
            if not shape or shape[0] is not None:
                raise fault(
                    family, member,
                    f"input {name!r}: expected a first axis of any size, for batches, got shape {shape}: "
                    f"export it again: {HOW}",
                )  # fmt: skip
            dtype = str(examples[name].dtype).removeprefix("torch.")
            found.append(Taken(name, dtype, tuple(shape[1:])))
        return tuple(found)

    def _tensor_names(self) -> list[str]:
        return [arg.name for arg in self._user if not isinstance(arg, ConstantArgument)]

    def _call(self, tensors: dict[str, torch.Tensor]) -> object:
        leaves = [arg.value if isinstance(arg, ConstantArgument) else tensors[arg.name] for arg in self._user]
        spec = self._program.call_spec.in_spec
        assert spec is not None, "every exported program has one"
        args, kwargs = tree_unflatten(leaves, spec)
        return self._run(*args, **kwargs)

    def _move(self, device: torch.device) -> None:
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415  it imports much

        self._program = move_to_device_pass(self._program, device)
        self._run = self._program.module()


def _loaded(family: Family, member: FamilyMember) -> torch.export.ExportedProgram:
    """Return the program of a file. torch logs what is wrong with it, and raises without a reason."""
    with _torch_says() as said:
        try:
            return torch.export.load(member.model)
        except Exception as error:
            what = "expected a file that torch.export.save wrote"
            if found := next((match[1] for line in said if (match := _UNKNOWN_CLASS.search(line))), None):
                what = (
                    f"it takes or returns a {found}, which torch knows only where its package is imported: "
                    "export a model that returns tensors, in tuples or dictionaries (return_dict=False in "
                    "the configuration of a model of transformers)"
                )
                raise fault(family, member, what) from error
            raise fault(family, member, what, error) from error


_UNKNOWN_CLASS = re.compile(r"Deserializing ([\w.]+) in pytree is not registered")


@contextmanager
def _torch_says() -> Iterator[list[str]]:
    """Give what torch.export logs within the block, instead of printing it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(handler.format(record))  # type: ignore[method-assign]  # a handler's one method
    logger = logging.getLogger("torch.export")
    before, logger.propagate = logger.propagate, False
    others, logger.handlers = logger.handlers, [handler]
    try:
        yield said
    finally:
        logger.propagate, logger.handlers = before, others


class FunctionMember(_TorchMember):
    """A module that a function of the user's returns, perhaps filled from a checkpoint."""

    def __init__(self, family: Family, member: FamilyMember) -> None:
        self._module = _built(family, member).eval().requires_grad_(requires_grad=False)
        if member.weights is not None:
            load_checkpoint(self._module, Path(member.weights))
        tensors = self._module.state_dict().values()
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        super().__init__(member.name, _digest(self._module), n_bytes, _arguments(self._module, family))

    def _call(self, tensors: dict[str, torch.Tensor]) -> object:
        if list(tensors) == [""]:
            return self._module(tensors[""])
        return self._module(**tensors)

    def _move(self, device: torch.device) -> None:
        self._module = copy.deepcopy(self._module).to(device)


def _built(family: Family, member: FamilyMember) -> torch.nn.Module:
    module, _, attribute = member.model.partition(":")
    try:
        function = load_attribute(module, attribute)
    except (ImportError, AttributeError) as error:
        raise fault(family, member, "expected a function that can be imported", error) from error
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            built = function()
    except Exception as error:
        raise fault(
            family, member, "expected a function that returns a module, and it raised", error
        ) from error
    if not isinstance(built, torch.nn.Module):
        raise fault(
            family, member, f"expected a function that returns a torch.nn.Module, got {type(built).__name__}"
        )
    return built


def _arguments(module: torch.nn.Module, family: Family) -> tuple[Taken, ...] | None:
    """Return the arguments of a module's forward that the family names; None if it names none.

    An argument that the family does not name keeps its default.
    """
    if not family.inputs:
        return None
    parameters = inspect.signature(module.forward).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return tuple(
        Taken(name, None, None, is_required=one.default is inspect.Parameter.empty)
        for name, one in parameters.items()
        if one.kind is not inspect.Parameter.VAR_POSITIONAL
    )


def _digest(module: torch.nn.Module) -> str:
    """Return a hash of a module's layers and tensors; code in its forward does not show."""
    found = hashlib.blake2b(repr(module).encode(), digest_size=DIGEST_BYTES)
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
        found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _named(outputs: object) -> dict[str, torch.Tensor]:
    """Return a model's tensors by name: a dictionary's keys, or places from "0"; what lies deeper is left."""
    if isinstance(outputs, torch.Tensor):
        return {"0": outputs}
    if not isinstance(outputs, Mapping | list | tuple):
        raise TypeError(f"expected tensors, in tuples, lists or dictionaries, got {type(outputs).__name__}")
    pairs = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return {str(name): output for name, output in pairs if isinstance(output, torch.Tensor)}


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        tensor = tensor.float()
    found: npt.NDArray[Any] = tensor.cpu().numpy()
    return found
