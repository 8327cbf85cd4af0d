from collections.abc import Iterator

import pytest

from tests.parallel.pool import WorkerPool

pytest.register_assert_rewrite("tests.models.conformance")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for all distributed tests of a session."""
    pool = WorkerPool()
    yield pool
    pool.close()
