"""Subnets whose accuracy you know: a short JSON list, which `profiles measure --subnets` also takes.

    [{"name": "small", "control": {"d": [1], "w": [0.25]}, "accuracy": 83.5},
     {"name": "whole", "control": {"d": [4], "w": [1.0]}, "accuracy": 97.6}]

Accuracy is in percent. Where a share of right answers does not describe a model, give any score from 0 to
100 that ranks its subnets: policies only compare and add it up.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from profiles.table import SCHEMA, Profile, load_profile, shipped_profiles
from superserve.errors import ProfileError

_KEYS = ("name", "control", "accuracy")


def subnets_of(source: str, supernet: str) -> Profile:
    """Return the subnets of a profile, or of a list of declared ones.

    A list states no latency. Until they are measured, row i has i + 1 ns, which keeps the order alone.

    Args:
        source: A shipped profile's name, or the path of a profile or of a list.
        supernet: What a list's subnets belong to.

    Raises:
        ProfileError: Naming the file, the subnet and the field that is not as expected.
    """
    path = Path(source)
    if source in shipped_profiles() or not path.is_file():
        return load_profile(source)
    try:
        data = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return load_profile(source)  # which names what is wrong
    if not isinstance(data, list):
        return load_profile(source)
    rows = [_row(row, f"{path}: subnet {number}") for number, row in enumerate(data)]
    rows.sort(key=lambda row: row["accuracy"])
    latencies_ms = [[(row + 1) / 1e6] for row in range(len(rows))]
    profile = {
        "schema": SCHEMA,
        "name": path.stem,
        "supernet": supernet,
        "device": "none",
        "source": "modelled",
        "provenance": f"Accuracies are those that {path.name} states.",
        "versions": {},
        "date": datetime.now(UTC).date().isoformat(),
        "batch_sizes": [1],
        "subnets": [
            {**row, "gflops": None, "latency_ms": latency_ms, "latency_ms_p99": latency_ms}
            for row, latency_ms in zip(rows, latencies_ms, strict=True)
        ],
    }
    return Profile.from_dict(profile, where=str(path))


def _row(row: object, where: str) -> dict[str, Any]:
    """Return one declared subnet, whose accuracy is a number; the profile checks the rest."""
    if not isinstance(row, dict) or sorted(row) != sorted(_KEYS):
        got = sorted(row) if isinstance(row, dict) else repr(row)
        raise ProfileError(f"{where}: expected an object with exactly name, control and accuracy, got {got}")
    if isinstance(row["accuracy"], bool) or not isinstance(row["accuracy"], int | float):
        raise ProfileError(f"{where}: accuracy: expected a number, got {row['accuracy']!r}")
    return row
