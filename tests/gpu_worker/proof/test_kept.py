"""The proof at a worker's start: what is not proved is not served, and a proof is not made twice."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.functional import glu

from gpu_worker.cli import UNPROVEN_VARIABLE, Asked, load_executor
from gpu_worker.engines.torch_executor import TorchExecutor, example_input
from gpu_worker.models.kinds import KINDS, SupernetKind, as_floats, resident
from gpu_worker.proof import kept
from gpu_worker.proof.absence import ProofError
from gpu_worker.proof.prove import prove
from gpu_worker.supernet.insertion import Elastic, insert
from gpu_worker.supernet.supernet import SubnetStatistics
from superserve.roles.local import STATE_VARIABLE
from superserve.subnet import Subnet, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu_worker.proof.prove import Proof
    from gpu_worker.supernet.supernet import Supernet

SUBNETS = (Subnet("small", {"w": [0.5]}), Subnet("whole", {"w": [1.0]}))


class Gated(nn.Module):
    """A fused layer whose parts were not declared: the smaller subnet answers wrong without an error."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 4)."""
        found: torch.Tensor = self.b(glu(self.a(x), -1))
        return found


def gated() -> Supernet:
    """Insert as a user would who does not know of parts."""
    return insert(Gated(), elastic=[Elastic("h", ["a"])])


WRONG = SupernetKind(
    name="wrong",
    build=gated,
    input_spec=TensorSpec("float32", (8,)),
    output_spec=TensorSpec("float32", (4,)),
    preprocess=as_floats,
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep proofs in a folder of the test."""
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Proof]:
    """Return the proofs that are made from now on."""
    made: list[Proof] = []

    def noted(*args: Any, **kwargs: Any) -> Proof:
        made.append(prove(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(kept, "prove", noted)
    return made


def load(check: Callable[[Supernet, torch.Tensor], None] | None) -> TorchExecutor:
    """Load the supernet that is wrong, as a worker does."""
    return TorchExecutor.load(f"{__name__}:WRONG", SUBNETS, weights="random", check=check)


def test_what_answers_wrong_is_not_served() -> None:
    """The error names the layer's line and what to do; without the check it is served."""
    with pytest.raises(
        ProofError, match=r"not served: .*size 'h' cut.*parts=N.*--unproven serves it all the same"
    ):
        load(kept.require_proof)

    assert load(None).subnets == SUBNETS


def test_a_worker_proves_its_profiles_subnets_once(
    proofs: list[Proof], caplog: pytest.LogCaptureFixture
) -> None:
    """The second start finds the proof of the first."""
    caplog.set_level(logging.INFO)
    profile, _ = load_executor(Asked("digits"), 1)
    load_executor(Asked("digits"), 1)

    assert [set(proof.subnets) for proof in proofs] == [{row.name for row in profile.subnets}]
    assert sum("proved before: " in message for message in caplog.messages) == 1


@pytest.mark.parametrize("by_variable", [False, True])
def test_unproven_serves_with_a_warning(
    by_variable: bool, proofs: list[Proof], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the option, or by the variable that workers of `cluster up` inherit."""
    if by_variable:
        monkeypatch.setenv(UNPROVEN_VARIABLE, "1")
    load_executor(Asked("digits", unproven=None if by_variable else True), 1)

    assert proofs == []
    assert any("digits is served unproven" in message for message in caplog.messages)


def small_kind() -> Supernet:
    """Return the digits supernet, hosting one subnet."""
    supernet = resident(KINDS["digits"], "random")
    supernet.host([Subnet("a", {"d": [1, 1, 1], "w": [0.5, 0.5, 0.5]})])
    return supernet


def with_other_weights(supernet: Supernet) -> None:
    """Change one number of one layer, if it is among those sampled."""
    with torch.no_grad():
        supernet.model.get_parameter("head.bias")[0] += 1


def with_another_subnet(supernet: Supernet) -> None:
    """Host another subnet under the same name."""
    supernet.host([Subnet("a", {"d": [1, 1, 1], "w": [0.5, 0.5, 0.75]})])


def with_statistics(supernet: Supernet) -> None:
    """Add statistics."""
    channels = tuple(norm.num_features for norm in supernet.norms)
    supernet.set_statistics({"a": SubnetStatistics(channels, torch.ones(2 * sum(channels)))})


def with_other_statistics(supernet: Supernet) -> None:
    """Add the same statistics, but for one number."""
    with_statistics(supernet)
    changed = supernet.statistics["a"].values.clone()
    changed[0] += 1
    supernet.set_statistics({"a": SubnetStatistics(supernet.statistics["a"].channels, changed)})


def test_a_proof_is_of_the_values_of_statistics() -> None:
    """As many of them are not the same ones."""
    one, other = small_kind(), small_kind()
    with_statistics(one)
    with_other_statistics(other)

    assert kept.fingerprint_of(one) != kept.fingerprint_of(other)


@pytest.mark.parametrize("change", [with_other_weights, with_another_subnet, with_statistics])
def test_a_proof_is_of_these_weights_subnets_and_statistics(change: Callable[[Supernet], None]) -> None:
    """Its fingerprint is that of a supernet built again, and another after a change."""
    supernet = small_kind()
    before = kept.fingerprint_of(supernet)
    change(supernet)

    assert kept.fingerprint_of(small_kind()) == before
    assert kept.fingerprint_of(supernet) != before


def test_a_proof_is_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of any file that slices, proves or defines the model asks for another one."""
    supernet = small_kind()
    before, sources = kept.fingerprint_of(supernet), list(kept._sources(supernet))
    changed = tmp_path / "changed.py"
    changed.write_bytes(sources[-1].read_bytes() + b"\n")
    monkeypatch.setattr(kept, "_sources", lambda _: [*sources[:-1], changed])

    assert kept.fingerprint_of(supernet) != before
    assert {"rules.py", "insertion.py", "digits_supernet.py"} <= {path.name for path in sources}


def test_a_proof_is_of_what_the_users_model_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper of a helper, too: a changed one may make another network."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "proof_sums.py").write_text("def add(x, y):\n    return x + y\n")
    (tmp_path / "proof_steps.py").write_text("import proof_sums\n")
    (tmp_path / "proof_net.py").write_text(
        "from torch import nn\nimport proof_steps\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)\n"
        "    def forward(self, x):\n"
        "        return self.b(proof_steps.proof_sums.add(x, self.a(x)))\n"
    )
    supernet = insert(importlib.import_module("proof_net").Net(), elastic=[Elastic("w", ["b"])])
    before = kept.fingerprint_of(supernet)
    (tmp_path / "proof_sums.py").write_text("def add(x, y):\n    return x - y\n")

    assert kept.fingerprint_of(supernet) != before


def test_without_a_folder_a_proof_is_made_and_not_kept(
    state: Path, proofs: list[Proof], caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the folder's place costs time at each start, and nothing else."""
    state.write_text("not a folder")
    supernet = small_kind()
    for _ in range(2):
        kept.require_proof(supernet, example_input(supernet, KINDS["digits"], torch.float32, 2))

    assert len(proofs) == 2
    assert any("the proof is not kept" in message for message in caplog.messages)


def test_few_proofs_are_kept(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go."""
    monkeypatch.setattr(kept, "_MOST_KEPT", 3)
    for name in "abcde":
        kept._keep(state / name, name)

    assert len(list(state.iterdir())) == 3
    assert (state / "e").read_text() == "e\n"


def test_examples_are_cut_down_where_the_model_takes_that() -> None:
    """A network that ends in a mean takes small images, one that flattens does not."""
    images = torch.randn(2, 3, 40, 40)
    takes = insert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1)), elastic=[Elastic("h", ["0"])])
    refuses = insert(nn.Sequential(nn.Flatten(), nn.Linear(4800, 4)), elastic=[Elastic("h", ["1"])])

    assert kept._small(takes, images).shape == (2, 3, 32, 32)
    assert kept._small(refuses, images).shape == images.shape
