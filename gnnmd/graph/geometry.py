"""Edge vectors, distances, strain, volume and incomplete cells."""

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph

#: Components of the vectors of spare edges, Angstrom: beyond every cutoff, so that they contribute nothing.
FAR = 60.0


def edge_vectors(g: AtomGraph) -> Tensor:
    """Return ``[E, 3]`` vectors r_ij = x_j + shift @ cell - x_i (Angstrom, in the dtype of the positions).

    Differences are taken before any cast to the model's dtype: float32 positions 1,000 A from the origin
    would already be wrong by 6e-5 A. Spare edges are far away, whatever the positions.
    """
    if g.positions is None:
        raise ValueError("the graph has no positions; call with_positions first")
    source, target = g.edge_index
    shift = g.shift.to(g.cell.dtype)
    if g.n_systems == 1:  # no gather: on a GPU its backward would add E rows into one, one after the other
        offset = shift @ g.cell[0]
    else:
        offset = torch.einsum("ea,eab->eb", shift, g.cell.index_select(0, g.system[target]))
    x = g.positions
    vectors = x.index_select(0, source) - x.index_select(0, target) + offset
    if g.n_edges is None:
        return vectors
    spare = torch.arange(len(source), device=source.device) >= g.n_edges
    return torch.where(spare[:, None], FAR, vectors)


def pair_distances(
    positions: Tensor, cell: Tensor, system: Tensor, target: Tensor, source: Tensor, shift: Tensor
) -> Tensor:
    """Return ``[P]`` lengths of x_j + shift @ cell - x_i, the same to the last bit for j -> i and i -> j.

    It decides which pairs are edges, so every operation is element-wise: the result depends neither on the
    device nor on the other pairs.

    Args:
        positions: ``[N, 3]`` float64, Angstrom.
        cell: ``[B, 3, 3]`` float64, Angstrom, rows are lattice vectors.
        system: ``[N]`` system of each atom.
        target: ``[P]`` atom i.
        source: ``[P]`` atom j.
        shift: ``[P, 3]`` integer lattice shift of j.
    """
    # Column by column: gathers of rows of three are several times slower on a CPU.
    s = shift.to(positions.dtype)
    squared = torch.zeros_like(s[:, 0])
    for axis in range(3):
        x, h = positions[:, axis].contiguous(), cell[:, :, axis]
        rows = h if len(h) == 1 else h[system[target]]  # [1 or P, 3]
        r = x.index_select(0, source) - x.index_select(0, target)
        r += s[:, 0] * rows[:, 0] + s[:, 1] * rows[:, 1] + s[:, 2] * rows[:, 2]
        squared += r * r
    return squared.sqrt_()


def complete_cell(cell: Tensor, pbc: Tensor) -> Tensor:
    """Replace the rows of open axes by unit vectors orthogonal to the periodic rows and to each other.

    Args:
        cell: ``[B, 3, 3]`` Angstrom, rows are lattice vectors; rows of open axes are ignored.
        pbc: ``[B, 3]`` bool.
    """
    if pbc.all():
        return cell
    # The last right singular vectors span what the periodic rows leave.
    basis = torch.linalg.svd(cell * pbc[..., None])[2]  # [B, 3, 3]
    n_periodic = pbc.sum(1, keepdim=True)
    which = (n_periodic + (~pbc).cumsum(1) - 1).clamp(0, 2)  # [B, 3], read for open axes only
    normals = basis.gather(1, which[..., None].expand(-1, -1, 3))
    return torch.where(pbc[..., None], cell, normals)


def strained(positions: Tensor, cell: Tensor, system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a zero symmetric strain per system so that the energy can be differentiated by it.

    Args:
        positions: ``[n, 3]`` Angstrom.
        cell: ``[B, 3, 3]`` Angstrom, rows are lattice vectors.
        system: ``[n]`` system of each row.

    Returns:
        Positions and cell multiplied by (1 + strain), and the strain leaf ``[B, 3, 3]``. Only its symmetric
        part acts, so dE/dstrain is symmetric.
    """
    strain = torch.zeros_like(cell, requires_grad=True)
    symmetric = 0.5 * (strain + strain.transpose(-1, -2))
    positions = positions + torch.einsum("na,nab->nb", positions, symmetric[system])
    return positions, cell + cell @ symmetric, strain


def volume(cell: Tensor) -> Tensor:
    """Return ``[B]`` cell volumes, Angstrom^3, positive for left-handed cells too; 0 where a row is zero."""
    a, b, c = cell.unbind(1)  # written out: a factorisation would make a GPU's host wait
    return (a * torch.linalg.cross(b, c)).sum(1).abs()
