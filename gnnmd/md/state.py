"""What is known of a running simulation at one time step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class State:
    """The atoms that this rank owns, and what all ranks know, at one time step.

    Units: eV, Angstrom, amu, and the time in which F = m dv/dt holds for these (`gnnmd.units.FEMTOSECOND`).
    All numbers are float64. Rows of per-atom columns are in the order of the plan; a rebuild may bring other
    atoms.

    Attributes:
        step: number of steps since the beginning.
        ids: ``[n]`` int64 global numbers of the owned atoms: their place in the input.
        numbers: ``[n]`` int64 atomic numbers.
        masses: ``[n]`` amu.
        positions: ``[n, 3]`` Angstrom, never wrapped.
        velocities: ``[n, 3]``.
        forces: ``[n, 3]`` eV/A at ``positions``.
        mobile: ``[n, 1]`` 1.0, or 0.0 for atoms that are held fixed.
        cell: ``[3, 3]`` Angstrom, rows are lattice vectors; the same on every rank.
        pbc: ``[3]`` bool.
        energy: potential energy of all atoms, eV; the same on every rank.
        stress: ``[3, 3]`` eV/A^3 of all atoms, dE/dstrain / V without kinetic part; the same on every rank,
            of this step if it was asked for.
        variables: what an ensemble keeps from step to step (thermostats), the same on every rank; saved in
            restarts.
        columns: further per-atom columns ``[n, ...]`` that travel with the atoms (of reporters); saved too.
    """

    step: int
    ids: Tensor
    numbers: Tensor
    masses: Tensor
    positions: Tensor
    velocities: Tensor
    forces: Tensor
    mobile: Tensor
    cell: Tensor
    pbc: Tensor
    energy: Tensor
    stress: Tensor
    variables: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> "State":
        """Return a state of its own: nothing done to one changes the other."""
        values = dict(vars(self))
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.clone()
            elif isinstance(value, dict):
                values[name] = {key: tensor.clone() for key, tensor in value.items()}
        return State(**values)

    @property
    def volume(self) -> Tensor:
        """Volume of the cell, Angstrom^3."""
        return determinant(self.cell).abs()


def determinant(m: Tensor) -> Tensor:
    """Return the determinant of a ``[3, 3]`` matrix; never waits for the device."""
    return torch.dot(m[0], torch.linalg.cross(m[1], m[2]))
