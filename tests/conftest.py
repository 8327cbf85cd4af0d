from collections.abc import Iterator

import pytest

from tests.parallel.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for all distributed tests of a session."""
    pool = WorkerPool()
    yield pool
    pool.close()
