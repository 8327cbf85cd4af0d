"""Replay a whole evaluation on a GPU as one CUDA graph: a small system is bound by launching its kernels."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext

#: Makes a graph of fewer edges from positions and cell, without waiting for the device.
Shorten = Callable[[Tensor, Tensor], AtomGraph]

#: Calls before the first capture: they compile kernels and create the handles of libraries.
WARM_UP = 2


class CapturedPotential:
    """A frozen potential that is captured once per neighbour list and replayed; called like the potential.

    A replay costs one launch in place of some thousand. It computes the same kernels on the same memory, so
    that its results are those of a call. The memory of one evaluation stays reserved until the next capture.

    Only the positions and the cell may change between calls with the same ``edge_index``. Not captured, but
    simply called: other devices than GPUs, several ranks, models in training mode and those of which
    `Backbone.links` has nothing.

    Args:
        potential: in evaluation mode, frozen.
        skin: no two atoms come closer by more than this while a list is used, Angstrom.

    Attributes:
        n_captures: captures so far.
        n_edges: scalar int64, how many edges the last call should have had; None = all of its graph.
    """

    def __init__(self, potential: Potential, skin: float = 0.0):
        self.potential, self.skin = potential, skin
        self.n_captures = 0
        self.n_edges: Tensor | None = None
        self._capture: _Capture | None = None

    def __call__(
        self,
        pos: Tensor,
        g: AtomGraph,
        gp: GPContext,
        *,
        stress: bool = True,
        listed_at: Tensor | None = None,
        shorten: Shorten | None = None,
        room: int | None = None,
    ) -> Prediction:
        """Return energy, forces and stress; see `Potential.forward`.

        Args:
            pos: ``[n_owned, 3]`` Angstrom.
            g: the graph.
            gp: this rank's share of it.
            stress: whether to compute the stress.
            listed_at: positions for which the neighbour list was made; None are ``pos`` of the first call.
            shorten: what makes a graph of fewer edges from positions and cell, which is then evaluated; it
                becomes part of the capture.
            room: how many edges there are then, spare ones included.
        """
        standing = self._capture
        if standing is None or not standing.fits(g, gp, stress, room):
            self._capture = standing = None  # its memory is needed
            linked = self._linked(pos if listed_at is None else listed_at, g, gp)
            if linked.links is None:
                shorter = g if shorten is None else shorten(pos, g.cell)
                self.n_edges = shorter.n_edges
                return self.potential(pos, shorter, gp, stress=stress)
            warm_up = 0 if self.n_captures else WARM_UP
            self._capture = standing = _Capture(
                self.potential, pos, linked, gp, stress, warm_up, shorten, room
            )
            self.n_captures += 1
        self.n_edges = standing.n_edges
        return standing.replay(pos, g.cell)

    def _linked(self, pos: Tensor, g: AtomGraph, gp: GPContext) -> AtomGraph:
        if pos.device.type != "cuda" or gp.group is not None or self.potential.training:
            return replace(g, links=None)
        return self.potential.linked(pos.detach(), g, gp, skin=self.skin)


class _Capture:
    """One captured evaluation and the tensors it reads and writes."""

    def __init__(
        self,
        potential: Potential,
        pos: Tensor,
        g: AtomGraph,
        gp: GPContext,
        stress: bool,
        warm_up: int,
        shorten: Shorten | None,
        room: int | None,
    ):
        self._edges, self._how = g.edge_index, (gp.n_owned, stress, room)
        self._pos, self._cell = pos.detach().clone(), g.cell.clone()
        self._g = replace(g, cell=self._cell)
        self.n_edges = self._g.n_edges

        def call() -> Prediction:
            g = self._g if shorten is None else shorten(self._pos, self._cell)
            self.n_edges = g.n_edges
            return potential(self._pos, g, gp, stress=stress)

        side = torch.cuda.Stream(pos.device)
        side.wait_stream(torch.cuda.current_stream(pos.device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream(pos.device).wait_stream(side)
        if warm_up:
            torch.cuda.empty_cache()  # a capture has memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def fits(self, g: AtomGraph, gp: GPContext, stress: bool, room: int | None) -> bool:
        """Return whether it was captured for these edges; tensors that are equal but others do not count."""
        return g.edge_index is self._edges and (gp.n_owned, stress, room) == self._how

    def replay(self, pos: Tensor, cell: Tensor) -> Prediction:
        """Return a copy of the result at these positions and cell."""
        self._pos.copy_(pos)
        self._cell.copy_(cell)
        self._graph.replay()
        p = self._result
        return Prediction(
            energy=p.energy.clone(),
            forces=p.forces.clone(),
            stress=None if p.stress is None else p.stress.clone(),
            node_energies=p.node_energies.clone(),
        )
