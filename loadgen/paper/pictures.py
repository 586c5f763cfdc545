"""The pictures of docs/results.md, drawn from the figures that `loadgen.paper.reproduce` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadgen.options import DEFAULT_POLICY
from loadgen.results.style import MUTED, RUNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]

OURS = ("slackfit", DEFAULT_POLICY)
_COLOURS = dict(zip(OURS, RUNS, strict=False))


def pictures(found: Mapping[str, Any]) -> dict[str, Draw]:
    """Return a function that draws each picture, by file stem, if its figures are there."""
    drawn: dict[str, Draw] = {}
    if "maf" in found:
        drawn["results-maf"] = _plane(found["maf"]["cells"][0])
    if "bursty" in found and "accelerating" in found:
        drawn["results-grids"] = _grids([*found["bursty"]["cells"], *found["accelerating"]["cells"]])
    if "faults" in found:
        drawn["results-faults"] = _faults(found["faults"], found.get("live_faults", {}))
    if "scaling" in found:
        drawn["results-scaling"] = _scaling(found["scaling"])
    if "dynamics" in found:
        drawn["results-dynamics"] = _dynamics(found["dynamics"])
    if "policies" in found:
        drawn["results-policies"] = _policies(found["policies"]["cells"])
    return drawn


def mean(runs: Sequence[Mapping[str, float | None]], what: str) -> float:
    """Return the mean over seeds of one of a policy's figures; 0 if it was never known."""
    known = [one[what] for one in runs if one[what] is not None]
    return sum(value for value in known if value is not None) / len(known) if known else 0.0


def _plane(cell: Mapping[str, Any]) -> Draw:
    """Each policy as a point: attainment to the right, accuracy upwards."""
    smallest = next(name for name in cell["policies"] if name.startswith("fixed:"))

    def draw(axes: Axes) -> None:
        for name, runs in cell["policies"].items():
            place = mean(runs, "attainment"), mean(runs, "accuracy")
            is_ours = name in OURS
            axes.plot(*place, "o" if is_ours else "s", color=_COLOURS.get(name, MUTED), markersize=6)
            if name == "mincost":
                continue  # at the same place as the smallest subnet
            words = name.removeprefix("fixed:") + (", mincost" if name == smallest else "")
            is_at_edge = place[0] > 0.9
            axes.annotate(
                words, place, (-7 if is_at_edge else 7, 5 if name == DEFAULT_POLICY else -3),
                textcoords="offset points", ha="right" if is_at_edge else "left", fontsize=8,
                color=_COLOURS.get(name, MUTED),
            )  # fmt: skip
        axes.set_xlim(0.0, 1.05)
        axes.set_xlabel("SLO attainment")
        axes.set_ylabel("mean serving accuracy, %")
        axes.margins(y=0.1)
        axes.grid()

    return draw


def _grids(cells: Sequence[Mapping[str, Any]]) -> Draw:
    """Each cell's accuracy under both policies, and that of the best baseline with the same attainment."""

    def draw(axes: Axes) -> None:
        places = range(len(cells))
        best = [best_baseline(cell, "slackfit") for cell in cells]
        rivals = [(p, cells[p]["policies"][name]) for p, name in zip(places, best, strict=True) if name]
        axes.plot(
            [p for p, _ in rivals], [mean(runs, "accuracy") for _, runs in rivals], "_", color=MUTED,
            markersize=12, markeredgewidth=2, label="best baseline at equal attainment",
        )  # fmt: skip
        for name in OURS:
            axes.plot(
                places, [mean(cell["policies"][name], "accuracy") for cell in cells], "o",
                color=_COLOURS[name], markersize=4.5, label=name,
            )  # fmt: skip
        axes.set_xticks(
            list(places), [cell["name"].replace(" cv2 ", "/").replace(" tau ", "/") for cell in cells],
            rotation=60, ha="right", fontsize=7,
        )  # fmt: skip
        axes.set_ylabel("mean serving accuracy, %")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(axis="y")

    return draw


def best_baseline(cell: Mapping[str, Any], policy: str) -> str | None:
    """Return the most accurate baseline with an attainment within 0.001 of a policy's; None without one."""
    headline = cell["headline"]
    name: str | None = None if headline is None else headline[policy]["over"]
    return name


def _faults(simulated: Mapping[str, Any], live: Mapping[str, Any]) -> Draw:
    def draw(axes: Axes) -> None:
        for name in OURS:
            if name in live:
                series, style, words = live[name]["over_time"], "-", f"{name}, live"
                axes.plot(series["at_s"], series["accuracy"], style, color=_COLOURS[name], label=words)
            series = simulated["runs"][name]["over_time"]
            axes.plot(
                series["at_s"], series["accuracy"], ":", color=_COLOURS[name], label=f"{name}, simulated"
            )
        every_s = simulated["kill_every_s"]
        for i in range(1, 5):
            axes.axvline(i * every_s, color=MUTED, linewidth=0.8, linestyle="--")
            axes.annotate(
                f"{8 - i} live", (i * every_s, 1.0), (3, -9), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=8, color=MUTED,
            )  # fmt: skip
        axes.set_xlabel("seconds; dashed: a worker is killed")
        axes.set_ylabel("accuracy of each second, %")
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        axes.grid()

    return draw


def _scaling(found: Mapping[str, Any]) -> Draw:
    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(point["policy"] for point in found["points"]))
        for place, name in enumerate(reversed(names)):
            held = [p for p in found["points"] if p["policy"] == name and p["rate_qps"]]
            axes.plot(
                [p["gpus"] for p in held], [p["rate_qps"] for p in held], "o-",
                color=RUNS[len(names) - 1 - place], markersize=4, label=name,
            )  # fmt: skip
        axes.axhline(33_000, color=MUTED, linewidth=0.8, linestyle="--")
        axes.annotate(
            "the paper: 33,000", (1, 33_000), (0, 3), textcoords="offset points", fontsize=8, color=MUTED
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({point["gpus"] for point in found["points"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("GPUs")
        axes.set_ylabel("queries/s with attainment 0.999")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.grid()

    return draw


def _dynamics(found: Mapping[str, Any]) -> Draw:
    def draw(axes: Axes) -> None:
        series = found["runs"][OURS[0]]["over_time"]
        rate = axes.twinx()
        rate.fill_between(series["at_s"], series["qps"], color=MUTED, alpha=0.25, linewidth=0, step="post")
        rate.set_ylabel("queries/s (grey)")
        rate.set_ylim(0, max(series["qps"]) * 2.2)
        for name in OURS:
            of = found["runs"][name]["over_time"]
            axes.plot(of["at_s"], of["accuracy"], color=_COLOURS[name], linewidth=1.2, label=name)
        axes.set_zorder(rate.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.set_xlabel("seconds")
        axes.set_ylabel("accuracy, %")
        axes.margins(y=0.5)
        axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
        axes.grid(axis="y")

    return draw


def _policies(cells: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(axes: Axes) -> None:
        names = [name for name in cells[0]["policies"] if not name.startswith("fixed:")]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            missed = [max(1.0 - mean(cell["policies"][name], "attainment"), 1e-6) for cell in cells]
            places = [place + i * width for place in range(len(cells))]
            axes.bar(places, missed, width * 0.9, color=RUNS[i % len(RUNS)], label=name)
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 200.0)  # room for the names
        axes.set_xticks(
            [place + 0.4 - width / 2 for place in range(len(cells))],
            [cell["name"].rpartition(" cv2 ")[2].join(("CV² ", "")) for cell in cells],
        )
        axes.set_ylabel("share that misses its SLO")
        axes.legend(frameon=False, fontsize=8, ncols=3)
        axes.grid(axis="y")

    return draw
