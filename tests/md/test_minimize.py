import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.units import GPa

from gnnmd.md import FIRE, Simulation
from tests.md.sampling import record, silver, unit


def vacancy():
    atoms = silver()
    atoms.rattle(0.15, seed=1)
    del atoms[5]
    return atoms


def by_ase(atoms, pressure=None):
    """Return the minimum of energy, or of enthalpy (pressure in GPa), and ase's own atoms."""
    atoms = atoms.copy()
    atoms.calc = EMT(asap_cutoff=False)
    what = atoms if pressure is None else FrechetCellFilter(atoms, scalar_pressure=pressure * GPa)
    BFGS(what, logfile=None).run(fmax=1e-4, steps=500)
    enthalpy = atoms.get_potential_energy() + (pressure or 0) * GPa * atoms.get_volume()
    return enthalpy, atoms


def test_the_minimum_is_ases():
    _, simulation = record(vacancy(), FIRE(max_force=1e-4), 400, interval=10)
    energy, atoms = by_ase(vacancy())
    assert simulation.step < 300
    assert simulation.scalars()["potential_energy"] == pytest.approx(energy, abs=1e-6)
    moved = simulation.atoms.positions - atoms.positions
    np.testing.assert_allclose(moved - moved.mean(0), 0, atol=1e-3)
    assert np.linalg.norm(simulation.atoms.get_forces(), axis=1).max() < 1e-4


def test_the_end_does_not_depend_on_who_looks_and_is_reported():
    kept, simulation = record(vacancy(), FIRE(), 500, interval=450, needs_stress=True)
    assert len(kept.rows) == 2
    assert kept["step"][-1] == simulation.step < 450
    assert record(vacancy(), FIRE(), 500, interval=7)[1].step == simulation.step
    minimum = simulation.atoms
    minimum.calc = EMT(asap_cutoff=False)
    assert kept["pressure"][-1] == pytest.approx(-minimum.get_stress()[:3].mean() / GPa, abs=1e-4)


def test_cell_and_positions_relax_under_pressure_as_ases():
    pressure = 5.0
    minimise = FIRE(max_force=1e-4, max_stress=1e-3, cell="flexible", pressure=pressure)
    _, simulation = record(vacancy(), minimise, 600, interval=10)
    enthalpy, atoms = by_ase(vacancy(), pressure)
    assert simulation.step < 400
    assert simulation.scalars()["conserved"] == pytest.approx(enthalpy, abs=2e-6)
    assert simulation.scalars()["volume"] == pytest.approx(atoms.get_volume(), rel=1e-4)
    np.testing.assert_allclose(simulation.atoms.cell.lengths(), atoms.cell.lengths(), rtol=1e-4)


@pytest.mark.parametrize("cell", ["isotropic", "anisotropic", "flexible"])
def test_cells_relax_only_in_the_ways_they_may(cell):
    atoms = silver()
    strain = np.array([[0.02, 0.01, 0], [0.01, -0.01, 0.02], [0, 0.02, 0]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    _, simulation = record(atoms, FIRE(cell=cell, max_stress=1e-2), 300, interval=10)
    stress = simulation.atoms.get_stress() / GPa
    change = np.linalg.inv(atoms.cell.array) @ simulation.atoms.cell.array - np.eye(3)
    allowed = {"isotropic": 1, "anisotropic": 3, "flexible": 6}[cell]
    assert abs(stress[:3].sum() / 3) < 0.01
    assert (np.abs(stress).max() < 0.01) == (allowed == 6)
    assert (np.abs(stress[:3]).max() < 0.01) == (allowed >= 3)
    assert (np.abs(change - np.diag(np.diag(change))).max() < 1e-12) == (allowed <= 3)
    np.testing.assert_allclose(change, change.T, atol=1e-12)  # it does not turn


def test_overlapping_atoms_come_apart_and_fixed_ones_stay():
    atoms = silver()
    atoms.positions[1] = atoms.positions[0] + [0.5, 0.1, 0]
    atoms.set_constraint(FixAtoms([7]))
    _, simulation = record(atoms, FIRE(), 500, interval=10)
    assert simulation.step < 500
    assert simulation.atoms.get_all_distances(mic=True)[np.triu_indices(32, 1)].min() > 2.5
    assert (simulation.atoms.positions[7] == atoms.positions[7]).all()


def test_what_cannot_be_minimised_is_refused():
    with pytest.raises(ValueError, match="needs a cell that changes"):
        FIRE(pressure=1)
    with pytest.raises(ValueError, match="'cubic' is not known"):
        FIRE(cell="cubic")
    with pytest.raises(ValueError, match="max_force"):
        FIRE(max_force=0)
    atoms = silver()
    atoms.pbc = (True, True, False)
    with pytest.raises(ValueError, match="must be periodic"):
        Simulation(atoms, unit(), FIRE(cell="isotropic"))
