"""Where atoms are, in the form that partitioners read: a box per system without the vacuum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.graph.geometry import complete_cell
from gnnmd.parallel.ranks import Ranks

#: Bins along each axis in which vacuum is looked for.
GAP_BINS = 1024


@dataclass(frozen=True)
class Box:
    """One parallelepiped per system that holds all its atoms, small enough for every rank to keep.

    Periodic axes start at the far end of their largest empty gap (vacuum lies at the seam, where nothing is
    cut); open axes reach from the first to the last atom.

    Attributes:
        inverse: ``[B, 3, 3]``: positions @ inverse are coordinates along the lattice vectors.
        pbc: ``[B, 3]`` bool.
        origin: ``[B, 3]`` where the box starts, in these coordinates.
        length: ``[B, 3]`` how far it reaches, in these coordinates.
        edge: ``[B, 3]`` its edges, Angstrom.
        height: ``[B, 3]`` distance between its opposite faces, Angstrom.
        seam: ``[B, 3]`` width of the empty gap between its end and its start, Angstrom; infinite on open
            axes.
    """

    inverse: Tensor
    pbc: Tensor
    origin: Tensor
    length: Tensor
    edge: Tensor
    height: Tensor
    seam: Tensor

    def coordinates(self, positions: Tensor, system: Tensor) -> Tensor:
        """Return ``[n, 3]`` coordinates in [0, 1) of atoms at ``positions`` (wrapped or not)."""
        x = torch.einsum("na,nab->nb", positions, self.inverse[system]) - self.origin[system]
        x = torch.where(self.pbc[system], x - x.floor(), x)
        return (x / self.length[system]).clamp(0, 1 - 2.0**-53)


def find_box(positions: Tensor, system: Tensor, cell: Tensor, pbc: Tensor, ranks: Ranks) -> Box:
    """Return the box of every system; each rank passes the atoms it holds.

    Args:
        positions: ``[n, 3]`` float64, Angstrom.
        system: ``[n]`` int64.
        cell: ``[B, 3, 3]`` Angstrom, the same on every rank.
        pbc: ``[B, 3]`` bool.
        ranks: who holds the rest.
    """
    axes = complete_cell(cell, pbc)
    inverse = torch.linalg.inv(axes)
    x = torch.einsum("na,nab->nb", positions, inverse[system])
    x = torch.where(pbc[system], x - x.floor(), x)
    n_systems, index = len(cell), system[:, None].expand(-1, 3)
    far = torch.full((n_systems, 3), torch.inf, dtype=x.dtype, device=x.device)
    lowest = ranks.min(far.scatter_reduce(0, index, x, "amin"))
    highest = ranks.max((-far).scatter_reduce(0, index, x, "amax"))
    open_length = torch.where(highest > lowest, highest - lowest, 1.0)
    empty = ~torch.isfinite(lowest)

    # Vacuum along periodic axes: the longest run of empty bins, walked twice around.
    place = (x * GAP_BINS).long().clamp(0, GAP_BINS - 1)
    occupied = torch.zeros(n_systems, 3, GAP_BINS, dtype=torch.int32, device=x.device)
    occupied[system[:, None], torch.arange(3, device=x.device), place] = 1
    twice = ranks.max(occupied).repeat(1, 1, 2)
    number = torch.arange(1, 2 * GAP_BINS + 1, device=x.device)
    run = number - torch.where(twice > 0, number, 0).cummax(2).values  # empty bins up to here
    longest, end = run.clamp(max=GAP_BINS - 1).max(2)
    # A gap of one bin may be chance: a crystal's layers are narrower than what separates them.
    longest = torch.where(longest > 1, longest, 0)
    # The box keeps a tenth of a bin of the gap on either side: rounding must not move an atom from one end of
    # the box to the other.
    end = (end + 0.9) % GAP_BINS / GAP_BINS
    origin = torch.where(longest > 0, end.to(x.dtype), 0.0)
    length = torch.where(longest > 0, 1 - (longest - 0.2).to(x.dtype) / GAP_BINS, 1.0)

    # A last step keeps the highest atom of an open axis inside.
    length = torch.where(pbc, length, open_length * (1 + 1e-12))
    origin = torch.where(pbc, origin, torch.where(empty, 0.0, lowest))
    spacing = 1 / torch.linalg.vector_norm(inverse, dim=1)
    return Box(
        inverse=inverse,
        pbc=pbc,
        origin=origin,
        length=length,
        edge=torch.linalg.vector_norm(axes, dim=2) * length,
        height=spacing * length,
        seam=torch.where(pbc, spacing * (1 - length), torch.inf),
    )


@dataclass(frozen=True)
class Sites:
    """The atoms a rank holds while it is decided who will own them.

    Attributes:
        u: ``[n, 3]`` coordinates in [0, 1) of their system's box.
        system: ``[n]`` int64.
        weight: ``[n]`` int64 > 0, work that an atom causes (its edges + 1, say). Integers, so that sums over
            ranks do not depend on which rank holds which atom.
        id: ``[n]`` int64 global number of each atom.
        box: the boxes of all systems.
    """

    u: Tensor
    system: Tensor
    weight: Tensor
    id: Tensor
    box: Box
