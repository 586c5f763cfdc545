"""An OCI runtime: runc, but for the limits of resources that podman asks for.

Podman raises them to those of the machine, which a kernel may refuse inside a container or a small virtual
machine. `config.json` asks for them; without them a container inherits podman's own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Take the limits out of the bundle's configuration, if a command names one, and become runc."""
    for word, value in zip(sys.argv, sys.argv[1:], strict=False):
        if word in ("--bundle", "-b"):
            path = Path(value) / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config["process"].pop("rlimits", None)
            path.write_text(json.dumps(config), encoding="utf-8")
    runc = shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert runc is not None, "installed with podman"
    os.execv(runc, ["runc", *sys.argv[1:]])


if __name__ == "__main__":
    main()
