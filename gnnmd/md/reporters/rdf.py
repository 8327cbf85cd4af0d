"""Radial distribution functions from the edges that the plan has anyway."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.graph.geometry import edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.observable import Observable
from gnnmd.md.state import State
from gnnmd.parallel import build_plan


@dataclass(frozen=True)
class RadialDistribution:
    """Radial distribution functions.

    Attributes:
        r: ``[bins]`` middles of the bins, Angstrom.
        g: ``[bins]`` of all atoms; goes to 1 - 1/N far away. NaN if the cell has no volume.
        pairs: ``[bins]`` of atoms of the second element around those of the first; (A, B) equals (B, A).
        coordination: ``[bins]`` how many atoms of the second element are, on average, nearer to one of the
            first than the outer edge of the bin.
        samples: how many steps were looked at.
    """

    r: np.ndarray
    g: np.ndarray
    pairs: dict[tuple[str, str], np.ndarray]
    coordination: dict[tuple[str, str], np.ndarray]
    samples: int


@dataclass(eq=False)
class RDF(Observable):
    """Counts pairs by their distance (Allen and Tildesley, Computer Simulation of Liquids, eq. 2.94).

    Up to the cutoff of the potential the plan knows all pairs. Beyond it, and for potentials that see only
    the nearest atoms, neighbours are searched at every sample, which costs about as much as a rebuild.
    Periodic images count, also of the atom itself.

    Attributes:
        interval: steps between two samples.
        r_max: Angstrom; None is the cutoff of the potential.
        bins: between 0 and ``r_max``.
    """

    interval: int = 100
    r_max: float | None = None
    bins: int = 200

    _sums = ("counts", "volume")

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.bins < 1 or (self.r_max is not None and not self.r_max > 0):
            raise ValueError(f"RDF needs r_max > 0 and bins >= 1, got r_max={self.r_max}, bins={self.bins}")

    def begin(self, view: View) -> None:
        """Make room for the counts. Collective."""
        super().begin(view)
        r_max = view.engine.potential.r_cut if self.r_max is None else self.r_max
        self._facts.setdefault("r_max", torch.tensor(r_max, dtype=torch.float64))

    def _zeros(self, view: View) -> dict[str, Tensor]:
        n = len(self._numbers)
        return {
            "counts": torch.zeros(n * n * (self.bins + 1), dtype=torch.int64),
            "volume": torch.zeros((), dtype=torch.float64),
        }

    def _sample(self, view: View) -> None:
        g = self._graph(view)
        r = torch.linalg.vector_norm(edge_vectors(g), dim=1)
        place = (r * (self.bins / float(self._facts["r_max"]))).clamp(max=self.bins).long()
        source, target = self._element_of[g.numbers[g.edge_index]]
        pair = target * len(self._numbers) + source
        counts = self._partial["counts"]
        counts.index_add_(0, pair * (self.bins + 1) + place, torch.ones_like(place))
        if view.first:
            self._partial["volume"] += view.state.volume

    def _graph(self, view: View) -> AtomGraph:
        """Return a graph with all edges up to ``r_max`` and the positions of this step. Collective."""
        s, engine, r_max = view.state, view.engine, float(self._facts["r_max"])
        plan = engine.plan
        if r_max > plan.r_cut or engine.potential.backbone.max_neighbors is not None:
            plan = build_plan(_piece(s), s.ids, r_max, engine.ranks, partition="morton")
            return plan.graph.with_positions(plan.gp.exchange(plan.positions), s.cell[None])
        return plan.graph.with_positions(plan.gp.exchange(s.positions), s.cell[None])

    def result(self) -> RadialDistribution:
        """Return g(r) of what was sampled so far.

        Raises:
            ValueError: there are no samples.
        """
        found, n = self._found(), self._counts
        counts = found["counts"].reshape(len(n), len(n), -1)[:, :, : self.bins] / self.samples  # per step
        edges = np.linspace(0, float(self._facts["r_max"]), self.bins + 1)
        shells = 4 / 3 * np.pi * np.diff(edges**3)
        volume = float(found["volume"]) / self.samples or np.nan
        g = counts * volume / (n[:, None, None] * n[None, :, None] * shells)
        around = counts.cumsum(2) / n[:, None, None]
        pairs = {(a, b): (i, j) for i, a in enumerate(self.symbols) for j, b in enumerate(self.symbols)}
        return RadialDistribution(
            r=(edges[1:] + edges[:-1]) / 2,
            g=counts.sum((0, 1)) * volume / (n.sum() ** 2 * shells),
            pairs={names: g[place] for names, place in pairs.items()},
            coordination={names: around[place] for names, place in pairs.items()},
            samples=self.samples,
        )


def _piece(s: State) -> AtomBatch:
    """Return the atoms of this rank without charge, spin and labels."""
    return AtomBatch(
        positions=s.positions,
        numbers=s.numbers,
        system=torch.zeros_like(s.numbers),
        cell=s.cell[None],
        pbc=s.pbc[None],
        charge=s.numbers.new_zeros(1),
        spin=s.numbers.new_zeros(1),
        dataset=("",),
        energy=s.energy[None],
        forces=s.forces,
        stress=s.stress[None],
    )
