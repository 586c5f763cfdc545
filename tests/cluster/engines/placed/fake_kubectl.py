"""kubectl as a script on PATH: objects are files, and each call is noted.

objects/KIND-NAME    an object, as it was applied; a StatefulSet or Deployment has a pod while it has replicas
pods/NAME            what replaces the status of that object's pod
calls                each command line
fail/VERB            if it is there, that command fails with its content on stderr
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

_SCRIPT = f"""\
#!{sys.executable} -IS
import json, pathlib, sys, time
folder = pathlib.Path(__file__).parent
flags = [arg for arg in sys.argv[1:] if arg.startswith("-")]
verb, *names = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
fail = folder / "fail" / verb
if fail.exists():
    sys.exit(fail.read_text())
held = folder / "objects"
objects = {{path.name: json.loads(path.read_text()) for path in sorted(held.iterdir())}}
def labelled(each, wanted):
    have = each["metadata"].get("labels", {{}})
    pairs = [word.partition("=") for word in wanted.split(",")]
    return all(key in have and (not sign or have[key] == value) for key, sign, value in pairs)
def selector():
    return next(flag.partition("=")[2] for flag in flags if flag.startswith("--selector="))
def pod(each):
    name = each["metadata"]["name"]
    found = {{
        "kind": "Pod", "spec": {{"nodeName": "n1"}},
        "metadata": {{"name": f"{{name}}-0", "labels": each["spec"]["template"]["metadata"]["labels"]}},
        "status": {{"phase": "Running", "containerStatuses": [
            {{"started": True, "restartCount": 0,
             "state": {{"running": {{"startedAt": "2026-01-01T00:00:00Z"}}}}}}
        ]}},
    }}
    other = folder / "pods" / name
    return {{**found, **json.loads(other.read_text())}} if other.exists() else found
if verb == "apply":
    for each in json.load(sys.stdin)["items"]:
        (held / f"{{each['kind'].lower()}}-{{each['metadata']['name']}}").write_text(json.dumps(each))
elif verb == "get":
    sets = [each for each in objects.values() if each["kind"] in ("StatefulSet", "Deployment")]
    found = [each for each in sets if labelled(each, selector())]
    print(json.dumps({{"items": found + [pod(each) for each in found if each["spec"]["replicas"]]}}))
elif verb == "scale":
    path = held / names[0].replace("/", "-")
    each = json.loads(path.read_text())
    each["spec"]["replicas"] = int(next(flag for flag in flags if "--replicas" in flag).partition("=")[2])
    path.write_text(json.dumps(each))
elif verb == "delete":
    for name, each in objects.items():
        kinds = names[0].split(",")
        if name in [one.replace("/", "-") for one in names] or (
            f"{{each['kind'].lower()}}s" in [k.replace("policies", "policys") for k in kinds]
            and labelled(each, selector())
        ):
            (held / name).unlink()
elif verb == "logs":
    print("one\\n\\ntwo")
elif verb == "api-versions":
    print((folder / "versions").read_text())
"""


@dataclass(frozen=True, slots=True)
class FakeKubectl:
    """The script and what it holds.

    Attributes:
        folder: Where all of it is.
    """

    folder: Path

    @property
    def calls(self) -> list[str]:
        """Every call so far, without the words that each has."""
        text = (self.folder / "calls").read_text()
        return [line.replace("--context=prod --namespace=serving ", "") for line in text.splitlines()]

    @property
    def names(self) -> set[str]:
        """Which objects there are: KIND-NAME."""
        return {path.name for path in (self.folder / "objects").iterdir()}

    def object(self, name: str) -> Any:
        """Return an object by KIND-NAME."""
        return json.loads((self.folder / "objects" / name).read_text())

    def set_pod(self, name: str, **fields: Any) -> None:
        """Replace fields of the pod of an object."""
        (self.folder / "pods" / name).write_text(json.dumps(fields))

    def fail(self, verb: str, words: str) -> None:
        """Let a command fail."""
        (self.folder / "fail" / verb).write_text(words)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    """Put the script on PATH."""
    for name in ("objects", "pods", "fail"):
        (folder / name).mkdir(parents=True)
    (folder / "versions").write_text("apps/v1\npolicy/v1\nv1\n")
    script = folder / "kubectl"
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeKubectl(folder)
