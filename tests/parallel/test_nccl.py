from collections.abc import Iterator

import pytest
import torch
from ase.build import bulk
from torch.testing import assert_close

from gnnmd.md import NVE, Langevin, Simulation
from gnnmd.models.emt import emt
from gnnmd.predict import InferenceSettings, PredictUnit
from tests.parallel.parity import deviations, many_ranks, one_rank
from tests.parallel.pool import WorkerPool
from tests.parallel.structures import structure
from tests.parallel.test_dpa2 import every_update
from tests.parallel.test_dpa3 import published
from tests.parallel.test_escn_md import balanced_experts, conservative
from tests.predict.test_workers import ALONE, SYSTEMS, network

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


@pytest.mark.parametrize("make", [published, every_update])
def test_angles_and_narrow_shells_too(gpus, make):
    batch = structure("bulk several cutoffs long")
    expected = one_rank(make(), batch)
    for found in gpus.run(GPUS, many_ranks, make, batch, timeout=120):
        assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)


@pytest.mark.parametrize("make", [conservative, published])
def test_edges_of_the_skin_and_spare_rows_change_nothing(gpus, make):
    """Kernels read the edges of a source in its order, and leave out the spare ones at the end of it."""
    batch = structure("unwrapped")
    expected = one_rank(make(), batch)
    for found in gpus.run(GPUS, many_ranks, make, batch, "auto", "all_to_all", 0.5, 0.2, timeout=120):
        assert max(deviations(found, expected).values()) < 1e-10, deviations(found, expected)


@pytest.fixture(scope="module")
def workers() -> Iterator[PredictUnit]:
    with PredictUnit(network(), device="cuda", settings=ALONE.settings, workers=GPUS) as unit:
        yield unit


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_workers_on_gpus_predict_what_one_cpu_process_does(workers, name):
    expected = ALONE.predict(SYSTEMS[name])
    found = workers.predict(SYSTEMS[name])
    for key in ("energy", "forces", "node_energies"):
        assert_close(getattr(found, key), getattr(expected, key), rtol=1e-10, atol=1e-10)


def test_float32_differs_by_rounding_only():
    settings = InferenceSettings(dtype="float32")
    one = PredictUnit(network(), device="cuda", settings=settings).predict(SYSTEMS["bulk"])
    with PredictUnit(network(), device="cuda", settings=settings, workers=GPUS) as unit:
        many = unit.predict(SYSTEMS["bulk"])
    exact = ALONE.predict(SYSTEMS["bulk"])
    scale = float(exact.forces.abs().max())
    assert float((many.forces - one.forces).abs().max()) < 1e-5 * max(scale, 1.0)
    assert float((many.forces - exact.forces).abs().max()) < 1e-4 * max(scale, 1.0)
    assert_close(many.energy, one.energy, rtol=1e-5, atol=1e-5)


def test_dynamics_on_gpus_follow_one_cpu_process():
    atoms = bulk("Ag", cubic=True) * (6, 3, 3)
    ends = []
    for device, workers in (("cpu", None), ("cuda", None), ("cuda", GPUS)):
        settings = InferenceSettings(dtype="float64")
        with PredictUnit(emt(), device=device, settings=settings, workers=workers) as unit:
            simulation = Simulation(atoms, unit, Langevin(timestep=5, temperature=600))
            ends.append(simulation.run(50).atoms.positions)
    for end in ends[1:]:
        assert abs(end - ends[0]).max() < 1e-10


@pytest.mark.parametrize("make", [conservative, published])
def test_replayed_steps_follow_launched_ones(make):
    """On one GPU and on all, with exchanges in the CUDA graph, over rebuilds."""
    atoms = bulk("Ag", cubic=True) * (6, 3, 3)
    settings = InferenceSettings(dtype="float64")
    ends = []
    for workers, how in ((None, "compact"), (None, "captured"), (GPUS, "compact"), (GPUS, "captured")):
        with PredictUnit(make(), device="cuda", settings=settings, workers=workers) as unit:
            options = {"temperature": 900, "skin": 0.4, "evaluation": how}
            simulation = Simulation(atoms, unit, NVE(timestep=4), **options).run(40)
            assert simulation.counters.rebuilds > 0
            ends.append(simulation.atoms.positions)
    for end in ends[1:]:
        assert abs(end - ends[0]).max() < 1e-10
