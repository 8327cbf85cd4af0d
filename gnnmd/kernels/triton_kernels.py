"""Kernels in Triton: the loops of `gnnmd.nn.scatter`, and SiLUT before and after them.

Every sum is made by one program that walks through the rows of its group, so that results do not depend on
timing. Rows of features are read whole; rows of atoms, which are gathered, mostly come from the cache.

Names: ``w [E, K]``, ``x [E, C]`` or rows that are gathered, ``s [n, K, C]``; e counts rows, i groups. T,
SLOPE and TOP are the threshold of `gnnmd.nn.activations.silut`, the slope there and the value there.
"""

import triton
import triton.language as tl


@triton.jit
def silut(x, T: tl.constexpr, SLOPE: tl.constexpr, TOP: tl.constexpr):
    """Return `gnnmd.nn.activations.silut`."""
    low = x / (1 + tl.exp(-x))
    high = (TOP + 1) - 2 / (1 + tl.exp(2 * SLOPE * (x - T)))
    return tl.where(x < T, low, high)


@triton.jit
def silut_slope(x, T: tl.constexpr, SLOPE: tl.constexpr):
    """Return its derivative."""
    sigmoid = 1 / (1 + tl.exp(-x))
    tanh = 1 - 2 / (1 + tl.exp(2 * SLOPE * (x - T)))
    return tl.where(x < T, sigmoid * (1 + x * (1 - sigmoid)), SLOPE * (1 - tanh * tanh))


@triton.jit
def activate(x_at, y_at, n, T: tl.constexpr, SLOPE: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Store y = silut(x), ``[n]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, mask=at < n, other=0.0)
    tl.store(y_at + at, silut(x, T, SLOPE, TOP), mask=at < n)


@triton.jit
def activate_back(x_at, g_at, dx_at, n, T: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    """Store dx = g silut'(x), ``[n]``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, mask=at < n, other=0.0)
    g = tl.load(g_at + at, mask=at < n, other=0.0)
    tl.store(dx_at + at, g * silut_slope(x, T, SLOPE), mask=at < n)


@triton.jit
def sums(
    w_at,
    x_at,
    first_at,
    order_at,
    rows_at,
    s_at,
    C,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    GATHERED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    T: tl.constexpr,
    SLOPE: tl.constexpr,
    TOP: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    """Store s_ik = sum_e w_ek x_e over the rows e of group i; w = 1 unless WEIGHTED; silut(x) on wish."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, BK)
    begin, end = tl.load(first_at + i), tl.load(first_at + i + 1)
    total = tl.zeros((BE, BK, BC), s_at.dtype.element_ty)
    for step in range(0, ((end - begin + BE - 1) // BE).to(tl.int32)):
        place = begin + step * BE + tl.arange(0, BE)
        valid = place < end
        e = tl.load(order_at + place, mask=valid, other=0) if ORDERED else place
        row = tl.load(rows_at + e, mask=valid, other=0) if GATHERED else e
        x = tl.load(x_at + row[:, None] * C + c[None, :], mask=valid[:, None] & (c < C)[None, :], other=0.0)
        if ACTIVATED:
            x = silut(x, T, SLOPE, TOP)
        if WEIGHTED:
            w_mask = valid[:, None] & (k < K)[None, :]
            w = tl.load(w_at + e[:, None] * K + k[None, :], mask=w_mask, other=0.0)
            total += w[:, :, None] * x[:, None, :]
        else:
            total += x[:, None, :]
    at = s_at + (i * K + k[:, None]) * C + c[None, :]
    tl.store(at, tl.sum(total, axis=0), mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit
def spread(w_at, s_at, index_at, x_at, E, C, K: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr):
    """Store x_e = sum_k w_ek s_ik with i the group of e."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (e < E)[:, None] & (c < C)[None, :]
    i = tl.load(index_at + e, mask=e < E, other=0)
    x = tl.zeros((BE, BC), x_at.dtype.element_ty)
    for k in tl.static_range(K):
        w = tl.load(w_at + e * K + k, mask=e < E, other=0.0)
        x += w[:, None] * tl.load(s_at + (i * K + k)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(x_at + e[:, None] * C + c[None, :], x, mask=mask)


@triton.jit
def spread_sums(
    w_at,
    s_at,
    index_at,
    first_at,
    order_at,
    x_at,
    C,
    K: tl.constexpr,
    ORDERED: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    """Store x_j = sum_e sum_k w_ek s_ik over the rows e of group j of other groups, with i the group of e."""
    j = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin, end = tl.load(first_at + j), tl.load(first_at + j + 1)
    total = tl.zeros((BE, BC), x_at.dtype.element_ty)
    for step in range(0, ((end - begin + BE - 1) // BE).to(tl.int32)):
        place = begin + step * BE + tl.arange(0, BE)
        valid = place < end
        mask = valid[:, None] & (c < C)[None, :]
        e = tl.load(order_at + place, mask=valid, other=0) if ORDERED else place
        i = tl.load(index_at + e, mask=valid, other=0)
        for k in tl.static_range(K):
            w = tl.load(w_at + e * K + k, mask=valid, other=0.0)
            total += w[:, None] * tl.load(s_at + (i * K + k)[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(x_at + j * C + c, tl.sum(total, axis=0), mask=c < C)


@triton.jit
def dots(
    x_at,
    s_at,
    index_at,
    rows_at,
    w_at,
    E,
    C,
    K: tl.constexpr,
    GATHERED: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    """Store w_ek = sum_c x_ec s_ikc with i the group of e."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.arange(0, BC)
    mask = (e < E)[:, None] & (c < C)[None, :]
    i = tl.load(index_at + e, mask=e < E, other=0)
    row = tl.load(rows_at + e, mask=e < E, other=0) if GATHERED else e
    x = tl.load(x_at + row[:, None] * C + c[None, :], mask=mask, other=0.0)
    for k in tl.static_range(K):
        s = tl.load(s_at + (i * K + k)[:, None] * C + c[None, :], mask=mask, other=0.0)
        tl.store(w_at + e * K + k, tl.sum(x * s, axis=1), mask=e < E)


@triton.jit
def activated_sums_back(
    w_at,
    x_at,
    g_at,
    index_at,
    dw_at,
    dx_at,
    E,
    C,
    T: tl.constexpr,
    SLOPE: tl.constexpr,
    TOP: tl.constexpr,
    BC: tl.constexpr,
    BE: tl.constexpr,
):
    """Store dw_e = sum_c silut(x_ec) g_ic and dx_e = w_e silut'(x_e) g_i, of sums with one weight."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.arange(0, BC)
    mask = (e < E)[:, None] & (c < C)[None, :]
    i = tl.load(index_at + e, mask=e < E, other=0)
    w = tl.load(w_at + e, mask=e < E, other=0.0)
    x = tl.load(x_at + e[:, None] * C + c[None, :], mask=mask, other=0.0)
    g = tl.load(g_at + i[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(dw_at + e, tl.sum(silut(x, T, SLOPE, TOP) * g, axis=1), mask=e < E)
    tl.store(dx_at + e[:, None] * C + c[None, :], w[:, None] * silut_slope(x, T, SLOPE) * g, mask=mask)


@triton.jit
def pair_rows(x_at, i_at, y_at, j_at, z_at, E, C, BC: tl.constexpr, BE: tl.constexpr):
    """Store z_e = x_i + y_j with (i, j) the pair e."""
    e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (e < E)[:, None] & (c < C)[None, :]
    i, j = tl.load(i_at + e, mask=e < E, other=0), tl.load(j_at + e, mask=e < E, other=0)
    x = tl.load(x_at + i[:, None] * C + c[None, :], mask=mask, other=0.0)
    y = tl.load(y_at + j[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(z_at + e[:, None] * C + c[None, :], x + y, mask=mask)
