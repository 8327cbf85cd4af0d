"""Small silver-copper structures that make partitioned graphs difficult, each for a reason its name tells."""

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.build import bulk

from gnnmd.graph import AtomBatch


def _crystal(*repeat: int, seed: int = 0, rattle: float = 0.1) -> Atoms:
    atoms = bulk("Ag", "fcc", a=4.09, cubic=True) * repeat
    rng = np.random.default_rng(seed)
    atoms.positions += rng.normal(0, rattle, atoms.positions.shape)
    atoms.numbers[rng.random(len(atoms)) < 0.3] = 29
    return atoms[rng.permutation(len(atoms))]


def _slab() -> Atoms:
    slab = _crystal(3, 3, 2, seed=3)
    cell = slab.cell.array.copy()
    cell[2, 2] += 25.0
    slab.set_cell(cell)
    return slab


def _triclinic() -> Atoms:
    atoms = _crystal(2, 3, 4, seed=4)
    cell = atoms.cell.array @ np.array([[1.0, 0.35, -0.2], [0.0, 1.0, 0.3], [0.1, 0.0, 0.95]])
    atoms.set_cell(cell, scale_atoms=True)
    return atoms


def _left_handed() -> Atoms:
    atoms = _triclinic()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def _unwrapped() -> Atoms:
    atoms = _crystal(2, 2, 5, seed=5)
    rng = np.random.default_rng(5)
    atoms.positions += rng.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    return atoms


def _cluster(n: int, seed: int) -> Atoms:
    atoms = _crystal(2, 2, 2, seed=seed)
    near = np.argsort(np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1))[:n]
    return Atoms(atoms.numbers[near], atoms.positions[near])


def _wire() -> Atoms:
    atoms = _crystal(1, 2, 6, seed=7)
    atoms.pbc = (False, False, True)
    return atoms


def _dimer_through_the_face() -> Atoms:
    """Two atoms 2.6 A apart, one of them outside the cell: a wrapped and an unwrapped neighbour."""
    return Atoms("Ag2", [[0.1, 5, 5], [-2.5, 5, 5]], cell=[20, 10, 10], pbc=True)


_STRUCTURES: dict[str, Callable[[], Atoms | list[Atoms]]] = {
    "bulk several cutoffs long": lambda: _crystal(2, 2, 12),
    "box thinner than the cutoff": lambda: _crystal(1, 1, 5, seed=1),
    "one primitive cell": lambda: bulk("Ag", "fcc", a=4.09),
    "perfect crystal": lambda: _crystal(3, 3, 3, rattle=0.0),
    "triclinic": _triclinic,
    "left-handed": _left_handed,
    "slab with vacuum": _slab,
    "wire": _wire,
    "molecule": lambda: _cluster(13, 6),
    "dimer through the face": _dimer_through_the_face,
    "lone atom": lambda: Atoms("Ag", cell=[30, 30, 30], pbc=True),
    "one conventional cell": lambda: _crystal(1, 1, 1, seed=8),
    "unwrapped": _unwrapped,
    "far from the origin": lambda: _shifted(1e5),
    "batch": lambda: [
        _crystal(2, 2, 2),
        _cluster(5, 1),
        Atoms("Cu"),
        _slab(),
        _crystal(1, 1, 1),
        _unwrapped(),
    ],
}

STRUCTURES = tuple(_STRUCTURES)


def _shifted(by: float) -> Atoms:
    atoms = _crystal(2, 2, 4, seed=9)
    atoms.positions += by
    return atoms


def images(name: str) -> list[Atoms]:
    """Return the structure as ASE Atoms, one per system."""
    made = _STRUCTURES[name]()
    return [made] if isinstance(made, Atoms) else made


def structure(name: str) -> AtomBatch:
    """Return the structure as a batch."""
    return AtomBatch.from_ase(images(name))
