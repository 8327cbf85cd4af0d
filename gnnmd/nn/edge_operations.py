"""What a layer of eSCN-MD consists of besides matrix products.

Rows of atoms ``[n, S, C]`` are l-major. Rows in the frame of an edge are m-major with |m| <= mmax, a list
with one tensor ``[E, rows * C]`` per order as in `nn.so2`. This is the version by operators of torch;
`gnnmd.kernels` has another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.norms import DegreeNorm
from gnnmd.nn.scatter import Groups, pair_rows
from gnnmd.nn.so2 import rows_per_order


@dataclass(frozen=True)
class Orders:
    """Which rows there are in the frame of an edge.

    Attributes:
        lmax: largest degree.
        mmax: largest order.
    """

    lmax: int
    mmax: int

    @property
    def rows(self) -> list[int]:
        """Rows of each order: of m = 0 one per degree, of m > 0 those of +m before those of -m."""
        return rows_per_order(self.lmax, self.mmax)

    @property
    def factors(self) -> list[int]:
        """Factors of each order, the same for +m and -m."""
        return [self.lmax + 1 - m for m in range(self.mmax + 1)]


class EdgeOperations:
    """These operations; ``d [E, R, S]`` are rotations into the frames of the edges.

    They never mix degrees: what is not zero in d lies between rows of the same one.
    """

    def scaled_pairs(
        self, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> list[Tensor]:
        """Return the rows of both atoms in the frame of their edge, times factors.

        Args:
            d: ``[E, R, S]``.
            h: ``[n_all, S, C]``.
            f: ``[E, F * 2C]`` factors of each order and degree.
            source: ``[E]`` rows of h.
            target: ``[E]`` rows of h, counted from ``first``.
            first: row of h.
            orders: R and F.

        Returns:
            For each order ``[E, rows * 2C]``, rows slow, then source before target.
        """
        pair = torch.stack([source.index, target.index + first], dim=1).flatten()
        x = h.index_select(0, pair).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # [E, S, 2C]
        m0, *others = torch.bmm(d, x).split(orders.rows, dim=1)
        f0, *factors = f.unflatten(1, (-1, x.shape[2])).split(orders.factors, dim=1)
        y = [(m0 * f0).flatten(1)]
        for xm, fm in zip(others, factors, strict=True):
            y.append((xm.unflatten(1, (2, fm.shape[1])) * fm[:, None]).flatten(1))
        return y

    def gated(self, y: Sequence[Tensor], lmax: int, channels: int) -> list[Tensor]:
        """Return SiLU of the scalars, and every degree > 0 times the sigmoid of a gate per channel.

        Args:
            y: rows of each order; m = 0 begins with ``lmax * channels`` gates before the sigmoid, degree
                slow.
            lmax: largest degree.
            channels: of a row.
        """
        gates, scalars, rest = y[0].split([lmax * channels, channels, lmax * channels], dim=1)
        gates = torch.sigmoid(gates)
        x = [torch.cat([F.silu(scalars), rest * gates], dim=1)]
        gates = gates.unflatten(1, (lmax, 1, channels)).transpose(1, 2)  # [E, 1, lmax, C]
        for m, ym in enumerate(y[1:], start=1):
            n = lmax - m + 1
            x.append((ym.unflatten(1, (2, n, channels)) * gates[:, :, m - 1 :]).flatten(1))
        return x

    def sums(self, d: Tensor, x: Sequence[Tensor], target: Groups, dtype: torch.dtype) -> Tensor:
        """Return ``[n, S, C]``, sum over the edges of each target of d^T x.

        Args:
            d: ``[E, R, S]``, first rows of it where x has fewer.
            x: rows of each order.
            target: ``[E]``, ascending.
            dtype: of the sums.
        """
        rows = torch.cat(list(x), dim=1).unflatten(1, (d.shape[1], -1))
        messages = torch.bmm(d.transpose(1, 2), rows).to(dtype)
        return messages.new_zeros(target.n, *messages.shape[1:]).index_add(0, target.index, messages)

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """Return ``[E, C]``, x_i + y_j."""
        return pair_rows(x, i, y, j)

    def degree_norm(self, x: Tensor, norm: DegreeNorm, shift: Tensor | None = None) -> Tensor:
        """Return normalised rows of atoms ``[n, S, C]``, see `DegreeNorm`."""
        return norm(x, shift)

    def activated_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return SiLU of a normalised ``[E, C]``."""
        return F.silu(norm(x))
