"""The two ends of a message in Triton: launch of the kernels and derivatives."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gnnmd.kernels import triton_frame_kernels as kernels
from gnnmd.nn.frames import Frames, Orders
from gnnmd.nn.scatter import Groups

#: Channels that a program handles where it need not have all of them.
COLUMNS = 128


class TritonFrames(Frames):
    """`gnnmd.nn.frames.Frames` without tensors of all rows of all edges but the results.

    Derivatives of higher order are those of the version by operators of torch.
    """

    def scaled_pairs(
        self, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> list[Tensor]:
        """See `Frames`."""
        if not d.dtype == h.dtype == f.dtype:  # under autocast
            return super().scaled_pairs(d, h, f, source, target, first, orders)
        x = _ScaledPairs.apply(d, h, f, source, target, first, orders)
        return list(x.split([n * f.shape[2] for n in orders.rows], dim=1))

    def sums(self, d: Tensor, x: Tensor, target: Groups, dtype: torch.dtype) -> Tensor:
        """See `Frames`."""
        if not d.dtype == x.dtype == dtype:
            return super().sums(d, x, target, dtype)
        return _Sums.apply(d, x, target)


class _ScaledPairs(torch.autograd.Function):
    """``[E, R * 2C]``; the orders of `Frames.scaled_pairs` side by side."""

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> Tensor:
        d, h, f = d.contiguous(), h.contiguous(), f.contiguous()
        ctx.save_for_backward(d, h, f)
        ctx.how = source, target, first, orders
        (n_edges, r, s), c = d.shape, h.shape[2]
        x = d.new_empty(n_edges, r * 2 * c)
        columns = _columns(c)
        if x.numel():
            kernels.to_frames[(n_edges, triton.cdiv(c, columns), 2)](
                d, h, f, _factors(orders, d.device), source.index, target.index, first, x, c, f.shape[1],
                R=r, S=s, BS=triton.next_power_of_2(s), BC=columns, num_warps=1,
            )  # fmt: skip
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (d, h, f), (source, target, first, orders) = ctx.saved_tensors, ctx.how
        if torch.is_grad_enabled():
            inputs = [t.view_as(t) for t in (d, h, f)]  # of how they depend on each other this knows nothing
            d, h, f = inputs
            x = torch.cat(Frames().scaled_pairs(d, h, f, source, target, first, orders), dim=1)
            return *_derivatives(x, inputs, ctx.needs_input_grad[:3], g), *(None,) * 4
        g, (n_edges, r, s), c = g.contiguous(), d.shape, h.shape[2]
        dd, df = torch.empty_like(d), torch.empty_like(f)
        if n_edges:
            kernels.to_frames_back[(n_edges,)](
                d, h, f, _rows(orders, d.device), source.index, target.index, first, g, dd, df, c,
                F=f.shape[1], R=r, S=s, BS=triton.next_power_of_2(s), BC=triton.next_power_of_2(c),
                num_warps=1,
            )  # fmt: skip
        scale = f, _factors(orders, d.device)
        dh = _sums(d, g, source, c, 0, scale)
        dh.narrow(0, first, target.n).add_(_sums(d, g, target, c, c, scale))
        return dd, dh, df, *(None,) * 4


class _Sums(torch.autograd.Function):
    """``[n, S, C]``; see `Frames.sums`."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, x: Tensor, target: Groups) -> Tensor:
        ctx.save_for_backward(d, x)
        ctx.target = target
        return _sums(d, x.contiguous(), target, x.shape[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (d, x), target = ctx.saved_tensors, ctx.target
        if torch.is_grad_enabled():
            inputs = [t.view_as(t) for t in (d, x)]
            sums = Frames().sums(inputs[0], inputs[1], target, x.dtype)
            return *_derivatives(sums, inputs, ctx.needs_input_grad[:2], g), None
        x, g, (n_edges, r, c), s = x.contiguous(), g.contiguous(), x.shape, d.shape[2]
        dd, dx = d.new_empty(n_edges, r, s), torch.empty_like(x)
        if n_edges:
            kernels.from_frames_back[(n_edges,)](
                d, d.stride(0), x, g, target.index, dd, dx, c,
                R=r, S=s, BS=triton.next_power_of_2(s), BC=triton.next_power_of_2(c), num_warps=1,
            )  # fmt: skip
        return dd, dx, None


def _sums(
    d: Tensor,
    x: Tensor,
    groups: Groups,
    c: int,
    column: int = 0,
    scale: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``[n, S, C]``, sums of d^T x over the edges of each atom.

    Args:
        d: ``[E, R, S]``.
        x: ``[E, R, W]`` or flat.
        groups: the atom of each edge.
        c: C.
        column: the first of the C columns of x that are meant.
        scale: factors ``[E, F, W]`` of x, and ``[R]`` which of them is that of a row.
    """
    n_edges, r, s = d.shape
    h, columns = x.new_empty(groups.n, s, c), _columns(c)
    f, factor = (x[:, None], x) if scale is None else scale
    order = groups.first if groups.order is None else groups.order
    if h.numel():
        kernels.from_frames[(groups.n, triton.cdiv(c, columns))](
            d, d.stride(0), x, f, factor, column, x.numel() // max(1, n_edges * r), groups.first, order, h, c,
            f.shape[1], R=r, S=s, SCALED=scale is not None, ORDERED=groups.order is not None,
            BS=triton.next_power_of_2(s), BC=columns, num_warps=1,
        )  # fmt: skip
    return h


def _derivatives(y: Tensor, inputs: list[Tensor], needed: tuple[bool, ...], g: Tensor) -> list[Tensor | None]:
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
    return [next(found) if need else None for need in needed]


def _columns(c: int) -> int:
    return min(triton.next_power_of_2(c), COLUMNS)


@cache
def _factors(orders: Orders, device: torch.device) -> Tensor:
    """Return ``[R]``, the factor of each row."""
    rows = [
        (m, l) for m in range(orders.mmax + 1) for _ in range(1 + (m > 0)) for l in range(m, orders.lmax + 1)
    ]
    places = {place: k for k, place in enumerate(dict.fromkeys(rows))}
    return torch.tensor([places[row] for row in rows], device=device)


@cache
def _rows(orders: Orders, device: torch.device) -> Tensor:
    """Return ``[F, 2]``, the rows of each factor, -1 where there is one only."""
    factors = _factors(orders, torch.device("cpu")).tolist()
    rows = [[r for r, k in enumerate(factors) if k == factor] for factor in range(max(factors) + 1)]
    return torch.tensor([(*row, -1)[:2] for row in rows], device=device)
