"""Angles: ordered pairs of edges that end on the same atom."""

import torch
from torch import Tensor


def angle_pairs(centre: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return all ordered pairs (ij, ik) of edges of one centre i, j = k included.

    They are sorted by ij, hence by centre, and then by ik, so that the angles an edge receives from stand
    together. Time and memory grow with the number of angles.

    Args:
        centre: ``[E]`` int64 target of each edge, ascending: rows ``0 .. n_atoms - 1``.
        n_atoms: number of centres.

    Returns:
        ``ij [A]`` and ``ik [A]``, int64 positions in ``centre``; A sums the squares of the edge counts.
    """
    edges = torch.arange(len(centre), device=centre.device)
    counts = torch.zeros(n_atoms, dtype=torch.int64, device=centre.device)
    counts = counts.index_add(0, centre, torch.ones_like(centre))
    first = counts.cumsum(0) - counts  # [n_atoms] first edge of each centre
    partners = counts.index_select(0, centre)  # [E]
    ij = torch.repeat_interleave(edges, partners)
    start = partners.cumsum(0) - partners  # [E] first angle of each edge
    ik = torch.arange(len(ij), device=centre.device) + (first.index_select(0, centre) - start).index_select(
        0, ij
    )
    return ij, ik
