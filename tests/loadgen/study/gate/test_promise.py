"""The promise, line by line, over constructed figures: each holds at its limit and fails below."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadgen.study.compare import Figures
from loadgen.study.gate.promise import PromiseLine, Standing, findings, is_near, shortcomings

MS = 1_000_000


def figures(
    attainment: float, accuracy: float | None = 78.0, top: float | None = None, batch: float | None = 15.0
) -> Figures:
    """Return figures that agree with each other."""
    return Figures(attainment, accuracy, attainment * (accuracy or 0.0), top, batch)


# All attain 0.99; the candidate is as accurate as slackfit and the baseline, and the bound is near.
EVEN = Standing(
    candidate=figures(0.99), slackfit=figures(0.99), mincost=figures(0.99, 74.0), slower=figures(0.99, 74.0),
    baseline=figures(0.99), slowed_slackfit=figures(0.99), slowed_baseline=figures(0.99),
    bound=Figures(1.0, None, 77.4), is_strict=True,
    is_at_once=False, n_gpus=8, slo_ns=36 * MS,
)  # fmt: skip


def failing(standing: Standing) -> str:
    """Return the letters of the lines that fail."""
    return "".join(sorted({one.line for one in findings(standing) if not one.holds}))


def test_a_policy_as_good_as_all_holds_every_line() -> None:
    """Each line counts here, and none fails."""
    assert failing(EVEN) == ""
    assert {one.line for one in findings(EVEN)} == set("abcde")
    assert shortcomings(EVEN) == ()


SURPRISED = replace(EVEN, is_surprise=True, n_gpus=1)
ALL_LOSE = dict.fromkeys(("slackfit", "baseline", "slowed_slackfit", "slowed_baseline"), figures(0.9))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"slower": figures(1.0, 74.0)}, ""),
        ({"candidate": figures(0.96), "slackfit": figures(0.9)}, "ac"),
        ({"mincost": figures(1.0, 80.0), "candidate": figures(0.95), **ALL_LOSE}, ""),
        ({"mincost": figures(1.0, 80.0), "candidate": figures(0.9499), **ALL_LOSE}, "a"),
        ({"slackfit": figures(0.9905, 77.0)}, ""),
        ({"slackfit": figures(0.9906, 77.0)}, "a"),
        ({"baseline": figures(0.9906, 77.0)}, "a"),
        ({"slowed_baseline": Figures(0.99, 78.0, 77.241)}, "c"),
    ],
)
def test_in_a_surprise_others_that_spend_time_are_the_measure(
    changed: dict[str, object], expected: str
) -> None:
    """Line a against slackfit, the baseline and mincost less 0.05; neither b nor c against mincost."""
    assert failing(replace(SURPRISED, **changed)) == expected  # type: ignore[arg-type]  # each is a field
    found = findings(SURPRISED)
    assert "b" not in {one.line for one in found}
    assert {one.against for one in found if one.line == "c"} == {"slackfit at 0.9", "baseline at 0.9"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # a: the better of slackfit and of mincost on slower GPUs, less 0.0005.
        ({"slackfit": figures(0.9905, 77.0)}, ""),
        ({"slackfit": figures(0.9906, 77.0)}, "a"),
        ({"slower": figures(0.9905, 74.0)}, ""),
        ({"slower": figures(0.9906, 74.0)}, "a"),
        # a: mincost less 0.01; b: mincost less 0.0005, where there is no excuse.
        ({"mincost": figures(1.0, 74.0), "is_strict": False}, ""),
        ({"candidate": figures(0.9898, 79.0), "mincost": figures(1.0, 74.0), "is_strict": False}, "a"),
        ({"mincost": figures(0.9905, 74.0)}, ""),
        ({"mincost": figures(0.9906, 74.0)}, "b"),
        ({"mincost": figures(0.9906, 74.0), "is_strict": False}, ""),
        # c: correct answers of mincost, and of slackfit and the baseline on slower GPUs, each less 0.02.
        ({"slowed_slackfit": Figures(0.98, 78.0, 77.239)}, ""),
        ({"slowed_slackfit": Figures(0.98, 78.0, 77.241)}, "c"),
        ({"mincost": Figures(0.99, 78.0, 77.241, None, 15.0)}, "c"),
        ({"slowed_baseline": Figures(0.99, 78.0, 77.239)}, ""),
        ({"slowed_baseline": Figures(0.99, 78.0, 77.241)}, "c"),
        ({"slackfit": Figures(0.99, 78.0, 80.0), "baseline": Figures(0.99, 78.0, 80.0)}, ""),
        # d: accuracy, where attainments differ by less than 0.0005.
        ({"slowed_slackfit": Figures(0.9899, 78.0199, 77.2)}, ""),
        ({"slowed_slackfit": Figures(0.9899, 78.0201, 77.2)}, "d"),
        ({"slowed_slackfit": Figures(0.9894, 78.0201, 77.2)}, ""),
        ({"slowed_slackfit": Figures(0.9899, None, 77.2)}, ""),
        # e: within 0.3 of the bound, where that is near.
        ({"bound": Figures(1.0, None, 77.5199)}, ""),
        ({"bound": Figures(1.0, None, 77.5201)}, "e"),
        ({"bound": Figures(0.9999, None, 79.0)}, ""),
        ({"bound": Figures(1.0, None, 79.0), "n_gpus": 7}, ""),
        ({"bound": Figures(1.0, None, 79.0), "is_at_once": True}, ""),
        ({"bound": Figures(1.0, None, 79.0), "slo_ns": 35 * MS}, ""),
        ({"bound": Figures(1.0, None, 79.0), "slo_ns": None}, ""),
        ({"bound": Figures(1.0, None, 79.0), "mincost": figures(0.99, 74.0, batch=13.9)}, ""),
        ({"bound": Figures(1.0, None, 79.0), "mincost": figures(0.99, 74.0, batch=None)}, ""),
        ({"bound": Figures(1.0, None, 79.0), "mincost": figures(0.99, 74.0, batch=14.0)}, "e"),
    ],
)
def test_each_line_fails_just_below_its_limit(changed: dict[str, object], expected: str) -> None:
    """One figure is moved at a time: to the limit, and past it."""
    standing = replace(EVEN, **changed)  # type: ignore[arg-type]  # by name

    assert failing(standing) == expected


@pytest.mark.parametrize(
    ("ours", "top", "expected"),
    [
        (figures(0.99, top=1.0), figures(0.99, top=1.0), ""),
        (figures(0.99, top=0.9995), figures(0.99, top=1.0), ""),
        (figures(0.99, top=0.9994), figures(0.99, top=1.0), "a"),
        (figures(0.99, top=1.0), figures(0.995, 74.0, top=0.9), "a"),
    ],
)
def test_the_highest_class_counts_as_all_do(ours: Figures, top: Figures, expected: str) -> None:
    """Line a holds for the highest class, and for all queries: neither makes up for the other."""
    others = figures(0.99, 74.0, top=0.5)

    assert failing(replace(EVEN, candidate=ours, slackfit=others, mincost=others, slower=top)) == expected


def test_the_worst_of_each_line_is_shown() -> None:
    """Of two failures of one line the larger is named, with what it was compared with and by how much."""
    standing = replace(
        EVEN, slowed_slackfit=Figures(0.97, 79.0, 77.3), slowed_baseline=Figures(0.99, 79.0, 78.21),
        mincost=figures(0.995, 74.0),
    )  # fmt: skip

    short = shortcomings(standing)

    assert [one.line for one in short] == ["b", "c"]
    assert short[1].against == "baseline at 0.95"
    assert short[1].margin == pytest.approx(0.99 * 78 - 78.21 + 0.02)
    assert str(PromiseLine("c", "baseline", -0.97)) == "c -0.97000 (baseline)"


def test_the_distance_to_the_bound_is_there_wherever_line_e_does_not_count() -> None:
    """It is printed in every cell."""
    far = replace(EVEN, n_gpus=2, bound=Figures(0.8, None, 79.0))

    assert not is_near(far)
    assert far.of_bound == pytest.approx(0.99 * 78 - 79)
