"""The nearest neighbours of each atom, and consecutive atoms with all their edges."""

from bisect import bisect_right

import torch
from torch import Tensor


def nearness(distance: Tensor, target: Tensor, n_atoms: int) -> Tensor:
    """Return ``[E]`` int64: 0 for the nearest neighbour of its atom, 1 for the second, and so on.

    Args:
        distance: ``[E]`` lengths of the edges.
        target: ``[E]`` int64 atom of each edge, ascending: rows ``0 .. n_atoms - 1``.
        n_atoms: number of atoms.
    """
    by_length = torch.argsort(distance.detach(), stable=True)
    order = by_length.index_select(0, torch.argsort(target.index_select(0, by_length), stable=True))
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=target.device)
    counts = counts.index_add(0, target, torch.ones_like(target))
    place = torch.arange(len(target), device=target.device) - (counts.cumsum(0) - counts).index_select(
        0, target
    )
    return torch.empty_like(place).index_copy(0, order, place)


def cut_between_atoms(target: Tensor, n_atoms: int, longest: int) -> list[tuple[int, int]]:
    """Cut the edges between atoms into pieces of at most so many edges, or of one atom.

    Args:
        target: ``[E]`` int64 atom of each edge, ascending: rows ``0 .. n_atoms - 1``.
        n_atoms: number of atoms.
        longest: number of edges.

    Returns:
        (atom, edge) of every cut, both ends included: a piece begins with this atom and this edge.
    """
    if len(target) <= longest:
        return [(0, 0), (n_atoms, len(target))]
    first = torch.searchsorted(target, torch.arange(n_atoms + 1, device=target.device)).tolist()
    cuts = [(0, 0)]
    while (atom := cuts[-1][0]) < n_atoms:
        following = max(bisect_right(first, first[atom] + longest) - 1, atom + 1)
        cuts.append((following, first[following]))
    return cuts
