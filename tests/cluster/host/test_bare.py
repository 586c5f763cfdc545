"""What runs on a bare host: it looks without changing anything, and installs as a whole or not at all."""

from __future__ import annotations

import ast
import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cluster.host import bare
from cluster.host.bare import BEGIN, END
from superserve.roles import local

SOURCE = Path(bare.__file__).read_text(encoding="utf-8")
TOO_NEW = [["numpy", "9999"], ["no-such-thing", "1"], ["numpy", "1"]]


def run(verb: str, asked: dict[str, Any], content: bytes = b"", /, **env: str) -> dict[str, Any]:
    """Run the script as a host does: by its text, in a Python that knows nothing of us."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", SOURCE, verb, json.dumps(asked)],
        input=content, env={**os.environ, **env}, capture_output=True, check=True,
    )  # fmt: skip
    said: dict[str, Any] = json.loads(done.stdout.partition(BEGIN.encode())[2].partition(END.encode())[0])
    return said


def asked(**more: Any) -> dict[str, Any]:
    """Return what is asked of a host."""
    return {"cluster": "c", "host": "h", "hash": "abc", "ports": [], "requirements": [], "router": "", **more}


def wheel(**files: str) -> bytes:
    """Return a wheel with files."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def test_python_39_can_read_it() -> None:
    """No syntax, and no import, that is newer than the oldest Python that a host may have."""
    tree = ast.parse(SOURCE, feature_version=(3, 9))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= set(sys.stdlib_module_names) - {"tomllib"}


@pytest.mark.parametrize("variable", ["SUPERSERVE_STATE", "XDG_STATE_HOME", "HOME"])
def test_the_folder_is_where_state_is_kept(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restates superserve/roles/local.py, which it cannot import: they agree."""
    for name in ("SUPERSERVE_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert bare.host_folder(asked()) == local.state_folder() / ".hosts" / "c" / "h"


def test_looking_changes_nothing_and_says_what_is_there(tmp_path: Path) -> None:
    """No folder is made; what is lacking is named, one that is too old included."""
    found = run("probe", asked(requirements=TOO_NEW), SUPERSERVE_STATE=str(tmp_path / "state"))

    assert not (tmp_path / "state").exists()
    assert found["python"] == list(sys.version_info[:3])
    assert found["lacks"] == ["numpy", "no-such-thing"]
    assert found["has_code"] is False
    assert found["folder"] == str(tmp_path / "state/.hosts/c/h")
    assert found["disk_bytes"] > 0
    assert found["writable"] == ""


def test_who_has_a_port_is_told(tmp_path: Path) -> None:
    """Nobody, a process by its number, or a role of this very cluster."""
    state = tmp_path / "state"
    listen = "import socket,sys; s=socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); "
    listen += "sys.stdout.flush(); sys.stdin.read()"
    env = {**os.environ, "SUPERSERVE_HOST_FOLDER": str(state / ".hosts/c/h")}
    with (
        socket.create_server(("127.0.0.1", 0)) as own,
        socket.socket() as free,
        subprocess.Popen(
            [sys.executable, "-c", listen], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as role,
    ):
        assert role.stdout is not None
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        ports = [own.getsockname()[1], free.getsockname()[1], int(role.stdout.readline())]
        said = run("probe", asked(ports=ports), SUPERSERVE_STATE=str(state))["ports"]
        role.communicate()

    taken, nobody, ours = (said[str(port)] for port in ports)
    assert taken.startswith(f"pid {os.getpid()} (")
    assert (nobody, ours) == ("", "ours")


def test_the_package_is_unpacked_once_for_its_user_alone(tmp_path: Path) -> None:
    """A Python that has everything is used as it is; a second installation touches nothing."""
    state = tmp_path / "state"
    content = wheel(**{"router/x.py": "first"})
    said = run("install", asked(), content, SUPERSERVE_STATE=str(state))
    folder = state / ".hosts/c/h"
    assert said == {"interpreter": sys.executable}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "code/abc/router/x.py").read_text() == "first"
    assert not (folder / "venv").exists()

    run("install", asked(), wheel(**{"router/x.py": "second"}), SUPERSERVE_STATE=str(state))
    assert (folder / "code/abc/router/x.py").read_text() == "first"
    assert [path.name for path in (folder / "code").iterdir()] == ["abc"]


def test_a_broken_wheel_leaves_no_part_that_counts(tmp_path: Path) -> None:
    """An interrupted transfer is an error, and the next one starts from the beginning."""
    content = wheel(**{"router/x.py": "whole"})
    said = run("install", asked(), content[:-30], SUPERSERVE_STATE=str(tmp_path))
    assert "error" in said
    assert not (tmp_path / ".hosts/c/h/code/abc").exists()


@pytest.mark.slow
def test_what_is_lacking_comes_by_the_hosts_own_pip(tmp_path: Path) -> None:
    """The new environment sees the packages of the named Python; pip finds the rest in the given folder."""
    about = "Metadata-Version: 2.1\nName: tinydep\nVersion: 1.2\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "tinydep-1.2.dist-info"
    (tmp_path / "tinydep-1.2-py3-none-any.whl").write_bytes(
        wheel(**{
            "tinydep.py": "", f"{info}/METADATA": about, f"{info}/WHEEL": kind, f"{info}/RECORD": "",
        })
    )  # fmt: skip
    wanted = asked(requirements=[["tinydep", "1.1"], ["numpy", "1"]])
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "SUPERSERVE_STATE": str(tmp_path / "s")}

    said = run("install", wanted, wheel(**{"router/x.py": ""}), **pip)

    assert said == {"interpreter": str(tmp_path / "s/.hosts/c/h/venv/bin/python")}
    found = run("probe", wanted, b"", **pip)
    assert (found["lacks"], found["interpreter"]) == ([], said["interpreter"])

    failed = run("install", asked(requirements=[["no-such-thing", "1"]]), wheel(), **pip)
    assert "no-such-thing" in failed["error"]


def test_a_name_that_cannot_be_looked_up_is_told(tmp_path: Path) -> None:
    """No message if it can, or if there is none."""
    for name, is_known in (
        ("localhost", True),
        ("", True),
        ("no-such-host.invalid", False),
        ("a" * 70, False),
    ):
        said = run("probe", asked(router=name), SUPERSERVE_STATE=str(tmp_path))["router"]
        assert (said == "") is is_known, (name, said)
