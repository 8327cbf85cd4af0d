"""Neighbour pairs by other people's code; each function has the signature of `cell_list_pairs`."""

import numpy as np
import torch
from torch import Tensor

from gnnmd.graph.boxed import BoxedAtoms, Pairs
from gnnmd.graph.cell_list import cell_list_pairs
from gnnmd.graph.geometry import pair_distances

#: vesin 0.6 coarsens grids of more than 1e5 bins and then divides by zero (SIGFPE) where a box is thin.
_MOST_BINS_OF_VESIN = 9e4


def vesin_pairs(atoms: BoxedAtoms, r_cut: float) -> Pairs:
    """Return all pairs closer than ``r_cut`` (Angstrom), found on the CPU by vesin, system after system.

    Boxes too large for it go to `cell_list_pairs`.
    """
    from vesin import NeighborList

    if ((atoms.height / r_cut).floor().prod(1) > _MOST_BINS_OF_VESIN).any():
        return cell_list_pairs(atoms, r_cut)
    search = NeighborList(cutoff=r_cut, full_list=False)
    cell, pbc = atoms.cell.cpu().numpy(), atoms.pbc.cpu().numpy()
    n_atoms = torch.bincount(atoms.system, minlength=len(cell)).tolist()
    positions = np.split(atoms.positions.cpu().numpy(), np.cumsum(n_atoms)[:-1])
    found = [search.compute(x, h, p, "PSd") for x, h, p in zip(positions, cell, pbc, strict=True)]
    pair, shift, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    first_atom = np.repeat(np.cumsum([0, *n_atoms[:-1]]), [len(d) for _, _, d in found])
    target, source = pair.astype(np.int64).T + first_atom
    return Pairs(*(torch.from_numpy(x).to(atoms.positions.device) for x in (target, source, shift, distance)))


def nvalchemi_pairs(atoms: BoxedAtoms, r_cut: float) -> Pairs:
    """Return all pairs closer than ``r_cut`` (Angstrom), found by nvalchemi-toolkit-ops (on a GPU)."""
    from nvalchemiops.torch.neighbors import NeighborOverflowError, neighbor_list

    ends = torch.bincount(atoms.system, minlength=len(atoms.cell)).cumsum(0)

    def search(max_neighbors: int | None) -> tuple[Tensor, Tensor, Tensor]:
        return neighbor_list(
            atoms.positions,
            r_cut,
            cell=atoms.cell,
            pbc=atoms.pbc,
            batch_idx=atoms.system.int(),
            batch_ptr=torch.cat([ends.new_zeros(1), ends]).int(),
            return_neighbor_list=True,
            max_neighbors=max_neighbors,
        )

    try:
        pair, _, shift = search(None)
    except NeighborOverflowError as overflow:  # its guess of the density was too low
        pair, _, shift = search(int(overflow.num_neighbors))
    target, source = pair.long()
    return _one_of_two(atoms, target, source, shift)


def torch_cluster_pairs(atoms: BoxedAtoms, r_cut: float) -> Pairs:
    """Return all pairs closer than ``r_cut`` (Angstrom) of open systems, found by torch_cluster.

    Raises:
        ValueError: a system is periodic.
    """
    from torch_cluster import radius

    if atoms.pbc.any():
        raise ValueError(
            "backend 'torch_cluster' knows open boundaries only; use backend='torch' for periodic systems"
        )
    limit = 64
    while True:
        target, source = radius(
            atoms.positions, atoms.positions, r_cut, atoms.system, atoms.system, max_num_neighbors=limit
        )
        # A full row may have been cut: torch_cluster does not tell.
        if torch.bincount(target, minlength=1).max() < limit:
            break
        limit *= 2
    return _one_of_two(atoms, target, source, target.new_zeros(len(target), 3))


def _one_of_two(atoms: BoxedAtoms, target: Tensor, source: Tensor, shift: Tensor) -> Pairs:
    """Keep one of j -> i and i -> j, drop an atom paired with itself, and measure what is left."""
    # The sign of the first shift that is not zero.
    direction = (shift.sign() * shift.new_tensor([4, 2, 1])).sum(1)
    keep = (target < source) | ((target == source) & (direction > 0))
    target, source, shift = target[keep], source[keep], shift[keep]
    distance = pair_distances(atoms.positions, atoms.cell, atoms.system, target, source, shift)
    return Pairs(target, source, shift, distance)
