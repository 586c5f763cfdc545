"""`cluster keys`: what it makes, says and refuses."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from click.testing import CliRunner

from cluster.cli import cli

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def keys(folder: Path, *args: str) -> Result:
    """Run `cluster keys` on a folder."""
    return CliRunner().invoke(cli, ["keys", "--out", str(folder), *args])


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    """Each command names the files, and what to copy where; the list has no secret."""
    folder = tmp_path / "keys"
    assert f"made {folder / 'router.key'}" in keys(folder, "make").output
    for role, name in (("client", "web"), ("worker", "gpu-1")):
        added = keys(folder, "add", role, name)
        own = folder / f"{role}s" / f"{name}.key"
        assert f"Copy {own} to the {role}'s machine, mode 0600" in added.output
        assert stat.S_IMODE(own.stat().st_mode) == 0o600
    listed = keys(folder, "list")
    assert [line.split()[:2] for line in listed.output.splitlines()[1:]] == [
        ["client", "web"], ["worker", "gpu-1"], ["operator", "operator"],
    ]  # fmt: skip
    assert "secret" not in listed.output
    assert f"removed {folder / 'clients' / 'web.pub'}" in keys(folder, "revoke", "web").output
    assert "web" not in keys(folder, "list").output


def test_nothing_is_overwritten_and_errors_say_what_was_expected(tmp_path: Path) -> None:
    """Each exits 1 and names the file or the name at fault."""
    folder = tmp_path / "keys"
    assert "make it with `cluster keys" in keys(folder, "add", "client", "web").output
    keys(folder, "make")
    keys(folder, "add", "client", "web")
    for args, error in (
        (("make",), "exists already"),
        (("add", "client", "web"), "exists already, and is not overwritten"),
        (("add", "client", "../web"), "expected 1 to 64 letters"),
        (("revoke", "nobody"), "no key is listed under the name 'nobody'"),
    ):
        result = keys(folder, *args)
        assert result.exit_code == 1
        assert error in result.output
    (folder / "clients" / "bad.pub").write_text("nonsense")
    result = keys(folder, "list")
    assert result.exit_code == 1
    assert "bad.pub:1" in result.output
