"""Replay a whole evaluation on a GPU as one CUDA graph: a small system is bound by launching its kernels."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor

from gnnmd.graph.graph import AtomGraph
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext, Ranks

#: Makes a graph of fewer edges from positions and cell, with links and without waiting for the device; also
#: says how long its lists should be, int64.
Shorten = Callable[[Tensor, Tensor], tuple[AtomGraph, Tensor]]

#: Calls before the first capture: they compile kernels, create the handles of libraries and connect GPUs.
WARM_UP = 2

_all: "WeakSet[CapturedPotential]" = WeakSet()


def release_captures() -> None:
    """Give up all captures of this process: NCCL does not end a group while a CUDA graph may still use it."""
    for captured in _all:
        captured.release()


class CaptureFailure(RuntimeError):
    """An evaluation could not be captured, for want of memory perhaps; raised on every rank."""


class CapturedPotential:
    """A frozen potential that is captured once per neighbour list and replayed; called like the potential.

    A replay costs one launch in place of some thousand. It computes the same kernels on the same memory, so
    that its results are those of a call. The memory of one evaluation stays reserved.

    Only the positions and the cell may change between calls with the same ``edge_index``, which is another
    object for another list, on all ranks. The exchange between GPUs is captured too. Not captured, but
    simply called: other devices than GPUs, models in training mode and those of which `Backbone.links` has
    nothing.

    Args:
        potential: in evaluation mode, frozen.
        ranks: who evaluates it; None is this process alone.
        skin: no two atoms come closer by more than this while a list is used, Angstrom.

    Attributes:
        n_captures: captures so far.
        needed: how long the lists of the graph should have been in the last call; None if it was given.
    """

    def __init__(self, potential: Potential, ranks: Ranks | None = None, skin: float = 0.0):
        self.potential, self.ranks, self.skin = potential, ranks or Ranks(), skin
        self.n_captures = 0
        self.needed: Tensor | None = None
        self._capture: _Capture | None = None
        self._current = False
        self._memory: _Memory | None = None
        _all.add(self)

    def __call__(
        self,
        pos: Tensor,
        g: AtomGraph,
        gp: GPContext,
        *,
        stress: bool = True,
        listed_at: tuple[Tensor, Tensor] | None = None,
        shorten: Shorten | None = None,
    ) -> Prediction:
        """Return energy, forces and stress; see `Potential.forward`. Collective.

        Args:
            pos: ``[n_owned, 3]`` Angstrom.
            g: the graph.
            gp: this rank's share of it.
            stress: whether to compute the stress.
            listed_at: positions and cell for which the neighbour list was made; None are those of the first
                call.
            shorten: what makes a graph of fewer edges from positions and cell, which is then evaluated; it
                becomes part of the capture. Another object is captured anew.

        Raises:
            CaptureFailure: a rank could not capture it.
        """
        standing = self._capture
        if standing is None or not self._current or not standing.fits(g, gp, stress, shorten):
            if shorten is None:
                then, cell = listed_at or (pos, g.cell)
                linked = self.potential.linked(then.detach(), replace(g, cell=cell), gp, skin=self.skin)
                given = now = replace(linked, cell=g.cell)
                self.needed = None
            else:
                given, (now, self.needed) = g, shorten(pos, g.cell)
            if now.links is None or pos.device.type != "cuda" or self.potential.training:
                return self.potential(pos, now, gp, stress=stress)
            standing = _Capture(self.potential, pos, given, gp, stress, shorten)
            if not self.n_captures:
                standing.warm_up()
            try:
                with self.ranks.together("capturing a CUDA graph"):
                    if self._memory is None:
                        self._memory = _Memory(pos.device)
                    standing.capture(self._memory)
            except RuntimeError as error:
                self.release()
                raise CaptureFailure(f"a step could not be captured as a CUDA graph: {error}") from error
            self._capture, self._current = standing, True
            self.n_captures += 1
        self.needed = standing.needed
        return standing.replay(pos, g.cell)

    def renew(self) -> None:
        """Capture again at the next call, into the same memory."""
        self._current = False

    def release(self) -> None:
        """Give up the capture and its memory; the next call makes another one."""
        self._capture = self._memory = None


class _Memory:
    """Where captures of one potential put what they compute: each begins with what the one before leaves."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.empty_cache()  # what calls have used
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Keep Python from ending the CUDA graph of a forgotten simulation, which would spoil a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Capture:
    """One captured evaluation and the tensors it reads and writes."""

    def __init__(
        self,
        potential: Potential,
        pos: Tensor,
        g: AtomGraph,
        gp: GPContext,
        stress: bool,
        shorten: Shorten | None,
    ):
        self._edges, self._how = g.edge_index, (gp.n_owned, stress, shorten)
        self._pos, self._cell = pos.detach().clone(), g.cell.clone()
        self._g, self._gp, self._potential = replace(g, cell=self._cell), gp, potential
        self.needed: Tensor | None = None

    def _call(self) -> Prediction:
        _, stress, shorten = self._how
        g = self._g
        if shorten is not None:
            g, self.needed = shorten(self._pos, self._cell)
        return self._potential(self._pos, g, self._gp, stress=stress)

    def warm_up(self) -> None:
        """Call what will be captured. Collective."""
        current, side = torch.cuda.current_stream(self._pos.device), torch.cuda.Stream(self._pos.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._call()
        current.wait_stream(side)

    def capture(self, memory: _Memory) -> None:
        """Capture, computing nothing: no rank waits for another."""
        torch.cuda.synchronize(self._pos.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(memory.stream), _no_collecting():
            self._graph.capture_begin(memory.pool)
            try:
                self._result = self._call()
            except BaseException:
                with suppress(RuntimeError):  # says only that the capture was spoilt, not by what
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def fits(self, g: AtomGraph, gp: GPContext, stress: bool, shorten: Shorten | None) -> bool:
        """Return whether it was captured for these edges; tensors that are equal but others do not count."""
        n_owned, stressed, shortened = self._how
        same = g.edge_index is self._edges and shorten is shortened
        return same and (gp.n_owned, stress) == (n_owned, stressed)

    def replay(self, pos: Tensor, cell: Tensor) -> Prediction:
        """Return a copy of the result at these positions and cell. Collective."""
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
