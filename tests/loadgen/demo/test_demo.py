"""The demo: what it says of answers is true, and it catches a worker that does not do as told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from loadgen.demo import demo
from loadgen.demo.demo import (
    DemoComparison,
    Score,
    ServedAnswers,
    burst_spec,
    capacity_qps,
    compare,
    enough,
    recompute,
)
from loadgen.demo.demo import score as score_answers
from loadgen.results.result import load_run
from loadgen.traces.specs import parse_spec
from profiles.table import load_profile
from superserve.errors import ProcessError
from superserve.roles import local

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SUBNETS = [("small", 80.0), ("middle", 90.0), ("large", 96.0)]
NAMES = [name for name, _ in SUBNETS]
PIXELS = np.random.default_rng(3).standard_normal((400, 10)).astype(np.float32)


def forward(row: int, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Play a supernet: every row gives other logits."""
    return np.asarray(images * np.float32(row + 1), dtype=np.float32)


def answers_by(ran: npt.NDArray[np.int64], named: npt.NDArray[np.int64]) -> ServedAnswers:
    """Return answers that name one row each and were computed by another, maybe."""
    images = np.arange(len(ran)) % len(PIXELS)
    logits = np.stack([forward(int(row), PIXELS[image]) for row, image in zip(ran, images, strict=True)])
    return ServedAnswers(named, images, logits)


def test_capacity_is_that_of_the_best_batch_size() -> None:
    """16 in 8 ms are 2,000 a second, more than one in 1 ms."""
    assert capacity_qps((1, 16), (1_000_000, 8_000_000)) == pytest.approx(2_000)


@given(capacity=st.floats(10, 100_000))
def test_the_burst_overloads_the_subnet_it_is_made_for(capacity: float) -> None:
    """Its mean rate is above the capacity, whatever that is."""
    spec = parse_spec(burst_spec(capacity), rate_qps=None)

    assert spec.mean_qps(10.0) > 1.1 * capacity


@given(accuracy=st.floats(1.0, 99.0))
def test_enough_answers_make_three_sigmas_fit_the_tolerance(accuracy: float) -> None:
    """So many answers do, one fewer would not."""
    n, share = enough(accuracy), accuracy / 100

    assert 300 * (share * (1 - share) / n) ** 0.5 <= demo.TOLERANCE_POINTS + 1e-9
    assert n == 1 or 300 * (share * (1 - share) / (n - 1)) ** 0.5 > demo.TOLERANCE_POINTS


@given(n=st.integers(0, 10_000), share=st.floats(0, 1))
def test_an_interval_holds_what_was_measured(n: int, share: float) -> None:
    """And stays within 0 to 100 %."""
    one = Score("x", n, int(n * share), 90.0)
    low, high = one.interval()

    assert 0 <= low <= high <= 100
    assert one.measured is None or low - 1e-9 <= one.measured <= high + 1e-9


def test_labels_are_scored_by_the_subnet_that_an_answer_names() -> None:
    """Right and wrong answers count for their own row only; one that served nothing has no accuracy."""
    rows = np.array([0, 0, 0, 2])
    scores = score_answers(rows, np.array([1, 2, 3, 4]), np.array([1, 2, 9, 4]), SUBNETS)

    assert [(one.n, one.n_right) for one in scores] == [(3, 2), (0, 0), (1, 1)]
    assert scores[1].measured is None


def test_a_subnet_that_reads_worse_than_promised_is_caught() -> None:
    """Two points below the profile in ten thousand answers is wrong."""
    wrong = demo.wrong_answers([Score("large", 10_000, 9_400, 96.0)], [])

    assert len(wrong) == 1
    assert "labels of large" in wrong[0]


def test_too_few_answers_are_not_judged_and_it_is_said() -> None:
    """Far off, but with few answers: listed with an interval, no failure of its own."""
    few, many = Score("small", 20, 5, 80.0), Score("large", 10_000, 9_600, 96.0)

    assert demo.wrong_answers([few, many], []) == []
    assert "too few to judge (needs 6,400)" in "\n".join(demo.score_lines([few, many]))
    assert "no subnet answered enough" in demo.wrong_answers([few], [])[0]


def test_honest_answers_pass() -> None:
    """Each computed by the subnet that it names."""
    rows = np.arange(300) % 3
    comparisons = recompute(answers_by(rows, rows), PIXELS, NAMES, forward)

    assert comparisons == [DemoComparison(name, 50, 50, 50) for name in NAMES]
    assert demo.wrong_answers([Score("large", 10_000, 9_600, 96.0)], comparisons) == []


@pytest.mark.parametrize("ran", range(3))
def test_a_worker_that_ignores_directives_is_caught(ran: int) -> None:
    """It runs one subnet always: all answers that name another are found out."""
    rows = np.arange(300) % 3
    comparisons = recompute(answers_by(np.full(300, ran), rows), PIXELS, NAMES, forward)

    assert [one.n_same for one in comparisons] == [50 if row == ran else 0 for row in range(3)]
    assert len(demo.wrong_answers([], comparisons)) == 3  # the two subnets, and that none is judged


def test_a_single_wrong_answer_is_caught() -> None:
    """One of few answers came from the neighbour."""
    named = np.zeros(40, np.int64)
    ran = named.copy()
    ran[7] = 1

    assert recompute(answers_by(ran, named), PIXELS, NAMES, forward)[0] == DemoComparison("small", 40, 39, 40)


def test_subnets_that_answer_alike_prove_nothing() -> None:
    """Where a neighbour gives the same outputs, a match is not taken for proof."""
    same = PIXELS[:5]
    comparison = compare("small", same, same, [same])

    assert not comparison.is_proof
    assert "no proof" in demo.wrong_answers([], [comparison])[-1]


@pytest.mark.parametrize(("n_left_out", "n_lines"), [(0, 0), (1, 1), (50, 1)])
def test_an_answer_without_an_output_is_a_failure(n_left_out: int, n_lines: int) -> None:
    """A worker that sends nothing but zeros cannot pass for one whose batches ended in part."""
    rows = np.zeros(100 - n_left_out, np.int64)

    assert (
        len(demo.wrong_coverage(ServedAnswers(rows, rows, np.ones((len(rows), 10), np.float32), n_left_out)))
        == n_lines
    )


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_the_demos_cluster_is_gone_however_its_block_ends(tmp_path: Path) -> None:
    """Interrupted, it leaves no process; what an earlier demo left when it was killed goes first."""
    profile = tmp_path / "profile.json"
    profile.write_bytes(load_profile("digits-cpu").to_json())
    demo._cluster(tmp_path / "cluster", "up", "--emulate", "cnn-8gpu-modelled:1")
    seen = [local.running(tmp_path / "cluster")]

    def serve() -> None:
        with demo.serving("maxacc", profile) as endpoint:
            assert not seen[0].keeper.is_alive()
            seen.append(local.running(tmp_path / "cluster"))
            assert endpoint == seen[1].client_endpoint
            assert "policy maxacc" in seen[1].roles[0].serves
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve()

    processes = [seen[1].keeper, *(role.process for role in seen[1].roles)]
    assert [process.is_alive() for process in processes if process] == [False] * 3
    assert local.names(tmp_path / "cluster") == []


@pytest.mark.e2e
def test_a_demo_whose_cluster_does_not_start_says_why(tmp_path: Path) -> None:
    """The error has what `cluster up` said."""
    serving = demo.serving("slackfit", tmp_path / "none.json")

    with pytest.raises(ProcessError, match=r"cluster up: exit code 1:\n.*none.json"), serving:
        pytest.fail("it serves")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_demo_serves_twice_and_every_answer_is_what_it_says(tmp_path: Path) -> None:
    """Results are written and checks made; only attainment may fail, on a machine that is busy."""
    done = CliRunner().invoke(demo.cli, ["--out", str(tmp_path), "--seconds", "6"])

    for name, policy in (("adaptive", "slackfit"), ("largest", "fixed")):
        assert load_run(tmp_path / f"{name}.json").policy.startswith(policy), done.output
    assert (tmp_path / "profile.json").exists()
    assert "fixed:largest" in (tmp_path / "report.html").read_text()
    for words in ("SLO attainment", "Labels that came back", "are its own", "Next: "):
        assert words in done.output
    assert not (tmp_path / "cluster").exists()
    failed = [line for line in done.output.splitlines() if line.startswith("FAILED")]
    assert not [line for line in failed if "labels of" in line or "outputs of" in line], failed
    assert done.exit_code == (1 if failed else 0)
