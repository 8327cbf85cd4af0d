"""Neighbour pairs by a cell list written in torch: O(N), any device, all systems of a batch at once."""

import torch
from torch import Tensor

from gnnmd.graph.boxed import BoxedAtoms, Pairs

#: Candidate pairs examined at a time, about 100 bytes each. On a CPU 2^16 to 2^18 are equally fast and 2^22
#: takes 2.8 times as long; a GPU wants fewer launches.
CPU_CHUNK = 2**17
GPU_CHUNK = 2**22


def cell_list_pairs(atoms: BoxedAtoms, r_cut: float) -> Pairs:
    """Return all pairs closer than ``r_cut`` (Angstrom).

    Boxes are divided into bins at least ``r_cut`` wide; a box thinner than that is one bin which is its own
    neighbour several times over, once per image. There is no bin grid in memory: only occupied bins are
    stored, sorted, and neighbouring bins are found by bisection, so vacuum costs nothing.
    """
    bins = _Bins(atoms, r_cut)
    first, second, shift, within = bins.neighbors()
    # One row per atom i of the first bin; it meets all atoms of the second, within one bin those after it.
    pair, i = _ranges(bins.start[first], bins.count[first])
    j_start = torch.where(within[pair], i + 1, bins.start[second[pair]])
    j_count = (bins.start + bins.count)[second[pair]] - j_start
    # Coordinates are kept as three columns: gathers of rows of three are several times slower on a CPU.
    position = atoms.positions[bins.order].t().contiguous()  # [3, N]
    image = torch.einsum("pa,pab->bp", shift.to(position.dtype), atoms.cell[bins.system[first]])
    origin = [x.index_select(0, i) - s.index_select(0, pair) for x, s in zip(position, image, strict=True)]

    found = []
    for rows in _chunks(j_count, CPU_CHUNK if j_count.device.type == "cpu" else GPU_CHUNK):
        row, j = _ranges(j_start[rows], j_count[rows])
        squared = torch.zeros_like(j, dtype=position.dtype)
        for x, x0 in zip(position, origin, strict=True):
            squared += (x.index_select(0, j) - x0[rows].index_select(0, row)) ** 2
        distance = squared.sqrt_()
        near = (distance < r_cut).nonzero().squeeze(1)
        row = row[near] + rows.start
        found.append(Pairs(bins.order[i[row]], bins.order[j[near]], shift[pair[row]], distance[near]))
    return Pairs(*(torch.cat(column) for column in zip(*found, strict=True)))


class _Bins:
    """Occupied bins of all systems, sorted by key, and the atoms in them.

    Attributes:
        order: ``[N]`` atoms sorted by bin.
        start, count: ``[K]`` the range of `order` that each occupied bin holds.
        system: ``[K]`` system of each occupied bin.
    """

    def __init__(self, atoms: BoxedAtoms, r_cut: float) -> None:
        height = atoms.height
        # Keys of all systems together must fit into 63 bits.
        most = int((2.0**62 / max(len(height), 1)) ** (1 / 3))
        self._n = (height / r_cut).floor().clamp(1, most).long()  # [B, 3] bins along each axis
        reach = (r_cut * self._n / height).ceil().long()  # [B, 3] bins to look at on either side
        self._reach = torch.where(atoms.pbc | (self._n > 1), reach, 0)
        self._pbc = atoms.pbc
        per_system = self._n.prod(1)
        self._first_key = per_system.cumsum(0) - per_system

        fraction = torch.einsum("na,nab->nb", atoms.positions, torch.linalg.inv(atoms.cell)[atoms.system])
        n = self._n[atoms.system]
        place = (fraction * n).floor().long().clamp(min=0).minimum(n - 1)  # [N, 3]
        key, self.order = torch.sort(self._key(place, atoms.system), stable=True)
        self._occupied, self.count = torch.unique_consecutive(key, return_counts=True)
        self.start = self.count.cumsum(0) - self.count
        representative = self.order[self.start]
        self.system = atoms.system[representative]
        self._place = place[representative]

    def _key(self, place: Tensor, system: Tensor) -> Tensor:
        n = self._n[system]
        return self._first_key[system] + (place[:, 0] * n[:, 1] + place[:, 1]) * n[:, 2] + place[:, 2]

    def neighbors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return pairs of occupied bins within reach, each once, and whether both are the same bin unshifted.

        Returns:
            First bin, second bin ``[P]``, lattice shift of the second ``[P, 3]``, and the flag ``[P]``.
        """
        # Offsets o and -o have numbers symmetric about the middle one, o = 0: one half lists each pair once.
        width = 2 * self._reach + 1
        middle = width.prod(1)[self.system] // 2
        first, number = _ranges(middle, middle + 1)
        width, system = width[self.system[first]], self.system[first]
        offset = torch.stack(
            [
                number // (width[:, 1] * width[:, 2]),
                number // width[:, 2] % width[:, 1],
                number % width[:, 2],
            ],
            dim=1,
        )
        place = self._place[first] + offset - self._reach[system]
        n = self._n[system]
        shift = torch.div(place, n, rounding_mode="floor")
        exists = (self._pbc[system] | (shift == 0)).all(1)
        key = self._key(place - shift * n, system)
        second = torch.searchsorted(self._occupied, key).clamp(max=len(self._occupied) - 1)
        met = (exists & (self._occupied[second] == key)).nonzero().squeeze(1)
        within = number == middle[first]
        return first[met], second[met], shift[met], within[met]


def _ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges ``start[r] .. start[r] + count[r] - 1``; return each number's row r, and it."""
    row = torch.repeat_interleave(count)
    before = count.cumsum(0) - count
    return row, torch.arange(len(row), device=row.device) + (start - before)[row]


def _chunks(count: Tensor, size: int) -> list[slice]:
    """Split rows into slices that hold about ``size`` candidates each (a single row is never split)."""
    total = count.cumsum(0)
    marks = torch.arange(size, max(int(total[-1]), 1) + size, size, device=count.device)
    ends = torch.searchsorted(total, marks).add(1).clamp(max=len(count)).tolist()
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if a < b]
