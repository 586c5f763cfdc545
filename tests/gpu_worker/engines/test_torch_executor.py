"""TorchExecutor: the shipped supernet, the batches it takes, and the options it refuses."""

from __future__ import annotations

import functools
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpu_worker.engines.torch_executor import Placement, TorchExecutor, half_holds, relative_error
from gpu_worker.models import digits
from gpu_worker.models.kinds import KINDS, SupernetKind, as_floats, digits_data, supernet_kind
from gpu_worker.models.names import SHIPPED_SUPERNETS
from gpu_worker.supernet.insertion import Elastic, insert
from profiles.table import load_profile, statistics_path
from superserve.errors import ConfigError, InvalidQueryError
from superserve.subnet import Subnet, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROFILE = load_profile("digits-cpu")
SUBNETS = [Subnet(row.name, row.control) for row in PROFILE.subnets]
LARGEST = len(SUBNETS) - 1


def loaded(*batch_sizes: int, subnets: list[Subnet] = SUBNETS, **options: Any) -> TorchExecutor:
    """Return the shipped supernet with the shipped profile's subnets."""
    return TorchExecutor.load(
        "digits",
        subnets,
        statistics=options.pop("statistics", statistics_path("digits-cpu")),
        weights=options.pop("weights", None),
        placement=Placement(batch_sizes=batch_sizes, **options),
    )


@functools.cache
def usual() -> TorchExecutor:
    """Return the executor that most tests use. It takes seconds to load: not when this file is read."""
    return loaded(1, 4, 16)


def some_images(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return n images as a batch from the wire would be: not to be written to."""
    batch = np.random.default_rng(5).standard_normal((n, *usual().input_spec.shape)).astype(np.float32)
    batch.flags.writeable = False
    return batch


def measured_accuracy(row: int) -> float:
    """Return the percentage of the held-out set that a row reads rightly, in batches of 512."""
    executor, held_out = loaded(), digits_data().held_out
    logits = [
        executor.execute(row, np.asarray(held_out.inputs[start : start + 512]))
        for start in range(0, len(held_out.labels), 512)
    ]
    return 100 * float((np.concatenate(logits).argmax(1) == held_out.labels).mean())


def test_the_smallest_subnet_is_as_accurate_as_the_profile_says() -> None:
    """The shipped weights and statistics read the held-out digits as the profile promises."""
    assert measured_accuracy(0) == pytest.approx(PROFILE.subnets[0].accuracy, abs=0.1)


@pytest.mark.parametrize("row", range(1, LARGEST + 1))
def test_every_subnet_is_as_accurate_as_the_profile_says(row: int) -> None:
    """So do all the larger subnets."""
    assert measured_accuracy(row) == pytest.approx(PROFILE.subnets[row].accuracy, abs=0.1)


def test_subnets_truly_differ() -> None:
    """Several subnets, over more than ten points of accuracy."""
    accuracies = [row.accuracy for row in PROFILE.subnets]

    assert 5 <= len(SUBNETS) <= 12
    assert min(after - before for before, after in itertools.pairwise(accuracies)) > 0
    assert accuracies[-1] - accuracies[0] > 10


def test_no_held_out_image_is_chosen_on_or_trained_on() -> None:
    """The two held-out halves share no original: they are as many as all, and their images differ."""
    selection, held_out = digits.held_out_halves()
    together = {image.tobytes() for image in (*selection.pixels, *held_out.pixels)}

    assert len(selection.labels) + len(held_out.labels) == digits.HELD_OUT_IMAGES == len(together)
    assert abs(len(selection.labels) - len(held_out.labels)) < 50


@pytest.mark.parametrize("n_queries", [1, 2, 4, 5, 16])
def test_padding_changes_no_answer(n_queries: int) -> None:
    """A query's logits do not depend on the zeros beside it, and padding is trimmed."""
    batch = some_images(n_queries)
    padded = usual().execute(0, batch)
    alone = loaded().execute(0, batch)

    assert padded.shape == (n_queries, *usual().output_spec.shape)
    assert padded.dtype == np.dtype(usual().output_spec.dtype)
    np.testing.assert_allclose(padded, alone, rtol=1e-3, atol=1e-4)


def test_a_batch_answers_as_its_queries_do_alone() -> None:
    """Batching changes no answer."""
    batch = some_images(4)
    together = usual().execute(LARGEST, batch)
    alone = np.concatenate([usual().execute(LARGEST, query[np.newaxis]) for query in batch])

    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_switching_back_gives_the_same_bits() -> None:
    """A subnet's outputs do not remember which one ran between."""
    batch = some_images(4)
    first = usual().execute(0, batch)
    usual().execute(LARGEST, batch)

    assert np.array_equal(usual().execute(0, batch), first)


def test_warming_up_answers_nothing_and_breaks_nothing() -> None:
    """After a warm-up the outputs are as before."""
    batch = some_images(1)
    before = usual().execute(0, batch)
    usual().warm_up()

    assert np.array_equal(usual().execute(0, batch), before)


def test_packed_slices_and_views_answer_alike() -> None:
    """A budget for packed slices moves memory, not answers; on a CPU none is taken unless asked for."""
    packed = loaded(1, 4, packed_bytes=10**7)
    batch = some_images(3)

    assert packed.memory().packed > 0 == loaded().memory().packed
    for row in range(len(SUBNETS)):
        np.testing.assert_allclose(
            packed.execute(row, batch), loaded().execute(row, batch), rtol=1e-3, atol=1e-4
        )


def test_a_supernet_is_trimmed_unless_asked_not_to() -> None:
    """What only larger subnets use is freed, and answers stay; untrimmed, it is all there."""
    few = SUBNETS[:2]
    trimmed, whole = loaded(1, 4, subnets=few), loaded(1, 4, subnets=few, trims=False)
    batch = some_images(3)

    assert trimmed.memory().shared < 0.5 * whole.memory().shared
    assert whole.memory().shared == loaded(subnets=SUBNETS, trims=False).memory().shared
    assert trimmed.fingerprint == whole.fingerprint
    for row in range(len(few)):
        np.testing.assert_allclose(
            trimmed.execute(row, batch), whole.execute(row, batch), rtol=1e-3, atol=1e-4
        )


def test_without_statistics_small_subnets_guess() -> None:
    """SubnetNorm is what makes them work: with the whole's statistics the smallest is far off."""
    bare = loaded(statistics=None)
    held_out = digits_data().held_out
    images, labels = np.asarray(held_out.inputs[:512]), held_out.labels[:512]

    assert (bare.execute(0, images).argmax(1) == labels).mean() < 0.5
    assert (loaded().execute(0, images).argmax(1) == labels).mean() > 0.75


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((0, 1, 20, 20), dtype=np.float32), "at least 1 query"),
        (np.zeros((), dtype=np.float32), "at least 1 query"),
        (np.zeros((17, 1, 20, 20), dtype=np.float32), "at most 16 queries, got 17"),
        (np.zeros((1, 1, 20, 20)), "expected dtype float32, got float64"),
        (np.zeros((1, 20, 20), dtype=np.float32), r"expected shape \(1, 20, 20\), got \(20, 20\)"),
    ],
)
def test_a_bad_batch_is_refused(batch: np.ndarray[Any, Any], message: str) -> None:
    """The error says what was expected of the batch."""
    with pytest.raises(InvalidQueryError, match=message):
        usual().execute(0, batch)


def test_a_row_that_is_not_hosted_is_refused() -> None:
    """The error gives the rows there are."""
    with pytest.raises(ConfigError, match="subnet: expected a row from 0"):
        usual().execute(LARGEST + 1, some_images(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:<n>, got 'tpu'"),
        ({"device": "meta"}, "device: expected cpu, cuda or cuda:<n>, got 'meta'"),
        ({"device": "cuda:99"}, "device: cuda:99: this machine has"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"batch_sizes": (4, 2)}, "batch_sizes: expected ascending"),
        ({"batch_sizes": (0, 2)}, "batch_sizes: expected ascending"),
        ({"precision": "int4"}, "precision: expected auto, float32, float16, bfloat16, got 'int4'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    """A placement refuses what it cannot do, by the option's name."""
    with pytest.raises(ConfigError, match=message):
        TorchExecutor.load("digits", SUBNETS, placement=Placement(**options))


def test_a_lower_precision_answers_nearly_alike() -> None:
    """bfloat16 on request: nearly the same labels, another fingerprint; auto stays in float32 here."""
    lower = loaded(precision="bfloat16")
    batch = np.asarray(digits_data().held_out.inputs[:256])

    assert (usual().precision, lower.precision) == ("float32", "bfloat16")
    alike = lower.execute(LARGEST, batch).argmax(1) == loaded().execute(LARGEST, batch).argmax(1)
    assert alike.mean() > 0.98
    assert lower.fingerprint != usual().fingerprint


def test_an_error_that_is_not_a_number_is_infinite() -> None:
    """A half-precision pass that overflows never counts as holding."""
    ones = torch.ones(3)

    assert relative_error(ones, ones) == 0
    assert relative_error(2 * ones, ones) == pytest.approx(1)
    assert relative_error(torch.full((3,), torch.nan), ones) == float("inf")
    assert relative_error(torch.full((3,), torch.inf), ones) == float("inf")


class Several(nn.Module):
    """Returns what its caller makes of two logits."""

    def __init__(self, made: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.linear, self.made = nn.Linear(4, 2), made

    def forward(self, x: torch.Tensor) -> object:
        """Return anything."""
        return self.made(self.linear(x))


def kind_of(made: Callable[[torch.Tensor], object], dtype: str, *shape: int) -> SupernetKind:
    """Return a kind whose model returns `made` of two logits, and that states an output."""
    return SupernetKind(
        "several",
        lambda: insert(Several(made), elastic=[Elastic("w", ["linear"], fractions=(0.5, 1.0))]),
        TensorSpec("float32", (4,)),
        TensorSpec(dtype, shape),
        as_floats,
    )


def executed(kind: SupernetKind, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Return what its whole answers to three queries."""
    monkeypatch.setitem(KINDS, kind.name, kind)
    executor = TorchExecutor.load(kind.name, [Subnet("whole", {"w": [1.0]})], weights="random")
    return executor.execute(0, np.arange(12, dtype=np.float32).reshape(3, 4))


def test_outputs_are_served_in_the_dtype_that_the_spec_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class numbers stay whole, and the one tensor of a tuple or a dictionary that fits is the answer."""
    logits = executed(kind_of(lambda x: x, "float32", 2), monkeypatch)
    classes = executed(kind_of(lambda x: x.argmax(1), "int64"), monkeypatch)
    narrow = executed(kind_of(lambda x: x.argmax(1), "int32"), monkeypatch)
    among = executed(kind_of(lambda x: (None, {"a": x[:, :1], "b": [x]}), "float32", 2), monkeypatch)
    half = executed(kind_of(lambda x: x, "float16", 2), monkeypatch)
    flags = executed(kind_of(lambda x: x > 0, "bool", 2), monkeypatch)

    assert (classes.dtype, narrow.dtype, half.dtype) == (np.int64, np.int32, np.float16)
    assert classes.tolist() == narrow.tolist() == logits.argmax(1).tolist()
    np.testing.assert_array_equal(among, logits)
    np.testing.assert_array_equal(flags, logits > 0)
    np.testing.assert_allclose(half, logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("made", "dtype", "shape", "message"),
    [
        (
            lambda x: (x, 2 * x),
            "float32",
            (2,),
            r"expected one tensor of shape \(B, 2\), got \(B, 2\), \(B, 2\)",
        ),
        (lambda x: x, "float32", (3,), r"expected one tensor of shape \(B, 3\), got \(B, 2\)"),
        (lambda _x: "text", "float32", (2,), "got none"),
        (lambda x: x, "int64", (2,), "output: expected int64, got torch.float32"),
        (lambda x: x.argmax(1), "float32", (), "output: expected float32, got torch.int64"),
    ],
)
def test_an_output_that_is_not_what_the_spec_states_is_an_error(
    made: Callable[[torch.Tensor], object],
    dtype: str,
    shape: tuple[int, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two that fit, none, or numbers of another kind: nothing is guessed, and nothing is cut off."""
    with pytest.raises(TypeError, match=message):
        executed(kind_of(made, dtype, *shape), monkeypatch)


class Strict(nn.Module):
    """Multiplies by a float32 table, which raises for halves; its embedding is tied to its head."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.eye(4))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 3)."""
        hidden = self.linear(x) * self.scale
        table = self.get_buffer("table")
        logits: torch.Tensor = self.head(hidden if self.scale > 1 else hidden @ table)
        return logits


@pytest.mark.parametrize(
    ("scale", "why"),
    [(1.0, "RuntimeError: "), (1e9, "it is nan off|it is inf off")],
    ids=["raises", "overflows"],
)
def test_where_half_precision_fails_everything_stays_in_float32(
    scale: float, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pass that raises or overflows in halves leaves the parameters that were there, tied as they were."""
    model = Strict(scale)
    kind = SupernetKind(
        "strict", lambda: insert(model, elastic=[Elastic("w", ["linear"])]), TensorSpec("float32", (4,)),
        TensorSpec("float32", (3,)), as_floats,
    )  # fmt: skip
    supernet, before = kind.build().eval(), dict(model.named_parameters())

    assert not half_holds(supernet, kind)
    assert dict(model.named_parameters()) == before
    assert model.head.weight is model.embedding.weight
    assert re.search(rf"float16 does not hold \(({why}).*staying in float32", caplog.text)
    with torch.inference_mode():
        assert supernet(torch.zeros(1, 4)).dtype == torch.float32


def test_where_half_precision_holds_tied_parameters_stay_tied() -> None:
    """The digits supernet holds; one tensor in two places becomes one half."""
    kind = KINDS["digits"]

    assert half_holds(kind.build().eval(), kind)
    model = Strict(1.0)
    insert(model, elastic=[Elastic("w", ["linear"])]).to_half()
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.float16


def test_fingerprints_tell_what_decides_answers(tmp_path: Path) -> None:
    """Equal for a copy; another for other weights, other subnets and other statistics."""
    shipped = KINDS["digits"].weights
    assert shipped is not None
    tensors = load_file(shipped)
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, copy)
    tensors["head.bias"] += 1
    save_file(tensors, other)

    assert loaded(weights=str(copy)).fingerprint == loaded().fingerprint == usual().fingerprint
    others = [loaded(weights=str(other)), loaded(subnets=SUBNETS[1:]), loaded(statistics=None)]
    assert len({usual().fingerprint, *(one.fingerprint for one in others)}) == 4


def test_random_weights_are_the_same_everywhere() -> None:
    """They are drawn from a fixed seed, and leave torch's own generator alone."""
    before = torch.random.get_rng_state()
    first, second = (loaded(weights="random", statistics=None) for _ in range(2))

    assert first.fingerprint == second.fingerprint != usual().fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_names_are_those_of_the_kinds() -> None:
    """Code that does not import torch has the same list of supernets."""
    assert tuple(KINDS) == SHIPPED_SUPERNETS


def test_a_kind_of_ones_own_is_found_by_module_and_attribute() -> None:
    """`package.module:attribute` names a SupernetKind that is not shipped."""
    assert supernet_kind(f"{__name__}:OWN") is OWN


OWN = KINDS["digits"]
