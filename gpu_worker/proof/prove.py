"""Prove a supernet: run each subnet of a sample in place and as a masked whole network, and compare.

prove(supernet, torch.zeros(2, 3, 32, 32))
"""

from __future__ import annotations

import contextlib
import copy
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gpu_worker.proof.absence import ProofError, UnjudgedError, UnsliceableError
from gpu_worker.proof.flow import DataFlow
from gpu_worker.proof.rules import tensors_in
from gpu_worker.proof.sample import covering, drawn
from gpu_worker.proof.whole import LayerRun, OracleRun, SubnetCut, WholeNetwork, members_of, tensors_of
from gpu_worker.supernet.actuation import actuate
from gpu_worker.supernet.supernet import SubnetStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpu_worker.supernet.original import Original
    from gpu_worker.supernet.supernet import Supernet
    from superserve.subnet import Subnet

MOST_SUBNETS = 32
"""Subnets that a proof looks at, at most."""

EXTRA_S = 10.0
"""Subnets that add no size and no set of blocks are looked at until a proof has taken this long."""

TOLERANCE = 1e-9
"""Largest deviation in float64, relative to a layer's largest number; faults deviate by 1e-3 and more."""

TOLERANCE_LOWERED = 1e-4
"""The same for a model that casts to float32 on its own, or takes no doubles, and so is only as exact."""

_ROUNDINGS = 20
"""For one that casts to halves, how often their relative rounding may add up."""

TOLERANCE_RESIDENT = {torch.float32: 1e-2, torch.float64: 1e-2}
"""The same between the supernet as it is, in its own precision, and a copy in float32."""

TOLERANCE_HALF = 0.2
"""The same in half precision; bfloat16 was seen 0.01 off, and other weights give about 1."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved.

    Attributes:
        subnets: Names of those compared.
        n_layers: Outputs of layers that were compared.
        deviation: The largest, relative to a layer's largest number.
        seconds: How long it took.
    """

    subnets: tuple[str, ...]
    n_layers: int
    deviation: float
    seconds: float

    def __str__(self) -> str:
        """Return it in one line."""
        return (
            f"{len(self.subnets)} subnets equal the masked whole network in {self.n_layers} layer outputs, "
            f"within {self.deviation:.1g}; {self.seconds:.1f} s"
        )


class _Inputs(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def cast(self, dtype: torch.dtype, device: torch.device) -> _Inputs:
        def one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return _Inputs(tuple(map(one, self.args)), {name: one(value) for name, value in self.kwargs.items()})


def prove(
    supernet: Supernet,
    example: Any,
    *,
    subnets: Sequence[Subnet] | None = None,
    most: int = MOST_SUBNETS,
    checks_resident: bool = True,
) -> Proof:
    """Prove that subnets in place are what their control tuples say.

    Args:
        supernet: As insertion returned it, filled or not, before `trim`; it is left as it was.
        example: A batch of at least two inputs as the model takes them: a tensor, a tuple of arguments, or a
            dictionary of keyword arguments. Numbers should be random, and small inputs save time.
        subnets: Those to choose from; by default all that there are.
        most: How many to look at.
        checks_resident: Also compare the supernet as it is with a copy of it: for one that has run.

    Raises:
        ProofError: Naming the layer, the size and the deviation; or what cannot be judged, and what to do.
    """
    began = time.monotonic()
    original = _original(supernet)
    controls = supernet.controls
    chosen, n_needed = drawn(controls, most) if subnets is None else covering(subnets, controls, most)
    inputs = _inputs(example)
    judge = _judge(supernet, original, inputs, chosen)
    names = []
    for row, subnet in enumerate(chosen):
        if row >= n_needed and time.monotonic() - began > EXTRA_S:
            break
        judge.compare(row)
        names.append(subnet.name)
    if checks_resident:
        _check_resident(supernet, chosen[: len(names)], inputs)
    return Proof(tuple(names), judge.n_layers, judge.deviation, time.monotonic() - began)


def _judge(supernet: Supernet, original: Original, inputs: _Inputs, subnets: tuple[Subnet, ...]) -> _Judge:
    """Return what compares in float64; in float32 if the model has an operation that takes no doubles."""
    cpu = torch.device("cpu")
    try:
        exact = _copied(supernet, torch.float64)
        judge = _Judge(exact, original, inputs.cast(torch.float64, cpu), subnets, TOLERANCE)
        judge.look_at_whole()
    except UnjudgedError as error:
        plain = _copied(supernet, torch.float32)
        judge = _Judge(plain, original, inputs.cast(torch.float32, cpu), subnets, TOLERANCE_LOWERED)
        try:
            judge.look_at_whole()
        except UnjudgedError:
            raise error from None
    return judge


def _copied(supernet: Supernet, dtype: torch.dtype) -> Supernet:
    """Return a copy in host memory and eval mode.

    Raises:
        UnjudgedError: Memory does not suffice, or a module refuses.
    """
    try:
        return copy.deepcopy(supernet).cpu().eval().to(dtype)
    except Exception as error:
        raise UnjudgedError(f"the supernet cannot be copied in {dtype}: {_plain(error)}") from error


def _original(supernet: Supernet) -> Original:
    original = supernet.original
    if original is None:
        raise UnjudgedError("the supernet has no record of its original: build it with `insert`")
    if original.model is None:
        raise ProofError(original.why_not)
    return original


def _inputs(example: Any) -> _Inputs:
    if isinstance(example, dict):
        return _Inputs((), example)
    return _Inputs(example if isinstance(example, tuple) else (example,), {})


# --- the supernet as it is --------------------------------------------------------------------


def _check_resident(supernet: Supernet, subnets: Sequence[Subnet], inputs: _Inputs) -> None:
    """Compare the supernet, in its own precision, with a copy in which nothing is left of earlier passes."""
    copied = _copied(supernet, torch.float32)
    dtype = _dtype(supernet.model)
    tolerance = TOLERANCE_RESIDENT.get(dtype, TOLERANCE_HALF)
    own = inputs.cast(dtype, supernet.device)
    plain = inputs.cast(torch.float32, torch.device("cpu"))
    modes = [(module, module.training) for module in supernet.modules()]
    supernet.eval()
    try:
        with torch.inference_mode():
            for subnet in subnets:
                settings = supernet.settings_of(subnet)
                found = tensors_in(supernet.run_with(settings, *own.args, **own.kwargs))
                expected = tensors_in(
                    copied.run_with(copied.settings_of(subnet), *plain.args, **plain.kwargs)
                )
                for one, other in zip(found, expected, strict=True):
                    deviation = _deviation(one.cpu().double(), other.double())
                    if not deviation <= tolerance:
                        raise ProofError(
                            f"subnet {subnet.name} {subnet.control}: the supernet answers {deviation:.2g} "
                            "off a fresh copy of it: it still uses slices of weights that have been "
                            "replaced (p.data = ...), or its modules run past their changed classes"
                        )
    except ProofError:
        raise
    except Exception as error:
        raise ProofError(f"the supernet fails on the example: {_plain(error)}") from error
    finally:
        for module, training in modes:
            module.training = training


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the precision of a model's products; its norms may have another."""
    weights = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    return next((tensor.dtype for tensor in weights if tensor.dim() > 1), torch.float32)


def _deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number; infinite if just one is no number."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    difference = (found - expected).abs().max()
    if bool(difference.isfinite()):
        largest = expected.abs().max()
        return float(difference / largest) if largest else float(difference)
    both = found.isfinite() & expected.isfinite()
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool((~both & ~same).any()):
        return float("inf")
    largest = expected[both].abs().max() if bool(both.any()) else torch.zeros(())
    difference = (found - expected)[both].abs().max() if bool(both.any()) else torch.zeros(())
    return float(difference / largest) if largest else float(difference)


# --- exact ------------------------------------------------------------------------------------


class _Judge:
    """Compares an exact copy of a supernet with the oracle."""

    def __init__(
        self,
        copied: Supernet,
        original: Original,
        inputs: _Inputs,
        subnets: tuple[Subnet, ...],
        tolerance: float,
    ) -> None:
        assert original.model is not None, "the caller has looked"
        self._supernet, self._original, self._inputs, self._subnets = copied, original, inputs, subnets
        self._modules = dict(copied.model.named_modules())
        self._norms = {norm.path for norm in copied.norms}
        _vary(copied.model)
        self._whole = WholeNetwork(original, tensors_of(copied.model), self._modules)
        copied.host(subnets)
        self._tolerance = tolerance
        self._layers: set[str] = set()  # all that run in the whole network
        self.n_layers, self.deviation = 0, 0.0

    def look_at_whole(self) -> None:
        """Run the whole network, and refuse what its run shows.

        Raises:
            ProofError: It fails, has no numbers, or uses blocks or parameters in a way that nothing can
            follow.
        """
        flow = DataFlow()
        run = self._oracle(SubnetCut(), "the whole network", flow)
        self._layers = {ran.path for ran in run.layers}
        if not run.output.outputs or not any(bool(out.isfinite().any()) for out in run.output.outputs):
            raise UnjudgedError("the whole network gives no finite numbers on the example")
        elastic = {path for size in self._original.sizes.values() for path in size.layers}
        for path, where in run.outside.items():
            if path in elastic:
                raise UnsliceableError(
                    f"layer {path}: a parameter is used outside of the layer's own forward, at {where}, and "
                    "would be used whole there: call the layer instead"
                )
        left_out = set().union(*(self._left_out(subnet) for subnet in self._subnets))
        self._look_at_blocks(left_out, run, flow)

    def _look_at_blocks(self, left_out: set[str], run: OracleRun, flow: DataFlow) -> None:
        for path in sorted(left_out):
            if not run.n_calls.get(path):
                raise UnsliceableError(
                    f"block {path}: never called as a module, so that leaving it out has no effect; name "
                    "the modules that are called"
                )
        gives = {
            member: stage.skipped
            for stage in self._original.stages
            for block in stage.blocks
            for member in members_of(self._whole.model, block)
        }
        for call in flow.calls:
            if call.path not in left_out or gives[call.path] != "input":
                continue
            where = flow.meets_its_input(call)
            if where is not None:
                raise UnsliceableError(
                    f"block {call.path}: its caller combines what the block returns with what it was given "
                    f"({where}), as in x + block(x): left out it would give x + x. Declare "
                    'Stage(..., skipped="zero"), or move the sum into the block'
                )

    def compare(self, row: int) -> None:
        """Compare one subnet in place with the whole network in which the rest is absent.

        Raises:
            ProofError: They differ, or it cannot be judged.
        """
        try:
            self._compare(row)
        except ProofError as error:
            first, second = (self._oracle(SubnetCut(), "the whole network", None).output for _ in range(2))
            for one, other in zip(first.outputs, second.outputs, strict=True):
                if _deviation(one, other) > TOLERANCE_LOWERED:
                    raise UnjudgedError(
                        "the whole network answers the same batch differently each time: it draws random "
                        "numbers, or keeps what it has seen"
                    ) from error
            raise

    def _compare(self, row: int) -> None:
        subnet = self._subnets[row]
        label = f"subnet {subnet.name} {subnet.control}"
        statistics = _Statistics(self._supernet, subnet)
        sizes = self._supernet.controls.sizes_of(subnet.control)
        left_out = self._left_out(subnet)
        expected = self._oracle(SubnetCut(frozenset(left_out), sizes.outputs, statistics.of), label, None)
        tolerance = self._tolerance
        if expected.rounding:
            tolerance = max(TOLERANCE_LOWERED, _ROUNDINGS * expected.rounding)
        if not statistics.is_held:
            self._supernet.set_statistics({subnet.name: statistics.as_held(expected)})
        self._layers |= {ran.path for ran in expected.layers}
        layers, outputs = self._in_place(row, label, left_out)
        n_calls = Counter(ran.path for ran in expected.layers)
        if n_calls != {path: len(calls) for path, calls in layers.items()}:
            # A supernet may look at a subnet's first pass more closely, by passes of its own.
            layers, outputs = self._in_place(row, label, left_out)
        counted: dict[str, int] = {}
        for ran in expected.layers:
            number = counted[ran.path] = counted.get(ran.path, -1) + 1
            calls = layers.get(ran.path, [])
            if number >= len(calls):
                raise ProofError(f"{label}: layer {ran.path} runs in the whole network and not in place")
            self._compare_one(label, f"layer {ran.path}", ran, calls[number], tolerance)
        extra = [path for path, calls in layers.items() if len(calls) > counted.get(path, -1) + 1]
        if extra:
            raise ProofError(f"{label}: layer {extra[0]} runs in place and not in the whole network")
        self._compare_one(label, "the output", expected.output, outputs, tolerance)

    def _compare_one(
        self, label: str, what: str, ran: LayerRun, found: Sequence[torch.Tensor], tolerance: float
    ) -> None:
        after = f" (cut before it: {', '.join(ran.sizes)})" if ran.sizes else ""
        if len(found) != len(ran.outputs):
            raise ProofError(f"{label}: {what}: gives {len(found)} tensors in place, not {len(ran.outputs)}")
        for expected, shape, one in zip(ran.outputs, ran.shapes, found, strict=True):
            if one.numel() != expected.numel():
                raise ProofError(
                    f"{label}: {what}: has shape {tuple(one.shape)} in place, where {tuple(expected.shape)} "
                    f"of {shape} is kept{after}"
                )
            deviation = _deviation(one.reshape(expected.shape), expected)
            if not deviation <= tolerance:
                raise ProofError(
                    f"{label}: {what}: keeps {tuple(expected.shape)} of {shape}{after} and deviates by "
                    f"{deviation:.2g} of its largest number from the whole network in which the rest is "
                    "masked: insertion does not follow what the model does here"
                )
            self.deviation = max(self.deviation, deviation)
        self.n_layers += 1

    def _left_out(self, subnet: Subnet) -> set[str]:
        kept = self._supernet.controls.sizes_of(subnet.control).blocks
        return {
            member
            for stage, numbers in zip(self._original.stages, kept, strict=True)
            for number, path in enumerate(stage.blocks)
            if number not in numbers
            for member in members_of(self._whole.model, path)
        }

    def _oracle(self, cut: SubnetCut, label: str, flow: DataFlow | None) -> OracleRun:
        try:
            return self._whole.run(self._inputs.args, self._inputs.kwargs, cut, flow)
        except ProofError as error:
            raise type(error)(f"{label}: {error}") from error
        except Exception as error:
            raise UnjudgedError(f"{label}: the masked whole network fails: {_plain(error)}") from error

    def _in_place(
        self, row: int, label: str, left_out: set[str]
    ) -> tuple[dict[str, list[list[torch.Tensor]]], list[torch.Tensor]]:
        """Return the tensors that each call of each layer gives, and the output.

        A layer that is a block itself and is left out is called, or not, as its switch pleases.
        """
        actuate(self._supernet, row)
        entered: list[str] = []
        with (
            _noting(self._modules, self._layers - left_out, self._norms, entered) as found,
            torch.inference_mode(),
        ):
            try:
                output = self._supernet(*self._inputs.args, **self._inputs.kwargs)
            except Exception as error:
                where = f"after layer {entered[-1]}" if entered else "before its first layer"
                raise ProofError(f"{label}: fails in place, {where}: {_plain(error)}") from error
        return found, tensors_in(output)


def _plain(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def _noting(
    modules: dict[str, nn.Module], paths: set[str], norms: set[str], entered: list[str]
) -> Iterator[dict[str, list[list[torch.Tensor]]]]:
    """Note what these modules give, within the block, by the forward of the instance.

    Hooks would not do: torch's encoder layers take another way where there are any.
    """
    found: dict[str, list[list[torch.Tensor]]] = {}

    def noted(path: str, module: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered.append(path)
            output = type(module).forward(module, *args, **kwargs)
            bare = output
            if path in norms and len(args) > 1:
                bare = type(module).forward(module, args[0])  # without the sum and the ReLU that it may do
            found.setdefault(path, []).append([tensor.clone() for tensor in tensors_in(bare)])
            return output

        return forward

    for path in paths:
        modules[path].forward = noted(path, modules[path])
    try:
        yield found
    finally:
        for path in paths:
            del modules[path].forward


# --- numbers ----------------------------------------------------------------------------------


def _vary(model: nn.Module) -> None:
    """Give parameters that are all equal some noise: ones and zeros would hide that a wrong one is used."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                spread = parameter.max() - parameter.min()
                if not spread > 1e-3 * parameter.abs().max():
                    fan = parameter[0].numel() if parameter.dim() > 1 else 10
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(noise / max(fan, 1) ** 0.5)


class _Statistics:
    """One subnet's statistics, held or invented, for the oracle."""

    def __init__(self, supernet: Supernet, subnet: Subnet) -> None:
        held = supernet.statistics.get(subnet.name)
        self._name, self._norms = subnet.name, [norm.path for norm in supernet.norms]
        # Of its name: statistics of another subnet are other numbers, even if it is as wide.
        self._generator = torch.Generator().manual_seed(zlib.crc32(subnet.name.encode()))
        self._found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.is_held = held is not None
        if held is not None:
            at = 0
            for path, channels in zip(self._norms, held.channels, strict=True):
                ends = at + channels, at + 2 * channels
                self._found[path] = held.values[at : ends[0]], held.values[ends[0] : ends[1]]
                at = ends[1]

    def of(self, path: str, channels: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return mean and variance of a norm, (channels,) each; None if the norm's own count."""
        if path not in self._norms:
            return None
        found = self._found.get(path)
        if self.is_held:
            if found is None or not len(found[0]):
                return None
            if len(found[0]) != channels:
                raise ProofError(
                    f"statistics of {self._name}, {path}: expected {channels} channels, got {len(found[0])}"
                )
        elif found is None:
            mean = torch.randn(channels, generator=self._generator) / 2
            found = self._found[path] = mean, 0.5 + torch.rand(channels, generator=self._generator)
        return found

    def as_held(self, run: OracleRun) -> SubnetStatistics:
        """Return the invented ones as a supernet holds them."""
        channels = tuple(run.channels.get(path, 0) for path in self._norms)
        parts = [part for path in self._norms if path in run.channels for part in self._found[path]]
        return SubnetStatistics(channels, torch.cat(parts) if parts else torch.empty(0))
