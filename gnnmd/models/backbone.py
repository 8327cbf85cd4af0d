"""The one message-passing loop that all models share."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gnnmd.graph.graph import AtomGraph
from gnnmd.parallel import GPContext

#: Sum of a per-atom quantity over the atoms of each system, on every rank: ``[n_owned, ...] -> [B, ...]``.
SystemSum = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """One step of message passing: ``block(h, x_all, basis, g) -> (h, basis)``.

    With rows h of the owned atoms, and of owned + ghost atoms what `outgoing` made of theirs.
    """

    def outgoing(self, h: Tensor, basis: Any, g: AtomGraph) -> Tensor:
        """Return what neighbours read of rows ``[n, ...]`` of the first n atoms; of the same shape."""
        return h


class Backbone(nn.Module):
    """Message passing on owned + ghost atoms; subclasses are the models.

    A model provides `edge_basis`, `embed`, the `blocks` and the final `norm`. Blocks take owned rows,
    and of owned + ghost atoms what neighbours read, and return owned rows; they never see a rank. What edges
    and angles carry is in the basis: they belong to owned atoms and never travel, so a block may return
    another basis for the next one.

    Attributes:
        r_cut: cutoff, Angstrom.
        row_width: numbers that travel for each ghost between two blocks.
        max_number: largest atomic number its tables hold.
        charge_range: smallest and largest total charge it can embed; None = any.
        spin_range: smallest and largest spin multiplicity it can embed; None = any.
        max_neighbors: neighbours kept per atom, nearest first; None = all (a limit makes the energy
            discontinuous).
        exchange_cut: blocks after the first read neighbours nearer than this only, Angstrom; None = `r_cut`.
            Their rows come first in what these blocks get; rows of farther ghosts are missing.
        needs_statistics: whether a fresh model must be given `statistics` of its training data.
        edge_chunk: edges that are processed at a time; None = all. A smaller number costs a recomputation in
            the backward pass and bounds the memory. May be set at any time.
        largest_captured: atoms per rank up to which dynamics may replay a captured evaluation, see `links`;
            larger systems keep a GPU busy without. 0 = it cannot be captured.
        spares_are_free: whether lists with room for more, see `links`, cost next to nothing.
        compilable: whether `torch.compile` gives the same forces (tested).
        kernels: which version of its operations a model uses that has several, see `gnnmd.kernels`. May be
            set at any time.
        blocks: see `Block`.
        norm: module applied to the last owned rows.
    """

    r_cut: float
    row_width: int
    max_number: int
    charge_range: tuple[int, int] | None = None
    spin_range: tuple[int, int] | None = None
    max_neighbors: int | None = None
    exchange_cut: float | None = None
    needs_statistics: bool = False
    edge_chunk: int | None = None
    largest_captured: int = 0
    spares_are_free: bool = False
    compilable: bool = False
    kernels: str = "torch"
    blocks: nn.ModuleList
    norm: nn.Module

    def edge_basis(self, g: AtomGraph, n_owned: int, system_sum: SystemSum) -> Any:
        """Return what the first block reads besides rows of atoms (distances, rotations, edge features)."""
        raise NotImplementedError

    def links(self, g: AtomGraph, n_owned: int, skin: float = 0.0, room: Sequence[int] | None = None) -> Any:
        """Return what of `edge_basis` stays the same until the next neighbour list, for `AtomGraph.links`.

        With it a call never waits for the device. Lists of angles hold all that can count while no pair comes
        closer by more than the skin; those that do not count add zero.

        Args:
            g: the graph, with positions.
            n_owned: number of owned atoms.
            skin: Angstrom.
            room: how long the lists besides that of the edges are made, spare entries included; the host then
                does not wait for the device. None = as long as they are.

        Returns:
            None if the model has nothing of this kind.
        """
        return None

    def lengths(self, links: Any) -> tuple[int, ...]:
        """Return how long the lists of `links` are, besides that of the edges."""
        return ()

    def needed(self, links: Any) -> tuple[Tensor, ...]:
        """Return how long they should be, int64 scalars; more than their room, and they are not complete."""
        return ()

    def embed(self, g: AtomGraph, basis: Any) -> Tensor:
        """Return the initial rows ``[n_all, ...]`` of owned and ghost atoms (all species are known)."""
        raise NotImplementedError

    def statistics(self, g: AtomGraph, n_owned: int) -> Tensor:
        """Return sums over the owned atoms of a graph with positions; they add over batches and ranks."""
        raise NotImplementedError

    def set_statistics(self, sums: Tensor) -> None:
        """Normalise by the sum of `statistics` over the training data."""
        raise NotImplementedError

    def after_block(self, i: int, h: Tensor, g: AtomGraph, system_sum: SystemSum) -> Tensor:
        """Adjust owned rows after block i; the identity unless a model couples all atoms of a system."""
        return h

    def forward(self, g: AtomGraph, gp: GPContext) -> Tensor:
        """Return the features of the owned atoms, ``[n_owned, K, C]``; rows ``[:, 0]`` are invariant."""

        def system_sum(x: Tensor) -> Tensor:
            partial = x.new_zeros(g.n_systems, *x.shape[1:]).index_add(0, g.system[: gp.n_owned], x)
            return gp.sum_shared(partial)

        basis = self.edge_basis(g, gp.n_owned, system_sum)
        rows = self.embed(g, basis)
        h = rows[: gp.n_owned]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if i == 0:
                x_all = block.outgoing(rows, basis, g)
            else:
                x = block.outgoing(h, basis, g)
                x_all = gp.between_layers.exchange(x)  # the one line that knows others exist
            h, basis = block(h, x_all, basis, g)
            h = self.after_block(i, h, g, system_sum)
        return self.norm(h)
