"""Small structures without symmetry, and what a potential says about them."""

from dataclasses import replace

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext


def crystal(seed: int = 0) -> Atoms:
    """Eight atoms of two elements in a sheared periodic cell thinner than the cutoff."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True).repeat((2, 1, 1))
    atoms.numbers[::3] = 29
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += 0.15 * rng.normal(size=atoms.positions.shape)
    return atoms


def ethanol() -> Atoms:
    """Return a molecule without cell, with a charge."""
    atoms = molecule("CH3CH2OH")
    atoms.positions += 0.05 * np.random.default_rng(1).normal(size=atoms.positions.shape)
    atoms.info.update(charge=1, spin=2)
    return atoms


def slab() -> Atoms:
    """Return five atoms, periodic along two axes."""
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True)
    atoms.append("O")
    atoms.positions[-1] = [0.3, 0.2, 4.0]
    atoms.positions += 0.1 * np.random.default_rng(2).normal(size=atoms.positions.shape)
    atoms.cell[2] = [0, 0, 12]
    atoms.pbc = [True, True, False]
    return atoms


def dimer(distance: float) -> Atoms:
    """Return two different atoms in open space along a general direction."""
    direction = np.array([0.36, 0.48, 0.8])
    return Atoms("AgCu", positions=[np.zeros(3), distance * direction])


def predict(potential: Potential, atoms: Atoms | list[Atoms] | AtomBatch, **options: bool) -> Prediction:
    """Return what the potential says, in its present mode and dtype."""
    batch = atoms if isinstance(atoms, AtomBatch) else AtomBatch.from_ase(atoms)
    graph = potential.graph(batch)
    return potential(batch.positions, graph, GPContext.single(len(batch.numbers)), **options)


def moved(batch: AtomBatch, positions: torch.Tensor, cell: torch.Tensor | None = None) -> AtomBatch:
    """Return the batch at other positions."""
    return replace(batch, positions=positions, cell=batch.cell if cell is None else cell)


def randomised(potential: Potential, seed: int = 0, spread: float = 0.1) -> Potential:
    """Add noise to every weight: fresh ones are partly zero or one and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
                parameter
            )
    return potential
