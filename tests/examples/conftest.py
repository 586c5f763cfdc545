"""A router and one CPU worker with the digits supernet: what each example is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.cluster import serving

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def endpoint() -> Iterator[str]:
    """Give the client endpoint of a running cluster."""
    with serving() as cluster:
        yield cluster.client_endpoint
