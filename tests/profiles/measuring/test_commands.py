"""The commands, on a supernet that is searched in seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gpu_worker.models.kinds import KINDS, resident
from gpu_worker.supernet.calibration import load_statistics
from profiles.measuring.commands import (
    accuracy_command,
    calibrate_command,
    measure_command,
    search_command,
    show_command,
)
from profiles.table import load_profile, statistics_path
from superserve.subnet import Subnet
from tests.profiles.measuring.test_accuracy import PREDICTOR, TINY, WITHOUT, published_shapes, tiny_data

if TYPE_CHECKING:
    from pathlib import Path

    from click import Command
    from click.testing import Result

    from gpu_worker.supernet.supernet import Supernet

SEARCH_TINY = (
    *("--supernet", "tests.profiles.measuring.test_accuracy:TINY", "--weights", "random"),
    *("--batch-sizes", "1,2,3", "--population", "8", "--generations", "2"),
)


def run(command: Command, *options: object) -> Result:
    """Run a command; an exception that it does not turn into a message is a failure."""
    result = CliRunner().invoke(command, [str(option) for option in options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Search the tiny supernet once."""
    out = tmp_path_factory.mktemp("found") / "tiny.json"
    return out, run(search_command, *SEARCH_TINY, "--out", out)


def test_a_search_writes_a_profile_that_loads(found: tuple[Path, Result]) -> None:
    """It is modelled, says what it was fitted to and how accuracy was measured, and names are accuracies."""
    out, result = found
    assert result.exit_code == 0, result.output
    profile = load_profile(out)

    assert (profile.name, profile.supernet, profile.source) == ("tiny", "tiny", "modelled")
    assert profile.batch_sizes == (1, 2, 3)
    assert [row.name for row in profile.subnets] == [f"tiny-{row.accuracy:.2f}" for row in profile.subnets]
    assert {"python", "torch", "numpy"} <= set(profile.versions)
    for words in (
        "seed 0, 2 generations of 8",
        "Accuracy is measured on 32 held-out examples",
        "chosen by 32 others",
        "fitted to 9 subnets measured at batch sizes 1, 2, 3",
        "On 3 further measured subnets the model was",
        "Weights were random",
    ):
        assert words in profile.provenance
    assert len(json.loads(out.read_bytes())["raw"]["latency_fit"]["subnets"]) == 12


def test_statistics_lie_beside_the_profile(found: tuple[Path, Result]) -> None:
    """A worker finds those of every subnet of the profile by its name and control tuple."""
    out, result = found
    profile, beside = load_profile(out), statistics_path(out)
    subnets = [Subnet(row.name, row.control) for row in profile.subnets]
    statistics = load_statistics(beside, resident(TINY, "random"), TINY.name, subnets)

    assert set(statistics) == {row.name for row in profile.subnets}
    assert f"wrote {out} and {beside}" in result.output


def test_a_search_prints_what_it_found(found: tuple[Path, Result]) -> None:
    """Every subnet in a line, then how many of how many judged, and how long it took."""
    out, result = found
    profile = load_profile(out)

    for row in profile.subnets:
        assert f"{row.name}  {row.accuracy:6.2f}" in result.output
    assert f"{len(profile.subnets)} pareto subnets, " in result.output
    assert "judged, in " in result.output
    assert "searching: 2 of 2" in result.stderr


def printed_accuracies(output: str) -> dict[str, list[float]]:
    """Return what `accuracy` printed, by subnet: with its own statistics, and with the largest's."""
    rows = (line.replace("%", "").split() for line in output.splitlines()[1:])
    return {name: [float(own), float(shared)] for name, own, shared in rows}


def test_the_accuracies_of_a_searched_profile_are_its_own(found: tuple[Path, Result]) -> None:
    """`accuracy` measures what the profile gives; a supernet that is not the profile's is refused."""
    out, _ = found
    result = run(accuracy_command, out, "--supernet", SEARCH_TINY[1], "--weights", "random")
    refused = run(accuracy_command, out, "--supernet", "digits")

    assert result.exit_code == 0, result.output
    own = {name: own for name, (own, _) in printed_accuracies(result.output).items()}
    assert own == {row.name: row.accuracy for row in load_profile(out).subnets}
    assert "supernet: expected tiny, the profile's, got digits" in refused.output


def test_a_profile_of_a_users_own_kind_asks_for_the_option(found: tuple[Path, Result]) -> None:
    """A profile names its supernet without the module that describes it: the error asks for --supernet."""
    out, _ = found
    for command in (accuracy_command, calibrate_command):
        refused = run(command, out, "--weights", "random")

        assert refused.exit_code == 1
        assert "--supernet: expected package.module:attribute: the profile names 'tiny'" in refused.output


def test_calibrating_a_profile_writes_what_the_search_wrote(
    found: tuple[Path, Result], tmp_path: Path
) -> None:
    """The same statistics, from the supernet's data or from a file of the same examples."""
    out, _ = found
    assert TINY.data is not None
    data, examples, again = TINY.data(), tmp_path / "examples.npz", tmp_path / "again.safetensors"
    np.savez(examples, calibration=data.calibration, inputs=data.held_out.inputs, labels=data.held_out.labels)
    options = (out, "--supernet", SEARCH_TINY[1], "--weights", "random", "--out", again)
    subnets = [Subnet(row.name, row.control) for row in load_profile(out).subnets]
    supernet = resident(TINY, "random")
    expected = load_statistics(statistics_path(out), supernet, TINY.name, subnets)
    for more in ((), ("--examples", examples)):
        result = run(calibrate_command, *options, *more)
        assert result.exit_code == 0, result.output
        assert f"wrote {again}: statistics of {len(load_profile(out).subnets)} subnets" in result.output
        found_again = load_statistics(again, supernet, TINY.name, subnets)
        assert [held.channels for held in found_again.values()] == [
            held.channels for held in expected.values()
        ]
        for one, other in zip(found_again.values(), expected.values(), strict=True):
            torch.testing.assert_close(one.values, other.values)


def test_a_supernet_without_data_is_searched_on_examples_of_ones_own(tmp_path: Path) -> None:
    """What its own data made impossible a file makes possible; predictor and examples exclude each other."""
    out, examples = tmp_path / "own.json", tmp_path / "examples.npz"
    assert TINY.data is not None
    data = TINY.data()
    np.savez(examples, inputs=data.held_out.inputs, labels=data.held_out.labels)
    result = run(search_command, *SEARCH_TINY, "--examples", examples, "--out", out)
    both = run(search_command, *SEARCH_TINY, "--examples", examples, "--predictor", examples, "--out", out)

    assert result.exit_code == 0, result.output
    assert f"measured on {len(data.held_out.labels) // 2} held-out examples" in load_profile(out).provenance
    assert "expected a predictor or examples to measure it on, got both" in both.output


def test_measured_latencies_take_the_place_of_fitted_ones(tmp_path: Path) -> None:
    """With `--latency measured` the profile is a measured one, of the subnets that were found."""
    out = tmp_path / "measured.json"
    result = run(search_command, *SEARCH_TINY, "--latency", "measured", "--out", out)
    assert result.exit_code == 0, result.output
    profile = load_profile(out)

    assert profile.source == "measured"
    assert "Found by profiles.search" in profile.provenance
    assert "Latencies are modelled" not in profile.provenance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--supernet", "digit"], "did you mean 'digits'?"),
        (["--supernet", "dynabert", "--weights", "random"], "dynabert comes without data"),
        (["--subnets", "1"], "subnets: expected at least 2, got 1"),
        (["--batch-sizes", "4"], "batch_sizes: expected at least two, got [4]"),
        (["--batch-sizes", "2,1"], "batch_sizes: expected ascending"),
        (["--population", "1"], "population: expected at least 4, got 1"),
        (["--device", "tpu"], "device: expected cpu, cuda or cuda:<n>, got 'tpu'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_a_bad_option_of_search_is_one_clear_line(options: list[str], message: str, tmp_path: Path) -> None:
    """The command fails at once, names the option, and writes nothing."""
    out = tmp_path / "out.json"
    result = run(search_command, "--out", out, *options)

    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not out.exists()


def looking() -> Supernet:
    """Build the tiny supernet, as a plain function; its model reads a number of its input."""
    supernet = TINY.build()
    plain = supernet.model.forward
    supernet.model.forward = lambda x: plain(x) if float(x.sum()) > -1e9 else x
    return supernet


def test_a_plain_function_is_searched_and_measured(tmp_path: Path) -> None:
    """With an example of its input and labelled ones, without --weights; its model needs numbers to run."""
    examples, out, measured = (tmp_path / name for name in ("examples.npz", "found.json", "measured.json"))
    data = tiny_data()
    np.savez(examples, inputs=data.selection.inputs, labels=data.selection.labels)
    options = (*("--supernet", f"{__name__}:looking", "--example-input", "1x8x8:float32"),)
    effort = (*("--batch-sizes", "1,2", "--population", "4", "--generations", "0"),)
    searched = run(search_command, *options, *effort, "--examples", examples, "--out", out)
    assert searched.exit_code == 0, searched.output
    again = run(
        measure_command,
        *options,
        "--batch-sizes",
        "1,2",
        "--repeats",
        "2",
        "--subnets",
        out,
        "--out",
        measured,
    )
    assert again.exit_code == 0, again.output

    assert load_profile(out).supernet == load_profile(measured).supernet == f"{__name__}:looking"
    assert load_profile(measured).source == "measured"
    assert statistics_path(measured).exists()


def test_batch_sizes_are_numbers(tmp_path: Path) -> None:
    """A letter among them is refused by the option's name."""
    result = run(search_command, "--out", tmp_path / "out.json", "--batch-sizes", "1,x")

    assert result.exit_code == 1
    assert "--batch-sizes: expected whole numbers" in result.output


def test_a_predictor_is_for_its_own_supernet(tmp_path: Path) -> None:
    """Digits cannot be predicted by OFA-ResNet50's."""
    predictor = tmp_path / "predictor.pth"
    predictor.write_bytes(b"")
    result = run(search_command, "--predictor", predictor, "--out", tmp_path / "out.json")

    assert "predictor: expected the supernet ofa-resnet50, got digits" in result.output


def test_show_prints_a_heat_map_or_draws_it(tmp_path: Path) -> None:
    """Without a terminal: 80 columns of plain text; with `--picture` a file; a wrong name is one line."""
    printed = run(show_command, "cnn-8gpu-modelled").output
    picture = tmp_path / "map.svg"
    drawn = run(show_command, "cnn-8gpu-modelled", "--picture", picture)
    refused = run(show_command, "cnn-8gpu-modeled")

    assert "cnn-80.16" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed
    assert drawn.output == f"wrote {picture}\n"
    assert picture.exists()
    assert refused.exit_code == 1
    assert "did you mean 'cnn-8gpu-modelled'?" in refused.output


def test_without_subnet_norm_small_digits_subnets_guess(tmp_path: Path) -> None:
    """The shipped digits: the smallest is right on most images; with the largest's statistics, on few."""
    shipped = load_profile("digits-cpu")
    out = tmp_path / "two.json"
    out.write_bytes(replace(shipped, subnets=(shipped.subnets[0], shipped.subnets[-1])).to_json())
    result = run(accuracy_command, out)
    assert result.exit_code == 0, result.output
    (own, shared), _ = printed_accuracies(result.output).values()

    assert "own statistics" in result.output
    assert own > 80
    assert shared < 30


@pytest.mark.slow
@pytest.mark.timeout(180)  # a dozen subnets at 224 pixels on a busy machine
@pytest.mark.skipif(not PREDICTOR.exists(), reason=WITHOUT)
def test_ofa_resnet50_is_searched_with_its_predictor(tmp_path: Path) -> None:
    """A short search: valid, with predicted accuracies from the smallest subnet on, and labelled as such."""
    out = tmp_path / "ofa.json"
    options: list[Any] = ["--supernet", "ofa-resnet50", "--weights", "random", "--predictor", PREDICTOR]
    options += ["--batch-sizes", "1,2", "--population", "16", "--generations", "4", "--subnets", "8"]
    result = run(search_command, *options, "--out", out)
    assert result.exit_code == 0, result.output
    profile = load_profile(out)

    assert profile.supernet == "ofa-resnet50"
    assert len(profile.subnets) == 8
    assert profile.subnets[0].accuracy == 78.78
    assert 81 < profile.subnets[-1].accuracy <= 82.99
    assert profile.subnets[0].control == KINDS["ofa-resnet50"].build().controls.space.smallest
    assert "held-out part of ImageNet's training set" in profile.provenance
    assert not statistics_path(out).exists()


def test_a_broken_predictor_is_one_clear_line(tmp_path: Path) -> None:
    """The file and the tensor are named before anything is measured."""
    import torch  # noqa: PLC0415  to write the file

    predictor = tmp_path / "predictor.pth"
    tensors = published_shapes()
    del tensors["layers.3.weight"]
    torch.save(tensors, predictor)
    result = run(
        search_command, "--supernet", "ofa-resnet50", "--predictor", predictor, "--out", tmp_path / "out.json"
    )

    assert result.exit_code == 1
    assert f"{predictor}: tensor layers.3.weight: missing" in result.output
