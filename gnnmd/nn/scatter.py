"""Weighted sums over the edges of an atom or the angles of an edge, and the gathering of pairs of rows.

The sum, S_ik = sum_e w_ek x_e over the rows e of i, is linear in w and in x. It and its two derivatives are
derivatives of one trilinear form, so that the three of them are their own backward passes, of every order.
None makes or keeps the products w_ek x_e, the largest tensor of a layer: rows are added up as they are read.

The loops themselves are `Loops`, without derivatives: `TORCH` here, others in `gnnmd.kernels`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows are summed into which of n sums; reading the group's row for every row is the transpose.

    Attributes:
        index: ``[E]`` int64, the sum of each row, smaller than n.
        n: number of sums.
        ascending: whether the index is sorted.
        count: scalar int64, how many rows are summed; those behind, which have the largest index, add zero
            and may be left out. None = all.
        known_order: what `order` is, if that is known.
    """

    index: Tensor
    n: int
    ascending: bool = True
    count: Tensor | None = None
    known_order: Tensor | None = None

    @cached_property
    def order(self) -> Tensor | None:
        """``[E]`` int64, the rows sorted by their sum; None if they are sorted. Made when first needed."""
        if self.ascending or self.known_order is not None:
            return self.known_order
        return torch.argsort(self.index, stable=True)

    @cached_property
    def first(self) -> Tensor:
        """``[n + 1]`` int64, where the rows of each sum begin in `order`. Made when first needed."""
        index = self.index if self.order is None else self.index.index_select(0, self.order)
        first = torch.searchsorted(index, torch.arange(self.n + 1, device=index.device))
        return first if self.count is None else torch.minimum(first, self.count)

    def make(self) -> None:
        """Make `order` and `first` now."""
        _ = self.order, self.first


class Loops(Protocol):
    """The loops over rows, on plain tensors; ``w [E, K]``, ``x [E, C]`` (or see rows), ``s [n, K, C]``."""

    def sums(self, w: Tensor, x: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """Return ``[n, K, C]``, sum_e w_ek x_e over each group; with rows, of x_rows(e)."""

    def spread(self, w: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """Return ``[E, C]``, sum_k w_ek s_ik with i the group of e; with rows, summed by these."""

    def dots(self, x: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """Return ``[E, K]``, sum_c x_ec s_ikc with i the group of e; with rows, of x_rows(e)."""

    def row_sums(self, x: Tensor, groups: Groups) -> Tensor:
        """Return ``[n, C]``, the sum of x over each group."""

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """Return ``[E, C]``, x_i + y_j."""


class TorchLoops:
    """The loops by operators of torch; `embedding_bag` adds rows up as it reads them."""

    def sums(self, w: Tensor, x: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `Loops`."""
        where = torch.arange(len(w), device=w.device) if rows is None else rows.index
        sums = [
            F.embedding_bag(where, x, groups.first[:-1], mode="sum", per_sample_weights=weight)
            for weight in w.t().contiguous()
        ]
        return torch.stack(sums, dim=1)

    def spread(self, w: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `Loops`."""
        k = w.shape[1]
        places = k * groups.index[:, None] + torch.arange(k, device=w.device)
        x = F.embedding_bag(places, s.flatten(0, 1), mode="sum", per_sample_weights=w)
        return x if rows is None else self.row_sums(x, rows)

    def dots(self, x: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `Loops`."""
        x = x if rows is None else x.index_select(0, rows.index)
        return torch.bmm(s.index_select(0, groups.index), x[:, :, None]).squeeze(2)

    def row_sums(self, x: Tensor, groups: Groups) -> Tensor:
        """See `Loops`."""
        if not groups.ascending:
            return x.new_zeros(groups.n, x.shape[1]).index_add_(0, groups.index, x)
        return F.embedding_bag(torch.arange(len(x), device=x.device), x, groups.first[:-1], mode="sum")

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """See `Loops`."""
        places = torch.stack([i.index, j.index + len(x)], dim=1)
        return F.embedding_bag(places, torch.cat([x, y]), mode="sum")


TORCH: Loops = TorchLoops()


def weighted_sums(
    w: Tensor, x: Tensor, groups: Groups, rows: Groups | None = None, *, loops: Loops = TORCH
) -> Tensor:
    """Return S ``[n, K, C]``, S_ik = sum of w_ek x_e over the rows e of group i.

    Args:
        w: ``[E, K]`` weights.
        x: ``[E, C]`` what is summed.
        groups: of the rows, ascending.
        rows: if given, x_rows(e) of x ``[rows.n, C]`` stands in place of x_e; it is gathered as it is read.
        loops: what computes it.
    """
    dtype = torch.promote_types(w.dtype, x.dtype)
    w, x = w.to(dtype), x.to(dtype)
    if torch.compiler.is_compiling():
        x = x if rows is None else x.index_select(0, rows.index)
        products = w[:, :, None] * x[:, None, :]
        return products.new_zeros(groups.n, *products.shape[1:]).index_add(0, groups.index, products)
    return _Sums.apply(w, x, groups, rows, loops)


class _Sums(torch.autograd.Function):
    """S_ik = sum_e w_ek x_e."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, groups: Groups, rows: Groups | None, loops: Loops) -> Tensor:
        ctx.save_for_backward(w, x)
        ctx.how = groups, rows, loops
        return loops.sums(w, x, groups, rows)

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor | None, ...]:
        w, x = ctx.saved_tensors
        need_w, need_x = ctx.needs_input_grad[:2]
        return (
            _Dots.apply(x, s, *ctx.how) if need_w else None,
            _Spread.apply(w, s, *ctx.how) if need_x else None,
            *(None,) * 3,
        )


class _Spread(torch.autograd.Function):
    """x_e = sum_k w_ek S_ik."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, groups: Groups, rows: Groups | None, loops: Loops) -> Tensor:
        ctx.save_for_backward(w, s)
        ctx.how = groups, rows, loops
        return loops.spread(w, s, groups, rows)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        w, s = ctx.saved_tensors
        need_w, need_s = ctx.needs_input_grad[:2]
        return (
            _Dots.apply(x, s, *ctx.how) if need_w else None,
            _Sums.apply(w, x, *ctx.how) if need_s else None,
            *(None,) * 3,
        )


class _Dots(torch.autograd.Function):
    """w_ek = sum_c x_ec S_ikc."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, groups: Groups, rows: Groups | None, loops: Loops) -> Tensor:
        ctx.save_for_backward(x, s)
        ctx.how = groups, rows, loops
        return loops.dots(x, s, groups, rows)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        x, s = ctx.saved_tensors
        need_x, need_s = ctx.needs_input_grad[:2]
        return (
            _Spread.apply(w, s, *ctx.how) if need_x else None,
            _Sums.apply(w, x, *ctx.how) if need_s else None,
            *(None,) * 3,
        )


def pair_rows(x: Tensor, i: Groups, y: Tensor, j: Groups, *, loops: Loops = TORCH) -> Tensor:
    """Return ``[E, C]``, x_i + y_j for every pair of indices, in one pass.

    Args:
        x: ``[n, C]``.
        i: rows of x.
        y: ``[m, C]``.
        j: rows of y.
        loops: what computes it.
    """
    if torch.compiler.is_compiling():
        return x.index_select(0, i.index) + y.index_select(0, j.index)
    return _PairRows.apply(x, i, y, j, loops)


class _PairRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, i: Groups, y: Tensor, j: Groups, loops: Loops) -> Tensor:
        ctx.how = i, j, loops
        return loops.pair_rows(x, i, y, j)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        i, j, loops = ctx.how
        need_x, _, need_y = ctx.needs_input_grad[:3]
        return (
            _RowSums.apply(rows, i, loops) if need_x else None,
            None,
            _RowSums.apply(rows, j, loops) if need_y else None,
            None,
            None,
        )


class _RowSums(torch.autograd.Function):
    """Sums of the rows of each group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, loops: Loops) -> Tensor:
        ctx.groups = groups
        return loops.row_sums(x, groups)

    @staticmethod
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        return sums.index_select(0, ctx.groups.index), None, None
