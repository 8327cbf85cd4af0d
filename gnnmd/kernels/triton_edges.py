"""`gnnmd.nn.edge_operations` in Triton: launch of the kernels and derivatives."""

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
import triton
from torch import Tensor, nn

from gnnmd.kernels import triton_edge_kernels as kernels
from gnnmd.kernels.triton_operations import TritonLoops
from gnnmd.nn.edge_operations import EdgeOperations, Orders
from gnnmd.nn.norms import EPS, DegreeNorm
from gnnmd.nn.scatter import Groups, pair_rows

#: Channels that a program handles where it need not have all of them, and numbers in a tile of whole rows.
COLUMNS, TILE = 128, 1024

REFERENCE, LOOPS = EdgeOperations(), TritonLoops()


class TritonEdgeOperations(EdgeOperations):
    """`gnnmd.nn.edge_operations.EdgeOperations` without tensors of all rows of all edges but the results.

    Derivatives of higher order are those of the version by operators of torch, which also serves for mixed
    types and orders beyond 2.
    """

    def scaled_pairs(
        self, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> list[Tensor]:
        """See `EdgeOperations`."""
        if orders.mmax > 2 or not d.dtype == h.dtype == f.dtype:  # under autocast
            return super().scaled_pairs(d, h, f, source, target, first, orders)
        return list(_ScaledPairs.apply(d, h, f, source, target, first, orders))

    def gated(self, y: Sequence[Tensor], lmax: int, channels: int) -> list[Tensor]:
        """See `EdgeOperations`."""
        if len(y) > 3 or len({t.dtype for t in y}) > 1:
            return super().gated(y, lmax, channels)
        return list(_Gated.apply(lmax, channels, *y))

    def sums(self, d: Tensor, x: Sequence[Tensor], target: Groups, dtype: torch.dtype) -> Tensor:
        """See `EdgeOperations`."""
        if len(x) > 3 or {t.dtype for t in (d, *x)} != {dtype}:
            return super().sums(d, x, target, dtype)
        return _Sums.apply(d, target, *x)

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """See `EdgeOperations`."""
        return pair_rows(x, i, y, j, loops=LOOPS)

    def degree_norm(self, x: Tensor, norm: DegreeNorm, shift: Tensor | None = None) -> Tensor:
        """See `EdgeOperations`; derivatives by parameters are torch's."""
        trained = norm.weight.requires_grad or (shift is not None and shift.requires_grad)
        if trained or x.dtype != norm.weight.dtype:
            return super().degree_norm(x, norm, shift)
        return _DegreeNorm.apply(x, norm, norm.bias[None] if shift is None else norm.bias + shift)

    def activated_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """See `EdgeOperations`; derivatives by parameters are torch's."""
        if norm.weight.requires_grad or x.dtype != norm.weight.dtype:
            return super().activated_norm(x, norm)
        return _ActivatedNorm.apply(x, norm)


class _ScaledPairs(torch.autograd.Function):
    """See `EdgeOperations.scaled_pairs`."""

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, h: Tensor, f: Tensor, source: Groups, target: Groups, first: int, orders: Orders
    ) -> tuple[Tensor, ...]:
        d, h, f = d.contiguous(), h.contiguous(), f.contiguous()
        ctx.save_for_backward(d, h, f)
        ctx.how = source, target, first, orders
        (n_edges, r, s), c = d.shape, h.shape[2]
        x = tuple(d.new_empty(n_edges, n * 2 * c) for n in orders.rows)
        columns = _columns(c)
        if d.numel():
            kernels.to_frames[(n_edges, triton.cdiv(c, columns), 2)](
                d, h, f, source.index, target.index, first, *_three(x), c, N=_rows(orders.rows),
                F=sum(orders.factors), R=r, S=s, L=orders.lmax, BC=columns, num_warps=1,
            )  # fmt: skip
        return x

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (source, target, first, orders) = ctx.saved_tensors, ctx.how
        if torch.is_grad_enabled():

            def again(d: Tensor, h: Tensor, f: Tensor) -> list[Tensor]:
                return REFERENCE.scaled_pairs(d, h, f, source, target, first, orders)

            return *_derivatives(again, inputs, ctx.needs_input_grad[:3], g), *(None,) * 4
        d, h, f = inputs
        g, (n_edges, r, s), c = tuple(t.contiguous() for t in g), d.shape, h.shape[2]
        dd, df = torch.zeros_like(d), torch.empty_like(f)
        if n_edges:
            kernels.to_frames_back[(n_edges,)](
                d, h, f, source.index, target.index, first, *_three(g), dd, df, c, N=_rows(orders.rows),
                F=sum(orders.factors), R=r, S=s, L=orders.lmax, BC=triton.next_power_of_2(c), num_warps=1,
            )  # fmt: skip
        dh = _sums(d, g, source, c, 2 * c, f=f)
        dh.narrow(0, first, target.n).add_(_sums(d, g, target, c, 2 * c, column=c, f=f))
        return dd, dh, df, *(None,) * 4


class _Sums(torch.autograd.Function):
    """See `EdgeOperations.sums`."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, target: Groups, *x: Tensor) -> Tensor:
        x = tuple(t.contiguous() for t in x)
        ctx.save_for_backward(d, *x)
        ctx.target = target
        c = sum(t.shape[1] for t in x) // d.shape[1]
        return _sums(d, x, target, c, c)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (d, *x), target = ctx.saved_tensors, ctx.target
        if torch.is_grad_enabled():

            def again(d: Tensor, *x: Tensor) -> list[Tensor]:
                return [REFERENCE.sums(d, x, target, d.dtype)]

            needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
            by_d, *by_x = _derivatives(again, [d, *x], needed, [g])
            return by_d, None, *by_x
        g, (n_edges, r, s), c = g.contiguous(), d.shape, g.shape[2]
        dd, dx = d.new_zeros(n_edges, r, s), [torch.empty_like(t) for t in x]
        if n_edges:
            rows = [t.shape[1] // c for t in x]
            kernels.from_frames_back[(n_edges,)](
                d, d.stride(0), *_three(x), g, target.index, dd, *_three(dx), c, N=_rows(rows),
                R=r, S=s, L=isqrt(s) - 1, BC=triton.next_power_of_2(c), num_warps=1,
            )  # fmt: skip
        return dd, None, *dx


def _sums(
    d: Tensor,
    x: Sequence[Tensor],
    groups: Groups,
    c: int,
    width: int,
    column: int = 0,
    f: Tensor | None = None,
) -> Tensor:
    """Return ``[n, S, C]``, sums of d^T x over the edges of each atom.

    Args:
        d: ``[E, R, S]``.
        x: ``[E, rows * width]`` of each order.
        groups: the atom of each edge.
        c: C.
        width: columns of a row of x.
        column: the first of the C columns of x that are meant.
        f: factors ``[E, F * width]`` of x, if there are any.
    """
    s, columns, rows = d.shape[2], _columns(c), _rows([t.shape[1] // width for t in x])
    h = d.new_empty(groups.n, s, c)
    if h.numel():
        order = groups.first if groups.order is None else groups.order
        kernels.from_frames[(groups.n, triton.cdiv(c, columns), isqrt(s))](
            d, d.stride(0), *_three(x), x[0] if f is None else f, column, width, groups.first, order, h, c,
            N=rows, F=rows[0] + rows[1] // 2 + rows[2] // 2, S=s, L=isqrt(s) - 1, SCALED=f is not None,
            ORDERED=groups.order is not None, BC=columns, num_warps=1,
        )  # fmt: skip
    return h


class _Gated(torch.autograd.Function):
    """See `EdgeOperations.gated`."""

    @staticmethod
    def forward(ctx: Any, lmax: int, channels: int, *y: Tensor) -> tuple[Tensor, ...]:
        y = tuple(t.contiguous() for t in y)
        ctx.save_for_backward(*y)
        ctx.shape = lmax, channels
        x = (y[0].new_empty(len(y[0]), (lmax + 1) * channels), *(torch.empty_like(t) for t in y[1:]))
        _launch_gated(kernels.gated, [y, x], lmax, channels)
        return x

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        y, shape = ctx.saved_tensors, ctx.shape
        if torch.is_grad_enabled():

            def again(*y: Tensor) -> list[Tensor]:
                return REFERENCE.gated(y, *shape)

            return None, None, *_derivatives(again, y, ctx.needs_input_grad[2:], g)
        dy = [torch.empty_like(t) for t in y]
        _launch_gated(kernels.gated_back, [y, [t.contiguous() for t in g], dy], *shape)
        return None, None, *dy


def _launch_gated(kernel: Any, features: list[Sequence[Tensor]], lmax: int, channels: int) -> None:
    """Launch `kernels.gated` or its derivative on features, each a tensor per order."""
    y, columns = features[0], _columns(channels)
    rows = _rows([lmax + 1, *(t.shape[1] // channels for t in y[1:])])
    if y[0].numel():
        kernel[(len(y[0]), triton.cdiv(channels, columns))](
            *(t for x in features for t in _three(x)), channels, N=rows, L=lmax, BC=columns, num_warps=1
        )


class _DegreeNorm(torch.autograd.Function):
    """See `EdgeOperations.degree_norm`, with the bias ``[1 or n, C]``; of parameters it is no function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: DegreeNorm, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.norm = norm
        y = torch.empty_like(x)
        _launch_degree_norm(kernels.degree_norm, norm, x, bias.contiguous(), y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,), norm = ctx.saved_tensors, ctx.norm
        if torch.is_grad_enabled():

            def again(x: Tensor) -> list[Tensor]:
                return [norm(x)]

            return *_derivatives(again, [x], [True], [g]), None, None
        dx = torch.empty_like(x)
        _launch_degree_norm(kernels.degree_norm_back, norm, x, g.contiguous(), dx)
        return dx, None, None


def _launch_degree_norm(kernel: Any, norm: DegreeNorm, x: Tensor, second: Tensor, result: Tensor) -> None:
    """Launch `kernels.degree_norm` with a bias, or its derivative with g."""
    n, s, c = x.shape
    if x.numel():
        kernel[(n,)](
            x, norm.weight, norm.degree, norm.mean_power.to(x.dtype), second, int(len(second) > 1), result, c,
            EPS=EPS, S=s, BS=triton.next_power_of_2(s), BC=triton.next_power_of_2(c), num_warps=4,
        )  # fmt: skip


class _ActivatedNorm(torch.autograd.Function):
    """See `EdgeOperations.activated_norm`; of parameters it is no function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.norm = norm
        y = torch.empty_like(x)
        _launch_norm(kernels.activated_norm, norm, [x], y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,), norm = ctx.saved_tensors, ctx.norm
        if torch.is_grad_enabled():

            def again(x: Tensor) -> list[Tensor]:
                return [REFERENCE.activated_norm(x, norm)]

            return *_derivatives(again, [x], [True], [g]), None
        dx = torch.empty_like(x)
        _launch_norm(kernels.activated_norm_back, norm, [x, g.contiguous()], dx)
        return dx, None


def _launch_norm(kernel: Any, norm: nn.LayerNorm, inputs: list[Tensor], result: Tensor) -> None:
    """Launch `kernels.activated_norm` or its derivative."""
    (n_edges, c), (x, *more) = result.shape, inputs
    columns = triton.next_power_of_2(c)
    rows = max(1, TILE // columns)
    if n_edges:
        kernel[(triton.cdiv(n_edges, rows),)](
            x, norm.weight, norm.bias, *more, result, n_edges, c, norm.eps, BE=rows, BC=columns, num_warps=4
        )


def _derivatives(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    g: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the derivatives for g of what a function makes of inputs, with a graph of their own."""
    inputs = [t.view_as(t) for t in inputs]  # of how they depend on each other this knows nothing
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(function(*inputs), wanted, g, create_graph=True))
    return [next(found) if need else None for need in needed]


def _columns(c: int) -> int:
    return min(triton.next_power_of_2(c), COLUMNS)


def _three(x: Sequence[Tensor]) -> list[Tensor]:
    """Return a tensor for each of three orders; nobody reads those of orders that do not exist."""
    return [*x, *(x[0],) * (3 - len(x))]


def _rows(rows: Sequence[int]) -> tuple[int, ...]:
    """Return the number of rows of each of three orders."""
    return (*rows, *(0,) * (3 - len(rows)))
