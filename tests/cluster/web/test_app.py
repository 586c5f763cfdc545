"""Who may look at the live page, and that it is whole."""

from __future__ import annotations

import asyncio
import re
import stat
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from cluster.cli.web import _check_reach, token_in
from cluster.web.app import page_app
from cluster.web.hub import FrameHub
from cluster.web.recording import FILES, recorded_page
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "a-token-of-a-test-1234"


class StillHub(FrameHub):
    """A hub that asks no router."""

    def __init__(self) -> None:
        self.frames = deque([b'{"t":1,"misses":[]}'])

    def start(self, loop: Any) -> None:
        """Start nothing."""

    def stop(self) -> None:
        """Stop nothing."""


def visitor(token: str = "", base: str = "http://127.0.0.1:8765") -> TestClient:
    """Return a browser at an address."""
    app = page_app(StillHub(), asyncio.new_event_loop, lambda worker: f"log of {worker}", token)
    return TestClient(app, base_url=base, follow_redirects=False)


def test_everything_that_the_page_names_is_served() -> None:
    """The page, its styles and scripts, and a worker's log; nothing from elsewhere."""
    browser = visitor()

    page = browser.get("/").text
    named = re.findall(r'(?:src|href)="([\w.]+\.(?:js|css))"', page)
    assert sorted(named) == sorted(FILES)
    for name in named:
        assert browser.get(f"/{name}").status_code == 200
    assert "https:" not in page
    assert browser.get("/log/worker-0").text == "log of worker-0"
    assert browser.get("/other.js").status_code == 404
    answer = browser.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert browser.post("/").status_code == 405


@pytest.mark.parametrize("path", ["/", "/stream", "/recording", "/web.js", "/log/worker-0"])
def test_another_site_cannot_read_it(path: str) -> None:
    """A name that leads to loopback is refused: no page of another site reads this one through a browser."""
    assert visitor(base="http://evil.example:8765").get(path).status_code == 403


@pytest.mark.parametrize("path", ["/", "/stream", "/recording", "/web.js", "/log/worker-0"])
def test_without_the_token_nothing_is_shown(path: str) -> None:
    """With a token every path needs it; once given, a cookie that scripts cannot read stays."""
    browser = visitor(TOKEN, base="http://host.example:8765")

    assert browser.get(path).status_code == 401
    assert browser.get("/?token=wrong").status_code == 401
    answer = browser.get(f"/?token={TOKEN}")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert browser.get("/web.js").status_code == 200


def test_beyond_loopback_needs_keys_and_a_token() -> None:
    """Neither alone opens it to other machines."""
    _check_reach("127.0.0.1", "", "")
    _check_reach("0.0.0.0", TOKEN, "key")
    with pytest.raises(ConfigError, match="--token-file"):
        _check_reach("0.0.0.0", "", "key")
    with pytest.raises(ConfigError, match="a router with keys"):
        _check_reach("0.0.0.0", TOKEN, "")


def test_a_token_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """A missing file is made; a short token is refused, with the file's name."""
    path = tmp_path / "token"
    token = token_in(path)
    assert len(token) >= 16
    assert token_in(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="token: expected a token of 16 characters or more, got 5"):
        token_in(path)


def test_a_recording_is_one_file_that_nothing_breaks_out_of() -> None:
    """Its frames are inside, it names no other file, and text from outside cannot end the element."""
    page = recorded_page([b'{"t":1,"misses":[],"cluster":"</script><script>alert(1)</script>"}'])

    assert "alert(1)</script>" not in page
    assert not re.search(r'<(?:script|link)[^>]*(?:src|href)="(?!data:)', page)
    assert page.count('id="recording"') == 1
