"""Slices never outlive the parameters that they are of, however these are replaced.

What is expected is a plain module with the new parameters, cut by hand.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn
from torch.nn.utils import parametrizations

from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.subnet import Subnet
from tests.gpu_worker.supernet.answers import alike, answer, drawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.supernet.supernet import Supernet

    State = dict[str, torch.Tensor]


class Net(nn.Module):
    """One layer of each kind that keeps slices."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.gate = nn.Linear(16, 32)
        self.scale = nn.LayerNorm(16)
        self.memory = nn.GRU(16, 6, batch_first=True)
        self.down = nn.Linear(6, 3)
        for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.dim() == 1 else nn.init.normal_(tensor)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 3) of (B, 4)."""
        x = F.glu(self.gate(self.norm(self.up(x))))
        out: torch.Tensor = self.down(self.memory(self.scale(x)[:, None])[0][:, 0])
        return out


def plain(p: State, x: torch.Tensor) -> torch.Tensor:
    """Compute the subnet of half the units everywhere, of these parameters."""
    x = F.linear(x, p["up.weight"][:8], p["up.bias"][:8])
    x = (x - p["norm.running_mean"][:8]) / (p["norm.running_var"][:8] + 1e-5).sqrt()
    x = x * p["norm.weight"][:8] + p["norm.bias"][:8]
    rows = [*range(8), *range(16, 24)]
    x = F.glu(F.linear(x, p["gate.weight"][rows][:, :8], p["gate.bias"][rows]))
    x = F.layer_norm(x, (8,), p["scale.weight"][:8], p["scale.bias"][:8])
    rows = [6 * gate + i for gate in range(3) for i in range(3)]
    gru = nn.GRU(8, 3).double()
    cut = {name: p[f"memory.{name}"][rows] for name in gru.state_dict()}
    cut["weight_ih_l0"] = cut["weight_ih_l0"][:, :8]
    cut["weight_hh_l0"] = cut["weight_hh_l0"][:, :3]
    gru.load_state_dict(cut)
    return F.linear(gru(x[None])[0][0], p["down.weight"][:, :3], p["down.bias"])


def supernet_of(model: nn.Module) -> Supernet:
    """Insert, with every layer at half its units."""
    supernet = insert(
        model,
        elastic=[Elastic("up", ["up"]), Elastic("gate", ["gate"], parts=2), Elastic("units", ["memory"])],
    ).eval()
    supernet.host([Subnet("half", {"w": [0.5, 0.5, 0.5]})])
    return supernet


def run(supernet: Supernet, x: torch.Tensor) -> torch.Tensor:
    """Run what is actuated, without actuating again."""
    with torch.no_grad():
        out: torch.Tensor = supernet(x)
    return out


def new_data(model: nn.Module, state: State) -> None:
    """Give each parameter other data."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        parameter.data = state[name].clone()


def new_parameters(model: nn.Module, state: State) -> None:
    """Put other parameters and buffers in the place of each."""
    for path, module in model.named_modules():
        for name in list(module._parameters):
            setattr(module, name, nn.Parameter(state[f"{path}.{name}"].clone()))
        for name in list(module._buffers):
            setattr(module, name, state[f"{path}.{name}"].clone())


def written(model: nn.Module, state: State) -> None:
    """Write into each in place."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(state[name])


def assigned(model: nn.Module, state: State) -> None:
    """Load a state dict, whose tensors become the model's."""
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)


@pytest.mark.parametrize("change", [new_data, new_parameters, written, assigned])
@pytest.mark.parametrize("is_packed", [False, True])
def test_new_parameters_are_seen(change: Callable[[nn.Module, State], None], is_packed: bool) -> None:
    """The next pass uses them, though nothing was actuated or hosted in between."""
    model, x = Net(), drawn(2, 4)
    old, new = model.state_dict(), Net(seed=1).state_dict()
    expected_old, expected_new = plain(old, x), plain(new, x)
    supernet = supernet_of(model)
    if is_packed:
        assert supernet.pack([0], x, budget_bytes=10**6) > 0

    alike(run(supernet, x), expected_old)
    change(model, new)
    alike(run(supernet, x), expected_new)
    new_data(model, Net().state_dict())  # the parameters that are new have moved
    alike(run(supernet, x), expected_old)


@pytest.mark.parametrize("is_data", [False, True])
def test_each_new_parameter_or_buffer_is_seen_by_itself(is_data: bool) -> None:
    """One after the other becomes another tensor, or other data; the answer follows each time."""
    model, x = Net(), drawn(2, 4)
    state, new = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        Net(seed=1).state_dict(),
    )
    supernet = supernet_of(model)
    alike(run(supernet, x), plain(state, x))
    for path in [name for name in state if "tracked" not in name]:
        module, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        state[path] = new[path]
        if is_data:
            getattr(module, name).data = new[path].clone()
        else:
            old = getattr(module, name)
            setattr(
                module, name, type(old)(new[path].clone()) if isinstance(old, nn.Parameter) else new[path]
            )
        alike(run(supernet, x), plain(state, x))


def test_a_functional_call_is_answered_by_its_parameters_and_no_other_is() -> None:
    """Within the call the given parameters count, before and after it the model's own."""
    model, x, new = Net(), drawn(2, 4), Net(seed=1).state_dict()
    expected = plain(model.state_dict(), x)
    supernet = supernet_of(model)
    given = {f"model.{name}": tensor for name, tensor in new.items()}

    for _ in range(2):
        alike(run(supernet, x), expected)
        with torch.no_grad():
            alike(torch.func.functional_call(supernet, given, (x,)), plain(new, x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("is_before", [True, False])
def test_a_computed_weight_is_computed_for_each_pass(
    normed: Callable[[nn.Module], nn.Module], is_before: bool
) -> None:
    """Weight norm of a half: of the whole weight's rows, which change with magnitude and direction."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3)).double(), drawn(2, 4)
    if is_before:
        normed(model[0])
    supernet = insert(model, elastic=[Elastic("up", ["0"])])
    if not is_before:
        normed(model[0])

    for _ in range(2):
        magnitude, direction = (p for p in model[0].parameters() if p.dim() == 2)
        if magnitude.shape[1] > 1:
            magnitude, direction = direction, magnitude
        weight = direction * magnitude / direction.norm(dim=1, keepdim=True)
        inner = F.linear(x, weight[:8], model.get_parameter("0.bias")[:8])
        expected = F.linear(inner, model.get_parameter("1.weight")[:, :8], model.get_parameter("1.bias"))
        alike(answer(supernet, {"w": [0.5]}, x), expected)
        with torch.no_grad():
            magnitude.mul_(3)
            direction.add_(1)


def test_a_spectral_norm_is_of_the_whole_weight() -> None:
    """A half of a weight that is divided by its largest singular value."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 16).double()
    weight, bias, x = layer.weight.detach().clone(), layer.bias.detach().clone(), drawn(2, 4)
    model = nn.Sequential(parametrizations.spectral_norm(layer, n_power_iterations=200))
    supernet = insert(model, elastic=[Elastic("up", ["0"])])
    expected = F.linear(x, weight[:8] / torch.linalg.svdvals(weight)[0], bias[:8])

    torch.testing.assert_close(answer(supernet, {"w": [0.5]}, x), expected)


def test_statistics_are_dropped_when_their_name_is_hosted_with_another_control_tuple() -> None:
    """They belong to a subnet, and a name that is used again is another one."""
    model, x = Net(), drawn(2, 4)
    expected = plain(model.state_dict(), x)
    supernet = supernet_of(model)
    supernet.host([Subnet("a", {"w": [1.0, 1.0, 1.0]})])
    wrong = SubnetStatistics((16,), torch.full((32,), 7.0))
    supernet.set_statistics({"a": wrong, "later": wrong})
    supernet.host([Subnet("b", {"w": [0.75, 0.5, 0.5]})])
    supernet.host([Subnet("a", {"w": [1, 1, 1]})])

    assert set(supernet.statistics) == {"a", "later"}  # the same tuple, after another was hosted
    supernet.host([Subnet("a", {"w": [0.5, 0.5, 0.5]})])
    alike(run(supernet, x), expected)
    assert set(supernet.statistics) == {"later"}


def test_statistics_set_before_hosting_are_those_of_what_is_hosted_first() -> None:
    """They were set for a name; the first control tuple with it is theirs, the next one is not."""
    supernet = supernet_of(Net())
    supernet.set_statistics({"later": SubnetStatistics((16,), torch.ones(32))})
    supernet.host([Subnet("later", {"w": [1.0, 1.0, 1.0]})])
    assert set(supernet.statistics) == {"later"}

    supernet.host([Subnet("later", {"w": [0.5, 0.5, 0.5]})])
    assert not supernet.statistics


def test_a_deep_copy_looks_after_its_own_parameters() -> None:
    """Moving the copy's parameters is seen by the copy, and only there."""
    model, x = Net(), drawn(2, 4)
    expected_old, new = plain(model.state_dict(), x), Net(seed=1).state_dict()
    supernet = supernet_of(model)
    alike(run(supernet, x), expected_old)
    other = copy.deepcopy(supernet)
    alike(run(other, x), expected_old)
    new_data(other.model, new)

    alike(run(other, x), plain(new, x))
    alike(run(supernet, x), expected_old)
