"""The search: which tuples are one network, who survives, and that one seed gives one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.models.kinds import KINDS
from profiles.measuring.find import servable
from profiles.measuring.flops import Cost, CostCounter, meta_supernet
from profiles.measuring.search import Candidate, SearchEffort, Space, non_dominated, search, survivors
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from tests.paths import ROOT
from tests.profiles.measuring.test_accuracy import TINY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gpu_worker.supernet.control import Control

    Floats = npt.NDArray[np.float64]

POINTS = st.integers(1, 3).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, 6).map(float), min_size=n, max_size=n), min_size=1, max_size=25
    ).map(np.array)
)


# --- tuples and networks --------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_canonical_tuple_is_the_same_network(name: str) -> None:
    """For random tuples of each supernet: legal, of the same signature, and canonical already."""
    supernet = meta_supernet(KINDS[name])
    space = Space(supernet)
    rng = np.random.default_rng(3)
    for _ in range(60):
        genome = space.genome(supernet.controls.space.random(rng))
        canonical = space.canonical(genome)

        supernet.controls.space.check(space.control(canonical))
        assert space.signature(canonical) == space.signature(genome)
        assert space.canonical(canonical) == canonical


def changed(control: Control, key: str, place: int, value: Any) -> Control:
    """Return a control tuple with another value in one place."""
    return {
        name: [*row] if name != key else [*row[:place], value, *row[place + 1 :]]
        for name, row in control.items()
    }


@pytest.mark.parametrize(
    ("name", "control", "change"),
    [
        # OFA: the stem block runs only at 2, so 1 is 0.
        ("ofa-resnet50", {"d": [0] * 5, "e": [0.2] * 18, "w": [0] * 6}, ("d", 0, 1)),
        # The third block of the first stage does not run.
        ("ofa-resnet50", {"d": [0] * 5, "e": [0.2] * 18, "w": [0] * 6}, ("e", 2, 0.35)),
        # 32 channels times 0.65 and times 0.8 are both rounded to 24.
        ("ofa-resnet50", {"d": [0] * 5, "e": [0.2] * 18, "w": [0] * 6}, ("w", 0, 1)),
        # At depth 6 DynaBERT keeps every second block.
        ("dynabert", {"d": [6], "w": [0.25] * 12}, ("w", 1, 1.0)),
    ],
)
def test_entries_that_do_not_matter_are_lowered(
    name: str, control: Control, change: tuple[str, int, Any]
) -> None:
    """Two tuples of one network come to one canonical tuple."""
    space = Space(meta_supernet(KINDS[name]))
    other = changed(control, *change)

    assert space.canonical(space.genome(other)) == space.canonical(space.genome(control))
    assert space.control(space.canonical(space.genome(other))) == control


def test_entries_that_matter_stay() -> None:
    """A block that runs keeps its width."""
    space = Space(meta_supernet(KINDS["dynabert"]))
    genome = space.genome({"d": [6], "w": [0.25, 0.25, 1.0, *[0.25] * 9]})

    assert space.canonical(genome) == genome


def test_a_search_draws_the_ofa_stem_as_it_is() -> None:
    """The first depth is 0 or 2: at 1 the predictor would see a block that does not run."""
    assert Space(meta_supernet(KINDS["ofa-resnet50"])).choices[0] == (0, 2)


# --- who survives ---------------------------------------------------------------------------


def dominates(one: Floats, other: Floats) -> bool:
    """Return whether `one` is as low everywhere, and lower somewhere."""
    return bool((one <= other).all() and (one < other).any())


@given(points=POINTS)
def test_a_front_is_mutually_non_dominated(points: Floats) -> None:
    """No row of it beats another, and each row left out is beaten, or equalled, by one of it."""
    front = non_dominated(points)

    assert not any(dominates(points[one], points[other]) for one in front for other in front)
    for row in set(range(len(points))) - set(front):
        assert any((points[kept] <= points[row]).all() for kept in front)


@given(points=POINTS, n=st.integers(1, 25))
def test_survivors_are_the_best_fronts(points: Floats, n: int) -> None:
    """As many as asked for or there are, each once, and none beaten by one that is left out."""
    chosen = survivors(points, n)

    assert len(set(chosen)) == len(chosen) == min(n, len(points))
    left_out = set(range(len(points))) - set(chosen)
    assert not any(dominates(points[lost], points[kept]) for lost in left_out for kept in chosen)


@given(
    rows=st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=20)
)
def test_servable_rows_pay_for_being_slower(rows: list[tuple[float, float, float]]) -> None:
    """Accuracy to two decimals and mean latency both ascend; the most accurate is kept."""
    accuracies = [accuracy for accuracy, _, _ in rows]
    latency_ms = np.array([latencies for _, *latencies in rows])
    kept = servable(accuracies, latency_ms)

    rounded = [round(accuracies[row], 2) for row in kept]
    means = np.log(latency_ms).mean(axis=1)[kept].tolist()
    assert rounded == sorted(set(rounded))
    assert means == sorted(set(means))
    assert rounded[-1] == max(round(accuracy, 2) for accuracy in accuracies)


# --- the evolution --------------------------------------------------------------------------


class Toy:
    """An accuracy that grows with each entry, less and less, and each entry by its own measure."""

    def __init__(self, space: Space) -> None:
        self.seen: list[Control] = []
        self._space = space

    def __call__(self, controls: Sequence[Control]) -> Floats:
        """Return percents."""
        self.seen += controls
        genomes = np.array([self._space.genome(control) for control in controls], dtype=np.float64)
        weights = 1 + np.arange(genomes.shape[1]) % 3
        return np.asarray(100 * (1 - np.exp(-(genomes @ weights) / weights.sum())))


def searched(effort: SearchEffort) -> tuple[list[Candidate], Toy, Space]:
    """Search the digits supernet for what the toy says."""
    counter = CostCounter(KINDS["digits"])
    space = Space(counter.supernet)
    toy = Toy(space)
    return search(space, toy, counter, effort).candidates, toy, space


def test_what_is_found_is_legal_and_non_dominated() -> None:
    """No tuple out of bounds is judged, no network twice, and no subnet found beats another."""
    front, toy, space = searched(SearchEffort(population=16, generations=4))
    legal = meta_supernet(KINDS["digits"]).controls.space
    for control in toy.seen:
        legal.check(control)

    signatures = [space.signature(space.genome(control)) for control in toy.seen]
    assert len(set(signatures)) == len(signatures)
    assert legal.smallest in toy.seen
    assert legal.largest in toy.seen
    points = np.array([(-one.accuracy, *one.cost) for one in front])
    assert len(non_dominated(points)) == len(front)
    assert front[0].control == legal.smallest


def test_one_seed_gives_one_result() -> None:
    """The same seed judges the same subnets in the same order; another seed does not."""
    first, second, other = (searched(SearchEffort(12, 3, seed))[1].seen for seed in (4, 4, 5))

    assert first == second
    assert first != other


_PROGRAM = """
import json
from tests.profiles.measuring.test_search import SearchEffort, searched
front, toy, _ = searched(SearchEffort(12, 3, 4))
print(json.dumps([toy.seen, [one.control for one in front]]))
"""


@pytest.mark.e2e
def test_one_seed_gives_one_result_in_every_process() -> None:
    """Nothing depends on the order of sets, which differs from process to process."""
    front, toy, _ = searched(SearchEffort(12, 3, 4))
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(ran.stdout) == [toy.seen, [one.control for one in front]]


def test_generations_find_what_drawing_does_not() -> None:
    """For as many judged subnets, evolution is nearer to the best at most costs than random draws."""
    effort = SearchEffort(population=20, generations=8)
    front, toy, _ = searched(effort)
    drawn, _, _ = searched(SearchEffort(population=len(toy.seen), generations=0))

    def best_within(candidates: list[Candidate], budget: int) -> float:
        return max((one.accuracy for one in candidates if one.cost.multiply_adds <= budget), default=0.0)

    budgets = [one.cost.multiply_adds for one in drawn]
    wins = [best_within(front, budget) >= best_within(drawn, budget) for budget in budgets]
    assert sum(wins) / len(wins) > 0.8


def test_a_small_space_is_searched_to_its_end() -> None:
    """Where nothing new is left, generations end without children."""
    counter = CostCounter(TINY)
    space = Space(counter.supernet)
    toy = Toy(space)
    front = search(space, toy, counter, SearchEffort(population=30, generations=12))

    assert front.n_judged == len(toy.seen) <= 36  # as many tuples as the space has
    assert front.n_judged > 30
    assert len(front.candidates) + len(front.others) <= front.n_judged
    both = [one.control for one in (*front.candidates, *front.others)]
    assert [space.control(end) for end in space.ends if space.control(end) not in both] == []


def test_costs_are_what_a_settings_tuple_says() -> None:
    """A candidate's cost is that of its own control tuple."""
    front, _, _ = searched(SearchEffort(8, 1))
    counter = CostCounter(KINDS["digits"])

    assert [one.cost for one in front] == [counter(one.control) for one in front]
    assert all(isinstance(one.cost, Cost) for one in front)


@pytest.mark.parametrize(
    ("effort", "message"), [((3, 1, 0), "population"), ((4, -1, 0), "generations"), ((4, 1, -1), "seed")]
)
def test_an_impossible_effort_is_refused(effort: tuple[int, int, int], message: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError, match=f"{message}: expected at least"):
        SearchEffort(*effort)


def test_signatures_tell_networks_apart() -> None:
    """A tuple out of bounds has none; two networks have two."""
    supernet = meta_supernet(TINY)
    space = Space(supernet)
    smallest, largest = space.ends

    assert space.signature(smallest) != space.signature(largest)
    assert supernet.settings_of(Subnet("x", space.control(largest)))
    with pytest.raises(ConfigError, match="control d, stage 0: expected"):
        space.signature((9, *largest[1:]))
