"""Compiles the core in place with mypyc, from the same Python files that run without it.

    python wheels/compile.py            compile; each module gets a file .so beside it, which Python prefers
    python wheels/compile.py --remove   back to pure Python

SUPERSERVE_OPT_LEVEL=0 is for tests: the C compiler leaves out its work on speed, most of what it does.
`superserve.build` reads what is written here, and refuses modules whose source has changed since.

Left out, beside packages' `__init__`: modules of dataclasses and tuples alone (`messages`, `runs`, `events`,
`traceparent`). mypyc makes them no faster, and takes a class variable of a dataclass with slots for a field.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Every module of these that is not left out, and these modules.
FOLDERS = ("router/core", "router/policies", "superserve/wire", "gpu_worker/core")
MODULES = (
    "superserve/client/checks.py", "superserve/client/outgoing.py", "superserve/client/session.py",
    "superserve/client/spread.py", "superserve/net/stream.py", "superserve/net/zmtp.py",
    "router/serve/client_side.py", "router/serve/directives.py", "router/serve/side.py",
    "router/serve/worker_side.py",
)  # fmt: skip
LEFT_OUT = ("__init__.py", "messages.py", "runs.py", "events.py", "traceparent.py")
RECORD = "superserve/compiled.json"
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_TIMEOUT_S = 1_200


def sources(root: Path) -> list[str]:
    """Return the modules that are compiled, as paths below the root."""
    found = [
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).glob("*.py")
        if path.name not in LEFT_OUT
    ]
    return sorted([*found, *MODULES])


def remove(root: Path) -> int:
    """Remove all that compiling has made; return how many files that were."""
    folders = [root, *(root / folder for folder in {*FOLDERS, *(str(Path(one).parent) for one in MODULES)})]
    made = [path for folder in folders for path in folder.glob(f"*{_SUFFIX}")]
    record = root / RECORD
    made += [record] if record.exists() else []
    for path in made:
        path.unlink()
    return len(made)


def compile_in(root: Path) -> list[str]:
    """Compile the modules below a root, and return the files made, as paths below it.

    Raises:
        RuntimeError: mypyc or the C compiler failed; the text is theirs.
    """
    remove(root)
    modules = sources(root)
    with tempfile.TemporaryDirectory() as work:
        level = os.environ.get("SUPERSERVE_OPT_LEVEL", "3")
        asked = {"modules": modules, "work": work, "config": str(root / "pyproject.toml"), "level": level}
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, json.dumps(asked)],
            cwd=root, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"mypyc failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        made = []
        for path in sorted((Path(work) / "lib").rglob(f"*{_SUFFIX}")):
            name = path.relative_to(Path(work) / "lib").as_posix()
            shutil.copyfile(path, root / name)
            made.append(name)
    digests = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in modules}
    record = {"suffix": _SUFFIX, "modules": digests}
    (root / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return [*made, RECORD]


# In a process of its own: setuptools reads sys.argv, changes the working folder's files, and prints.
_BUILD = """
import json, sys
asked = json.loads(sys.argv[1])
del sys.argv[1:]
from mypyc.build import mypycify
from setuptools import setup
work = asked["work"]
extensions = mypycify(
    ["--config-file", asked["config"], *asked["modules"]],
    opt_level=asked["level"], debug_level="0", multi_file=True, target_dir=work + "/c",
)
setup(
    name="superserve", packages=[], py_modules=[], ext_modules=extensions,
    script_args=["build_ext", "--build-lib", work + "/lib", "--build-temp", work + "/o", "--parallel", "2"],
)
"""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Compile SuperServe's core in place, or undo that.")
    parser.add_argument("--remove", action="store_true", help="back to pure Python")
    if parser.parse_args().remove:
        print(f"pure Python again: {remove(ROOT)} files removed")
        return
    try:
        made = compile_in(ROOT)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"not compiled, and pure Python still runs: {error}") from error
    print(f"compiled: {len(made) - 1} files; after a change of the source type `make compile` again")


if __name__ == "__main__":
    main()
