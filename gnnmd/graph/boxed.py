"""Atoms folded into one box per system, the form in which every neighbour-list backend gets them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.geometry import complete_cell

#: Largest accepted coordinate, Angstrom. Float64 resolves 1.5e-8 A there, well below `DISTANCE_ERROR`.
LARGEST_COORDINATE = 1e8

#: Bound on the rounding error of a backend's distances, Angstrom.
DISTANCE_ERROR = 1e-6


@dataclass(frozen=True)
class BoxedAtoms:
    """Atoms of one or many systems, each system inside an invertible box.

    Attributes:
        positions: ``[N, 3]`` float64, Angstrom, inside the box up to rounding.
        system: ``[N]`` int64, ascending.
        cell: ``[B, 3, 3]`` float64, Angstrom, invertible. Rows of open axes are orthogonal to all others and
            long enough that no pair within the cutoff crosses them.
        pbc: ``[B, 3]`` bool.
        image: ``[N, 3]`` int64, the lattice vectors that were taken off: given position = boxed position +
            image @ cell (+ one common translation per system).
    """

    positions: Tensor
    system: Tensor
    cell: Tensor
    pbc: Tensor
    image: Tensor

    @property
    def height(self) -> Tensor:
        """``[B, 3]`` distances between opposite faces of the boxes, Angstrom."""
        return 1 / torch.linalg.vector_norm(torch.linalg.inv(self.cell), dim=1)


class Pairs(NamedTuple):
    """Pairs of boxed atoms: of j -> i and i -> j only one is listed.

    ``distance = |positions[source] + shift @ cell - positions[target]|`` up to `DISTANCE_ERROR`.
    """

    target: Tensor  # [P] int64
    source: Tensor  # [P] int64
    shift: Tensor  # [P, 3] integer
    distance: Tensor  # [P] float64, Angstrom

    def select(self, rows: Tensor) -> "Pairs":
        """Return the pairs with the indices ``[P']``."""
        return Pairs(*(column.index_select(0, rows) for column in self))


def box_atoms(batch: AtomBatch, reach: float) -> BoxedAtoms:
    """Wrap atoms along periodic axes and put a box around them along open axes.

    Args:
        batch: systems; cell rows of open axes are ignored.
        reach: largest distance that will be asked for, Angstrom.

    Raises:
        ValueError: a coordinate that is not finite or beyond 1e8 A, systems that are not one after the other,
            or periodic lattice vectors that are missing or linearly dependent.
    """
    check_boxes(batch)
    axes = complete_cell(batch.cell, batch.pbc)
    system, pbc = batch.system, batch.pbc
    # In units of the lattice vector on periodic axes, in Angstrom on open ones.
    fraction = torch.einsum("na,nab->nb", batch.positions, torch.linalg.inv(axes)[system])
    image = torch.where(pbc[system], fraction.floor(), 0.0)
    index = system[:, None].expand(-1, 3)
    start = torch.zeros_like(axes[:, 0])  # [B, 3]
    lowest = start.scatter_reduce(0, index, fraction, "amin", include_self=False)
    highest = start.scatter_reduce(0, index, fraction, "amax", include_self=False)
    origin = torch.where(pbc, 0.0, lowest)
    # A little more than reach: even a backend that took an open axis for a periodic one found nothing across.
    length = torch.where(pbc, 1.0, highest - lowest + 1.01 * reach)
    offset = torch.einsum("na,nab->nb", image + origin[system], axes[system])
    return BoxedAtoms(batch.positions - offset, system, axes * length[..., None], pbc, image.long())


def check_boxes(batch: AtomBatch) -> None:
    """Raise the errors of `box_atoms`."""
    _check_input(batch)
    _check_volume(batch, complete_cell(batch.cell, batch.pbc))


def _check_input(batch: AtomBatch) -> None:
    if batch.positions.dtype != torch.float64 or batch.cell.dtype != torch.float64:
        raise ValueError(
            f"positions and cell must be float64, got {batch.positions.dtype} and {batch.cell.dtype}; "
            "read or create them in double precision (converting afterwards does not bring the digits back)"
        )
    if (batch.system.diff() < 0).any():
        raise ValueError("the systems of a batch must be one after the other; sort the atoms by system")
    far = ~(batch.positions.abs() <= LARGEST_COORDINATE).all(1)  # negated: NaN counts as far
    if far.any():
        atom = int(far.nonzero()[0])
        raise ValueError(
            f"atom {atom} of system {int(batch.system[atom])} is at {batch.positions[atom].tolist()} A; "
            f"positions must be finite and within {LARGEST_COORDINATE:.0e} A of the origin. Check the "
            "input; in a simulation, the time step"
        )
    damaged = ~batch.cell.isfinite().flatten(1).all(1)
    if damaged.any():
        b = int(damaged.nonzero()[0])
        raise ValueError(f"the cell of system {b} is not finite: {batch.cell[b].tolist()} A; check the input")


def _check_volume(batch: AtomBatch, axes: Tensor) -> None:
    volume = torch.linalg.det(axes).abs()  # or area or length: the rows of open axes are unit vectors
    # Below 1e-3 A^3 an atom has a million images in reach; the second bound is for rounding in large cells.
    flat = (volume < 1e-3) | (volume < 1e-8 * torch.linalg.vector_norm(axes, dim=2).prod(1))
    if flat.any():
        b = int(flat.nonzero()[0])
        raise ValueError(
            f"the cell of system {b} is singular along its periodic axes: cell {batch.cell[b].tolist()} A, "
            f"pbc {batch.pbc[b].tolist()}. Give independent lattice vectors, or set pbc to False where there "
            "is none"
        )
