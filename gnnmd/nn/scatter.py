"""Weighted sums over the edges of an atom or the angles of an edge, and the gathering of pairs of rows.

The sum, S_ik = sum_e w_ek x_e over the rows e of i, is linear in w and in x. It and its two derivatives are
derivatives of one trilinear form, so that the three of them are their own backward passes, of every order.
None makes or keeps the products w_ek x_e, the largest tensor of a layer: rows are added up as they are read.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_sums(w: Tensor, x: Tensor, index: Tensor, n: int) -> Tensor:
    """Return S ``[n, K, C]``, S_ik = sum of w_ek x_e over the rows e with index i.

    Args:
        w: ``[E, K]`` weights.
        x: ``[E, C]`` what is summed.
        index: ``[E]`` int64, ascending, smaller than n.
        n: number of sums.
    """
    dtype = torch.promote_types(w.dtype, x.dtype)
    w, x = w.to(dtype), x.to(dtype)
    if torch.compiler.is_compiling():
        products = w[:, :, None] * x[:, None, :]
        return products.new_zeros(n, *products.shape[1:]).index_add(0, index, products)
    return _Sums.apply(w, x, index, n)


class _Sums(torch.autograd.Function):
    """S_ik = sum_e w_ek x_e."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, index: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(w, x, index)
        first = torch.searchsorted(index, torch.arange(n, device=index.device))
        rows = torch.arange(len(index), device=index.device)
        sums = [
            F.embedding_bag(rows, x, first, mode="sum", per_sample_weights=weight)
            for weight in w.t().contiguous()
        ]
        return torch.stack(sums, dim=1)

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor | None, ...]:
        w, x, index = ctx.saved_tensors
        need_w, need_x = ctx.needs_input_grad[:2]
        return (
            _Dots.apply(x, s, index) if need_w else None,
            _Spread.apply(w, s, index) if need_x else None,
            None,
            None,
        )


class _Spread(torch.autograd.Function):
    """x_e = sum_k w_ek S_ik."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(w, s, index)
        k = w.shape[1]
        rows = k * index[:, None] + torch.arange(k, device=index.device)
        return F.embedding_bag(rows, s.flatten(0, 1), mode="sum", per_sample_weights=w)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        w, s, index = ctx.saved_tensors
        need_w, need_s = ctx.needs_input_grad[:2]
        return (
            _Dots.apply(x, s, index) if need_w else None,
            _Sums.apply(w, x, index, len(s)) if need_s else None,
            None,
        )


class _Dots(torch.autograd.Function):
    """w_ek = sum_c x_ec S_ikc."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, s, index)
        return torch.bmm(s.index_select(0, index), x[:, :, None]).squeeze(2)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        x, s, index = ctx.saved_tensors
        need_x, need_s = ctx.needs_input_grad[:2]
        return (
            _Spread.apply(w, s, index) if need_x else None,
            _Sums.apply(w, x, index, len(s)) if need_s else None,
            None,
        )


def pair_rows(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """Return ``[E, C]``, x_i + y_j for every pair of indices, in one pass.

    Args:
        x: ``[n, C]``.
        i: ``[E]`` int64, ascending.
        y: ``[m, C]``.
        j: ``[E]`` int64.
    """
    if torch.compiler.is_compiling():
        return x.index_select(0, i) + y.index_select(0, j)
    return _PairRows.apply(x, i, y, j)


class _PairRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
        ctx.save_for_backward(i, j)
        ctx.lengths = len(x), len(y)
        return F.embedding_bag(torch.stack([i, j + len(x)], dim=1), torch.cat([x, y]), mode="sum")

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        (i, j), (n, m) = ctx.saved_tensors, ctx.lengths
        return _RowSums.apply(rows, i, n, True), None, _RowSums.apply(rows, j, m, False), None


class _RowSums(torch.autograd.Function):
    """Sums of the rows with each index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, n: int, ascending: bool) -> Tensor:
        ctx.save_for_backward(index)
        if not ascending:
            return x.new_zeros(n, x.shape[1]).index_add_(0, index, x)
        first = torch.searchsorted(index, torch.arange(n, device=index.device))
        return F.embedding_bag(torch.arange(len(index), device=index.device), x, first, mode="sum")

    @staticmethod
    def backward(ctx: Any, sums: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return sums.index_select(0, index), None, None, None
