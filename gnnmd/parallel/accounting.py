"""What a partition costs, counted exactly: rows and bytes between ranks that need not exist.

One process does the work of all ranks here, so a cluster job can be sized on a laptop.
"""

from dataclasses import dataclass

import numpy as np
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
    # Edges are sorted by target: most repetitions stand side by side and need not be sorted.
    pairs = torch.unique(torch.unique_consecutive(target[other] * n_parts + needer[other]))
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

    def all_gather(self) -> "AllPairs":
        """Return the rows of one all-gather: each rank gets those of all others, padded to the largest."""
        return AllPairs(self.n_parts, int(self.owned.max()))

    def wide_halo(self, n_passes: int) -> "WideHalo":
        """Return what it takes to do without exchanges between passes over the edges: ghosts of ghosts.

        A rank that wants the last pass of its atoms needs the one before of their neighbours, and so on; at
        the end it needs the positions of all atoms that are ``n_passes`` edges away.
        """
        owner, (source, target) = self.owner.numpy(), self.edge_index.numpy()
        degree = np.bincount(target, minlength=len(owner))
        first_edge = degree.cumsum() - degree  # edges are sorted by target
        edges = np.zeros((n_passes, self.n_parts), dtype=np.int64)
        found = [np.zeros((3, 0), dtype=np.int64)]
        for first in range(0, self.n_parts, 64):  # the sets of 64 ranks at a time, a bit for each
            mine = owner // 64 == first // 64
            bit = np.left_shift(np.uint64(1), (owner - first).clip(0, 63).astype(np.uint64))
            known = np.where(mine, bit, np.uint64(0))
            near = mine & (degree > 0)  # atoms that some of the 64 ranks know, or will after the next pass
            edge, _ = _rows_of(near, first_edge, degree)
            for k in range(n_passes):
                atom, rank = _set_bits(known)
                edges[k, first : first + 64] = np.bincount(rank, degree[atom], 64)[: self.n_parts - first]
                near[source[edge]] = True
                edge, start = _rows_of(near, first_edge, degree)
                if len(edge):
                    known[near] |= np.bitwise_or.reduceat(known[source[edge]], start)
            atom, rank = _set_bits(known)
            rows = np.bincount(owner[atom] * 64 + rank, minlength=self.n_parts * 64)
            pair = rows.nonzero()[0]
            found.append(np.stack((pair // 64, pair % 64 + first, rows[pair])))
        sender, receiver, rows = torch.from_numpy(np.concatenate(found, axis=1))
        ghost = sender != receiver
        return WideHalo(
            Rows(self.n_parts, sender[ghost], receiver[ghost], rows[ghost]), torch.from_numpy(edges)
        )


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
        return self.backward.received

    @property
    def partners(self) -> Tensor:
        """``[P]`` ranks that each rank receives from."""
        return torch.bincount(self.receiver, minlength=self.n_parts)

    @property
    def backward(self) -> "Rows":
        """The rows of the transpose: gradients of ghosts, which go home."""
        return Rows(self.n_parts, self.receiver, self.sender, self.rows)

    def table(self) -> Tensor:
        """Return ``[P, P]`` rows from sender (first index) to receiver; for small P."""
        dense = torch.zeros(self.n_parts, self.n_parts, dtype=torch.int64)
        dense[self.sender, self.receiver] = self.rows
        return dense


@dataclass(frozen=True)
class AllPairs:
    """As `Rows`, for the same number of rows between all pairs of ranks.

    Attributes:
        n_parts: number of ranks P.
        rows: from each rank to each other.
    """

    n_parts: int
    rows: int

    @property
    def received(self) -> Tensor:
        """``[P]`` rows each rank receives."""
        return torch.full((self.n_parts,), self.rows * (self.n_parts - 1))

    @property
    def sent(self) -> Tensor:
        """``[P]`` rows each rank sends."""
        return self.received

    @property
    def partners(self) -> Tensor:
        """``[P]`` ranks that each rank receives from."""
        return torch.full((self.n_parts,), self.n_parts - 1)

    @property
    def backward(self) -> "AllPairs":
        """The rows of the transpose: a reduce-scatter."""
        return self

    def table(self) -> Tensor:
        """Return ``[P, P]`` rows from sender (first index) to receiver; for small P."""
        return self.rows * (1 - torch.eye(self.n_parts, dtype=torch.int64))


@dataclass(frozen=True)
class WideHalo:
    """A halo wide enough for all passes.

    Attributes:
        rows: positions that are fetched once.
        edges: ``[n_passes, P]`` edges that each rank evaluates in the last pass, the one before it, ...
    """

    rows: Rows
    edges: Tensor


def _rows_of(chosen: np.ndarray, first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows ``first .. first + count - 1`` of the chosen, and where those of each begin."""
    length = count[chosen]
    start = length.cumsum() - length
    return np.arange(length.sum()) + np.repeat(first[chosen] - start, length), start


def _set_bits(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and number of every bit that is set in ``words`` ``[n]`` uint64."""
    rows = words.nonzero()[0]
    bits = np.unpackbits(words[rows].astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    row, bit = bits.nonzero()
    return rows[row], bit


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
        n_layers: message-passing layers.
        n_exchanges: times that features are exchanged, forward; as often backward.
        row_bytes: bytes of one atom's features.
        edge_seconds: s per edge, all layers, forward and backward.
    """

    n_layers: int
    n_exchanges: int
    row_bytes: int
    edge_seconds: float


#: eSCN-MD in the UMA-S shape (4 layers, lmax 2, 128 channels, float32) on one H200: 13.7 us per silver atom
#: with 54 neighbours within 6 A. Features are exchanged before every layer, because the edge-degree embedding
#: that precedes the first one reads neighbours too.
UMA_S = ModelCost(n_layers=4, n_exchanges=4, row_bytes=9 * 128 * 4, edge_seconds=13.7e-6 / 54)


@dataclass(frozen=True)
class Leg:
    """One collective of a step.

    Attributes:
        what: what travels.
        row_bytes: bytes per row.
        rows: between which ranks.
    """

    what: str
    row_bytes: int
    rows: Rows | AllPairs

    @property
    def received(self) -> Tensor:
        """``[P]`` bytes each rank receives."""
        return self.rows.received * self.row_bytes

    @property
    def sent(self) -> Tensor:
        """``[P]`` bytes each rank sends."""
        return self.rows.sent * self.row_bytes


@dataclass(frozen=True)
class Strategy:
    """One way to let every rank read its atoms' neighbours in all layers.

    Attributes:
        name: "all-to-all", "all-gather" or "wide halo".
        legs: all collectives of a step, in order; none on one rank.
        edges: ``[P]`` float64, edges that each rank evaluates, mean over the layers.
    """

    name: str
    legs: tuple[Leg, ...]
    edges: Tensor

    @property
    def received(self) -> Tensor:
        """``[P]`` bytes that each rank receives in a step."""
        return sum((leg.received for leg in self.legs), torch.zeros(len(self.edges), dtype=torch.int64))

    def seconds(self, link: Link) -> Tensor:
        """Return ``[P]`` s that each rank spends in collectives, sending and receiving at the same time."""
        traffic = sum((torch.maximum(leg.received, leg.sent) for leg in self.legs), torch.tensor(0))
        return len(self.legs) * link.latency + traffic / link.bandwidth


def strategies(partition: VirtualPartition, model: ModelCost = UMA_S) -> tuple[Strategy, ...]:
    """Return a step of `GPContext` (all-to-all), of `AllGatherContext`, and with a halo for all layers."""
    work = partition.edges.to(torch.float64)
    halo = partition.wide_halo(model.n_exchanges + 1)
    return (
        Strategy("all-to-all", _step(partition.all_to_all(), model.n_exchanges, model), work),
        Strategy("all-gather", _step(partition.all_gather(), model.n_exchanges, model), work),
        # A pass before the first layer, as of eSCN-MD's edge-degree embedding, is cheap and not counted.
        Strategy("wide halo", _step(halo.rows, 0, model), halo.edges[: model.n_layers].double().mean(0)),
    )


def efficiency(
    partition: VirtualPartition, strategy: Strategy, link: Link, model: ModelCost = UMA_S
) -> float:
    """Return the predicted parallel efficiency of a step: ideal time over time of the slowest rank.

    Exchanges are not hidden behind work, and the host costs nothing (captured graphs): the first is
    pessimistic, the second optimistic.
    """
    ideal = partition.edges.to(torch.float64).mean() * model.edge_seconds
    slowest = (strategy.edges * model.edge_seconds + strategy.seconds(link)).max()
    return float(ideal / slowest) if slowest else 1.0


def _step(rows: Rows | AllPairs, n_exchanges: int, model: ModelCost) -> tuple[Leg, ...]:
    """Return the collectives of positions and features, and of their gradients in the opposite order."""
    if rows.n_parts == 1:
        return ()
    features = [Leg(f"features {i + 1}", model.row_bytes, rows) for i in range(n_exchanges)]
    forward = (Leg("positions", POSITION_BYTES, rows), *features)
    backward = (Leg(f"gradients of {leg.what}", leg.row_bytes, rows.backward) for leg in reversed(forward))
    return (*forward, *backward)
