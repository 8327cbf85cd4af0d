"""Profiles of density, temperature and stress along one direction of the cell."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.observable import Observable
from gnnmd.units import BOLTZMANN

#: amu/A^3 in g/cm^3.
_GRAM_PER_CM3 = 1.66053906660


@dataclass(frozen=True)
class Profiles:
    """Averages in slabs between planes; they keep their places relative to the cell when it changes.

    Attributes:
        position: ``[bins]`` height of the middle of each slab above the cell's origin, Angstrom.
        planes: ``[bins + 1]`` heights of the planes between them, Angstrom.
        atoms: ``[bins]`` mean number of atoms.
        number_density: ``[bins]`` 1/A^3.
        density: ``[bins]`` g/cm^3.
        temperature: ``[bins]`` K, of atoms that are not held fixed; flow is not taken out. NaN without atoms.
        kinetic_stress: ``[bins, 3, 3]`` eV/A^3, -sum m v v / V; minus the pressure of an ideal gas.
        traction: ``[bins + 1, 3]`` eV/A^3, what forces between atoms carry through each plane: force per area
            with which the atoms above pull at those below, in Cartesian components (n.stress).
        samples: how many steps were looked at.
    """

    position: np.ndarray
    planes: np.ndarray
    atoms: np.ndarray
    number_density: np.ndarray
    density: np.ndarray
    temperature: np.ndarray
    kinetic_stress: np.ndarray
    traction: np.ndarray
    samples: int


@dataclass(eq=False)
class Profile(Observable):
    """Density, temperature and stress in slabs parallel to two of the cell's vectors.

    A network has no stress of an atom: how a many-body energy is shared among atoms is arbitrary. What
    crosses a plane is not. Momentum is conserved, so the traction changes from plane to plane by the forces
    on the atoms in between (as in the method of planes, Todd, Evans and Daivis, Phys. Rev. E 52 (1995) 1627),
    and its mean over the cell is the stress of the whole. This fixes the three components across the planes,
    for any potential whose forces add up to zero; the others are given without what atoms exert on another.

    Attributes:
        interval: steps between two samples.
        axis: 0, 1 or 2: slabs are stacked along this vector of the cell. Where it is not periodic, atoms
            outside the cell count in the first or last slab.
        bins: number of slabs.
    """

    interval: int = 100
    axis: int = 2
    bins: int = 50

    needs_stress = True
    _sums = (
        "number",
        "mass",
        "twice_kinetic",
        "freedom",
        "momentum_flow",
        "force",
        "moment",
        "whole",
        "height",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.axis not in (0, 1, 2) or self.bins < 1:
            raise ValueError(
                f"Profile needs axis 0, 1 or 2 and bins >= 1, got axis={self.axis}, bins={self.bins}"
            )

    def begin(self, view: View) -> None:
        """Check the cell and make room for the sums. Collective."""
        if not view.state.volume > 0:
            raise ValueError(
                f"Profile divides the cell into slabs, but its volume is zero: {view.state.cell.tolist()}. "
                "Give the atoms a cell, periodic or not"
            )
        super().begin(view)

    def _zeros(self, view: View) -> dict[str, Tensor]:
        n = self.bins
        shapes = {
            "number": (n, 2),  # atoms, and atoms per volume
            "mass": (n,),
            "twice_kinetic": (n,),
            "freedom": (n,),
            "momentum_flow": (n, 3, 3),
            "force": (n, 3),
            "moment": (3,),
            "whole": (3,),
            "height": (),
        }
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def _sample(self, view: View) -> None:
        s, sums = view.state, self._partial
        normal = torch.linalg.cross(s.cell[self.axis - 2], s.cell[self.axis - 1])
        area = torch.linalg.vector_norm(normal)
        normal = normal / area
        height = torch.dot(normal, s.cell[self.axis])  # negative in a left-handed cell
        normal, height = normal * torch.sign(height), height.abs()
        u = s.positions @ normal / height
        u = torch.where(s.pbc[self.axis], u - u.floor(), u)
        place = (u * self.bins).floor().clamp(0, self.bins - 1).long()
        slab, force = s.volume / self.bins, s.forces / area
        flow = s.masses[:, None, None] * s.velocities[:, :, None] * s.velocities[:, None]
        one = torch.ones_like(u)
        sums["number"].index_add_(0, place, torch.stack((one, one / slab), 1))
        sums["mass"].index_add_(0, place, s.masses / slab)
        sums["twice_kinetic"].index_add_(0, place, flow.diagonal(dim1=1, dim2=2).sum(1))
        sums["freedom"].index_add_(0, place, 3 * s.mobile[:, 0])
        sums["momentum_flow"].index_add_(0, place, flow / slab)
        sums["force"].index_add_(0, place, force)
        sums["moment"] += (force * (1 - u)[:, None]).sum(0)
        if view.first:
            sums["whole"] += normal @ s.stress
            sums["height"] += height

    def result(self) -> Profiles:
        """Return the averages of what was sampled so far.

        Raises:
            ValueError: there are no samples.
        """
        mean = {name: total / self.samples for name, total in self._found().items()}
        planes = np.linspace(0, float(mean["height"]), self.bins + 1)
        below = np.concatenate((np.zeros((1, 3)), mean["force"].cumsum(0)))
        with np.errstate(invalid="ignore"):
            temperature = mean["twice_kinetic"] / (mean["freedom"] * BOLTZMANN)
        return Profiles(
            position=(planes[1:] + planes[:-1]) / 2,
            planes=planes,
            atoms=mean["number"][:, 0],
            number_density=mean["number"][:, 1],
            density=mean["mass"] * _GRAM_PER_CM3,
            temperature=temperature,
            kinetic_stress=-mean["momentum_flow"],
            # forces below a plane, less their mean over all planes, which the stress of the whole replaces
            traction=mean["whole"] + below - mean["moment"],
            samples=self.samples,
        )
