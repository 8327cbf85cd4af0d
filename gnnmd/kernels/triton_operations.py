"""The operations of `gnnmd.kernels.operations` in Triton: kernels, their launch, their derivatives."""

from math import exp
from typing import Any

import torch
import triton
from torch import Tensor

from gnnmd.kernels import triton_kernels as kernels
from gnnmd.kernels.operations import Operations
from gnnmd.nn.activations import activation, silut
from gnnmd.nn.scatter import Groups, weighted_sums

#: Columns, elements of a tile of rows, and elements of an element-wise operation that a program handles.
COLUMNS, TILE, ELEMENTS = 128, 2048, 1024


class TritonLoops:
    """The loops of `gnnmd.nn.scatter.Loops`. Dots take whole rows at a time: C is at most some thousands."""

    def sums(self, w: Tensor, x: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `gnnmd.nn.scatter.Loops`."""
        return _sums(w.contiguous(), x.contiguous(), groups, rows, w.shape[1])

    def row_sums(self, x: Tensor, groups: Groups) -> Tensor:
        """See `gnnmd.nn.scatter.Loops`."""
        return _sums(None, x.contiguous(), groups, None, 1).squeeze(1)

    def spread(self, w: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `gnnmd.nn.scatter.Loops`."""
        w, s = w.contiguous(), s.contiguous()
        (n_rows, k), n_columns = w.shape, s.shape[2]
        columns, tile = _blocks(n_columns)
        x = s.new_empty(n_rows if rows is None else rows.n, n_columns)
        n_blocks = triton.cdiv(n_columns, columns)
        if x.numel() and rows is None:
            grid = (triton.cdiv(n_rows, tile), n_blocks)
            kernels.spread[grid](w, s, groups.index, x, n_rows, n_columns, K=k, BC=columns, BE=tile)
        elif x.numel() and rows is not None:
            kernels.spread_sums[(rows.n, n_blocks)](
                w,
                s,
                groups.index,
                rows.first,
                rows.first if rows.order is None else rows.order,
                x,
                n_columns,
                K=k,
                ORDERED=rows.order is not None,
                BC=columns,
                BE=16,
            )
        return x

    def dots(self, x: Tensor, s: Tensor, groups: Groups, rows: Groups | None) -> Tensor:
        """See `gnnmd.nn.scatter.Loops`."""
        x, s = x.contiguous(), s.contiguous()
        n_rows, (_, k, n_columns) = len(groups.index), s.shape
        columns, tile = _blocks(n_columns, whole=True)
        w = x.new_empty(n_rows, k)
        if w.numel():
            gathered = groups if rows is None else rows
            kernels.dots[(triton.cdiv(n_rows, tile),)](
                x,
                s,
                groups.index,
                gathered.index,
                w,
                n_rows,
                n_columns,
                K=k,
                GATHERED=rows is not None,
                BC=columns,
                BE=tile,
            )
        return w

    def pair_rows(self, x: Tensor, i: Groups, y: Tensor, j: Groups) -> Tensor:
        """See `gnnmd.nn.scatter.Loops`."""
        x, y, (n_rows, n_columns) = x.contiguous(), y.contiguous(), (len(i.index), x.shape[1])
        columns, tile = _blocks(n_columns)
        z = x.new_empty(n_rows, n_columns)
        if z.numel():
            grid = (triton.cdiv(n_rows, tile), triton.cdiv(n_columns, columns))
            kernels.pair_rows[grid](x, i.index, y, j.index, z, n_rows, n_columns, BC=columns, BE=tile)
        return z


class SiLUT:
    """`gnnmd.nn.activations.silut`, of which only the input is kept for the backward pass.

    Args:
        threshold: T; infinity gives SiLU.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        sigmoid = 1 / (1 + exp(-threshold))
        t = threshold if threshold < float("inf") else 1e30
        slope = sigmoid * (1 + t * (1 - sigmoid))
        self.slope_options = {"T": t, "SLOPE": slope}
        self.options = {**self.slope_options, "TOP": t * sigmoid}

    def __call__(self, x: Tensor) -> Tensor:
        """Return it element by element."""
        return _Activated.apply(x, self)

    def sums(self, w: Tensor, x: Tensor, groups: Groups) -> Tensor:
        """Return ``[n, C]``, sum_e w_e act(x_e) over each group; see `Operations.activated_sums`."""
        dtype = torch.promote_types(w.dtype, x.dtype)
        return _ActivatedSums.apply(w.to(dtype), x.to(dtype), groups, self)

    def reference(self, x: Tensor) -> Tensor:
        """Return the same by operators of torch, for derivatives of higher order."""
        return silut(x, self.threshold) if self.threshold < float("inf") else torch.nn.functional.silu(x)


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, act: SiLUT) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(x)
        x, n = x.contiguous(), x.numel()
        y = torch.empty_like(x)
        if n:
            kernels.activate[(triton.cdiv(n, ELEMENTS),)](x, y, n, BLOCK=ELEMENTS, **act.options)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*torch.autograd.grad(ctx.act.reference(x), x, g, create_graph=True), None)
        x, g, n = x.contiguous(), g.contiguous(), x.numel()
        dx = torch.empty_like(x)
        if n:
            grid = (triton.cdiv(n, ELEMENTS),)
            kernels.activate_back[grid](x, g, dx, n, BLOCK=ELEMENTS, **ctx.act.slope_options)
        return dx, None


class _ActivatedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, groups: Groups, act: SiLUT) -> Tensor:
        ctx.save_for_backward(w, x)
        ctx.how = groups, act
        return _sums(w.contiguous(), x.contiguous(), groups, None, 1, act).squeeze(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (w, x), (groups, act) = ctx.saved_tensors, ctx.how
        if torch.is_grad_enabled():
            w, x = w.view_as(w), x.view_as(x)  # x may depend on w: of that, this derivative knows nothing
            s = weighted_sums(w[:, None], act.reference(x), groups, loops=LOOPS).squeeze(1)
            wanted = [t for t, needed in zip((w, x), ctx.needs_input_grad[:2], strict=True) if needed]
            found = iter(torch.autograd.grad(s, wanted, g, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None
        w, x, g, (n_rows, n_columns) = w.contiguous(), x.contiguous(), g.contiguous(), x.shape
        columns, tile = _blocks(n_columns, whole=True)
        dw, dx = torch.empty_like(w), torch.empty_like(x)
        if x.numel():
            grid = (triton.cdiv(n_rows, tile),)
            kernels.activated_sums_back[grid](
                w, x, g, groups.index, dw, dx, n_rows, n_columns, BC=columns, BE=tile, **act.options
            )
        return dw, dx, None, None


def _sums(
    w: Tensor | None, x: Tensor, groups: Groups, rows: Groups | None, k: int, act: SiLUT | None = None
) -> Tensor:
    n_columns = x.shape[1]
    s, columns = x.new_empty(groups.n, k, n_columns), _blocks(n_columns)[0]
    if s.numel():
        kernels.sums[(groups.n, triton.cdiv(n_columns, columns))](
            x if w is None else w,
            x,
            groups.first,
            groups.first if groups.order is None else groups.order,
            groups.index if rows is None else rows.index,
            s,
            n_columns,
            K=k,
            WEIGHTED=w is not None,
            ORDERED=groups.order is not None,
            GATHERED=rows is not None,
            ACTIVATED=act is not None,
            **(_NOTHING if act is None else act.options),
            BK=triton.next_power_of_2(k),
            BC=columns,
            BE=16 if k == 1 else 8,
        )
    return s


def _blocks(n_columns: int, *, whole: bool = False) -> tuple[int, int]:
    """Return columns and rows that a program handles."""
    columns = triton.next_power_of_2(max(n_columns, 1))
    if not whole:
        columns = min(columns, COLUMNS)
    return columns, max(TILE // columns, 1)


LOOPS = TritonLoops()
_NOTHING = SiLUT(1.0).options


def triton_operations(act: str) -> Operations:
    """Return the operations with an activation by name; others than SiLU and SiLUT stay those of torch."""
    base, _, threshold = act.lower().partition(":")
    reference = activation(act)  # refuses what it does not know
    if base not in ("silu", "silut"):
        return Operations(reference, LOOPS)
    fast = SiLUT(float("inf") if base == "silu" else float(threshold or 3))
    return Operations(fast, LOOPS, fast.sums)
