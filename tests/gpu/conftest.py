"""Tests of what only a CUDA device can show; each is skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it without a device."""
    why = f"no CUDA device: torch {torch.__version__} sees {torch.cuda.device_count()}"
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=why))
