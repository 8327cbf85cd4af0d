"""Angles: ordered pairs of edges that end on the same atom."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnglePairs:
    """Ordered pairs (ij, ik) of edges of one centre i, j = k included.

    They are sorted by ij, hence by centre, and then by ik, so that the angles an edge receives from stand
    together.

    Attributes:
        ij, ik: ``[A]`` int64 edges.
        by_ik: ``[A]`` int64, the pairs sorted by ik and then by ij.
        count: scalar int64, how many there are; the rest are spare. None = all.
    """

    ij: Tensor
    ik: Tensor
    by_ik: Tensor
    count: Tensor | None


def angle_pairs(
    centre: Tensor, n_atoms: int, *, counts: Tensor | None = None, room: int | None = None
) -> AnglePairs:
    """Return all pairs; time and memory grow with their number, which sums the squares of the edge counts.

    Args:
        centre: ``[E]`` int64 target of each edge, ascending: rows ``0 .. n_atoms - 1``.
        n_atoms: number of centres.
        counts: ``[n_atoms]`` int64 edges of each centre, if known; edges after these are spare.
        room: for so many pairs, so that the host need not wait for their number; without edges there are
            none. If ``count`` is larger, pairs are missing.
    """
    edges = torch.arange(len(centre), device=centre.device)
    if counts is None:
        counts = torch.zeros(n_atoms, dtype=torch.int64, device=centre.device)
        counts = counts.index_add(0, centre, torch.ones_like(centre))
    partners = counts.index_select(0, centre)  # [E]
    if room is not None:
        partners = torch.where(edges < counts.sum(), partners, 0)
    end = partners.cumsum(0)
    start = end - partners  # [E] first angle of each edge
    first = (counts.cumsum(0) - counts).index_select(0, centre)  # [E] first edge of its centre
    if room is None:
        ij = torch.repeat_interleave(edges, partners)  # here the host waits
        places = torch.arange(len(ij), device=ij.device)
        ik = places + (first - start).index_select(0, ij)
        return AnglePairs(ij, ik, _transposed(ij, ik, start, first), None)
    if not len(edges):
        return AnglePairs(edges, edges, edges, counts.sum())
    places, last = torch.arange(room, device=centre.device), len(edges) - 1
    ij = torch.searchsorted(end, places, right=True).clamp(max=last)
    ik = (places + (first - start).index_select(0, ij)).clamp(max=last)
    spare = places >= end[-1]
    ik = torch.where(spare, last, ik)
    by_ik = torch.where(spare, places, _transposed(ij, ik, start, first)).clamp(max=room - 1)
    return AnglePairs(ij, ik, by_ik, end[-1])


def _transposed(ij: Tensor, ik: Tensor, start: Tensor, first: Tensor) -> Tensor:
    """Return where (ik, ij) stands for every (ij, ik): that is the order by ik."""
    return start.index_select(0, ik) + ij - first.index_select(0, ij)
