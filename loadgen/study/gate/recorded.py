"""The family of recorded traces: Azure's, at five loads, from files that do not come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadgen.study.compare import Cell
from loadgen.study.gate.draft import CNN, CNN_8, TRANSFORMER_8, TRANSFORMER_SLO_MS, GateCell, at_load
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FILES = {
    "2019": "invocations_per_function_md*",
    "2021": "AzureFunctionsInvocationTrace*2021*",
    "conv": "AzureLLMInferenceTrace_conv*",
    "code": "AzureLLMInferenceTrace_code*",
}
"""The published names of the files: the largest that matches is taken."""

LOADS = (0.1, 0.25, 0.5, 0.75, 0.95)

# An hour of 2019 in five seconds: a day in 120 s, as the paper has it. Each seed takes another hour.
_MINUTES, _MINUTE_S = 60, 1 / 12
_CNN_4 = f"{CNN}:4"
_SURPRISING = 0.25
"""From this load on the largest surge of the LLM code trace, 931 queries after at most 484, fills eight GPUs:
it takes 20 ms at 75 % and 60 ms at 25 %, in which they serve 350 and 1,045 if none of them is busy."""


def recorded_family(folder: Path | None) -> list[GateCell]:
    """Return the recorded traces at their loads; skipped, with the reason, where there is no file.

    Recorded instants are squeezed to the load and neither thinned out nor smoothed, so all seeds have the
    same: their network alone differs. The counts of 2019 are those of another hour with each seed.

    Raises:
        ConfigError: The folder is none.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--traces: expected a folder with Azure's files, got {folder}")
    found = []
    for kind, pattern in FILES.items():
        path = None if folder is None else _file(folder, kind)
        skipped = None
        if path is None:
            where = "no --traces DIR was given" if folder is None else f"{folder} has no {pattern}"
            skipped = f"its file is not here: {where}"
        found += [
            GateCell("recorded", cell, True, skipped=skipped, is_surprise=kind == "code" and _is_high(cell))
            for cell in _cells(kind, path or "missing")
        ]
    return found


def _is_high(cell: Cell) -> bool:
    """Tell whether the largest surge takes all that the GPUs have, so that a busy one is missed."""
    assert cell.rate_qps is not None, "recorded traces are squeezed to a rate"
    return cell.rate_qps >= _SURPRISING * at_load(1.0, cell.cluster)


def _file(folder: Path, kind: str) -> str | None:
    matches = sorted(folder.glob(FILES[kind]), key=lambda path: (path.stat().st_size, path.name))
    return str(matches[-1]) if matches else None


def _cells(kind: str, path: str) -> list[Cell]:
    cells = []
    for load in LOADS:
        name = f"recorded {kind} at {load:.0%}"
        if kind == "2019":
            cells.append(
                Cell(name, path, _CNN_4, at_load(load, _CNN_4), duration_s=_MINUTES * _MINUTE_S,
                     minutes=_MINUTES)
            )  # fmt: skip
        else:
            cells.append(Cell(name, path, CNN_8, at_load(load, CNN_8)))
    if kind in ("conv", "code"):
        cells += [
            Cell(f"recorded {kind}, transformer at {load:.0%}", path, TRANSFORMER_8,
                 at_load(load, TRANSFORMER_8), TRANSFORMER_SLO_MS)
            for load in (0.5, 0.95)
        ]  # fmt: skip
    return cells
