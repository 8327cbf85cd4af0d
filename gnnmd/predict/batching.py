"""Cutting a batch of systems, with its neighbour list, into pieces that fit the memory."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from gnnmd.graph import AtomBatch, NeighborList


def split_by_atoms(batch: AtomBatch, max_atoms: int) -> Iterator[AtomBatch]:
    """Yield consecutive systems of together at most ``max_atoms`` atoms, or one that has more by itself."""
    cuts, filled = [0], 0
    for b, n_atoms in enumerate(batch.n_atoms.tolist()):
        if b > cuts[-1] and filled + n_atoms > max_atoms:
            cuts.append(b)
            filled = 0
        filled += n_atoms
    for start, stop in pairwise([*cuts, batch.n_systems]):
        yield take_systems(batch, start, stop)


def take_systems(batch: AtomBatch, start: int, stop: int) -> AtomBatch:
    """Return systems ``start`` to ``stop`` (exclusive) of a batch."""
    first, last = torch.searchsorted(
        batch.system, torch.tensor([start, stop], device=batch.system.device)
    ).tolist()
    atoms, systems = slice(first, last), slice(start, stop)
    return replace(
        batch,
        positions=batch.positions[atoms],
        numbers=batch.numbers[atoms],
        system=batch.system[atoms] - start,
        cell=batch.cell[systems],
        pbc=batch.pbc[systems],
        charge=batch.charge[systems],
        spin=batch.spin[systems],
        dataset=batch.dataset[systems],
        energy=batch.energy[systems],
        forces=batch.forces[atoms],
        stress=batch.stress[systems],
    )


def take_neighbors(batch: AtomBatch, neighbors: NeighborList, start: int, stop: int) -> NeighborList:
    """Return the edges of systems ``start`` to ``stop``, counted from the first atom of ``start``.

    Edges are sorted by target and atoms by system, so they are one stretch of the list.
    """
    bounds = torch.searchsorted(batch.system, torch.tensor([start, stop], device=batch.system.device))
    first, last = torch.searchsorted(neighbors.edge_index[1].contiguous(), bounds).tolist()
    return replace(
        neighbors,
        edge_index=neighbors.edge_index[:, first:last] - bounds[0],
        shift=neighbors.shift[first:last],
    )


def edges_per_system(batch: AtomBatch, neighbors: NeighborList) -> list[int]:
    """Return the number of edges of each system."""
    return torch.bincount(batch.system[neighbors.edge_index[1]], minlength=batch.n_systems).tolist()


def next_stop(rows: list[int], start: int, limit: float) -> int:
    """Return where a call that begins at ``start`` ends: one system, or more with at most ``limit`` rows."""
    stop, n_rows = start + 1, rows[start]
    while stop < len(rows) and n_rows + rows[stop] <= limit:
        n_rows += rows[stop]
        stop += 1
    return stop
