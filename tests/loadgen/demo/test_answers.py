"""What the demo says of answers is true, and it catches a worker that does not do as directed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.demo import answers, tables, verdict
from loadgen.demo.answers import DemoComparison, Score, ServedAnswers, compare, enough, recompute, together
from loadgen.demo.answers import score as score_answers

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


@given(accuracy=st.floats(1.0, 99.0))
def test_enough_answers_make_three_sigmas_fit_the_tolerance(accuracy: float) -> None:
    """This number of answers is enough, one fewer is not."""
    n, share = enough(accuracy), accuracy / 100

    assert 300 * (share * (1 - share) / n) ** 0.5 <= answers.TOLERANCE_POINTS + 1e-9
    assert n == 1 or 300 * (share * (1 - share) / (n - 1)) ** 0.5 > answers.TOLERANCE_POINTS


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
    wrong = verdict.wrong_answers([Score("large", 10_000, 9_400, 96.0)], [])

    assert len(wrong) == 1
    assert "labels of large" in wrong[0]


def test_too_few_answers_are_not_judged_and_it_is_said() -> None:
    """Far off, but with few answers: listed with an interval, no failure of its own."""
    few, many = Score("small", 20, 5, 80.0), Score("large", 10_000, 9_600, 96.0)

    assert verdict.wrong_answers([few, many], []) == []
    assert "too few to judge (needs 6,400)" in "\n".join(tables.score_lines([few, many]))
    assert "too few queries" in verdict.thin_answers([few])[0]
    assert verdict.thin_answers([few, many]) == []


def test_honest_answers_pass() -> None:
    """Each computed by the subnet that it names."""
    rows = np.arange(300) % 3
    comparisons = recompute(answers_by(rows, rows), PIXELS, NAMES, forward)

    assert comparisons == [DemoComparison(name, 50, 50, 50) for name in NAMES]
    assert verdict.wrong_answers([Score("large", 10_000, 9_600, 96.0)], comparisons) == []


@pytest.mark.parametrize("ran", range(3))
def test_a_worker_that_ignores_directives_is_caught(ran: int) -> None:
    """It runs one subnet always: all answers that name another are found out."""
    rows = np.arange(300) % 3
    comparisons = recompute(answers_by(np.full(300, ran), rows), PIXELS, NAMES, forward)

    assert [one.n_same for one in comparisons] == [50 if row == ran else 0 for row in range(3)]
    assert len(verdict.wrong_answers([], comparisons)) == 2  # the other two subnets


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

    assert comparison.n_telling == 0
    assert "no proof" in verdict.wrong_answers([], [comparison])[-1]


@pytest.mark.parametrize(("n_left_out", "n_lines"), [(0, 0), (1, 1), (50, 1)])
def test_an_answer_without_an_output_is_a_failure(n_left_out: int, n_lines: int) -> None:
    """A worker that sends nothing but zeros cannot pass for one whose batches ended in part."""
    rows = np.zeros(100 - n_left_out, np.int64)

    assert (
        len(
            verdict.wrong_coverage(
                ServedAnswers(rows, rows, np.ones((len(rows), 10), np.float32), n_left_out)
            )
        )
        == n_lines
    )


def test_answers_of_all_subnets_are_judged_together() -> None:
    """Where no subnet answered enough, all of them may have: beside the accuracy expected of that mix."""
    scores = [Score("small", 1_000, 750, 80.0), Score("large", 3_000, 2_880, 96.0)]
    both = together(scores)

    assert (both.n, both.n_right, both.profiled) == (4_000, 3_630, 92.0)
    assert both.is_judged
    assert together([]).n == 0


def test_too_few_answers_of_all_still_show_labels_that_are_wrong() -> None:
    """Short of the tolerance, the interval that they leave must hold the accuracy expected of the mix."""
    fine, wrong = (together([Score("x", 200, n_right, 90.0)]) for n_right in (178, 20))

    assert verdict.wrong_answers([fine], []) == []
    assert "labels of all of them" in verdict.wrong_answers([wrong], [])[0]
    assert verdict.wrong_answers([together([])], []) == ["labels: no query was answered"]


def test_answers_of_several_runs_are_joined() -> None:
    """In order, and those left out add up."""
    rows = np.arange(6) % 3
    one = answers_by(rows, rows)
    both = answers.joined([one, ServedAnswers(one.rows[:2], one.images[:2], one.logits[:2], n_left_out=3)])

    assert both.rows.tolist() == [*rows, 0, 1]
    assert len(both.logits) == len(both.images) == 8
    assert both.n_left_out == 3
