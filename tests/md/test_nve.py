import numpy as np
import pytest

from gnnmd.md import NVE, Simulation
from tests.md.sampling import record, silver, unit


def rms_of_energy(timestep, time):
    kept, _ = record(
        silver(), NVE(timestep=timestep), round(time / timestep), warm_up=round(250 / timestep),
        temperature=600, interval=3,
    )  # fmt: skip
    return kept["total_energy"].std()


def test_energy_fluctuates_with_the_square_of_the_time_step():
    assert rms_of_energy(6, 1200) / rms_of_energy(3, 1200) == pytest.approx(4, abs=1)


@pytest.mark.slow
def test_energy_fluctuates_with_the_square_of_the_time_step_over_5_ps():
    ratio = rms_of_energy(4, 5000) / rms_of_energy(2, 5000)
    print(f"rms ratio {ratio:.3f}")
    assert ratio == pytest.approx(4, abs=0.4)


@pytest.mark.slow
def test_energy_does_not_drift_over_50_ps():
    kept, _ = record(silver(5), NVE(timestep=5), 10_000, warm_up=200, temperature=600, interval=10)
    time, energy = kept["time"], kept["total_energy"]
    drift = np.polyfit(time * 1e-6, energy, 1)[0] * 1e3 / 500
    ratio = abs(np.polyfit(time, energy, 1)[0]) * np.ptp(time) / kept["kinetic_energy"].std()
    print(f"{drift:.3f} meV/atom/ns, {ratio:.4f} of std(K); rms {energy.std() * 2:.5f} meV/atom; "
          f"{kept['temperature'].mean():.0f} K")  # fmt: skip
    assert abs(drift) < 0.5
    assert ratio < 0.1


def test_time_can_be_reversed_and_momentum_stays():
    atoms = silver()
    there = Simulation(atoms, unit(), NVE(timestep=5), temperature=600, skin=0.6).run(100).atoms
    momenta = np.abs(there.get_momenta()).max()
    assert np.abs(there.get_momenta().sum(0)).max() < 1e-12 * momenta * 32
    assert np.abs(there.get_forces().sum(0)).max() < 1e-13 * 32 * np.sqrt((there.get_forces() ** 2).mean())
    there.set_momenta(-there.get_momenta())
    back = Simulation(there, unit(), NVE(timestep=5), skin=0.6).run(100).atoms
    assert np.abs(there.positions - atoms.positions).max() > 0.1
    np.testing.assert_allclose(back.positions, atoms.positions, rtol=0, atol=1e-10)


def test_pressure_is_the_derivative_by_volume():
    atoms = silver()
    atoms.rattle(0.1, seed=2)
    simulation = Simulation(atoms, unit(), NVE(timestep=1), temperature=300)
    known = simulation.scalars()
    energies = []
    for eps in (1e-5, -1e-5):
        strained = simulation.atoms
        strained.set_cell(strained.cell.array * (1 + eps), scale_atoms=True)
        strained.set_momenta(simulation.atoms.get_momenta() / (1 + eps))
        energies.append(Simulation(strained, unit(), NVE(timestep=1)).scalars()["total_energy"])
    slope = (energies[0] - energies[1]) / (6e-5 * known["volume"]) * 160.2176634
    assert known["pressure"] == pytest.approx(-slope, abs=5e-7)
