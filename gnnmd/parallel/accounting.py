"""What a partition costs, counted exactly: rows and bytes between ranks that need not exist.

One process does the work of all ranks here, so a cluster job can be sized on a laptop.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.graph.atoms import AtomBatch
from gnnmd.graph.neighbors import NeighborList, neighbor_list
from gnnmd.parallel.partition import Cuts, choose
from gnnmd.parallel.ranks import Ranks
from gnnmd.parallel.sites import Sites, find_box

#: Bytes of a ghost's position (three float64).
POSITION_BYTES = 24


def copies(edge_index: Tensor, owner: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
    """Return the copies that ranks need of the targets of edges: atom and rank, each pair once, ``[K]``.

    Edges come in both directions, so the ranks that read an atom own the sources of the edges that end on it.

    Args:
        edge_index: ``[2, E]`` source, target.
        owner: ``[n_all]`` rank that owns each atom.
        n_parts: number of ranks.
    """
    source, target = edge_index
    needer = owner[source]
    other = needer != owner[target]
    pairs = torch.unique(target[other] * n_parts + needer[other])
    return pairs // n_parts, pairs % n_parts


@dataclass(frozen=True)
class VirtualPartition:
    """Systems divided over P ranks, seen from outside.

    Attributes:
        n_parts: number of ranks P.
        owner: ``[N]`` int64, the rank that owns each atom.
        edge_index: ``[2, E]`` int64 edges of all atoms.
        cuts: the partition.
    """

    n_parts: int
    owner: Tensor
    edge_index: Tensor
    cuts: Cuts

    @property
    def owned(self) -> Tensor:
        """``[P]`` atoms each rank owns."""
        return torch.bincount(self.owner, minlength=self.n_parts)

    @property
    def edges(self) -> Tensor:
        """``[P]`` edges that end on each rank's atoms: its work."""
        return torch.bincount(self.owner[self.edge_index[1]], minlength=self.n_parts)

    @property
    def imbalance(self) -> float:
        """Largest number of edges of a rank over the mean; 1 where there are none."""
        edges = self.edges.to(torch.float64)
        return float(edges.max() / edges.mean()) if edges.any() else 1.0

    def all_to_all(self) -> "Rows":
        """Return the rows of one exchange: every ghost comes from its owner."""
        atom, needer = copies(self.edge_index, self.owner, self.n_parts)
        return _rows(self.owner[atom], needer, self.n_parts)

    def all_gather(self) -> "Rows":
        """Return the rows of one all-gather: each rank gets those of all others, padded to the largest."""
        capacity = int(self.owned.max())
        rank = torch.arange(self.n_parts)
        sender, receiver = rank.repeat_interleave(self.n_parts), rank.repeat(self.n_parts)
        sender, receiver = sender[sender != receiver], receiver[sender != receiver]
        return Rows(self.n_parts, sender, receiver, torch.full_like(sender, capacity))

    def wide_halo(self, n_layers: int) -> "WideHalo":
        """Return what it takes to do without exchanges between layers: ghosts of ghosts.

        A rank that wants the last layer of its atoms needs the layer before of their neighbours, and so on;
        at the end it needs the positions of all atoms that are ``n_layers`` edges away.
        """
        source, target = self.edge_index
        degree = torch.bincount(target, minlength=len(self.owner))
        first = degree.cumsum(0) - degree
        own = torch.arange(len(self.owner)) * self.n_parts + self.owner
        known = frontier = own.sort().values  # atom * P + rank
        edges = [self.edges]
        for _ in range(n_layers):
            at = frontier // self.n_parts
            pair = torch.repeat_interleave(degree[at])
            before = degree[at].cumsum(0) - degree[at]
            edge = torch.arange(len(pair)) + (first[at] - before)[pair]
            reached = torch.unique(source[edge] * self.n_parts + (frontier % self.n_parts)[pair])
            place = torch.searchsorted(known, reached).clamp(max=len(known) - 1)
            frontier = reached[known[place] != reached]
            known = torch.cat((known, frontier)).sort().values
            work = degree[frontier // self.n_parts]
            edges.append(edges[-1].index_add(0, frontier % self.n_parts, work))
        atom, rank = known // self.n_parts, known % self.n_parts
        ghost = self.owner[atom] != rank
        rows = _rows(self.owner[atom[ghost]], rank[ghost], self.n_parts)
        # Layer k of n is computed for atoms up to n - k edges away.
        return WideHalo(rows, edges=torch.stack(edges[:n_layers]).sum(0))


@dataclass(frozen=True)
class Rows:
    """Rows that travel between pairs of ranks; only pairs that exchange something are listed.

    Attributes:
        n_parts: number of ranks P.
        sender, receiver: ``[K]`` int64.
        rows: ``[K]`` int64 > 0.
    """

    n_parts: int
    sender: Tensor
    receiver: Tensor
    rows: Tensor

    @property
    def received(self) -> Tensor:
        """``[P]`` rows each rank receives: its ghosts."""
        return torch.zeros(self.n_parts, dtype=torch.int64).index_add(0, self.receiver, self.rows)

    @property
    def sent(self) -> Tensor:
        """``[P]`` rows each rank sends."""
        return torch.zeros(self.n_parts, dtype=torch.int64).index_add(0, self.sender, self.rows)

    @property
    def partners(self) -> Tensor:
        """``[P]`` ranks that each rank receives from."""
        return torch.bincount(self.receiver, minlength=self.n_parts)

    def table(self) -> Tensor:
        """Return ``[P, P]`` rows from sender (first index) to receiver; for small P."""
        dense = torch.zeros(self.n_parts, self.n_parts, dtype=torch.int64)
        dense[self.sender, self.receiver] = self.rows
        return dense


@dataclass(frozen=True)
class WideHalo:
    """A halo wide enough for all layers.

    Attributes:
        rows: positions that are fetched once.
        edges: ``[P]`` edges that each rank evaluates in all layers together.
    """

    rows: Rows
    edges: Tensor


def _rows(sender: Tensor, receiver: Tensor, n_parts: int) -> Rows:
    pair, rows = torch.unique(sender * n_parts + receiver, return_counts=True)
    return Rows(n_parts, pair // n_parts, pair % n_parts, rows)


def partition_virtually(
    batch: AtomBatch, neighbors: NeighborList | float, n_parts: int, partition: str = "auto"
) -> VirtualPartition:
    """Divide systems over ranks as `build_plan` would, in this process.

    Args:
        batch: one or many systems, on the CPU.
        neighbors: all edges, or the cutoff (Angstrom) to find them.
        n_parts: number of ranks.
        partition: "auto", "bisection", "bricks", "morton" or "index".
    """
    ranks = Ranks()
    if not isinstance(neighbors, NeighborList):
        neighbors = neighbor_list(batch, neighbors)
    edge_index, n = neighbors.edge_index, len(batch.numbers)
    box = find_box(batch.positions, batch.system, batch.cell, batch.pbc, ranks)
    sites = Sites(
        u=box.coordinates(batch.positions, batch.system),
        system=batch.system,
        weight=torch.bincount(edge_index[1], minlength=n) + 1,
        id=torch.arange(n),
        box=box,
    )

    def count_ghosts(owner: Tensor) -> Tensor:
        return torch.bincount(copies(edge_index, owner, n_parts)[1], minlength=n_parts)

    cuts = choose(partition, sites, n_parts, neighbors.r_cut, ranks, count_ghosts)
    return VirtualPartition(n_parts, cuts.owner(sites), edge_index, cuts)


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Attributes:
        name: what users call it.
        bandwidth: bytes/s that a rank can send, and receive at the same time, in an exchange.
        latency: s that an exchange takes however little is sent.
    """

    name: str
    bandwidth: float
    latency: float


#: Effective in measured exchanges of 6 to 40 MB, and with almost nothing to send (4 H200, NCCL 2.28).
NVLINK = Link("NVLink", 300e9, 28e-6)
#: One 400 Gbit/s port per GPU at 80 %; the latency is an assumption.
INFINIBAND = Link("InfiniBand", 40e9, 50e-6)


@dataclass(frozen=True)
class ModelCost:
    """What a model needs per step (energy and forces).

    Attributes:
        n_layers: message-passing layers; features are exchanged between them.
        row_bytes: bytes of one atom's features.
        edge_seconds: s per edge, all layers, forward and backward.
    """

    n_layers: int
    row_bytes: int
    edge_seconds: float


#: eSCN-MD in the UMA-S shape (4 layers, lmax 2, 128 channels, float32) on one H200: 13.7 us per silver atom
#: with 54 neighbours within 6 A.
UMA_S = ModelCost(n_layers=4, row_bytes=9 * 128 * 4, edge_seconds=13.7e-6 / 54)


def step_bytes(ghosts: Tensor, model: ModelCost) -> Tensor:
    """Return bytes per step for ``ghosts`` ``[P]`` rows: positions and features, there and back."""
    return ghosts * 2 * (POSITION_BYTES + (model.n_layers - 1) * model.row_bytes)


def efficiency(partition: VirtualPartition, link: Link, model: ModelCost = UMA_S) -> float:
    """Return the predicted parallel efficiency of a step: ideal time over time of the slowest rank.

    Exchanges are not hidden behind work, and the host costs nothing (captured graphs): the first is
    pessimistic, the second optimistic.
    """
    if partition.n_parts == 1:
        return 1.0
    rows = partition.all_to_all()
    traffic = step_bytes(torch.maximum(rows.received, rows.sent), model)
    work = partition.edges.to(torch.float64) * model.edge_seconds
    exchange = 2 * model.n_layers * link.latency + traffic / link.bandwidth
    return float(work.mean() / (work + exchange).max())
