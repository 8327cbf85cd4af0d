"""How a step is evaluated: which edges the network sees, and whether a GPU gets it as one CUDA graph."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph
from gnnmd.models.backbone import Backbone
from gnnmd.models.potential import Prediction
from gnnmd.parallel import Plan
from gnnmd.predict.capture import CapturedPotential, CaptureFailure
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
        choices: what may be the fastest; only ``how`` if it was given. A capture that fails is none any more.
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
        self._growth = Growth()

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
        if self.how == "standing":
            return self._potential(positions, replace(plan.graph, cell=cell), plan.gp, stress=stress)
        try:
            return self._replayed(plan, positions, replace(plan.graph, cell=cell), exact)
        except CaptureFailure as failure:
            if len(self.choices) == 1:
                raise
            warnings.warn(f"{failure}. Steps are launched one by one instead", stacklevel=2)
        self.choices = ("compact",)
        self.switch("compact")
        return self(plan, positions, cell, stress=stress, exact=exact)

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
        self._growth.note(needed)
        self.lacked = (needed > self._shorten.limits).any()
        return graph

    def _listed(self, plan: Plan, positions: Tensor, cell: Tensor) -> AtomGraph:
        """Return the same with exact lists, for which the host waits; see how much room steps will need."""
        graph = plan.within_cutoff(positions, cell)
        if not self.has_room:
            return graph
        backbone = self._potential.backbone
        links = backbone.links(graph, plan.gp.n_owned)
        lengths = graph.edge_index.shape[1], *(() if links is None else backbone.lengths(links))
        self._shorten = WithinCutoff.of(plan, backbone, self._growth.room(lengths))
        return replace(graph, links=links)

    def _replayed(self, plan: Plan, positions: Tensor, graph: AtomGraph, exact: bool) -> Prediction:
        """Return the prediction of a CUDA graph, for the edges within the cutoff if it can choose these.

        Always with the stress: one capture serves all steps.
        """
        self._captured.skin = plan.skin
        if not self.has_room:
            listed_at = plan.positions, plan.graph.cell
            return self._captured(positions, graph, plan.gp, listed_at=listed_at)
        if self._shorten is None:
            self._listed(plan, positions, graph.cell)
        assert self._shorten is not None
        p = self._captured(positions, graph, plan.gp, shorten=self._shorten)
        needed = self._captured.needed
        assert needed is not None
        self._growth.note(needed)
        lacked = (needed > self._shorten.limits).any()
        if not exact:
            self.lacked = lacked
        elif self._ranks.max(lacked.int()):
            self.begin_anew()
            return self._potential(positions, self._listed(plan, positions, graph.cell), plan.gp)
        return p


class Growth:
    """How much longer lists become while nobody looks, and the room to give them."""

    def __init__(self) -> None:
        self._lengths: Sequence[int] = ()  # the last time that they were exactly as long as needed
        self._longest: Tensor | None = None  # since then
        self._grown: Sequence[float] = ()  # by which part

    def note(self, needed: Tensor) -> None:
        """Note how long lists should have been, ``[k]`` int64; the host does not wait."""
        self._longest = needed.clone() if self._longest is None else torch.maximum(self._longest, needed)

    def room(self, lengths: Sequence[int]) -> list[int]:
        """Return room for lists so long now: for the longest of lately, and for growing as much again."""
        longest = list(lengths)
        if self._longest is not None:
            longest = [max(now, seen) for now, seen in zip(lengths, self._longest.tolist(), strict=True)]
            grown = [most / max(old, 1) - 1 for most, old in zip(longest, self._lengths, strict=True)]
            before = self._grown or grown
            self._grown = [max(g, KEPT_SPARE * old) for g, old in zip(grown, before, strict=True)]
        self._lengths, self._longest = lengths, None
        spare = [min(max(g, 1 / SPARE), MOST_SPARE) for g in self._grown or [0.0] * len(lengths)]
        return [ceil(n * (1 + part)) + FEWEST_SPARE for n, part in zip(longest, spare, strict=True)]


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
