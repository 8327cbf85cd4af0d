"""Kernels in Triton for `gnnmd.nn.frames`.

A program owns an edge, or an atom and walks through its edges in a fixed order, so that sums do not depend on
timing. It is one warp, which keeps the rows of an atom ``[S, C]`` in registers: only the features in the
frames of the edges, ``x [E, R, W]``, pass through memory once per edge. They lie in W columns, of which C
from some column on are meant; with SCALED their factors ``f [E, F, W]`` are multiplied to them as they are
read, and ``factor [R]`` says which one.

Names: ``d [E, R, S]`` rotations with a distance D between edges, e counts edges, i and j atoms.
"""

import triton
import triton.language as tl


@triton.jit
def to_frames(
    d_at, h_at, f_at, factor_at, source_at, target_at, first, x_at, C, F,
    R: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store x_er = f_e sum_s d_ers h_js, of the source in the first C columns, of the target in the next."""
    e, side = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    j = tl.load(source_at + e) if side == 0 else tl.load(target_at + e) + first
    h = tl.load(
        h_at + (j * S + s[:, None]) * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0
    )
    for r in tl.static_range(R):
        d = tl.load(d_at + (e * R + r) * S + s, mask=s < S, other=0.0)
        f_row = e * F + tl.load(factor_at + r)
        f = tl.load(f_at + (f_row * 2 + side) * C + c, mask=c < C, other=0.0)
        x = f * tl.sum(d[:, None] * h, axis=0)
        tl.store(x_at + ((e * R + r) * 2 + side) * C + c, x, mask=c < C)


@triton.jit
def to_frames_back(
    d_at, h_at, f_at, rows_at, source_at, target_at, first, g_at, dd_at, df_at, C,
    F: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the derivatives of `to_frames` by d and f for g, those by x; ``rows [F, 2]`` share factors."""
    e = tl.program_id(0).to(tl.int64)
    c, s = tl.arange(0, BC), tl.arange(0, BS)
    inside = (s < S)[:, None] & (c < C)[None, :]
    j, i = tl.load(source_at + e), tl.load(target_at + e) + first
    h_j = tl.load(h_at + (j * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
    h_i = tl.load(h_at + (i * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
    for k in tl.static_range(F):
        f_row = (e * F + k) * 2 * C + c
        f_j = tl.load(f_at + f_row, mask=c < C, other=0.0)
        f_i = tl.load(f_at + f_row + C, mask=c < C, other=0.0)
        df_j, df_i = f_j * 0, f_i * 0
        for side in tl.static_range(2):
            r = tl.load(rows_at + 2 * k + side)
            if r >= 0:
                g_row = (e * R + r) * 2 * C + c
                g_j = tl.load(g_at + g_row, mask=c < C, other=0.0)
                g_i = tl.load(g_at + g_row + C, mask=c < C, other=0.0)
                d = tl.load(d_at + (e * R + r) * S + s, mask=s < S, other=0.0)
                df_j += g_j * tl.sum(d[:, None] * h_j, axis=0)
                df_i += g_i * tl.sum(d[:, None] * h_i, axis=0)
                dd = tl.sum((g_j * f_j)[None, :] * h_j + (g_i * f_i)[None, :] * h_i, axis=1)
                tl.store(dd_at + (e * R + r) * S + s, dd, mask=s < S)
        tl.store(df_at + f_row, df_j, mask=c < C)
        tl.store(df_at + f_row + C, df_i, mask=c < C)


@triton.jit
def from_frames(
    d_at, D, x_at, f_at, factor_at, column, W, first_at, order_at, h_at, C, F,
    R: tl.constexpr, S: tl.constexpr, SCALED: tl.constexpr, ORDERED: tl.constexpr, BS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Store h_is = sum_e sum_r d_ers x_er over the edges e of each atom."""
    i = tl.program_id(0).to(tl.int64)
    c, s = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BS)
    begin, end = tl.load(first_at + i), tl.load(first_at + i + 1)
    total = tl.zeros((BS, BC), h_at.dtype.element_ty)
    for step in range(0, (end - begin).to(tl.int32)):
        e = tl.load(order_at + begin + step) if ORDERED else begin + step
        for r in tl.static_range(R):
            x = tl.load(x_at + (e * R + r) * W + column + c, mask=c < C, other=0.0)
            if SCALED:
                f_row = e * F + tl.load(factor_at + r)
                x *= tl.load(f_at + f_row * W + column + c, mask=c < C, other=0.0)
            total += tl.load(d_at + e * D + r * S + s, mask=s < S, other=0.0)[:, None] * x[None, :]
    tl.store(h_at + (i * S + s[:, None]) * C + c[None, :], total, mask=(s < S)[:, None] & (c < C)[None, :])


@triton.jit
def from_frames_back(
    d_at, D, x_at, g_at, target_at, dd_at, dx_at, C,
    R: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the derivatives of `from_frames` by d and x, not scaled, for those by h, ``g [n, S, C]``."""
    e = tl.program_id(0).to(tl.int64)
    c, s = tl.arange(0, BC), tl.arange(0, BS)
    i = tl.load(target_at + e)
    g = tl.load(
        g_at + (i * S + s[:, None]) * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0
    )
    for r in tl.static_range(R):
        row = (e * R + r) * C + c
        d = tl.load(d_at + e * D + r * S + s, mask=s < S, other=0.0)
        x = tl.load(x_at + row, mask=c < C, other=0.0)
        tl.store(dx_at + row, tl.sum(d[:, None] * g, axis=0), mask=c < C)
        tl.store(dd_at + (e * R + r) * S + s, tl.sum(x[None, :] * g, axis=1), mask=s < S)
