"""Edge vectors, strain and volume."""

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph


def edge_vectors(g: AtomGraph) -> Tensor:
    """Return ``[E, 3]`` vectors r_ij = x_j + shift @ cell - x_i (Angstrom, in the dtype of the positions).

    Differences are taken before any cast to the model's dtype: float32 positions 1,000 A from the origin would
    already be wrong by 6e-5 A.
    """
    if g.positions is None:
        raise ValueError("the graph has no positions; call with_positions first")
    source, target = g.edge_index
    cell = g.cell[g.system[target]]  # [E, 3, 3]
    offset = torch.einsum("ea,eab->eb", g.shift.to(cell.dtype), cell)
    return g.positions[source] - g.positions[target] + offset


def strained(positions: Tensor, cell: Tensor, system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a zero symmetric strain per system so that the energy can be differentiated by it.

    Args:
        positions: ``[n, 3]`` Angstrom.
        cell: ``[B, 3, 3]`` Angstrom, rows are lattice vectors.
        system: ``[n]`` system of each row.

    Returns:
        Positions and cell multiplied by (1 + strain), and the strain leaf ``[B, 3, 3]``. Only its symmetric part
        acts, so dE/dstrain is symmetric.
    """
    strain = torch.zeros_like(cell, requires_grad=True)
    symmetric = 0.5 * (strain + strain.transpose(-1, -2))
    positions = positions + torch.einsum("na,nab->nb", positions, symmetric[system])
    return positions, cell + cell @ symmetric, strain


def volume(cell: Tensor) -> Tensor:
    """Return ``[B]`` cell volumes, Angstrom^3, positive for left-handed cells too; 0 where a row is zero."""
    return torch.linalg.det(cell).abs()
