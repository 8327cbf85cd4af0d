"""The shipped network, in float32, drives dynamics as exact forces do."""

import numpy as np
import pytest

from gnnmd import PredictUnit
from gnnmd.md import MTK, NVE, Bussi, NoseHoover, Simulation, StochasticCell
from tests.md.sampling import Record, silver

BATH = {"timestep": 5, "temperature": 300, "time_constant": 50}
CELL = {"pressure_time_constant": 200, "cell": "flexible"}


def record(integrator, steps):
    kept = Record(2)
    unit = PredictUnit.from_checkpoint("silver", device="cpu")
    simulation = Simulation(silver(), unit, integrator, reporters=[kept], skin=0.6, temperature=600).run(20)
    kept.rows.clear()
    simulation.run(steps)
    return kept


def test_energy_fluctuates_with_the_square_of_the_time_step():
    rms = [record(NVE(timestep=dt), round(500 / dt))["total_energy"].std() for dt in (5, 10)]
    assert rms[1] / rms[0] == pytest.approx(4, abs=0.6)


@pytest.mark.parametrize(
    "integrator",
    [Bussi(**BATH), NoseHoover(**BATH), StochasticCell(**BATH, **CELL), MTK(**BATH, **CELL)],
    ids=lambda i: type(i).__name__,
)
def test_what_ensembles_conserve_stays(integrator):
    kept = record(integrator, 60)
    assert np.ptp(kept["conserved"]) < 0.1 * np.ptp(kept["total_energy"])
    assert kept["volume"].std() > 0 or not integrator.changes_cell
