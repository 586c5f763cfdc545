"""The engines that `cluster render` knows. A new one is a pure function and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.engines import compose, kubernetes, systemd

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description
    from cluster.engines.text import Rendered

    Renderer = Callable[[Description, RenderOptions], tuple[Rendered, ...]]

RENDERERS: dict[str, Renderer] = {
    "compose": compose.render,
    "kubernetes": kubernetes.render,
    "systemd": systemd.render,
}
"""What each engine is given: files, of which those that are not beside another one are printed."""
