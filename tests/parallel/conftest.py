from collections.abc import Iterator

import pytest
import torch

from tests.parallel.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks and test runners share a few cores; threads of each would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
