"""Where the checkout is, and what may lie beside it, for tests at any depth."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

SHARED = ROOT.parent / "shared"
"""Traces and checkpoints that are too large or not ours to ship; tests skip without it."""
