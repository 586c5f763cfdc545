"""A resident family: what members answer, and what is refused before they are served."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree

from gpu_worker.engines.torch_executor import Placement
from gpu_worker.family.engine import FamilyExecutor, FamilyRow
from gpu_worker.family.file import load_family
from gpu_worker.family.onnx_member import OnnxMember
from gpu_worker.family.proof import deviation
from superserve.errors import ConfigError, InvalidQueryError
from superserve.subnet import Subnet, TensorSpec
from tests.gpu_worker.family import models
from tests.gpu_worker.family.models import (
    CLASSES,
    LENGTH,
    WIDTH,
    Linear,
    linear,
    queries,
    weights_of,
    written,
)

if TYPE_CHECKING:
    from pathlib import Path

SIZES = (1, 2, 4)
FUNCTION = f"{models.__name__}:build"
INPUT = "input: {dtype: float32, shape: [5]}"


def loaded(path: Path, subnets: list[Subnet] | None = None, **options: Any) -> FamilyExecutor:
    """Return a resident family."""
    return FamilyExecutor.load(load_family(path), Placement(batch_sizes=SIZES), subnets, **options)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Give a family with a member of each kind, each with its own weights."""
    linear(tmp_path / "a.onnx", seed=1)
    models.exported(tmp_path / "b.pt2", Linear(seed=2))
    save_file(Linear(seed=3).state_dict(), tmp_path / "c.safetensors")
    return written(
        tmp_path, "name: a, model: a.onnx, accuracy: 1", "name: b, model: b.pt2, accuracy: 2",
        f'name: c, model: "{FUNCTION}", weights: c.safetensors, accuracy: 3',
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_each_member_answers_as_its_weights_say(three: Path, n: int) -> None:
    """Of every kind, in batches of every size: what NumPy alone computes from the same weights."""
    executor = loaded(three)
    batch = queries(n)

    assert [subnet.name for subnet in executor.subnets] == ["a", "b", "c"]
    assert (executor.input_spec, executor.output_spec) == (
        TensorSpec("float32", (WIDTH,)), TensorSpec("float32", (CLASSES,)),
    )  # fmt: skip
    for row, seed in enumerate((1, 2, 3)):
        np.testing.assert_allclose(
            executor.execute(row, batch), batch @ weights_of(seed), rtol=1e-5, atol=1e-6
        )


def test_queries_that_lie_apart_are_one_batch(three: Path) -> None:
    """As a staging thread has them."""
    executor, batch = loaded(three), queries(3)
    staged = executor.stage(list(batch))

    np.testing.assert_array_equal(executor.run(0, staged), executor.execute(0, batch))


def test_warming_up_answers_nothing_and_breaks_nothing(three: Path) -> None:
    """After a warm-up the outputs are as before."""
    executor, batch = loaded(three), queries(2)
    before = [executor.execute(row, batch) for row in range(3)]
    executor.warm_up()

    for row in range(3):
        np.testing.assert_array_equal(executor.execute(row, batch), before[row])


def test_every_member_is_warm_at_every_size(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No query pays for the first batch of a shape."""
    ran = []
    executor = loaded(three)
    plain = FamilyRow.run

    def noted(row: FamilyRow, batch: Any) -> Any:
        ran.append((row.member.name, len(batch)))
        return plain(row, batch)

    monkeypatch.setattr(FamilyRow, "run", noted)
    executor.warm_up()
    assert sorted(ran) == [(name, size) for name in "abc" for size in SIZES]


def test_threads_are_those_of_each_session(three: Path) -> None:
    """ONNX Runtime would take every core."""
    asked = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]  # untyped
        """Options that tell how many threads were asked for."""

        def add_session_config_entry(self, name: str, value: str) -> None:
            asked.append((self.intra_op_num_threads, name, value))
            super().add_session_config_entry(name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)
        FamilyExecutor.load(load_family(three), Placement(threads=2, batch_sizes=(1,)))
    torch.set_num_threads(1)
    spinning = "session.intra_op.allow_spinning"
    assert asked == [(1, spinning, "0"), (2, spinning, "0")]  # the direct run's, and the one that serves


def test_what_does_not_fit_is_refused(three: Path) -> None:
    """A query of another shape, a batch beyond the largest size, a row that is not there."""
    executor = loaded(three)

    with pytest.raises(InvalidQueryError, match="expected shape"):
        executor.execute(0, np.zeros((1, WIDTH + 1), np.float32))
    with pytest.raises(InvalidQueryError, match="expected at most 4 queries, got 5"):
        executor.execute(0, queries(5))
    with pytest.raises(ConfigError, match="expected a row from 0 to 2, got 3"):
        executor.execute(3, queries(1))


def test_the_memory_is_that_of_all_members(three: Path) -> None:
    """Files by their sizes, a function's module by its tensors; the report names each."""
    report = loaded(three).memory()
    sizes = dict(report.members)

    assert sizes["a"] == (three.parent / "a.onnx").stat().st_size
    assert sizes["b"] == (three.parent / "b.pt2").stat().st_size
    assert sizes["c"] == WIDTH * CLASSES * 4
    assert report.weights == sum(sizes.values())
    assert re.fullmatch(
        r"3 members, all resident: 0.\d\d MB of weights \(a .*, b .*, c .*\); the process grew by .* MB, .*",
        str(report),
    )


# --- a profile belongs to its files ---------------------------------------------------------


def test_a_profile_of_other_files_is_refused(three: Path) -> None:
    """A member whose file was replaced is another model; the same file under another folder is not."""
    subnets = list(loaded(three).subnets)
    first = loaded(three, subnets)
    linear(three.parent / "a.onnx", seed=9)

    with pytest.raises(
        ConfigError, match=r"member 'a': expected the model that the profile was measured with"
    ):
        loaded(three, subnets)
    assert loaded(three, subnets[1:]).fingerprint != first.fingerprint


def test_weights_beside_a_file_are_part_of_it(tmp_path: Path) -> None:
    """Another external data file is another digest and another answer; one that is missing is named."""
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    linear(tmp_path / "a.onnx", seed=1, is_external=True)
    before = loaded(path)
    graph = (tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx").unlink()
    (tmp_path / "a.onnx.data").unlink()
    linear(tmp_path / "a.onnx", seed=2, is_external=True)

    assert (tmp_path / "a.onnx").read_bytes() == graph  # the tensors alone differ
    assert loaded(path).subnets != before.subnets
    assert before.memory().weights == len(graph) + (tmp_path / "a.onnx.data").stat().st_size
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(
        ConfigError, match=r"its tensors are in a.onnx.data, expected beside it: copy the files"
    ):
        loaded(path)


@pytest.mark.parametrize("change", ["weights", "layers"])
def test_another_module_is_another_digest(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights, or other layers around the same weights."""
    path = written(tmp_path, f'name: c, model: "{FUNCTION}", accuracy: 3', head=INPUT)
    before = loaded(path).subnets
    assert loaded(path).subnets == before

    other = Linear(seed=5 if change == "weights" else 0)
    if change == "layers":
        other.add_module("last", nn.ReLU())
    monkeypatch.setattr(models, "build", lambda: other)
    assert loaded(path).subnets != before


def test_a_module_is_put_into_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its function returns: dropout is off."""
    path = written(tmp_path, f'name: c, model: "{FUNCTION}", accuracy: 3', head=INPUT)
    monkeypatch.setattr(models, "build", lambda: nn.Sequential(nn.Dropout(), Linear()).train())

    np.testing.assert_allclose(loaded(path).execute(0, queries(2)), queries(2) @ weights_of(0), rtol=1e-5)


def test_a_subnet_that_is_no_member_is_named(three: Path) -> None:
    """A profile of another family."""
    with pytest.raises(ConfigError, match=r"no member is called 'aa'; did you mean 'a'\?"):
        loaded(three, [Subnet("aa", None)])


# --- what is not served ---------------------------------------------------------------------


class TrainedNorm(nn.Module):
    """A model that was exported in training mode: its norm uses the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear()
        self.norm = nn.BatchNorm1d(1, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for the normalised input."""
        return self.layer(self.norm(x.unsqueeze(1)).squeeze(1))  # type: ignore[no-any-return]  # torch's


class Noisy(Linear):
    """A model with dropout left on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for a part of the input, drawn each time."""
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


def noisy() -> nn.Module:
    """Return a model with dropout left on, as a family file names it."""
    return Noisy()


def trained_norm() -> nn.Module:
    """Return a model whose rows depend on each other."""
    return TrainedNorm()


@pytest.mark.parametrize("kind", ["onnx", "pt2", "module", "random"])
def test_a_model_whose_rows_depend_on_each_other_is_refused(kind: str, tmp_path: Path) -> None:
    """A mean over the batch, training-mode BatchNorm, dropout that is on: never served, unless asked for."""
    model = {
        "onnx": "bad.onnx", "pt2": "bad.pt2", "module": f"{__name__}:trained_norm",
        "random": f"{__name__}:noisy",
    }[kind]  # fmt: skip
    if kind == "onnx":
        models.centred(tmp_path / model)
    elif kind == "pt2":
        models.exported(tmp_path / model, TrainedNorm())
    path = written(tmp_path, f'name: bad, model: "{model}", accuracy: 1', head=INPUT)
    torch.manual_seed(0)  # chance may drop the same outputs in two runs, and then another check refuses it

    with pytest.raises(
        ConfigError, match=r"member 'bad': .* its rows depend on each other or on chance; was it"
    ):
        loaded(path)
    assert loaded(path, is_proved=False).execute(0, queries(2)).shape == (2, CLASSES)


def test_what_serves_has_to_compute_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device or an optimisation that is 5 % off is refused; one that adds in another order is not."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    plain = OnnxMember.run
    for factor in (1.001, 1.05):
        monkeypatch.setattr(OnnxMember, "run", lambda *args, factor=factor: factor * plain(*args))
        if factor < 1.01:
            loaded(path)
        else:
            with pytest.raises(
                ConfigError, match=r"are 0.05 off those of a direct run .*computes something else"
            ):
                loaded(path)


def test_an_answer_without_numbers_equals_itself_alone() -> None:
    """A NaN for a NaN is no deviation; for a number it is."""
    one = np.array([1.0, np.nan, 2.0], np.float32)

    assert deviation(one, one) == 0
    assert deviation(np.nan_to_num(one), one) == float("inf")
    assert deviation(np.array([1.0, 2.1]), np.array([1.0, 2.0])) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["fixed.onnx", "fixed.pt2"])
def test_a_fixed_batch_is_refused_with_how_to_export(name: str, tmp_path: Path) -> None:
    """A batch of 1, or of 2, that an export without dynamic shapes froze."""
    if name.endswith("onnx"):
        linear(tmp_path / name, batch=1)
    else:
        models.exported(tmp_path / name, Linear(), is_dynamic=False)
    path = written(tmp_path, f"name: a, model: {name}, accuracy: 1")

    with pytest.raises(ConfigError, match=r"first axis of any size.*export it again: torch.*dynamic_shapes="):
        loaded(path)


@dataclass
class Answer:
    """What a model of a library returns: a class that torch is told of when that is imported."""

    logits: torch.Tensor


class Answering(Linear):
    """A model that returns it."""

    def forward(self, x: torch.Tensor) -> Any:
        """Return the answer, in a class."""
        return Answer(super().forward(x))


def test_a_class_that_is_not_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .pt2 file of a model of transformers needs transformers: torch logs that, and raises without it."""
    name = f"{__name__}.Answer"
    torch.export.register_dataclass(Answer, serialized_type_name=name)
    models.exported(tmp_path / "a.pt2", Answering())
    monkeypatch.delitem(_pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE, name)
    path = written(tmp_path, "name: a, model: a.pt2, accuracy: 1")

    with pytest.raises(ConfigError, match=rf"it takes or returns a {name}, which torch knows only where its"):
        loaded(path)


@pytest.mark.parametrize("bound", [3, 100])
def test_a_batch_that_an_export_bounds_is_refused(bound: int, tmp_path: Path) -> None:
    """A dimension whose largest size is below the profile's largest batch, however large that is."""
    batch = torch.export.Dim("batch", max=bound)
    program = torch.export.export(Linear(), (torch.ones(2, WIDTH),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "a.pt2")
    path = written(tmp_path, "name: a, model: a.pt2, accuracy: 1")

    placement = Placement(batch_sizes=(1, bound + 1))
    with pytest.raises(ConfigError, match=r"it cannot run in batches of up to \d+: AssertionError: Guard"):
        FamilyExecutor.load(load_family(path), placement)


class Ragged(nn.Module):
    """A model whose answers differ in size, as those of a detector do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return more of a query that begins above zero."""
        return x[:, : 1 + int(x[0, 0] > 0)]


def ragged() -> nn.Module:
    """Return it as a family file names it."""
    return Ragged()


def test_answers_are_of_one_shape(tmp_path: Path) -> None:
    """The wire has one output spec for a model."""
    path = written(tmp_path, f'name: a, model: "{__name__}:ragged", accuracy: 1', head=INPUT)

    with pytest.raises(
        ConfigError, match=r"output '0': expected answers of one shape, got .\d. and then .\d."
    ):
        loaded(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.onnx", b"hello", "expected an ONNX file: DecodeError"),
        ("a.onnx", b"", "expected an ONNX file, got an empty file"),
        ("a.onnx", b"version https://git-lfs", "expected an ONNX file, got a pointer of Git LFS"),
        ("a.pt2", b"hello", "expected a file that torch.export.save wrote"),
        ("a.pt2", b"<html>", "expected a torch.export file, got a web page"),
    ],
)
def test_a_file_that_is_no_model_is_named(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    """Corrupt, empty, or something else in its place."""
    (tmp_path / name).write_bytes(content)
    path = written(tmp_path, f"name: a, model: {name}, accuracy: 1")

    with pytest.raises(ConfigError, match=rf"member 'a': model: .*{name}: {expected}") as raised:
        loaded(path)
    assert "\n" not in str(raised.value)


def test_a_graph_that_its_runtime_refuses_is_named(tmp_path: Path) -> None:
    """A valid file whose weights are cut off."""
    linear(tmp_path / "a.onnx", is_external=True)
    (tmp_path / "a.onnx.data").write_bytes(b"short")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")

    with pytest.raises(ConfigError, match=r"member 'a': .*expected an ONNX file that ONNX Runtime takes"):
        loaded(path)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("no_such_module:build", "expected a function that can be imported: ModuleNotFoundError"),
        (f"{models.__name__}:no_such", "expected a function that can be imported: AttributeError"),
        (f"{models.__name__}:queries", "expected a function that returns a module, and it raised: TypeError"),
        ("builtins:dict", "expected a function that returns a torch.nn.Module, got dict"),
    ],
)
def test_a_function_that_is_none_is_named(function: str, expected: str, tmp_path: Path) -> None:
    """Not there, raising, or of something else."""
    path = written(tmp_path, f'name: a, model: "{function}", accuracy: 1')

    with pytest.raises(ConfigError, match=f"member 'a': model: {function}: {expected}"):
        loaded(path)


def test_members_have_to_take_and_give_alike(tmp_path: Path) -> None:
    """Another width, another dtype, another number of classes: the error names the member and both."""
    linear(tmp_path / "a.onnx")
    linear(tmp_path / "int.onnx", dtype=models.INT64)
    models.exported(tmp_path / "wide.pt2", nn.Linear(WIDTH + 1, CLASSES), (torch.ones(2, WIDTH + 1),))
    models.exported(tmp_path / "more.pt2", nn.Linear(WIDTH, CLASSES + 1))
    first = "name: a, model: a.onnx, accuracy: 1"

    for name, expected in (
        ("wide.pt2", r"member 'b': input 'input': expected float32 \[5\], as the family takes, got .*\[6\]"),
        ("int.onnx", "member 'b': input 'x': expected float32, as the family takes, got a model of int64"),
        ("more.pt2", r"member 'b': output: expected float32 \[3\], as 'a' gives, got float32 \[4\]"),
    ):
        with pytest.raises(ConfigError, match=expected):
            loaded(written(tmp_path, first, f"name: b, model: {name}, accuracy: 2"))


def test_a_dtype_that_holds_the_queries_is_enough(tmp_path: Path) -> None:
    """int32 on the wire, int64 in the graph: each query is converted, and none is changed."""
    linear(tmp_path / "a.onnx", dtype=models.INT64)
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1", head="input: {dtype: int32, shape: [5]}")
    batch = np.arange(10, dtype=np.int32).reshape(2, 5)

    np.testing.assert_allclose(loaded(path).execute(0, batch), batch @ weights_of(0), rtol=1e-5)


def test_a_size_that_varies_has_to_be_stated(tmp_path: Path) -> None:
    """A graph that takes rows of any width does not say what one query is."""
    linear(tmp_path / "a.onnx", width="width")
    member = "name: a, model: a.onnx, accuracy: 1"

    with pytest.raises(
        ConfigError, match="input: expected one query's dtype and shape: those of member 'a' vary"
    ):
        loaded(written(tmp_path, member))
    stated = written(tmp_path, member, head="input: {dtype: float32, shape: [5]}")
    assert loaded(stated).input_spec == TensorSpec("float32", (5,))


def test_a_module_does_not_say_what_it_takes(tmp_path: Path) -> None:
    """The family file has to."""
    path = written(tmp_path, f'name: c, model: "{FUNCTION}", accuracy: 3')

    with pytest.raises(ConfigError, match="input: expected one query's dtype and shape, such as"):
        loaded(path)


@pytest.mark.parametrize(
    ("head", "sign"), [("output: {name: logits}", 1), ("output: {name: other}", -1), ("", None)]
)
def test_one_of_several_outputs_answers(head: str, sign: int | None, tmp_path: Path) -> None:
    """The file says which; without that nothing is guessed."""
    linear(tmp_path / "a.onnx", outputs=["other", "logits"])
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1", head=head)

    if sign is None:
        with pytest.raises(
            ConfigError, match=r"'a': output: expected one .* got other .*, logits .*tells which"
        ):
            loaded(path)
    else:
        got = loaded(path).execute(0, queries(1))
        np.testing.assert_allclose(got, sign * queries(1) @ weights_of(0), rtol=1e-5, atol=1e-6)


def test_outputs_that_are_no_tensors_are_left(tmp_path: Path) -> None:
    """A classifier of scikit-learn gives a dictionary for each row too, which nobody has to name."""
    models.mapping(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")

    np.testing.assert_allclose(loaded(path).execute(0, queries(3)), queries(3) @ weights_of(0), rtol=1e-5)


# --- several inputs -------------------------------------------------------------------------

ALL = ("input_ids", "attention_mask", "token_type_ids")


def test_several_inputs_lie_in_one_query(tmp_path: Path) -> None:
    """In the family's order, whatever the graph's is; a member without token types is not given them."""
    models.reader(tmp_path / "full.onnx", 1, ["attention_mask", "token_type_ids", "input_ids"])
    models.reader(tmp_path / "distilled.onnx", 2, ["input_ids", "attention_mask"])
    path = written(
        tmp_path, "name: distilled, model: distilled.onnx, accuracy: 1",
        "name: full, model: full.onnx, accuracy: 2",
        head=f"inputs: [{', '.join(ALL)}]",
    )  # fmt: skip
    executor = loaded(path)
    batch = np.random.default_rng(0).integers(0, 2, (3, 3, LENGTH), np.int64)
    batch[:, 0] = np.random.default_rng(1).integers(0, models.VOCABULARY, (3, LENGTH))

    assert executor.input_spec == TensorSpec("int64", (3, LENGTH))
    ids, mask, types = batch[:, 0], batch[:, 1], batch[:, 2]
    for row, expected in (
        (0, models.read_by_hand(2, ids, mask, None)),
        (1, models.read_by_hand(1, ids, mask, types)),
    ):
        np.testing.assert_allclose(executor.execute(row, batch), expected, rtol=1e-5, atol=1e-5)


class Reader(nn.Module):
    """Two inputs by keyword, in another order than the family's, and one that keeps its default."""

    def forward(
        self, attention_mask: torch.Tensor, input_ids: torch.Tensor, scale: float = 2.0
    ) -> dict[str, torch.Tensor]:
        """Return the sum of what the mask keeps, and what nobody asks for."""
        kept = (attention_mask * input_ids).sum(1, keepdim=True).float() * scale
        return {"logits": kept, "hidden": kept.expand(-1, 7)}


def reading() -> nn.Module:
    """Return it as a family file names it."""
    return Reader()


def test_modules_and_programs_take_inputs_by_name(tmp_path: Path) -> None:
    """A .pt2 file and a module, with dictionaries as outputs."""
    example = tuple(torch.ones((2, LENGTH), dtype=torch.int64) for _ in range(2))
    models.exported(tmp_path / "a.pt2", Reader(), example)
    path = written(
        tmp_path, "name: a, model: a.pt2, accuracy: 1", f'name: b, model: "{__name__}:reading", accuracy: 2',
        head="inputs: [input_ids, attention_mask]\noutput: {name: logits}",
    )  # fmt: skip
    executor = loaded(path)
    batch = np.array([[[1, 2, 3, 4], [1, 0, 1, 0]], [[5, 6, 7, 8], [0, 0, 0, 1]]], np.int64)

    for row in (0, 1):
        np.testing.assert_array_equal(executor.execute(row, batch), [[8.0], [16.0]])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("", r"it takes attention_mask, token_type_ids, input_ids, and a query is one tensor: write `inputs"),
        ("inputs: [input_ids, attention_mask]", "expected a model of input_ids, attention_mask, got one"),
        ("inputs: [input_ids]", "expected a model of input_ids, got one that takes attention_mask, token"),
    ],
)  # fmt: skip
def test_inputs_that_no_query_holds_are_named(head: str, expected: str, tmp_path: Path) -> None:
    """A model that takes more than queries have is refused with what to write."""
    models.reader(tmp_path / "full.onnx", 1, ["attention_mask", "token_type_ids", "input_ids"])

    with pytest.raises(ConfigError, match=f"member 'full': {expected}"):
        loaded(written(tmp_path, "name: full, model: full.onnx, accuracy: 2", head=head))


# --- devices --------------------------------------------------------------------------------


ON_CPU = ["CPUExecutionProvider"]


def as_if_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a placement be on a CUDA device that torch sees."""
    monkeypatch.setattr(Placement, "torch_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 2))


def test_a_runtime_without_cuda_is_refused_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run on the CPU without an error, and the profile would lie."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    as_if_cuda(monkeypatch)

    with pytest.raises(ConfigError, match=r"ONNX Runtime here has no CUDAExecutionProvider: expected .*-gpu"):
        loaded(path)


def test_a_runtime_that_falls_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that is listed and cannot be loaded."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    as_if_cuda(monkeypatch)
    both = ["CUDAExecutionProvider", *ON_CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    session = onnxruntime.InferenceSession

    def on_cpu(model: str, options: Any, providers: list[Any]) -> Any:
        return session(model, options, providers[-1:])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)

    with pytest.raises(
        ConfigError, match="could not load CUDAExecutionProvider and would run on CPUExecution"
    ):
        loaded(path)


def test_another_precision_is_refused(three: Path) -> None:
    """A file has its precision."""
    with pytest.raises(
        ConfigError, match="--precision: a member of a family computes in what it was exported"
    ):
        FamilyExecutor.load(load_family(three), Placement(precision="float16"))


def test_a_runtime_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error says how to install it."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(
        ConfigError, match=r"onnxruntime: not installed; try: pip install 'superserve\[family\]'"
    ):
        loaded(path)
