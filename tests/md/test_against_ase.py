import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin as AseLangevin
from ase.md.velocitydistribution import thermalize_momenta

from gnnmd.md import Bussi, Simulation
from tests.md.sampling import mean_and_error, silver, unit

TEMPERATURE, EVERY, WARM_UP = 600, 15, 300
BINS = np.linspace(2.2, 4.0, 46)


def ours(frames):
    simulation = Simulation(
        silver(), unit(), Bussi(timestep=5, temperature=TEMPERATURE, time_constant=50), skin=0.6
    )
    simulation.run(WARM_UP)
    for _ in range(frames):
        atoms = simulation.run(EVERY).atoms
        yield atoms.get_potential_energy(), atoms


def theirs(frames):
    atoms = silver()
    atoms.calc = EMT(asap_cutoff=False)
    rng = np.random.default_rng(3)
    thermalize_momenta(atoms, temperature_K=TEMPERATURE, rng=rng)
    dynamics = AseLangevin(
        atoms, 5 * units.fs, temperature_K=TEMPERATURE, friction=0.02 / units.fs, fixcm=False, rng=rng
    )
    dynamics.run(WARM_UP)
    for _ in range(frames):
        dynamics.run(EVERY)
        yield atoms.get_potential_energy(), atoms


def energies_and_distribution(frames):
    energies, histogram = [], np.zeros(len(BINS) - 1)
    for energy, atoms in frames:
        energies.append(energy)
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(32, 1)]
        histogram += np.histogram(distances, BINS)[0]
    middle = (BINS[1:] + BINS[:-1]) / 2
    return np.array(energies), middle, histogram / middle**2 / len(energies)


@pytest.mark.parametrize(
    ("frames", "wider", "sigmas"), [(40, 4, 4), pytest.param(400, 1, 3, marks=pytest.mark.slow)]
)
def test_mean_energy_and_first_shell_are_those_of_ases_dynamics(frames, wider, sigmas):
    """Over 3 and over 30 ps; errors of means are three times as large in the short one."""
    energies, r, g = energies_and_distribution(ours(frames))
    reference, _, g_reference = energies_and_distribution(theirs(frames))
    (mean, error), (mean_reference, error_reference) = (
        mean_and_error(series, blocks=min(frames // 4, 20)) for series in (energies, reference)
    )
    # their centre of mass moves, which costs no potential energy: both have 93 vibrations
    sigma = np.hypot(error, error_reference)
    position, position_reference = (np.average(r, weights=h) for h in (g, g_reference))
    away = (mean - mean_reference) / sigma
    print(f"<U>/N {mean / 32:.5f}, ASE {mean_reference / 32:.5f} eV: {away:.2f} sigma")
    print(f"peak {g.max() / g_reference.max():.3f} as high, moved by {position - position_reference:.4f} A")
    print(f"sum |dg| / sum g {np.abs(g - g_reference).sum() / g_reference.sum():.4f}")
    assert abs(away) < sigmas
    assert g.max() == pytest.approx(g_reference.max(), rel=0.03 * wider)
    assert position == pytest.approx(position_reference, abs=0.01 * wider)
    assert np.abs(g - g_reference).sum() < 0.03 * wider * g_reference.sum()
