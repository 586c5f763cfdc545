"""YAML that renderers write is read alike by every version of YAML."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from cluster.engines.text import yaml_text

TRAPS = [
    "on", "NO", "y", "~", "null", "1e3", "0x1f", "0o17", "017", "1_000", "22:22", "2026-11-30", "<<", "=", "",
    " a", "a: b", "#a", "- a", "*a", "&a", "%a", "a\tb", "é", "5555:5555", "0.0.0.0", "a\nb\n", "$(POD_NAME)",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20) | st.sampled_from(TRAPS)
)
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=12
)


@given(data=DATA)
def test_both_versions_of_yaml_read_what_was_written(data: Any) -> None:
    """PyYAML reads 1.1, which has more traps; ruamel reads 1.2."""
    text = yaml_text({"data": data})

    assert yaml.safe_load(text) == {"data": data}
    assert YAML(typ="safe", pure=True).load(text) == {"data": data}


def test_documents_keep_their_order_and_their_comments() -> None:
    """The same data gives the same bytes: keys in the order that they were given in, no aliases."""
    shared = ["x"]
    assert yaml_text({"b": shared, "a": shared}, {"c": 1}, head=("Made by a test.",)) == (
        "# Made by a test.\nb:\n- x\na:\n- x\n---\nc: 1\n"
    )
