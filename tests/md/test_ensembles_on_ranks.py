import numpy as np
import pytest

from gnnmd.md import FIRE, MTK, Bussi, Langevin, NoseHoover, StochasticCell
from tests.md.sampling import end_on_ranks

NPT = {"timestep": 5, "temperature": 600, "pressure": 2, "time_constant": 50, "pressure_time_constant": 200}
ENSEMBLES = [
    Langevin(timestep=5, temperature=600),
    Bussi(timestep=5, temperature=600, time_constant=50),
    NoseHoover(timestep=5, temperature=600, time_constant=50),
    *(StochasticCell(**NPT, cell=cell) for cell in ("isotropic", "anisotropic", "flexible")),
    *(MTK(**NPT, cell=cell) for cell in ("isotropic", "anisotropic", "flexible")),
    FIRE(),
    FIRE(cell="flexible", pressure=2),
]


def name(integrator):
    return f"{type(integrator).__name__}-{getattr(integrator, 'cell', None)}"


@pytest.mark.parametrize("integrator", ENSEMBLES, ids=name)
def test_1_2_and_4_ranks_give_the_same_trajectory(integrator, pool):
    ends = [end for size in (1, 2, 4) for end in pool.run(size, end_on_ranks, integrator, 15)]
    positions, cell, conserved = ends[0]
    for other in ends[1:]:
        np.testing.assert_allclose(other[0], positions, rtol=0, atol=1e-11)
        np.testing.assert_allclose(other[1], cell, rtol=0, atol=1e-12)
        assert other[2] == pytest.approx(conserved, abs=1e-10)
    if integrator.changes_cell:
        assert np.abs(cell - np.diag([16.36, 8.18, 8.18])).max() > 1e-3
