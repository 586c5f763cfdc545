"""Advice on the number of GPUs: bisection, its words and picture, and agreement with `loadgen search`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.simulator.simulate import simulate
from loadgen.study.advise import sizing
from loadgen.study.advise.picture import draw
from loadgen.study.advise.sizing import SizedRun, SizingAnswer, SizingQuestion, best_of, size, words_of
from loadgen.study.rate_search import Bounds
from loadgen.study.search import Search, find_rate, simulated_offer
from loadgen.traces.trace import open_source
from profiles.table import load_profile
from superserve.clock import MS
from tests.loadgen.study.explain.flown import drawn

if TYPE_CHECKING:
    from pathlib import Path

PROFILE = load_profile("cnn-8gpu-modelled")
SLO_NS = 36 * MS


def question(spec: str, duration_s: float = 1.0, attainment: float = 0.99) -> SizingQuestion:
    """Return a question about a trace, with one set of arrivals."""
    return SizingQuestion(PROFILE, attainment, SLO_NS, (drawn(spec, duration_s, seed=0),))


@pytest.mark.parametrize("start", [1, 3, 7, 8, 50])
@pytest.mark.parametrize("least", [1, 2, 7, 8, 100, 4_096])
def test_the_least_number_is_found(start: int, least: int) -> None:
    """From any start, in few steps."""
    tried: list[int] = []

    def holds(n: int) -> bool:
        tried.append(n)
        return n >= least

    assert sizing._fewest(holds, start) == least
    assert len(tried) <= 26
    assert sizing._fewest(lambda _: False, start) is None


def test_it_finds_what_a_simulation_confirms() -> None:
    """The answer holds, one GPU fewer does not, and more GPUs give more accuracy."""
    asked = question("poisson:rate=4000", 0.6)
    said: list[str] = []

    answer = size(asked, "slackfit", said.append)

    assert answer.least is not None
    n = answer.least.gpus
    for gpus, holds in ((n, True), (n - 1, False)):
        found = simulate(asked.traces[0], [PROFILE] * gpus, policy="slackfit", slo_ns=SLO_NS).result
        assert ((found.slo_attainment or 0.0) >= asked.attainment) == holds
    held = [run.accuracy or 0.0 for run in answer.runs if run.gpus >= n]
    assert len(held) >= 3
    assert all(less <= more for less, more in pairwise(held))
    assert len(said) == len(answer.runs)
    words = words_of(asked, [answer])
    assert words[0].startswith(f"{n} GPUs under slackfit: attainment 0.99 at 36 ms for ")
    assert words[1].startswith(f"  with {n - 1} the attainment is 0.")


def test_other_arrivals_must_hold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that holds for the first arrivals and fails for the second fails."""
    quiet, busy = drawn("poisson:rate=500", 0.3), drawn("poisson:rate=9000", 0.3)
    asked = SizingQuestion(PROFILE, 0.99, SLO_NS, (quiet, busy))
    monkeypatch.setattr(sizing, "MOST_GPUS", 64)

    answer = size(asked, "slackfit", lambda _: None, beyond=())

    assert answer.least is not None
    alone = size(SizingQuestion(PROFILE, 0.99, SLO_NS, (quiet,)), "slackfit", lambda _: None, beyond=())
    assert alone.least is not None
    assert answer.least.gpus > alone.least.gpus


def test_the_fewest_gpus_win_and_accuracy_decides_a_tie() -> None:
    """Policies without an answer do not."""
    none = SizingAnswer("none", None)
    costly = SizingAnswer("costly", SizedRun("costly", 4, 1.0, 79.0))
    less = SizingAnswer("less", SizedRun("less", 3, 1.0, 75.0))
    more = SizingAnswer("more", SizedRun("more", 3, 1.0, 76.0))

    assert best_of([none, costly, less, more]) is more
    assert best_of([none]) is None
    assert "no number up to 4,096 holds" in words_of(question("poisson:rate=100", 0.1), [more, none])[-1]


def test_the_picture_has_a_line_for_each_policy() -> None:
    """It names them, and the same answers give the same bytes."""
    answers = [
        SizingAnswer(
            name, SizedRun(name, 2, 1.0, 75.0), [SizedRun(name, n, 1 - 0.1**n, 74.0 + n) for n in (1, 2, 4)]
        )
        for name in ("planfit", "slackfit")
    ]

    text = draw(answers, 0.999)
    assert all(name in text for name in ("planfit", "slackfit", "accuracy of what is in time"))
    assert draw(answers, 0.999) == text


def test_the_command_says_it_and_writes_it(tmp_path: Path) -> None:
    """It prints the advice, writes JSON and a picture, and refuses an SLO that nothing meets."""
    words = ["advise", "--profile", "cnn-8gpu-modelled", "--trace", "poisson:rate=600", "--duration", "0.3",
             "--policy", "slackfit", "--once"]  # fmt: skip
    done = CliRunner().invoke(cli, [*words, "--json", f"{tmp_path}/a.json", "--picture", f"{tmp_path}/a.svg"])
    assert done.exit_code == 0, done.output
    assert "1 GPUs under slackfit: attainment 0.999 at 36 ms" in done.output
    assert '"gpus": 1' in (tmp_path / "a.json").read_text()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    wrong = CliRunner().invoke(cli, [*words, "--slo-ms", "1"])
    assert wrong.exit_code == 1
    assert "--slo-ms: expected more than" in wrong.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "rate_qps"),
    [("poisson", 3_000.0), ("bursty:variant=2000,base=1000,cv2=8", 3_000.0), ("maf-like", 3_000.0)],
)
def test_it_agrees_with_search_within_one_gpu(spec: str, rate_qps: float) -> None:
    """`loadgen search` finds that one GPU more serves the rate, and that two fewer do not."""
    source = open_source(spec, rate_qps=rate_qps)
    search = Search(source, spec, 0.99, SLO_NS, Bounds(rate_qps, tolerance=0.1, max_probes=4), 1.0)
    asked = SizingQuestion(
        PROFILE, 0.99, SLO_NS, (search.trace_at(rate_qps, 0), search.trace_at(rate_qps, 1))
    )
    answer = size(asked, "slackfit", lambda _: None, beyond=())
    assert answer.least is not None
    n = answer.least.gpus

    def highest(gpus: int) -> float:
        found = find_rate(search, simulated_offer([PROFILE] * gpus, "slackfit", SLO_NS), lambda _: None)
        return found.rate_qps or 0.0

    assert highest(n + 1) >= rate_qps
    if n > 2:
        assert highest(n - 2) < rate_qps
