"""How a step is evaluated: which edges the network sees, and whether a GPU gets it as one CUDA graph."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph
from gnnmd.models.backbone import Backbone
from gnnmd.models.potential import Prediction
from gnnmd.parallel import Plan
from gnnmd.predict.capture import CapturedPotential
from gnnmd.predict.evaluation import RankPotential

#: "compact" leaves out the edges in the skin at every step, for which the host waits for the device unless
#: spare edges cost nothing; "standing" takes all edges of the plan, so that shapes stay between rebuilds;
#: "captured" is one of these as a CUDA graph, captured anew after a rebuild, which spares the host thousands
#: of launches.
EVALUATIONS = ("compact", "standing", "captured")
#: Room in lists for more than there was: one in so many, and so many.
SPARE, FEWEST_SPARE = 50, 64
#: Most room for lists that grow, as a part of what there was, and how much of it stays if they grow no more.
MOST_SPARE, KEPT_SPARE = 0.5, 0.8


class Evaluation:
    """A potential on the plan of one system, evaluated in the same way step after step.

    Args:
        evaluator: the potential, its settings and the ranks.
        n_atoms: of all ranks.
        skin: of the first plan, Angstrom.
        how: one of `EVALUATIONS`; None takes "captured" for systems that may not keep the GPUs busy if the
            model can be captured, else "compact".

    Attributes:
        choices: what may be the fastest; only ``how`` if it was given.
        how: one of `EVALUATIONS`.
        has_room: whether lists without the skin have room for more edges, so that the host need not know how
            many there are.
        lacked: scalar bool of this rank, whether the last call had too little room: it counts for nothing
            then. None if it could not.
    """

    def __init__(self, evaluator: RankPotential, n_atoms: int, skin: float, how: str | None = None):
        backbone, compiled = evaluator.potential.backbone, evaluator.settings.compile
        on_gpu = evaluator.device.type == "cuda"
        if how not in (None, *EVALUATIONS):
            raise ValueError(f"evaluation={how!r} is not one of {', '.join(EVALUATIONS)}")
        small = n_atoms <= backbone.largest_captured * evaluator.ranks.size
        may_capture = on_gpu and small and skin > 0 and not compiled
        self.choices = (how,) if how else ("captured", "compact") if may_capture else ("compact",)
        self.how = self.choices[0]
        whole = backbone.edge_chunk is None and not compiled  # pieces are cut where the host says
        self.has_room = on_gpu and backbone.spares_are_free and whole
        self.lacked: Tensor | None = None
        self._potential, self._ranks = evaluator.potential, evaluator.ranks
        self._captured = CapturedPotential(evaluator.potential, evaluator.ranks)
        self._shorten: WithinCutoff | None = None
        # How long lists were when they were made exactly the last time, the longest since, and by which part
        # they have grown.
        self._lengths: Sequence[int] = ()
        self._longest: Tensor | None = None
        self._growth: Sequence[float] = ()

    @property
    def spared(self) -> bool:
        """Whether the network does not see the edges in the skin."""
        return self.how == "compact" or (self.how == "captured" and self.has_room)

    def __call__(
        self, plan: Plan, positions: Tensor, cell: Tensor, *, stress: bool, exact: bool
    ) -> Prediction:
        """Return the prediction of a plan at other positions. Collective.

        Args:
            plan: valid at these positions.
            positions: ``[n_owned, 3]`` Angstrom.
            cell: ``[1, 3, 3]`` Angstrom.
            stress: whether the stress is needed.
            exact: compute again what had too little room; the host waits for the device.
        """
        self.lacked = None
        if self.how == "compact":
            graph = self._compact(plan, positions, cell, exact)
            return self._potential(positions, graph, plan.gp, stress=stress)
        graph = replace(plan.graph, cell=cell)
        if self.how == "standing":
            return self._potential(positions, graph, plan.gp, stress=stress)
        self._captured.skin = plan.skin
        if self.has_room:
            return self._replayed(plan, positions, graph, exact)
        # Always with the stress: one capture serves all steps.
        listed_at = plan.positions, plan.graph.cell
        return self._captured(positions, graph, plan.gp, listed_at=listed_at)

    def switch(self, how: str) -> None:
        """Evaluate in another way from now on; on all ranks."""
        self.how = how
        self.begin_anew()
        if how != "captured":
            self._captured.release()

    def begin_anew(self) -> None:
        """Give up what serves several steps, the room for edges and the capture; on all ranks."""
        self._shorten = None
        self._captured.renew()

    def _compact(self, plan: Plan, positions: Tensor, cell: Tensor, exact: bool) -> AtomGraph:
        """Return the plan's graph without the edges in the skin."""
        if self._shorten is None or exact:
            return self._listed(plan, positions, cell)
        graph, needed = self._shorten(positions, cell)
        self.lacked = self._too_long(needed)
        return graph

    def _too_long(self, needed: Tensor) -> Tensor:
        """Note how long lists should have been, and return whether that is too long."""
        assert self._shorten is not None
        known = needed if self._longest is None else self._longest
        self._longest = torch.maximum(known, needed)
        return (needed > self._shorten.limits).any()

    def _listed(self, plan: Plan, positions: Tensor, cell: Tensor) -> AtomGraph:
        """Return the same with exact lists, for which the host waits; see how much room steps will need."""
        graph = plan.within_cutoff(positions, cell)
        if not self.has_room:
            return graph
        backbone = self._potential.backbone
        links = backbone.links(graph, plan.gp.n_owned)
        lengths = graph.edge_index.shape[1], *(() if links is None else backbone.lengths(links))
        self._shorten = WithinCutoff.of(plan, backbone, self._room(lengths))
        return replace(graph, links=links)

    def _room(self, lengths: Sequence[int]) -> list[int]:
        """Return room for lists: for the longest of lately, and for growing as much once more."""
        longest = list(lengths)
        if self._longest is not None:
            longest = [max(now, seen) for now, seen in zip(lengths, self._longest.tolist(), strict=True)]
            growth = [most / max(old, 1) - 1 for most, old in zip(longest, self._lengths, strict=True)]
            before = self._growth or growth
            self._growth = [max(g, KEPT_SPARE * old) for g, old in zip(growth, before, strict=True)]
        self._lengths, self._longest = lengths, None
        spare = [min(max(g, 1 / SPARE), MOST_SPARE) for g in self._growth or [0.0] * len(lengths)]
        return [ceil(n * (1 + part)) + FEWEST_SPARE for n, part in zip(longest, spare, strict=True)]

    def _replayed(self, plan: Plan, positions: Tensor, graph: AtomGraph, exact: bool) -> Prediction:
        """Return the prediction for the edges within the cutoff, which are chosen in the CUDA graph too."""
        if self._shorten is None:
            self._listed(plan, positions, graph.cell)
        p = self._captured(positions, graph, plan.gp, shorten=self._shorten)
        assert self._captured.needed is not None
        lacked = self._too_long(self._captured.needed)
        if not exact:
            self.lacked = lacked
        elif self._ranks.max(lacked.int()):
            self.begin_anew()
            return self._potential(positions, self._listed(plan, positions, graph.cell), plan.gp)
        return p


@dataclass(frozen=True, eq=False)
class WithinCutoff:
    """Leaves out the edges in the skin of a plan, without waiting for the device.

    Attributes:
        plan: whose edges.
        backbone: which makes further lists.
        room: for so many edges, and how long these lists are.
        limits: the same on the device.
    """

    plan: Plan
    backbone: Backbone
    room: Sequence[int]
    limits: Tensor

    @classmethod
    def of(cls, plan: Plan, backbone: Backbone, room: Sequence[int]) -> "WithinCutoff":
        """Return it with this room."""
        return cls(plan, backbone, room, torch.tensor(room, device=plan.ids.device))

    def __call__(self, positions: Tensor, cell: Tensor) -> tuple[AtomGraph, Tensor]:
        """Return the graph at these positions with links, and how long all lists should be. Collective.

        Args:
            positions: ``[n_owned, 3]`` Angstrom.
            cell: ``[1, 3, 3]`` Angstrom.
        """
        n_edges, *rooms = self.room
        graph = self.plan.within_cutoff(positions, cell, n_edges)
        assert graph.n_edges is not None
        links = self.backbone.links(graph, self.plan.gp.n_owned, room=rooms)
        needed = self.backbone.needed(links) if rooms else ()
        return replace(graph, links=links), torch.stack((graph.n_edges, *needed))
