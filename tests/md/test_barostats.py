import math

import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms

from gnnmd.md import MTK, NVE, Bussi, Ramp, Simulation, StochasticCell
from gnnmd.md.cells import turn_back
from gnnmd.md.state import State
from gnnmd.units import BOLTZMANN, GPA_PER_EV_A3
from tests.md.sampling import correlation_time, log_ratio_slope, mean_and_error, record, silver, unit

OPTIONS = {"timestep": 5, "temperature": 300, "time_constant": 50, "pressure_time_constant": 200}
FREEDOM = 3 * 32 - 3
NPT = pytest.mark.parametrize("ensemble", [StochasticCell, MTK])
CELLS = pytest.mark.parametrize("cell", ["isotropic", "anisotropic", "flexible"])


class NoForces(torch.nn.Module):
    """A head that predicts forces."""

    def forward(self, features, g):
        return features.new_zeros(len(features), 3)


@NPT
@CELLS
def test_what_is_conserved_stays_while_the_cell_changes(ensemble, cell):
    kept, _ = record(silver(a=4.0), ensemble(**OPTIONS, cell=cell), 240, interval=6)
    assert np.ptp(kept["volume"]) > 0.02 * kept["volume"][0]
    assert kept["conserved"][2:].std() < 0.1 * kept["total_energy"][2:].std()


@NPT
def test_energy_errors_of_npt_fall_with_the_time_step(ensemble):
    rms = []
    for timestep in (2.0, 6.0):
        run = ensemble(**{**OPTIONS, "timestep": timestep}, cell="flexible")
        kept, _ = record(silver(a=4.0), run, round(900 / timestep), interval=3)
        rms.append(kept["conserved"][5:].std())
    assert rms[1] > 5 * rms[0]


@NPT
def test_terms_of_the_order_of_one_atom_are_right(ensemble):
    errors = []
    for timestep in (1.0, 2.0):
        run = ensemble(**{**OPTIONS, "timestep": timestep, "temperature": 900})
        kept, _ = record(silver(1, a=3.95), run, round(240 / timestep), interval=2)
        errors.append(np.ptp(kept["conserved"]))
    changes = BOLTZMANN * 900 * np.log(kept["volume"].max() / kept["volume"].min())
    print(f"conserved {errors} eV, kT ln V {changes} eV")
    assert errors[0] < 0.35 * errors[1]
    assert errors[0] < 0.5 * changes


def test_every_strain_gets_its_share_of_kinetic_energy():
    """Cells move faster than atoms here, and strains hardly exchange energy; shear begins at rest."""
    run = MTK(**{**OPTIONS, "timestep": 3}, cell="flexible")
    kept, _ = record(silver(), run, 300, warm_up=300)
    rates = np.linalg.inv(kept["cell"][:-1]) @ kept["cell"][1:] / 3  # 1/fs
    shear = rates[:, [0, 0, 1], [1, 2, 2]]
    mass = (FREEDOM + 3) / 3 * OPTIONS["pressure_time_constant"] ** 2  # kT fs^2
    assert 0.3 < 2 * mass * np.square(shear).mean() < 3  # kT; one chain for all strains: 0.04


@NPT
def test_pressure_is_the_one_that_is_asked_for(ensemble):
    run = ensemble(**OPTIONS, pressure=3.0)
    kept, _ = record(silver(a=4.02), run, 700, warm_up=150, interval=5, needs_stress=True)
    mean, error = mean_and_error(kept["pressure"], blocks=10)
    assert abs(mean - 3) < 3 * error
    assert error < 0.5


@NPT
def test_ramps_of_pressure_are_followed_and_the_account_of_energy_holds(ensemble):
    run = ensemble(**OPTIONS, pressure=Ramp(0, 10, 200))
    kept, _ = record(silver(), run, 400, interval=5)
    assert kept["volume"][-20:].mean() / kept["volume"][:5].mean() == pytest.approx(0.925, abs=0.02)
    assert np.abs(kept["conserved"] - kept["conserved"][0]).max() < 0.01 * np.ptp(kept["total_energy"])


@NPT
def test_shear_relaxes_only_in_flexible_cells_and_these_do_not_turn(ensemble):
    atoms = silver()
    strain = np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = 0.03
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    for cell, steps in (("flexible", 400), ("anisotropic", 60)):
        kept, simulation = record(atoms, ensemble(**OPTIONS, cell=cell), steps, warm_up=100, interval=5)
        lattice = kept["cell"].mean(0)
        shear = (lattice[0] @ lattice[1]) / (np.linalg.norm(lattice[0]) * np.linalg.norm(lattice[1]))
        assert (abs(shear) < 0.04) == (cell == "flexible")
        change = np.linalg.inv(atoms.cell.array) @ simulation.atoms.cell.array
        assert np.abs(change - change.T).max() < 1e-12
        assert np.abs(change - np.eye(3)).max() > 5e-3


@NPT
def test_a_run_of_constant_volume_goes_on_at_constant_pressure(ensemble, tmp_path):
    before = Simulation(
        silver(a=4.0), unit(), NVE(timestep=5), temperature=600, skin=0.6, restart=tmp_path
    ).run(30)
    resumed = Simulation.resume(tmp_path, unit(), integrator=ensemble(**OPTIONS)).run(3).atoms
    new = Simulation(before.atoms, unit(), ensemble(**OPTIONS), skin=0.6)
    if ensemble is MTK:  # noise depends on the step
        np.testing.assert_allclose(resumed.positions, new.run(3).atoms.positions, rtol=0, atol=1e-10)
    assert resumed.get_volume() > before.atoms.get_volume()


def test_turning_back_leaves_strain_and_its_rate_symmetric():
    rng = np.random.default_rng(0)
    random, rate = (torch.tensor(rng.normal(size=(3, 3))) for _ in range(2))
    first = torch.eye(3, dtype=torch.float64) * 8 + 0.1 * random
    x = torch.tensor(rng.normal(size=(5, 3)))
    s = State(0, *[x[:, 0]] * 3, x, x, x, x[:, :1], first + 0.2 * random @ rate, x[0] > 9, x[0, 0], rate)
    s.variables = {"first cell": first, "strain rate": rate + rate.T}
    power, lengths = s.velocities @ (rate + rate.T) @ s.velocities.T, torch.cdist(s.positions, s.cell)
    turn_back(s)
    strain, rate = torch.linalg.inv(first) @ s.cell, s.variables["strain rate"]
    torch.testing.assert_close(strain, strain.T, rtol=0, atol=1e-13)
    assert torch.equal(rate, rate.T)
    torch.testing.assert_close(s.velocities @ rate @ s.velocities.T, power)
    torch.testing.assert_close(torch.cdist(s.positions, s.cell), lengths)


def test_what_cannot_change_its_cell_is_refused():
    with pytest.raises(ValueError, match="'triclinic' is not known"):
        MTK(cell="triclinic")
    with pytest.raises(ValueError, match="pressure_time_constant"):
        MTK(pressure_time_constant=0)
    with pytest.raises(ValueError, match="compressibility"):
        StochasticCell(compressibility=0)
    with pytest.raises(ValueError, match="finite number"):
        StochasticCell(pressure=math.nan)
    slab = silver()
    slab.pbc = (True, True, False)
    with pytest.raises(ValueError, match="must be periodic"):
        Simulation(slab, unit(), StochasticCell(**OPTIONS))
    held = silver()
    held.set_constraint(FixAtoms([0]))
    with pytest.raises(ValueError, match="held fixed"):
        Simulation(held, unit(), MTK(**OPTIONS))
    without = unit()
    without.potential.heads["forces"] = NoForces()
    with pytest.raises(ValueError, match="stress"):
        Simulation(silver(), without, MTK(**OPTIONS))


@pytest.mark.slow
@NPT
@CELLS
def test_what_is_conserved_stays_for_long(ensemble, cell):
    run = ensemble(**{**OPTIONS, "pressure_time_constant": 1000}, cell=cell)
    kept, _ = record(silver(), run, 8000, warm_up=400, interval=4)
    drift, covariance = np.polyfit(kept["time"] * 1e-6, kept["conserved"] * 1e3 / 32, 1, cov=True)
    print(f"{ensemble.__name__} {cell}: {drift[0]:.2f} +- {covariance[0, 0] ** 0.5:.2f} meV/atom/ns over "
          f"40 ps, rms {kept['conserved'].std() * 1e3 / 32:.4f} meV/atom")  # fmt: skip
    assert abs(drift[0]) < 5
    assert kept["conserved"].std() < 0.01 * kept["total_energy"].std()


@pytest.mark.slow
@NPT
@CELLS
def test_volumes_have_their_mean_width_and_ratio_at_two_pressures(ensemble, cell):
    volumes, moduli, means = [], [], []
    options = {**OPTIONS, "pressure_time_constant": 1000 if ensemble is MTK else 200}
    for seed, pressure in enumerate((0.0, 1.5)):
        run = ensemble(**options, pressure=pressure, cell=cell)
        kept, _ = record(silver(), run, 10_000, warm_up=500, interval=5, needs_stress=True, seed=seed)
        mean, error = mean_and_error(kept["pressure"])
        v = kept["volume"]
        kappa = v.var() / (BOLTZMANN * 300 * v.mean()) / GPA_PER_EV_A3
        tau = correlation_time(v)
        print(f"{ensemble.__name__} {cell} {pressure} GPa: <P> {mean:.4f} +- {error:.4f}, "
              f"<V>/N {v.mean() / 32:.4f} +- {mean_and_error(v)[1] / 32:.4f}, "
              f"1/kappa {1 / kappa:.1f} GPa +- {100 * math.sqrt(2 * tau / len(v)):.0f} %")  # fmt: skip
        assert abs(mean - pressure) < 3 * error
        moduli.append(1 / kappa)
        means.append(v.mean())
        volumes.append(v[:: int(2 * tau) + 1])
    slope, error = log_ratio_slope(*volumes)
    expected = -1.5 / GPA_PER_EV_A3 / (BOLTZMANN * 300)
    print(f"slope {slope:.4f} +- {error:.4f} 1/A^3, expected {expected:.4f}")
    assert abs(slope - expected) < 3 * error
    modulus = 1.5 / math.log(means[0] / means[1])
    print(f"bulk modulus from the means {modulus:.1f} GPa, from fluctuations {np.mean(moduli):.1f} GPa")
    assert np.mean(moduli) == pytest.approx(modulus, rel=0.15)


@pytest.mark.slow
@NPT
def test_the_mean_volume_is_the_one_at_which_the_pressure_is_that_of_the_bath(ensemble):
    kept, _ = record(silver(3), ensemble(**OPTIONS), 8000, warm_up=500, interval=5)
    volume, error_v = mean_and_error(kept["volume"])
    fixed = Bussi(timestep=5, temperature=300, time_constant=50)
    atoms = silver(3, a=(volume / 27) ** (1 / 3))
    kept, _ = record(atoms, fixed, 8000, warm_up=500, interval=5, needs_stress=True, seed=1)
    pressure, error_p = mean_and_error(kept["pressure"])
    away, error = pressure / 92, np.hypot(error_v / volume, error_p / 92)
    print(f"{ensemble.__name__}: V/N {volume / 108:.4f} +- {error_v / 108:.4f} A^3, there {pressure:.4f} +- "
          f"{error_p:.4f} GPa: the volume is {100 * away:.3f} +- {100 * error:.3f} % away")  # fmt: skip
    assert abs(away) < 1e-3
    assert error < 5e-4
