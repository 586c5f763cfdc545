"""docs/families.md, block after block, in an empty folder: from no model to an answer of a family."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.docs.reader import steps
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.docs.reader import Reader

PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_the_page_takes_three_models_to_an_answer(reader: Reader) -> None:
    """Every file and command of the page works as it stands; the largest model answers an idle cluster.

    It answers what it does on the plain runtime, and its accuracy is the measured one.
    """
    outputs = reader.follow(steps(PAGE))

    found = re.fullmatch(r"(small|medium|large) ([\d.]+) (\d)\n", outputs["python client.py"])
    assert found is not None, outputs["python client.py"]
    measured = next(output for line, output in outputs.items() if line.startswith("profiles measure"))
    accuracies = dict(re.findall(r"^(small|medium|large) +(\d+\.\d\d)", measured, re.MULTILINE))
    best = max(accuracies, key=lambda name: float(accuracies[name]))
    assert found[1] == best
    assert float(found[2]) == pytest.approx(float(accuracies[best]), abs=0.01)
    assert float(accuracies[best]) > 85  # a model that guesses gets a tenth right
    assert int(found[3]) == _plainly(reader.folder / f"{best}.onnx", reader.folder / "examples.npz")
    (compared,) = (output for line, output in outputs.items() if line.startswith("loadgen compare"))
    assert all(f"fixed:{name}" in compared for name in accuracies)


def _plainly(model: Path, examples: Path) -> int:
    """Return what a model answers to the first example, without this project."""
    import onnxruntime  # noqa: PLC0415  slow to import

    session = onnxruntime.InferenceSession(model)
    (output,) = session.run(None, {session.get_inputs()[0].name: np.load(examples)["inputs"][:1]})
    return int(output.argmax())


def test_from_models_to_an_answer_it_is_ten_lines() -> None:
    """A family file of three members is 6 lines with its header, commands are 2, the question itself 2."""
    export, _, family, commands, client, *_ = (step.text for step in steps(PAGE))

    assert "dynamo=True, dynamic_shapes=" in export
    file = [line for line in family.splitlines() if line.strip()]
    question = [line for line in client.splitlines() if "Client(" in line or "infer(" in line]
    assert len(file) + len(commands.splitlines()) + len(question) <= 10
