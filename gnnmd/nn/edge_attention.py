"""Attention among the edges of an atom, and of an atom to its neighbours (DPA-2, arXiv 2312.15492).

A softmax runs over all neighbours an atom has room for. Those that are not there have the logit that edges
reach at the cutoff, so that the weights are smooth where a neighbour comes or goes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnnmd.nn.resnet_mlp import dense

#: Minus the logit of a neighbour at the cutoff, and of one that is not there.
SHIFT = 20.0


@dataclass(frozen=True)
class EdgeTable:
    """Edges of some atoms as a table with a row for each atom, for products over pairs of its edges.

    A row is as long as the largest number of edges found, M. Products in a table are batched matrix products;
    a list of pairs, which gathers both factors for every pair, took seven times as long (CPU, 18 neighbours).

    Attributes:
        n_atoms: number of rows.
        width: M, at least 1.
        target: ``[E]`` int64 atom of each edge, ascending: rows ``0 .. n_atoms - 1``.
        place: ``[E]`` int64 cell of each edge, row by row.
    """

    n_atoms: int
    width: int
    target: Tensor
    place: Tensor

    @classmethod
    def of(cls, target: Tensor, n_atoms: int) -> "EdgeTable":
        """Return the table of edges that end on the atoms ``target [E]``, see there."""
        counts = torch.zeros(n_atoms + 1, dtype=torch.int64, device=target.device)  # + 1: never empty
        counts.index_add_(0, target, torch.ones_like(target))
        width = max(int(counts.max()), 1)
        first = counts.cumsum(0) - counts
        column = torch.arange(len(target), device=target.device) - first.index_select(0, target)
        return cls(n_atoms, width, target, target * width + column)

    def fill(self, x: Tensor) -> Tensor:
        """Return ``[n, M, ...]`` of values ``[E, ...]`` on edges, zero where there is no edge."""
        cells = x.new_zeros(self.n_atoms * self.width, *x.shape[1:])
        return cells.index_copy(0, self.place, x).unflatten(0, (self.n_atoms, self.width))

    def read(self, table: Tensor) -> Tensor:
        """Return the values ``[E, ...]`` of edges from a table ``[n, M, ...]``."""
        return table.flatten(0, 1).index_select(0, self.place)

    def sum(self, x: Tensor) -> Tensor:
        """Return ``[n, C]``, the sum of ``[E, C]`` over the edges of each atom."""
        return x.new_zeros(self.n_atoms, x.shape[1]).index_add(0, self.target, x)

    def sum_products(self, h: Tensor, x: Tensor) -> Tensor:
        """Return ``[n, K, C]``, the sum of ``h [E, K]`` times ``x [E, C]`` over the edges of each atom."""
        return self.fill(h).transpose(1, 2) @ self.fill(x)


def switched_softmax(logits: Tensor, switch: Tensor, room: int) -> Tensor:
    """Return the softmax of (w + 20) s - 20 over the last axis and over neighbours that are not there.

    Those have s = 0. Where all real logits are near -20, as of an edge close to the cutoff, they make up much
    of the sum.

    Args:
        logits: ``[..., M]`` w.
        switch: ``[..., M]`` s, 0 in cells without an edge.
        room: neighbours an atom has room for; may be smaller than M.
    """
    absent = room - logits.shape[-1]
    shifted = (logits + SHIFT) * switch - SHIFT
    top = shifted.detach().amax(-1, keepdim=True)
    weights = torch.exp(shifted - top)
    total = weights.sum(-1, keepdim=True)
    if absent:  # an overflow leaves weights of zero; times zero it would not
        total = total + absent * torch.exp(-SHIFT - top)
    return weights / total


class PairWeights(nn.Module):
    """How much the edges ij and ik of an atom attend to each other, H heads.

    Args:
        channels: C of an edge.
        hidden: D of a query and of a key.
        heads: H.
        gated: whether logits are multiplied by h_ij . h_ik.
    """

    def __init__(self, channels: int, hidden: int, heads: int, *, gated: bool):
        super().__init__()
        self.hidden, self.heads, self.gated = hidden, heads, gated
        self.query_key = dense(channels, hidden * 2 * heads, bias=False)

    def forward(self, x: Tensor, h: Tensor, switch: Tensor, room: int, table: EdgeTable) -> Tensor:
        """Return ``[n, H, M, M]`` from features ``[E, C]``, vectors ``[E, 3]`` and switches ``[E]``."""
        query_key = table.fill(self.query_key(x)).unflatten(2, (self.hidden, 2 * self.heads))
        query, key = query_key.permute(0, 3, 1, 2).chunk(2, dim=1)  # [n, H, M, D]
        logits = query @ key.transpose(2, 3) / self.hidden**0.5
        h, s = table.fill(h), table.fill(switch)
        cosine = (h @ h.transpose(1, 2))[:, None]  # [n, 1, M, M]
        both = (s[:, :, None] * s[:, None, :])[:, None]
        if self.gated:
            logits = logits * cosine
        return switched_softmax(logits, both, room) * both * cosine / 3**0.5


class PairFeatures(nn.Module):
    """Features of the edges ik, weighted and summed for every edge ij.

    Args:
        channels: C.
        heads: H.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.value = dense(channels, channels * heads, bias=False)
        self.head_map = dense(channels * heads, channels)

    def forward(self, weights: Tensor, x: Tensor, table: EdgeTable) -> Tensor:
        """Return ``[E, C]`` from weights ``[n, H, M, M]`` and features ``[E, C]``."""
        value = table.fill(self.value(x)).unflatten(2, (-1, self.heads))  # [n, M, C, H]
        summed = weights @ value.permute(0, 3, 1, 2)  # [n, H, M, C]
        return self.head_map(table.read(summed.permute(0, 2, 3, 1)).flatten(1))


class PairVectors(nn.Module):
    """Vectors of the edges ik, weighted and summed for every edge ij; equivariant.

    Args:
        heads: H.
    """

    def __init__(self, heads: int):
        super().__init__()
        self.head_map = dense(heads, 1, bias=False)

    def forward(self, weights: Tensor, h: Tensor, table: EdgeTable) -> Tensor:
        """Return ``[E, 3]`` from weights ``[n, H, M, M]`` and vectors ``[E, 3]``."""
        summed = weights @ table.fill(h)[:, None]  # [n, H, M, 3]
        return self.head_map(table.read(summed.permute(0, 2, 3, 1))).squeeze(2)


class NeighborAttention(nn.Module):
    """Attention of an atom to its neighbours, H heads.

    Args:
        channels: C of an atom.
        hidden: D of a query and of a key.
        heads: H.

    Attributes:
        key_value: maps features ``[..., C]`` of neighbours to what `forward` reads of them.
    """

    def __init__(self, channels: int, hidden: int, heads: int):
        super().__init__()
        self.channels, self.hidden, self.heads = channels, hidden, heads
        self.query = dense(channels, hidden * heads, bias=False)
        self.key_value = dense(channels, (hidden + channels) * heads, bias=False)
        self.head_map = dense(channels * heads, channels)

    def forward(self, x: Tensor, key_value: Tensor, switch: Tensor, room: int, table: EdgeTable) -> Tensor:
        """Return ``[n, C]``.

        Args:
            x: ``[n, C]`` features of the atoms.
            key_value: ``[E, (D + C) H]`` of their neighbours.
            switch: ``[E]`` switch of each edge.
            room: neighbours an atom has room for.
            table: of the edges.
        """
        query = self.query(x).unflatten(1, (self.hidden, self.heads))
        key_value = table.fill(key_value).unflatten(2, (-1, self.heads))  # [n, M, D + C, H]
        key, value = key_value.split([self.hidden, self.channels], dim=2)
        logits = torch.einsum("ndh,nmdh->nhm", query, key) / self.hidden**0.5
        s = table.fill(switch)[:, None]  # [n, 1, M]
        weights = switched_softmax(logits, s, room) * s
        return self.head_map(torch.einsum("nhm,nmch->nhc", weights, value).flatten(1))
