import os
import signal
from collections.abc import Iterator

# Two runners, their ranks and their jobs share a few cores; threads of each would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.parallel.pool import WorkerPool

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.models.conformance")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Minutes long: begun first, so that no runner waits for the other at the end.
LONG = ("tests/slurm", "tests/test_notebooks.py", "tests/md/test_barostats.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for all distributed tests of a session."""
    pool = WorkerPool()
    yield pool
    pool.close()
