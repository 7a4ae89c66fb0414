from collections.abc import Iterator

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Worker processes for tests that need several ranks, started once."""
    world = World()
    yield world
    world.close()
