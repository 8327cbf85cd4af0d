"""Kernels in Triton for `gnnmd.nn.edge_operations`.

A program is one warp. It owns an edge, or a degree of an atom and walks through its edges in a fixed order,
so that sums do not depend on timing. Rotations are read where they can differ from zero, between rows of one
degree.

Rows in the frame of an edge are three tensors ``x0 [E, N[0] * W]``, x1 and x2, one per order m; N is 0 for
orders that do not exist. Within an order the row of degree l and +m (sign 0) comes before that of -m (sign
1), and l is the fastest. The two share a factor.

Names: ``d [E, R, S]`` rotations with a distance D between edges; ``f [E, F, W]`` factors; e counts edges, i
and j atoms, s rows of atoms, c columns.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _orders(l, N):
    """Return how many orders have rows of degree l."""
    return 1 + (l >= 1 and N[1] > 0) + (l >= 2 and N[2] > 0)


@triton.constexpr_function
def _factor(l, m, N):
    """Return the place of a factor among those of all orders."""
    return (l, N[0] + l - 1, N[0] + N[1] // 2 + l - 2)[m]


@triton.constexpr_function
def _row(l, m, sign, N):
    """Return the place of a row among those of all orders."""
    return (l, N[0] + sign * (N[1] // 2) + l - 1, N[0] + N[1] + sign * (N[2] // 2) + l - 2)[m]


@triton.constexpr_function
def _padded(l):
    """Return the next power of two of 2 l + 1."""
    return 1 << (2 * l).bit_length()


@triton.jit
def _at(x0, x1, x2, e, l: tl.constexpr, m: tl.constexpr, sign: tl.constexpr, W, N: tl.constexpr):
    """Return where a row of edge e begins."""
    if m == 0:
        at = x0 + (e * N[0] + l) * W
    elif m == 1:
        at = x1 + (e * N[1] + sign * (N[1] // 2) + l - 1) * W
    else:
        at = x2 + (e * N[2] + sign * (N[2] // 2) + l - 2) * W
    return at


@triton.jit
def to_frames(
    d_at, h_at, f_at, source_at, target_at, first, x0, x1, x2, C,
    N: tl.constexpr, F: tl.constexpr, R: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store x_er = f_e sum_s d_ers h_js, of the source in the first C columns, of the target in the next."""
    e, side = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tl.load(source_at + e) if side == 0 else tl.load(target_at + e) + first
    for l in tl.static_range(L + 1):
        a = tl.arange(0, _padded(l))
        s, here = l * l + a, a < 2 * l + 1
        inside = here[:, None] & (c < C)[None, :]
        h = tl.load(h_at + (j * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
        for m in tl.static_range(_orders(l, N)):
            f = tl.load(f_at + ((e * F + _factor(l, m, N)) * 2 + side) * C + c, mask=c < C, other=0.0)
            for sign in tl.static_range(1 + (m > 0)):
                d = tl.load(d_at + (e * R + _row(l, m, sign, N)) * S + s, mask=here, other=0.0)
                x = f * tl.sum(d[:, None] * h, axis=0)
                tl.store(_at(x0, x1, x2, e, l, m, sign, 2 * C, N) + side * C + c, x, mask=c < C)


@triton.jit
def to_frames_back(
    d_at, h_at, f_at, source_at, target_at, first, g0, g1, g2, dd_at, df_at, C,
    N: tl.constexpr, F: tl.constexpr, R: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the derivatives of `to_frames` by d and f for g, those by x."""
    e = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    j, i = tl.load(source_at + e), tl.load(target_at + e) + first
    for l in tl.static_range(L + 1):
        a = tl.arange(0, _padded(l))
        s, here = l * l + a, a < 2 * l + 1
        inside = here[:, None] & (c < C)[None, :]
        h_j = tl.load(h_at + (j * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
        h_i = tl.load(h_at + (i * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
        for m in tl.static_range(_orders(l, N)):
            f_row = (e * F + _factor(l, m, N)) * 2 * C + c
            f_j = tl.load(f_at + f_row, mask=c < C, other=0.0)
            f_i = tl.load(f_at + f_row + C, mask=c < C, other=0.0)
            df_j, df_i = f_j * 0, f_i * 0
            for sign in tl.static_range(1 + (m > 0)):
                g = _at(g0, g1, g2, e, l, m, sign, 2 * C, N) + c
                g_j, g_i = tl.load(g, mask=c < C, other=0.0), tl.load(g + C, mask=c < C, other=0.0)
                d_row = (e * R + _row(l, m, sign, N)) * S + s
                d = tl.load(d_at + d_row, mask=here, other=0.0)
                df_j += g_j * tl.sum(d[:, None] * h_j, axis=0)
                df_i += g_i * tl.sum(d[:, None] * h_i, axis=0)
                dd = tl.sum((g_j * f_j)[None, :] * h_j + (g_i * f_i)[None, :] * h_i, axis=1)
                tl.store(dd_at + d_row, dd, mask=here)
            tl.store(df_at + f_row, df_j, mask=c < C)
            tl.store(df_at + f_row + C, df_i, mask=c < C)


@triton.jit
def from_frames(
    d_at, D, x0, x1, x2, f_at, column, W, first_at, order_at, h_at, C,
    N: tl.constexpr, F: tl.constexpr, S: tl.constexpr, L: tl.constexpr, SCALED: tl.constexpr,
    ORDERED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store h_is = sum_e sum_r d_ers x_er over the edges e of each atom; x times its factors if SCALED.

    Of the W columns of x, and of its factors, C from ``column`` on are meant.
    """
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    begin, end = tl.load(first_at + i), tl.load(first_at + i + 1)
    for l in tl.static_range(L + 1):
        if tl.program_id(2) == L - l:  # those with most rows begin first
            a = tl.arange(0, _padded(l))
            s, here = l * l + a, a < 2 * l + 1
            total = tl.zeros((_padded(l), BC), h_at.dtype.element_ty)
            for step in range(0, (end - begin).to(tl.int32)):
                e = tl.load(order_at + begin + step) if ORDERED else begin + step
                for m in tl.static_range(_orders(l, N)):
                    if SCALED:
                        f_row = (e * F + _factor(l, m, N)) * W
                        f = tl.load(f_at + f_row + column + c, mask=c < C, other=0.0)
                    for sign in tl.static_range(1 + (m > 0)):
                        row = _at(x0, x1, x2, e, l, m, sign, W, N)
                        x = tl.load(row + column + c, mask=c < C, other=0.0)
                        if SCALED:
                            x *= f
                        d = tl.load(d_at + e * D + _row(l, m, sign, N) * S + s, mask=here, other=0.0)
                        total += d[:, None] * x[None, :]
            rows = h_at + (i * S + s[:, None]) * C
            tl.store(rows + c[None, :], total, mask=here[:, None] & (c < C)[None, :])


@triton.jit
def from_frames_back(
    d_at, D, x0, x1, x2, g_at, target_at, dd_at, dx0, dx1, dx2, C,
    N: tl.constexpr, R: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the derivatives of `from_frames` by d and x, not scaled, for those by h, ``g [n, S, C]``."""
    e = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    i = tl.load(target_at + e)
    for l in tl.static_range(L + 1):
        a = tl.arange(0, _padded(l))
        s, here = l * l + a, a < 2 * l + 1
        inside = here[:, None] & (c < C)[None, :]
        g = tl.load(g_at + (i * S + s[:, None]) * C + c[None, :], mask=inside, other=0.0)
        for m in tl.static_range(_orders(l, N)):
            for sign in tl.static_range(1 + (m > 0)):
                d = tl.load(d_at + e * D + _row(l, m, sign, N) * S + s, mask=here, other=0.0)
                x = tl.load(_at(x0, x1, x2, e, l, m, sign, C, N) + c, mask=c < C, other=0.0)
                dx, dd = tl.sum(d[:, None] * g, axis=0), tl.sum(x[None, :] * g, axis=1)
                tl.store(_at(dx0, dx1, dx2, e, l, m, sign, C, N) + c, dx, mask=c < C)
                tl.store(dd_at + (e * R + _row(l, m, sign, N)) * S + s, dd, mask=here)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.constexpr_function
def _gate(l, L):
    """Return where the gate of a degree is; scalars, which come after all gates, are their own."""
    return L if l == 0 else l - 1


@triton.jit
def gated(y0, y1, y2, x0, x1, x2, C, N: tl.constexpr, L: tl.constexpr, BC: tl.constexpr):
    """Store SiLU of the scalars, and of the other rows y sigmoid(gate of their degree).

    N counts the rows of x; y0 begins with the gates of degrees 1 to L.
    """
    e = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    gates, rows = y0 + e * (2 * L + 1) * C + c, y0 + (e + 1) * L * C
    for l in tl.static_range(L + 1):
        gate = _sigmoid(tl.load(gates + _gate(l, L) * C, mask=c < C, other=0.0))
        for m in tl.static_range(_orders(l, N)):
            for sign in tl.static_range(1 + (m > 0)):
                y = tl.load(_at(rows, y1, y2, e, l, m, sign, C, N) + c, mask=c < C, other=0.0)
                tl.store(_at(x0, x1, x2, e, l, m, sign, C, N) + c, y * gate, mask=c < C)


@triton.jit
def gated_back(
    y0, y1, y2, g0, g1, g2, dy0, dy1, dy2, C, N: tl.constexpr, L: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Store the derivatives of `gated` by y for g, those by x."""
    e = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    gates = e * (2 * L + 1) * C + c
    y = tl.load(y0 + gates + L * C, mask=c < C, other=0.0)
    g = tl.load(g0 + e * N[0] * C + c, mask=c < C, other=0.0)
    gate = _sigmoid(y)
    tl.store(dy0 + gates + L * C, g * gate * (1 + y * (1 - gate)), mask=c < C)
    rows, drows = y0 + (e + 1) * L * C, dy0 + (e + 1) * L * C
    for l in tl.static_range(1, L + 1):
        gate = _sigmoid(tl.load(y0 + gates + (l - 1) * C, mask=c < C, other=0.0))
        total = gate * 0
        for m in tl.static_range(_orders(l, N)):
            for sign in tl.static_range(1 + (m > 0)):
                y = tl.load(_at(rows, y1, y2, e, l, m, sign, C, N) + c, mask=c < C, other=0.0)
                g = tl.load(_at(g0, g1, g2, e, l, m, sign, C, N) + c, mask=c < C, other=0.0)
                tl.store(_at(drows, dy1, dy2, e, l, m, sign, C, N) + c, g * gate, mask=c < C)
                total += g * y
        tl.store(dy0 + gates + (l - 1) * C, total * gate * (1 - gate), mask=c < C)


@triton.jit
def _centred(x_at, power_at, C, EPS: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    """Return the rows of an atom with scalars of mean 0, and the root mean square of each with eps."""
    s, c = tl.arange(0, BS), tl.arange(0, BC)
    inside = (s < S)[:, None] & (c < C)[None, :]
    x = tl.load(x_at + s[:, None] * C + c[None, :], mask=inside, other=0.0)
    x = tl.where(inside & (s == 0)[:, None], x - (tl.sum(x, axis=1) / C)[:, None], x)
    pairs = (s < S)[:, None] & (s < S)[None, :]
    share = tl.load(power_at + s[:, None] * S + s[None, :], mask=pairs, other=0.0)
    return x, tl.sqrt(tl.sum((tl.sum(x * x, axis=1) / C)[:, None] * share, axis=0) + EPS), share


@triton.jit
def degree_norm(
    x_at, weight_at, degree_at, power_at, bias_at, each, y_at, C,
    EPS: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the rows of an atom over their root mean square, times weights, plus a bias of the scalars."""
    n = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, BS), tl.arange(0, BC)
    x, width, _ = _centred(x_at + n * S * C, power_at, C, EPS, S, BS, BC)
    degree = tl.load(degree_at + s, mask=s < S, other=0)
    weight = tl.load(weight_at + degree[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
    bias = tl.load(bias_at + n * each * C + c, mask=c < C, other=0.0)
    y = x / width[:, None] * weight + tl.where((s == 0)[:, None], bias[None, :], 0.0)
    tl.store(y_at + (n * S + s[:, None]) * C + c[None, :], y, mask=(s < S)[:, None] & (c < C)[None, :])


@triton.jit
def degree_norm_back(
    x_at, weight_at, degree_at, power_at, g_at, each, dx_at, C,
    EPS: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store the derivative of `degree_norm` by x for g, that by y."""
    n = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, BS), tl.arange(0, BC)
    rows = (n * S + s[:, None]) * C + c[None, :]
    inside = (s < S)[:, None] & (c < C)[None, :]
    x, width, share = _centred(x_at + n * S * C, power_at, C, EPS, S, BS, BC)
    degree = tl.load(degree_at + s, mask=s < S, other=0)
    g = tl.load(g_at + rows, mask=inside, other=0.0)
    g = g * tl.load(weight_at + degree[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
    by_width = tl.sum(g * x, axis=1) / (width * width * width)
    dx = g / width[:, None] - x * (tl.sum(share * by_width[None, :], axis=1) / C)[:, None]
    dx = tl.where(inside & (s == 0)[:, None], dx - (tl.sum(dx, axis=1) / C)[:, None], dx)
    tl.store(dx_at + rows, dx, mask=inside)


@triton.jit
def activated_norm(x_at, weight_at, bias_at, y_at, E, C, eps, BE: tl.constexpr, BC: tl.constexpr):
    """Store SiLU of rows with mean 0 and variance 1, times weight plus bias."""
    e, c = (tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE))[:, None], tl.arange(0, BC)[None, :]
    inside = (e < E) & (c < C)
    x = tl.load(x_at + e * C + c, mask=inside, other=0.0)
    x = tl.where(inside, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    y = x / tl.sqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
    y = y * tl.load(weight_at + c, mask=c < C, other=0.0) + tl.load(bias_at + c, mask=c < C, other=0.0)
    tl.store(y_at + e * C + c, y * _sigmoid(y), mask=inside)


@triton.jit
def activated_norm_back(
    x_at, weight_at, bias_at, g_at, dx_at, E, C, eps, BE: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Store the derivative of `activated_norm` by x for g, that by y."""
    e, c = (tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE))[:, None], tl.arange(0, BC)[None, :]
    inside = (e < E) & (c < C)
    x = tl.load(x_at + e * C + c, mask=inside, other=0.0)
    x = tl.where(inside, x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    width = tl.sqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
    x = x / width
    weight = tl.load(weight_at + c, mask=c < C, other=0.0)
    y = x * weight + tl.load(bias_at + c, mask=c < C, other=0.0)
    gate = _sigmoid(y)
    g = tl.load(g_at + e * C + c, mask=inside, other=0.0) * gate * (1 + y * (1 - gate)) * weight
    g = tl.where(inside, g - (tl.sum(g, axis=1) / C)[:, None] - x * (tl.sum(g * x, axis=1) / C)[:, None], 0.0)
    tl.store(dx_at + e * C + c, g / width, mask=inside)
