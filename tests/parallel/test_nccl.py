from collections.abc import Iterator

import pytest
import torch

from gnnmd.models.emt import emt
from tests.parallel.parity import deviations, many_ranks, one_rank
from tests.parallel.pool import WorkerPool
from tests.parallel.structures import structure
from tests.parallel.test_escn_md import balanced_experts, conservative

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def gpus() -> Iterator[WorkerPool]:
    pool = WorkerPool("nccl", range(1, GPUS + 1))
    yield pool
    pool.close()


@pytest.mark.parametrize("context", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("make", [emt, conservative, balanced_experts])
@pytest.mark.parametrize("name", ["bulk several cutoffs long", "batch", "lone atom"])
def test_gpus_together_equal_one_cpu_process(gpus, name, make, context):
    batch = structure(name)
    expected = one_rank(make(), batch)
    for size in range(2, GPUS + 1):
        for found in gpus.run(size, many_ranks, make, batch, "auto", context, timeout=120):
            assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)
