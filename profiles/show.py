"""Profiles as pictures: a heat map of latency by subnet and batch size, in the terminal or as a file."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.style import Style
from rich.table import Table
from rich.text import Text

from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from profiles.table import Profile, SubnetProfile

PICTURES = (".svg", ".png")
"""Suffixes of picture files."""

# From fast to slow: viridis, whose steps look even and which colour-blind people can read.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

_NS_PER_MS = 1_000_000
_MANY = 0.1  # billions of multiply-adds; if no subnet has this many, they are shown in millions


def heat(latency_ns: int, profile: Profile) -> float:
    """Return the place of a latency between the profile's least and longest median, 0 to 1, logarithmic."""
    least, longest = _ends_ns(profile)
    if longest == least:
        return 0.0
    return math.log(latency_ns / least) / math.log(longest / least)


def _ends_ns(profile: Profile) -> tuple[int, int]:
    medians = [latency for subnet in profile.subnets for latency in subnet.latency_ns]
    return min(medians), max(medians)


def colour(share: float) -> tuple[int, int, int]:
    """Return red, green and blue, 0 to 255, of a heat from 0 to 1."""
    at = share * (len(_COLOURS) - 1)
    low = min(int(at), len(_COLOURS) - 2)
    red, green, blue = (
        round(one + (other - one) * (at - low))
        for one, other in zip(_COLOURS[low], _COLOURS[low + 1], strict=True)
    )
    return red, green, blue


def _is_light(share: float) -> bool:
    red, green, blue = colour(share)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128  # luma of ITU-R BT.601


def print_heat_map(profile: Profile, console: Console) -> None:
    """Print a profile; if it does not fit side by side, further batch sizes follow in another table.

    Each cell is the median, then how much longer the p99 is. Colours need a terminal.
    """
    console.print(Text(f"{profile.name}: {profile.supernet} on {profile.device}, {profile.source}"))
    columns = range(len(profile.batch_sizes))
    console.print(Text("Median latency in ms, and how much longer the p99 is", style="dim"))
    cells = [[_cell(profile, subnet, column) for column in columns] for subnet in profile.subnets]
    width = 1 + max(len("batch 16"), *(len(cell) for row in cells for cell in row))
    beside = max(len(subnet.name) for subnet in profile.subnets) + 14  # the columns of figures
    at_once = max(1, (console.width - beside + 1) // width)
    for first in columns[::at_once]:
        console.print(_table(profile, cells, columns[first : first + at_once]))


def _table(profile: Profile, cells: Sequence[Sequence[Text]], columns: Sequence[int]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column("subnet", no_wrap=True)
    shown.add_column("%", justify="right", no_wrap=True)
    shown.add_column(flops_unit(profile), justify="right", no_wrap=True)
    for column in columns:
        shown.add_column(f"batch {profile.batch_sizes[column]}", justify="right", no_wrap=True)
    for subnet, row in zip(profile.subnets, cells, strict=True):
        figures = (f"{subnet.accuracy:.2f}", flops(subnet, profile))
        shown.add_row(Text(subnet.name), *figures, *(row[column] for column in columns))
    return shown


def _cell(profile: Profile, subnet: SubnetProfile, column: int) -> Text:
    median, p99 = subnet.latency_ns[column], subnet.latency_p99_ns[column]
    share = heat(median, profile)
    ink = "black" if _is_light(share) else "white"
    red, green, blue = colour(share)
    style = Style.parse(f"{ink} on rgb({red},{green},{blue})")
    return Text(f"{_ms(median)} {_longer(p99 / median):>4}", style=style)


def _longer(ratio: float) -> str:
    """Return how much a p99 is above its median, in four characters for any ratio below 100."""
    return f"+{100 * (ratio - 1):.0f}%" if ratio < 1.995 else f"x{ratio:.2g}"


def _is_light_model(profile: Profile) -> bool:
    known = [subnet.gflops for subnet in profile.subnets if subnet.gflops is not None]
    return bool(known) and max(known) < _MANY


def flops_unit(profile: Profile) -> str:
    """Return the unit in which `flops` gives multiply-adds."""
    return "MFLOPs" if _is_light_model(profile) else "GFLOPs"


def flops(subnet: SubnetProfile, profile: Profile) -> str:
    """Return a query's multiply-adds with three significant digits; a dash if unknown."""
    if subnet.gflops is None:
        return "-"
    return f"{subnet.gflops * (1000 if _is_light_model(profile) else 1):.3g}"


def _ms(latency_ns: int) -> str:
    """Return milliseconds in four characters, or as many as there are before the point."""
    ms = latency_ns / _NS_PER_MS
    if ms >= 100 or ms < 0.1:
        return f"{ms:.0f}" if ms >= 100 else f"{ms:.2g}"
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


# --- as a file ------------------------------------------------------------------------------

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "superserve",  # otherwise each drawing of a profile would differ
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9.0,
}


def draw_heat_map(profile: Profile, path: Path) -> None:
    """Write a profile as a picture, SVG or PNG by the path's suffix; the same profile gives the same file.

    Raises:
        ConfigError: The suffix is another, or matplotlib is not installed.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(f"{path}: expected a name that ends in {' or '.join(PICTURES)}")
    try:
        import matplotlib as mpl  # noqa: PLC0415  an optional extra
        from matplotlib.figure import Figure  # noqa: PLC0415  as above
    except ModuleNotFoundError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'superserve[report]'") from error
    rows, columns = len(profile.subnets), len(profile.batch_sizes)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(3.4 + 0.95 * columns, 1.2 + 0.3 * rows), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(
            [[colour(heat(median, profile)) for median in subnet.latency_ns] for subnet in profile.subnets],
            aspect="auto",
            origin="lower",  # the smallest subnet at the bottom
        )
        for row, subnet in enumerate(profile.subnets):
            for column in range(columns):
                _write_cell(axes, profile, subnet, row, column)
        axes.set_xticks(range(columns), [str(size) for size in profile.batch_sizes])
        axes.set_yticks(range(rows), [_label(subnet, profile) for subnet in profile.subnets])
        axes.set_xlabel("batch size")
        axes.set_title(f"{profile.name}: {profile.device}, {profile.source}\nmedian / p99, ms", loc="left")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        dateless = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, metadata=dateless, dpi=150, format=path.suffix.removeprefix(".") or "png")
        write_whole(path, drawn.getvalue())


def _write_cell(axes: Any, profile: Profile, subnet: SubnetProfile, row: int, column: int) -> None:
    median, p99 = subnet.latency_ns[column], subnet.latency_p99_ns[column]
    ink = "black" if _is_light(heat(median, profile)) else "white"
    axes.text(column, row, f"{_ms(median)} / {_ms(p99)}", ha="center", va="center", color=ink)


def _label(subnet: SubnetProfile, profile: Profile) -> str:
    cost = "" if subnet.gflops is None else f", {flops(subnet, profile)} {flops_unit(profile)}"
    return f"{subnet.name}  {subnet.accuracy:.2f} %{cost}"
