"""The page as one HTML file: as served, or with its frames inside, which plays back without a server."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAGE = Path(__file__).parent / "page"
# In a wheel beside this module, in a checkout at its root.
_VENDORS = (Path(__file__).parent / "vendor", Path(__file__).parents[2] / "vendor")
_VENDOR = next((path for path in _VENDORS if (path / "uplot").is_dir()), _VENDORS[0])
FILES = {
    "web.css": (_PAGE / "web.css", "text/css"),
    "web.js": (_PAGE / "web.js", "text/javascript"),
    "draw.js": (_PAGE / "draw.js", "text/javascript"),
    "uPlot.iife.min.js": (_VENDOR / "uplot" / "uPlot.iife.min.js", "text/javascript"),
    "uPlot.min.css": (_VENDOR / "uplot" / "uPlot.min.css", "text/css"),
}
"""What the page needs, by name: the path and the type."""

_STYLES = ("uPlot.min.css", "web.css")
_SCRIPTS = ("uPlot.iife.min.js", "draw.js", "web.js")


@cache
def file_of(name: str) -> bytes:
    """Return one of the page's files."""
    return FILES[name][0].read_bytes()


def live_page() -> str:
    """Return the page that follows `/stream`."""
    head = "\n".join(f'<link rel="stylesheet" href="{name}">' for name in _STYLES)
    scripts = "\n".join(f'<script src="{name}"></script>' for name in _SCRIPTS)
    return _filled(head, scripts, "")


def recorded_page(frames: Iterable[bytes]) -> str:
    """Return the page with its frames, as one file without further ones."""
    head = "\n".join(f"<style>\n{file_of(name).decode()}</style>" for name in _STYLES)
    scripts = "\n".join(f"<script>\n{file_of(name).decode()}</script>" for name in _SCRIPTS)
    # Text from outside is in the frames: none may end the element.
    text = ",\n".join(frame.decode().replace("<", "\\u003c") for frame in frames)
    return _filled(head, scripts, f'<script type="application/json" id="recording">[{text}]</script>')


def _filled(head: str, scripts: str, recording: str) -> str:
    page = Template((_PAGE / "index.html").read_text(encoding="utf-8"))
    return page.substitute(head=head, scripts=scripts, recording=recording)
