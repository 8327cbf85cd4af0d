"""The nearest neighbours of each atom, and consecutive atoms with all their edges."""

from bisect import bisect_right

import torch
from torch import Tensor

#: Lengths and components of vectors that differ by less are equal, Angstrom.
EQUAL = 1e-6


def nearness(vector: Tensor, target: Tensor, n_atoms: int) -> Tensor:
    """Return ``[E]`` int64: 0 for the nearest neighbour of its atom, 1 for the second, and so on.

    Those that are equally far, as in a perfect crystal, are ordered by their direction: so the result depends
    neither on the order of atoms nor on the number of ranks.

    Args:
        vector: ``[E, 3]`` from the target to the source, Angstrom.
        target: ``[E]`` int64 atom of each edge, ascending: rows ``0 .. n_atoms - 1``.
        n_atoms: number of atoms.
    """
    x, y, z = (vector.detach() / EQUAL).round().unbind(1)
    distance = (torch.linalg.vector_norm(vector.detach(), dim=1) / EQUAL).round()
    order = torch.arange(len(target), device=target.device)
    for key in (z, y, x, distance, target):  # the last is the most important
        order = order.index_select(0, torch.argsort(key.index_select(0, order), stable=True))
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=target.device)
    counts = counts.index_add(0, target, torch.ones_like(target))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(target), device=target.device) - first.index_select(0, target)
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
