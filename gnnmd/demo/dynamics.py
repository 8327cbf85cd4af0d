"""Short runs of a silver crystal, the same with any ASE calculator, and what is measured on them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.geometry.rdf import get_rdf
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from gnnmd.units import MEV

#: fcc lattice constant of EMT silver at 0 K, Angstrom, and its linear expansion, 1/K (as in the data set).
LATTICE, EXPANSION = 4.06355, 2.0e-5

#: Called with the number of steps done since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class EnergyTrace:
    """Energies along a constant-energy run.

    Attributes:
        timestep: fs.
        time: ``[T]`` ps.
        total: ``[T]`` potential + kinetic energy, meV/atom, relative to the first.
        kinetic: ``[T]`` kinetic energy, meV/atom.
    """

    timestep: float
    time: np.ndarray
    total: np.ndarray
    kinetic: np.ndarray

    @property
    def slope(self) -> float:
        """Fitted drift of the total energy, meV/atom/ps."""
        return float(np.polyfit(self.time, self.total, 1)[0])

    @property
    def rms(self) -> float:
        """Fluctuation of the total energy about its drift, meV/atom; proportional to timestep^2."""
        return float(np.std(self.total - np.polyval(np.polyfit(self.time, self.total, 1), self.time)))

    @property
    def drift_ratio(self) -> float:
        """Drift over the whole run in units of the kinetic energy's standard deviation (ml-peg's measure)."""
        return abs(self.slope) * float(np.ptp(self.time)) / float(np.std(self.kinetic))


def crystal(repeat: int, temperature: float, seed: int) -> Atoms:
    """Return a periodic fcc silver crystal of 4 repeat^3 atoms with velocities for ``temperature`` (K)."""
    cell = bulk("Ag", "fcc", a=LATTICE * (1 + EXPANSION * temperature), cubic=True)
    atoms = cell.repeat(repeat)
    rng = np.random.default_rng(seed)
    # a perfect crystal turns half of its kinetic energy into potential energy
    thermalize_momenta(atoms, temperature_K=2 * temperature, rng=rng)
    Stationary(atoms)
    return atoms


def constant_energy(
    start: Atoms, calculator: Calculator, timestep: float, length: float, progress: Progress
) -> EnergyTrace:
    """Run velocity Verlet from ``start`` for ``length`` ps at ``timestep`` fs."""
    atoms = start.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep * units.fs)
    rows: list[tuple[float, float]] = []

    def record() -> None:
        rows.append((atoms.get_potential_energy(), atoms.get_kinetic_energy()))

    _run(dynamics, record, round(1000 * length / timestep), 1, progress)
    potential, kinetic = np.array(rows).T * (MEV / len(atoms))
    total = potential + kinetic
    return EnergyTrace(timestep, np.arange(len(rows)) * timestep / 1000, total - total[0], kinetic)


def constant_temperature(
    start: Atoms,
    calculator: Calculator,
    temperature: float,
    lengths: tuple[float, float],
    seed: int,
    progress: Progress,
    r_max: float = 7.5,
) -> tuple[np.ndarray, np.ndarray, float, Atoms]:
    """Run Langevin dynamics (5 fs, 0.02/fs) and average the radial distribution function.

    Args:
        start: positions and velocities to start from; not changed.
        calculator: forces.
        temperature: K.
        lengths: ps before and during sampling (one frame per 50 fs).
        seed: of the noise.
        progress: called with finished steps.
        r_max: largest distance, Angstrom; at most half the cell.

    Returns:
        Distances ``[M]`` (Angstrom), g(r) ``[M]``, the mean temperature (K) and the last frame.
    """
    atoms = start.copy()
    atoms.calc = calculator
    dynamics = Langevin(
        atoms,
        5 * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        fixcm=False,  # fixcm=True does not sample the canonical ensemble
        rng=np.random.default_rng(seed),
    )
    _run(dynamics, lambda: None, round(200 * lengths[0]), 10, progress)
    profiles, temperatures = [], []

    def record() -> None:
        g, distances = get_rdf(atoms, r_max, 150)
        profiles.append((distances, g))
        temperatures.append(atoms.get_temperature())

    _run(dynamics, record, round(200 * lengths[1]), 10, progress)
    distances, g = np.mean(profiles, axis=0)
    return distances, g, float(np.mean(temperatures)), atoms


def peak(distances: np.ndarray, g: np.ndarray) -> tuple[float, float]:
    """Return position (Angstrom) and height of the highest peak, by a parabola through five points."""
    top = int(np.argmax(g))
    near = slice(max(top - 2, 0), top + 3)
    a, b, c = np.polyfit(distances[near], g[near], 2)
    return float(-b / (2 * a)), float(c - b * b / (4 * a))


def _run(
    dynamics: MolecularDynamics, record: Callable[[], None], steps: int, every: int, progress: Progress
) -> None:
    record()
    for _ in range(steps // every):
        dynamics.run(every)
        record()
        progress(every)
