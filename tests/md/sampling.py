"""Simulations of a small crystal, what they write down, and how sure averages of it are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.md import Integrator, Reporter, Simulation, View
from gnnmd.models.emt import emt
from gnnmd.parallel import Ranks
from gnnmd.predict.partitioned import PartitionedPotential

EXACT = InferenceSettings(dtype="float64")


@dataclass
class Record(Reporter):
    """Keeps what is known of every reported step.

    Attributes:
        interval: steps between two reports.
        needs_stress: whether the pressure is wanted.
        rows: in the caller's process, one per report.
    """

    interval: int = 1
    needs_stress: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def report(self, view: View) -> dict[str, Any]:
        """Return the scalars and the cell."""
        return {**view.scalars(), "cell": view.state.cell.cpu().numpy()}

    def show(self, row: dict[str, Any]) -> None:
        """Keep it."""
        self.rows.append(row)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column."""
        return np.array([row[name] for row in self.rows])


def silver(repeat: int | Sequence[int] = 2, a: float = 4.09) -> Atoms:
    """Return a crystal of 4 atoms per cell."""
    return bulk("Ag", cubic=True, a=a) * ((repeat,) * 3 if isinstance(repeat, int) else tuple(repeat))


def unit(workers: int | None = None) -> PredictUnit:
    """Return the exact oracle in float64."""
    return PredictUnit(emt(), device="cpu", settings=EXACT, workers=workers)


def record(
    atoms: Atoms,
    integrator: Integrator,
    steps: int,
    *,
    warm_up: int = 0,
    interval: int = 1,
    needs_stress: bool = False,
    **options: Any,
) -> tuple[Record, Simulation]:
    """Simulate and write down; what was written while warming up is dropped."""
    kept = Record(interval, needs_stress)
    options.setdefault("skin", 0.6)
    simulation = Simulation(atoms, unit(), integrator, reporters=[kept], **options)
    if warm_up:
        simulation.run(warm_up)
    kept.rows.clear()
    simulation.run(steps)
    return kept, simulation


def mean_and_error(x: np.ndarray, blocks: int = 20) -> tuple[float, float]:
    """Return the mean of a series and its standard error, from means of blocks."""
    means = x[: len(x) // blocks * blocks].reshape(blocks, -1).mean(1)
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(blocks))


def correlation_time(x: np.ndarray) -> float:
    """Return after how many samples a series and its variance have forgotten themselves (1: at once).

    The larger of two integrals: of the correlation, and of its square, which oscillations do not cancel.
    """
    y = x - x.mean()
    spectrum = np.abs(np.fft.rfft(y, 2 * len(y))) ** 2
    c = np.fft.irfft(spectrum)[: len(y)]
    c /= c[0]
    return max(_integral(c), _integral(c**2), 1.0)


def _integral(c: np.ndarray) -> float:
    total = 1.0
    for k in range(1, len(c)):  # until noise: Sokal's window
        total += 2 * c[k]
        if k >= 5 * max(total, 1.0) and k >= 20:
            break
    return total


def log_ratio_slope(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return d ln[P2(x)/P1(x)] / dx by maximum likelihood (logistic regression), and its error.

    Shirts, J. Chem. Theory Comput. 9 (2013) 909.
    """
    x, is_second = np.concatenate((first, second)), np.repeat((0.0, 1.0), (len(first), len(second)))
    centre, width = x.mean(), x.std()
    design = np.stack((np.ones_like(x), (x - centre) / width), 1)
    w = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ w))
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        w += np.linalg.solve(hessian, design.T @ (is_second - p))
    return float(w[1] / width), float(np.sqrt(np.linalg.inv(hessian)[1, 1]) / width)


def end_on_ranks(group: Any, integrator: Integrator, steps: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Simulate 64 atoms on the ranks of a group; return positions, the cell and what is conserved."""
    u = unit()
    if group.size() > 1:
        u._together = PartitionedPotential(u.potential, EXACT, Ranks(group))
    atoms = silver((4, 2, 2))
    atoms.rattle(0.1, seed=1)
    simulation = Simulation(atoms, u, integrator, skin=0.6, seed=5).run(steps)
    end = simulation.atoms
    return end.positions, end.cell.array, simulation.scalars()["conserved"]
