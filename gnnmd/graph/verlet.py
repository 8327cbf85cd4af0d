"""Reuse of one neighbour list for many steps."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.geometry import pair_distances
from gnnmd.graph.neighbors import NeighborList, neighbor_list


@dataclass(frozen=True)
class _Standing:
    """A list built at r_cut + skin and a copy of the atoms it was built for (callers move atoms in place)."""

    edges: NeighborList
    atoms: AtomBatch


class VerletList:
    """A neighbour list with a skin: built rarely, exact at every step.

    A list of all pairs within ``r_cut + skin`` stands until a pair from outside might have come within
    ``r_cut``. Every call returns the pairs that are within ``r_cut`` now: the same edges in the same order as
    `neighbor_list` gives.

    Attributes:
        r_cut: cutoff, Angstrom.
        skin: Angstrom; 0 reuses the list only while nothing moves.
        backend: see `neighbor_list`.
        n_builds: lists built so far.
        n_updates: calls so far.
    """

    def __init__(self, r_cut: float, skin: float, backend: str = "auto") -> None:
        if not 0 <= skin < float("inf"):
            raise ValueError(f"skin must be a distance of at least 0 Angstrom, got {skin}")
        self.r_cut = r_cut
        self.skin = skin
        self.backend = backend
        self.n_builds = 0
        self.n_updates = 0
        self._standing: _Standing | None = None

    @torch.no_grad()
    def update(self, batch: AtomBatch) -> NeighborList:
        """Return the edges shorter than ``r_cut``, from the standing list if it has them all.

        Positions and cells may change in any way between calls, jumps by lattice vectors included. A change
        of atoms, periodicity, charge, spin, data set or device makes a new list.

        Raises:
            ValueError: see `neighbor_list`.
        """
        self.n_updates += 1
        jumps = None if self._standing is None else self._jumps(self._standing.atoms, batch)
        if self._standing is None or jumps is None:
            edges = neighbor_list(batch, self.r_cut + self.skin, backend=self.backend)
            self._standing = _Standing(edges, _copy(batch))
            self.n_builds += 1
            jumps = torch.zeros_like(batch.positions, dtype=torch.int64)
        edge_index, shift = self._standing.edges.edge_index, self._standing.edges.shift
        source, target = edge_index
        if jumps.any():
            shift = shift + jumps[target] - jumps[source]
        distance = pair_distances(batch.positions, batch.cell, batch.system, target, source, shift)
        near = (distance < self.r_cut).nonzero().squeeze(1)
        return NeighborList(edge_index[:, near], shift[near], self.r_cut)

    def _jumps(self, before: AtomBatch, now: AtomBatch) -> Tensor | None:
        """Return the lattice vectors ``[N, 3]`` by which atoms jumped; None if the list may lack an edge.

        With the deformation D that takes the old lattice vectors to the new ones, an atom's displacement is
        u = x_now - x_before D - jump @ cell_now. A pair vector v then was (v - u_j + u_i) D^-1 when the list
        was built, so v inside r_cut was inside ``(r_cut + 2 max|u|) / smallest singular value of D``.
        """
        if not _same_systems(before, now) or not now.cell.isfinite().all():
            return None
        old, new = (b.cell * b.pbc[..., None] for b in (before, now))
        # The smallest map that takes old to new; exactly the identity for an unchanged cell.
        deformation = torch.eye(3).to(new) + torch.linalg.pinv(old) @ (new - old)
        carried = torch.einsum("na,nab->nb", before.positions, deformation[now.system])
        moved = now.positions - carried
        jumps = torch.einsum("na,nab->nb", moved, torch.linalg.pinv(new)[now.system]).round()
        moved = moved - torch.einsum("na,nab->nb", jumps, new[now.system])
        farthest = new.new_zeros(len(new)).scatter_reduce(
            0, now.system, torch.linalg.vector_norm(moved, dim=1), "amax"
        )
        was_within = (self.r_cut + 2 * farthest) / torch.linalg.svdvals(deformation)[:, -1]
        # A millionth of the skin is left for rounding. NaN fails the comparison.
        certain = was_within <= self.r_cut + self.skin * (1 - 1e-6)
        return jumps.long() if bool(certain.all()) else None


_FIXED = ("numbers", "system", "pbc", "charge", "spin")


def _same_systems(a: AtomBatch, b: AtomBatch) -> bool:
    return (
        a.positions.device == b.positions.device
        and a.dataset == b.dataset
        and all(torch.equal(getattr(a, name), getattr(b, name)) for name in _FIXED)
    )


def _copy(batch: AtomBatch) -> AtomBatch:
    names = ("positions", "cell", *_FIXED)
    return replace(batch, **{name: getattr(batch, name).clone() for name in names})
