"""Heat maps: in 80 columns, without colour where nobody sees it, and the same picture every time."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from profiles.show import colour, draw_heat_map, flops_unit, heat, print_heat_map
from profiles.table import Profile, load_profile, shipped_profiles
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def shown(profile: Profile, *, is_terminal: bool = False, width: int = 80) -> str:
    """Return what is printed."""
    page = io.StringIO()
    if is_terminal:
        console = Console(file=page, width=width, force_terminal=True, color_system="truecolor")
    else:
        console = Console(file=page, width=width)
    print_heat_map(profile, console)
    return page.getvalue()


@pytest.mark.parametrize("name", shipped_profiles())
@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut(name: str, width: int) -> None:
    """No line is longer than the page, and every subnet's every batch size is there whole."""
    profile = load_profile(name)
    page = shown(profile, width=width)

    assert max(map(len, page.splitlines())) <= width
    assert "…" not in page
    for size in profile.batch_sizes:
        assert f"batch {size}" in page
    for subnet in profile.subnets:
        assert page.count(subnet.name) >= 1
        assert f"{subnet.accuracy:.2f}" in page


def test_five_batch_sizes_stand_in_one_table_of_80_columns() -> None:
    """The usual profile needs no second table."""
    assert shown(load_profile("cnn-8gpu-modelled")).count("batch 1 ") == 1


def test_a_cell_is_the_median_and_how_much_longer_the_p99_is() -> None:
    """1.41 ms and 1.452 ms: 3 %; a p99 of several medians is shown as their ratio."""
    profile = load_profile("cnn-8gpu-modelled")
    first = profile.subnets[0]
    heavy = replace(first, latency_p99_ns=tuple(6 * latency for latency in first.latency_ns))

    assert "1.41  +3%" in shown(profile)
    assert "1.41   x6" in shown(replace(profile, subnets=(heavy,)))


def test_multiply_adds_are_told_in_a_unit_that_fits() -> None:
    """Billions, or millions where no subnet has a tenth of a billion; a dash where they are unknown."""
    digits, modelled = load_profile("digits-cpu"), load_profile("cnn-8gpu-modelled")

    assert flops_unit(digits) == "MFLOPs"
    assert flops_unit(modelled) == "GFLOPs"
    assert " - " in shown(modelled)


def test_colour_is_for_terminals() -> None:
    """A pipe or a file gets none; a terminal gets a background from the cold to the hot end."""
    profile = load_profile("cnn-8gpu-modelled")
    on_terminal = shown(profile, is_terminal=True)

    assert "\x1b" not in shown(profile)
    assert "48;2;68;1;84m" in on_terminal
    assert "48;2;253;231;37m" in on_terminal


def test_heat_is_logarithmic_from_end_to_end() -> None:
    """The quickest median is 0, the slowest 1, and their geometric mean lies halfway."""
    profile = load_profile("cnn-8gpu-modelled")
    least, longest = profile.latency_ns(0, 1), profile.latency_ns(profile.n_subnets - 1, 16)

    assert (heat(least, profile), heat(longest, profile)) == (0, 1)
    assert heat(round((least * longest) ** 0.5), profile) == pytest.approx(0.5)
    assert colour(0) == (68, 1, 84)
    assert colour(1) == (253, 231, 37)
    one = replace(profile.subnets[0], latency_ns=(5,), latency_p99_ns=(5,))
    assert heat(5, replace(profile, batch_sizes=(1,), subnets=(one,))) == 0


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_is_the_same_every_time(suffix: str, tmp_path: Path) -> None:
    """No date, no random ids: pictures can be committed and compared."""
    profile = load_profile("cnn-8gpu-modelled")
    paths = [tmp_path / "new" / f"{number}{suffix}" for number in range(2)]
    for path in paths:
        draw_heat_map(profile, path)

    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_picture_says_what_the_table_says(tmp_path: Path) -> None:
    """Names, accuracies, medians and p99s are text in the SVG."""
    profile = load_profile("cnn-8gpu-modelled")
    path = tmp_path / "map.svg"
    draw_heat_map(profile, path)
    text = path.read_text()

    assert "1.41 / 1.45" in text
    for subnet in profile.subnets:
        assert f"{subnet.name}  {subnet.accuracy:.2f} %" in text


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    """The error names the file and the suffixes there are."""
    with pytest.raises(ConfigError, match=r"map.gif: expected a name that ends in .svg or .png"):
        draw_heat_map(load_profile("digits-cpu"), tmp_path / "map.gif")
