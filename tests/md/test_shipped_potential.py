"""The shipped network, in float32, drives dynamics as exact forces do."""

import numpy as np
import pytest

from gnnmd import PredictUnit
from gnnmd.md import MTK, NVE, Bussi, NoseHoover, Simulation, StochasticCell
from gnnmd.md.reporters import VACF
from gnnmd.parallel import Ranks
from gnnmd.predict.partitioned import PartitionedPotential
from gnnmd.units import BOLTZMANN
from tests.md.sampling import Record, silver
from tests.md.sampling import unit as oracle

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


def test_time_can_be_reversed_and_momentum_stays_in_single_precision():
    unit = PredictUnit.from_checkpoint("silver", device="cpu")
    there = Simulation(silver(), unit, NVE(timestep=5), temperature=600, skin=0.6).run(100).atoms
    scale = np.sqrt(32 * there.get_masses()[0] * BOLTZMANN * 300)
    forces = there.get_forces()
    assert np.abs(forces.sum(0)).max() < 1e-6 * 32 * np.sqrt((forces**2).mean())
    assert np.abs(there.get_momenta().sum(0)).max() < 1e-5 * scale
    there.set_momenta(-there.get_momenta())
    back = Simulation(there, unit, NVE(timestep=5), skin=0.6).run(100).atoms
    assert np.abs(there.positions - silver().positions).max() > 0.1
    np.testing.assert_allclose(back.positions, silver().positions, rtol=0, atol=1e-4)


def end_of(group) -> tuple[np.ndarray, float]:
    unit = PredictUnit.from_checkpoint("silver", device="cpu")
    if group.size() > 1:
        unit._together = PartitionedPotential(unit.potential, unit.settings, Ranks(group))
    simulation = Simulation(silver((4, 2, 2)), unit, NVE(timestep=5), temperature=2400, skin=0.3).run(10)
    assert simulation.counters.rebuilds > 0
    return simulation.atoms.positions, simulation.scalars()["total_energy"]


def test_1_2_and_4_ranks_give_the_same_trajectory(pool):
    ends = [end for size in (1, 2, 4) for end in pool.run(size, end_of)]
    for positions, energy in ends[1:]:
        np.testing.assert_allclose(positions, ends[0][0], rtol=0, atol=1e-5)
        assert energy == pytest.approx(ends[0][1], abs=1e-5 * 64)


@pytest.mark.parametrize(
    "integrator",
    [Bussi(**BATH), NoseHoover(**BATH), StochasticCell(**BATH, **CELL), MTK(**BATH, **CELL)],
    ids=lambda i: type(i).__name__,
)
def test_what_ensembles_conserve_stays(integrator):
    kept = record(integrator, 60)
    assert np.ptp(kept["conserved"]) < 0.1 * np.ptp(kept["total_energy"])
    assert kept["volume"].std() > 0 or not integrator.changes_cell


@pytest.mark.slow
def test_atoms_vibrate_as_with_the_exact_forces():
    """Over 10 ps at 300 K; the network takes two minutes of one core."""
    spectra = []
    for unit in (PredictUnit.from_checkpoint("silver", device="cpu"), oracle()):
        bath = Bussi(timestep=5, temperature=300, time_constant=100)
        start = Simulation(silver(3), unit, bath, temperature=300, skin=1.0).run(300).atoms
        vacf = VACF(interval=4, lags=150)
        Simulation(start, unit, NVE(timestep=5), skin=1.0, reporters=[vacf]).run(2000)
        spectra.append(vacf.result().vdos)
    found, exact = spectra
    overlap = found @ exact / np.sqrt((found @ found) * (exact @ exact))
    print(f"overlap of the densities of states {overlap:.4f}")
    assert overlap > 0.97
