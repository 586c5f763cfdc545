"""The settings file: read whole, refused by field, taken while the router runs, and kept if it turns bad."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from router.serve.settings_file import LOOK_EVERY_NS, RouterSettings, SettingsFile, read_settings
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def _written(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object"),
        ('{"polcy": "maxacc"}', "polcy: unknown; expected policy, margin_ms, max_queries, max_bytes"),
        ('{"policy": "maxac"}', "did you mean 'maxacc'"),
        ('{"max_queries": 0}', "max_queries: expected at least 1, got 0"),
        ('{"max_bytes": "1"}', "max_bytes: expected an integer, got '1'"),
        ('{"margin_ms": NaN}', "margin_ms: expected 0 to 60000 ms, got nan"),
        ('{"margin_ms": -1}', "margin_ms: expected 0 to 60000 ms, got -1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    """With the file and the field."""
    path = tmp_path / "router.json"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=f"router.json: {expected}" if ": unknown" in expected else expected
    ):
        read_settings(path)
    with pytest.raises(ConfigError, match=r"none.json: cannot be read: No such file"):
        read_settings(tmp_path / "none.json")


def test_other_content_is_seen_and_bad_content_is_not_taken(tmp_path: Path) -> None:
    """A file that is replaced, turns bad, is gone, and is good again."""
    path = _written(tmp_path / "router.json", policy="maxacc")
    file = SettingsFile(path)
    now_ns = LOOK_EVERY_NS

    def look() -> RouterSettings | None:
        nonlocal now_ns
        now_ns += LOOK_EVERY_NS
        return file.look(now_ns)

    assert look() is None
    _written(tmp_path / "new", policy="slackfit", margin_ms=0.5).rename(path)
    assert file.look(now_ns + 1) is None, "not yet looked at"
    found = look()
    assert found == RouterSettings("slackfit", 0.5)
    file.took(found)

    _written(path, policy="x")
    assert look() is None
    assert "policy 'x' is unknown" in file.error
    path.unlink()
    assert look() is None
    assert "cannot be read" in file.error
    assert file.settings == found
    _written(path, policy="slackfit", margin_ms=0.5)
    assert look() is None, "those are in force"
    assert file.error == ""
