"""The graph a model sees: atoms of one rank (owned + ghost) and the edges that end on its owned atoms."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AtomGraph:
    """Atoms and edges of one rank's share of one or many systems, without ranks in it.

    Rows are ordered owned atoms first, ghosts after. Everything but `positions` and `cell` stays fixed
    between two neighbour-list builds.

    Attributes:
        numbers: ``[n_all]`` int64 atomic numbers of owned and ghost atoms.
        system: ``[n_all]`` int64 system of every row.
        edge_index: ``[2, E]`` int64, (source j in ``[0, n_all)``, target i in ``[0, n_owned)``), sorted by
            target.
        shift: ``[E, 3]`` int64 lattice shift of the source.
        cell: ``[B, 3, 3]`` float64, Angstrom.
        n_atoms: ``[B]`` int64, atoms of each system over all ranks.
        charge: ``[B]`` int64.
        spin: ``[B]`` int64 multiplicity.
        dataset: ``[B]`` int64 index into the model's list of data set names.
        positions: ``[n_all, 3]`` float64, Angstrom; put in by `Potential` at every evaluation.
        n_edges: scalar int64, how many of the E columns are edges; the rest are spare room that keeps the
            shape the same when the number of edges changes. None if all are edges.
        links: what a model derived from the edges for all its calls, see `Backbone.links`; it is not moved
            to other devices. None if it has to do that in every call.
    """

    numbers: Tensor
    system: Tensor
    edge_index: Tensor
    shift: Tensor
    cell: Tensor
    n_atoms: Tensor
    charge: Tensor
    spin: Tensor
    dataset: Tensor
    positions: Tensor | None = None
    n_edges: Tensor | None = None
    links: Any = None

    @property
    def n_systems(self) -> int:
        """Number of systems B."""
        return self.cell.shape[0]

    def with_positions(self, positions: Tensor, cell: Tensor) -> "AtomGraph":
        """Return the same graph at new positions ``[n_all, 3]`` and cell ``[B, 3, 3]``."""
        return replace(self, positions=positions, cell=cell)

    def to(self, device: torch.device | str) -> "AtomGraph":
        """Return the graph with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved, links=None)
