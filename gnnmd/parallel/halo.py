"""Which atoms must be known to which other ranks, found without anybody seeing all atoms.

Space is divided into cells at least one reach wide. Every rank reports the cells in which it owns atoms, and
their neighbours, whose atoms it needs, to the cell's directory rank (a hash of the cell), and the directories
tell the owners who needs what. Each rank handles its own cells only, whatever rule gave it its atoms.
"""

from itertools import product

import torch
from torch import Tensor

from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import Box

#: Odd multiplier that spreads neighbouring cells over the directory ranks (2^64 / golden ratio, as int64).
_SPREAD = -7046029254386353131


def halo_receivers(u: Tensor, system: Tensor, box: Box, reach: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Find the ranks that own atoms near those of this rank.

    Args:
        u: ``[n, 3]`` coordinates of the owned atoms in their box.
        system: ``[n]`` int64.
        box: the boxes of all systems.
        reach: how far edges reach, Angstrom.
        ranks: who owns the other atoms.

    Returns:
        Pairs ``[S]`` of an owned row and a rank that may need it: every atom within reach of another rank's
        atoms is among them, and some that are up to twice as far.
    """
    grid = _Grid(box, reach)
    place = grid.place(u, system)
    key, order = torch.sort(grid.key(place, system))
    occupied, count = torch.unique_consecutive(key, return_counts=True)
    start = count.cumsum(0) - count
    example = order[start]
    needed = grid.neighbors(place[example], system[example])

    # To the directories: occupied cells and needed cells; they answer owners with (cell, who needs it).
    cells = torch.cat((occupied, needed))
    need = torch.cat((torch.zeros_like(occupied), torch.ones_like(needed)))
    (cell, kind), counts = ranks.send_rows((cells, need), _directory(cells, ranks.size))
    sender = torch.repeat_interleave(counts)
    owners, at = torch.sort(cell[kind == 0])
    owner = sender[kind == 0][at]
    asked, asker = cell[kind == 1], sender[kind == 1]
    low = torch.searchsorted(owners, asked)
    row, found = expand_ranges(low, torch.searchsorted(owners, asked, right=True) - low)
    other = owner[found] != asker[row]
    row, found = row[other], found[other]
    (cell, receiver), _ = ranks.send_rows((asked[row], asker[row]), owner[found])

    slot = torch.searchsorted(occupied, cell)
    pair, atom = expand_ranges(start[slot], count[slot])
    return order[atom], receiver[pair]


def expand_ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """List the numbers ``start[r] .. start[r] + count[r] - 1`` of every row r, and the row of each."""
    row = torch.repeat_interleave(count)
    before = count.cumsum(0) - count
    return row, torch.arange(len(row), device=row.device) + (start - before)[row]


def _directory(cell: Tensor, n_ranks: int) -> Tensor:
    return ((cell * _SPREAD) >> 32 & 0x7FFFFFFF) % n_ranks


class _Grid:
    """Cells of all systems, numbered one after the other."""

    def __init__(self, box: Box, reach: float) -> None:
        most = int((2.0**62 / max(len(box.height), 1)) ** (1 / 3))
        self.n = (box.height / reach).floor().clamp(1, most).long()  # [B, 3]
        # Across vacuum wider than the reach nobody is a neighbour.
        self.wraps = box.seam < reach
        total = self.n.prod(1)
        self.first = total.cumsum(0) - total

    def place(self, u: Tensor, system: Tensor) -> Tensor:
        n = self.n[system]
        return (u * n).long().minimum(n - 1)

    def key(self, place: Tensor, system: Tensor) -> Tensor:
        n = self.n[system]
        return self.first[system] + (place[:, 0] * n[:, 1] + place[:, 1]) * n[:, 2] + place[:, 2]

    def neighbors(self, place: Tensor, system: Tensor) -> Tensor:
        """Return the sorted keys of the cells next to some of the given ones, and of these themselves."""
        offsets = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=place.device)
        system = system.repeat_interleave(27)
        moved = (place[:, None] + offsets).view(-1, 3)
        n = self.n[system]
        inside = ((moved >= 0) & (moved < n) | self.wraps[system]).all(1)
        return torch.unique(self.key(moved % n, system)[inside])
