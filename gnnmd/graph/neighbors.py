"""Neighbour lists (interface only so far; see AtomGraph for the use)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NeighborList:
    """Directed edges j -> i of one or many systems, sorted by target i, then source j, then shift.

    Attributes:
        edge_index: ``[2, E]`` int64, row 0 the source j, row 1 the target i.
        shift: ``[E, 3]`` int64 lattice shifts: ``r_ij = positions[j] + shift @ cell - positions[i]``, for the
            positions as given (wrapped or not).
        r_cut: cutoff, Angstrom; every edge is strictly shorter.
    """

    edge_index: Tensor
    shift: Tensor
    r_cut: float
