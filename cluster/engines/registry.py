"""The engines that `cluster render` knows. A new one is a pure function and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.engines import compose, kubernetes, slurm_script, systemd
from cluster.engines.text import Rendered

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description

    Renderer = Callable[[Description, RenderOptions], tuple[Rendered, ...]]


def _slurm(description: Description, options: RenderOptions) -> tuple[Rendered, ...]:
    del options  # a job has no image
    return (Rendered(f"{description.name}.sbatch", slurm_script.render(description)),)


RENDERERS: dict[str, Renderer] = {
    "compose": compose.render,
    "kubernetes": kubernetes.render,
    "slurm": _slurm,
    "systemd": systemd.render,
}
"""What each engine is given: files, of which those that are not beside another one are printed."""
