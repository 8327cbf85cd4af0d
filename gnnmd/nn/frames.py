"""The two ends of a message: rows of atoms seen from the frames of their edges, and sums of what goes back.

Rows of atoms ``[n, S, C]`` are l-major, rows in the frame of an edge m-major with |m| <= mmax (see `nn.so3`).
This is the version by operators of torch; `gnnmd.kernels` has another one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.nn.scatter import Groups
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


class Frames:
    """Both ends of a message; ``d [E, R, S]`` are rotations into the frames of the edges."""

    def scaled_pairs(
        self, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> list[Tensor]:
        """Return the rows of both atoms in the frame of their edge, times factors.

        Args:
            d: ``[E, R, S]``.
            h: ``[n_all, S, C]``.
            f: ``[E, F, 2C]`` factors of each order and degree.
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
        f0, *factors = f.split(orders.factors, dim=1)
        y = [(m0 * f0).flatten(1)]
        for xm, fm in zip(others, factors, strict=True):
            y.append((xm.unflatten(1, (2, fm.shape[1])) * fm[:, None]).flatten(1))
        return y

    def sums(self, d: Tensor, x: Tensor, target: Groups, dtype: torch.dtype) -> Tensor:
        """Return ``[n, S, C]``, sum over the edges of each target of d^T x.

        Args:
            d: ``[E, R, S]``, first rows of it where x has fewer.
            x: ``[E, R, C]``.
            target: ``[E]``, ascending.
            dtype: of the sums.
        """
        messages = torch.bmm(d.transpose(1, 2), x).to(dtype)
        return messages.new_zeros(target.n, *messages.shape[1:]).index_add(0, target.index, messages)
