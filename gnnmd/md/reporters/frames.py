"""One step of a simulation as ASE's Atoms."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.data import atomic_masses
from ase.stress import full_3x3_to_voigt_6_stress


@dataclass(frozen=True)
class Frame:
    """A simulation at one step, in full.

    Attributes:
        step: number of steps since the beginning.
        time: fs.
        atoms: all atoms in the order of the input, positions not wrapped, fixed ones with their constraint;
            momenta if velocities were asked for; energy, and forces and stress if asked for, in a calculator.
        scalars: temperature (K), energies (eV), pressure (GPa), ...; see `View.scalars`.
    """

    step: int
    time: float
    atoms: Atoms
    scalars: dict[str, float] = field(default_factory=dict)


def atoms_of(known: dict[str, np.ndarray]) -> Atoms:
    """Return atoms from arrays by their names in `State`.

    Args:
        known: ``numbers``, ``positions``, ``cell``, ``pbc``, and any of ``masses``, ``mobile``,
            ``velocities`` (needs masses), ``energy``, ``forces``, ``stress``. A stress that is not finite is
            left out.
    """
    atoms = Atoms(known["numbers"], known["positions"], cell=known["cell"], pbc=known["pbc"])
    if "masses" in known and not np.array_equal(known["masses"], atomic_masses[atoms.numbers]):
        atoms.set_masses(known["masses"])
    if "velocities" in known:
        atoms.set_momenta(known["velocities"] * known["masses"][:, None])
    if "mobile" in known:
        atoms.set_constraint(fixed_atoms(known["mobile"]))
    results: dict[str, Any] = {}
    if "energy" in known:
        results["energy"] = float(known["energy"])
    if "forces" in known:
        results["forces"] = known["forces"]
    if "stress" in known and np.isfinite(known["stress"]).all():
        results["stress"] = full_3x3_to_voigt_6_stress(known["stress"])
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def fixed_atoms(mobile: np.ndarray) -> list[FixAtoms]:
    """Return the constraint of atoms for which ``mobile`` ``[N, 1]`` is 0; none if there are none."""
    fixed = np.flatnonzero(mobile == 0)
    return [FixAtoms(fixed)] if len(fixed) else []
