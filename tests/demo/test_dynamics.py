import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet

from gnnmd import GNNMDCalculator, InferenceSettings
from gnnmd.demo.dynamics import EnergyTrace, constant_energy, constant_temperature, crystal, peak


def nothing(steps: int) -> None:
    pass


def test_trace_separates_drift_from_fluctuation():
    time = np.linspace(0, 5, 1001)
    wave = 0.3 * np.sin(40 * np.pi * time)
    trace = EnergyTrace(5.0, time, 0.2 * time + wave, 40 + 2 * np.cos(40 * np.pi * time))
    assert trace.slope == pytest.approx(0.2, abs=2e-3)
    assert trace.rms == pytest.approx(0.3 / np.sqrt(2), rel=1e-2)
    assert trace.drift_ratio == pytest.approx(0.2 * 5 / np.sqrt(2), rel=2e-2)


def test_peak_is_that_of_a_sampled_parabola():
    r = np.linspace(2, 4, 41)
    assert peak(r, 7 - 3 * (r - 2.917) ** 2) == pytest.approx((2.917, 7.0))


def test_crystal_settles_at_the_temperature_and_does_not_drift_away():
    atoms = crystal(3, 300.0, seed=0)
    assert len(atoms) == 108
    assert np.abs(atoms.get_momenta().sum(0)).max() < 1e-10
    assert atoms.get_temperature() == pytest.approx(600, rel=0.15)  # half of it becomes potential energy


def test_energy_fluctuates_fourfold_at_twice_the_timestep():
    """Velocity Verlet with exact forces is of second order; EMT stands in for the model."""
    start = crystal(3, 300.0, seed=0)
    short, long = (constant_energy(start, EMT(), dt, 1.0, nothing) for dt in (4.0, 8.0))
    assert len(short.time) == 251
    assert long.rms / short.rms == pytest.approx(4, abs=0.8)


def test_first_shell_of_a_crystal_holds_twelve_neighbours():
    r, g, temperature, last = constant_temperature(
        crystal(4, 300.0, seed=0), EMT(), 300.0, (0.1, 0.2), seed=1, progress=nothing
    )
    shell = r < 3.5
    density = len(last) / last.get_volume()
    assert np.trapezoid(4 * np.pi * density * (r**2 * g)[shell], r[shell]) == pytest.approx(12, abs=0.2)
    assert 150 < temperature < 600


@pytest.mark.slow
def test_shipped_potential_conserves_energy_over_50_ps():
    """500 atoms, 5 fs, 300 K, float32: at most 1 meV/atom/ns. Minutes of two cores."""
    calculator = GNNMDCalculator("silver", settings=InferenceSettings(stress=False))
    start = crystal(5, 300.0, seed=1)
    start.calc = calculator
    VelocityVerlet(start, 5 * units.fs).run(200)  # until kinetic and potential energy have met
    trace = constant_energy(start, calculator, 5.0, 50.0, nothing)
    assert abs(1000 * trace.slope) < 1
    assert trace.drift_ratio < 0.1
