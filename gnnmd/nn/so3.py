"""Real spherical harmonics: row order, the sphere grid, linear maps per degree.

Rows are ordered l-major, row ``l^2 + l + m``; the polar axis is y, so that l = 1 is (x, y, z). A point is
``(sin b sin a, cos b, sin b cos a)``; Y_lm ~ P_l^|m|(cos b) times cos(m a) for m > 0 and sin(|m| a) for m <
0, without the Condon-Shortley sign and with the integral of Y^2 over the sphere equal to 1.
"""

from collections.abc import Sequence
from functools import cache
from math import factorial, isqrt, pi, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.float64 import Float64Buffers


def n_rows(lmax: int) -> int:
    """Return the number of coefficients S = (lmax + 1)^2."""
    return (lmax + 1) ** 2


def degrees(lmax: int) -> list[int]:
    """Return the degree l of each of the S rows."""
    return [l for l in range(lmax + 1) for _ in range(2 * l + 1)]


def m_major_rows(lmax: int, mmax: int) -> list[int]:
    """Return the l-major row of each coefficient with |m| <= mmax, in m-major order.

    The order is m = 0 (l = 0..lmax), then for m = 1..mmax: +m (l = m..lmax), -m (l = m..lmax).
    """
    orders = [0] + [sign * m for m in range(1, mmax + 1) for sign in (1, -1)]
    return [l * l + l + m for m in orders for l in range(abs(m), lmax + 1)]


def spherical_harmonics(lmax: int, beta: NDArray, alpha: NDArray) -> NDArray:
    """Return ``[P, S]`` float64 values at P points given by polar angle beta and azimuth alpha."""
    cos_b, sin_b = np.cos(beta), np.sin(beta)
    legendre: dict[tuple[int, int], NDArray] = {}
    for m in range(lmax + 1):  # P_m^m = (2m-1)!! sin^m b, then upwards in l
        legendre[m, m] = np.prod(np.arange(1.0, 2 * m, 2)) * sin_b**m
        for l in range(m + 1, lmax + 1):
            below = legendre.get((l - 2, m), np.zeros_like(cos_b))
            legendre[l, m] = ((2 * l - 1) * cos_b * legendre[l - 1, m] - (l + m - 1) * below) / (l - m)
    columns = []
    for l in range(lmax + 1):
        for m in range(-l, l + 1):
            k = abs(m)
            norm = sqrt((2 * l + 1) / (4 * pi) * factorial(l - k) / factorial(l + k) * (2 if m else 1))
            azimuth = np.cos(m * alpha) if m >= 0 else np.sin(k * alpha)
            columns.append(norm * legendre[l, k] * azimuth)
    return np.stack(columns, axis=-1)


@cache
def coupling(l: int) -> NDArray:
    """Return C ``[3, 2l+1, 2l+3]`` float64, which couples degrees 1 and l to l + 1.

    C[a, b, c] is proportional to the sphere integral of Y_1a Y_lb Y_(l+1)c and scaled so that the sum of C^2
    over a and b is 1. The integral is done by a quadrature that is exact for these polynomials.
    """
    n = l + 2
    cos_b, weight = np.polynomial.legendre.leggauss(n)
    alpha = 2 * pi * np.arange(2 * n + 1) / (2 * n + 1)
    beta, alpha = (x.ravel() for x in np.meshgrid(np.arccos(cos_b), alpha, indexing="ij"))
    y = spherical_harmonics(l + 1, beta, alpha)
    weight = np.repeat(weight, 2 * n + 1)
    lower, same, upper = y[:, 1:4], y[:, l * l : (l + 1) ** 2], y[:, (l + 1) ** 2 :]
    integral = np.einsum("p,pa,pb,pc->abc", weight, lower, same, upper)
    return integral / np.sqrt((integral**2).sum(axis=(0, 1)))


def split_degrees(x: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each degree, ``[n, 2l + 1, C]``, of ``[n, S, C]``."""
    return x.split([2 * l + 1 for l in range(isqrt(x.shape[1]))], dim=1)


class SphereGrid(Float64Buffers):
    """Coefficients to values on a grid of the sphere and back.

    Polar angles b_k = pi (k + 1/2) / n_beta with the weights of Driscoll and Healy (1994), azimuths uniform.

    Args:
        lmax: largest degree.
        rows: l-major rows of the coefficients that are given, in their order.
        n_beta: number of polar angles, even.
        n_alpha: number of azimuths.
        row_scale: factor of each coefficient, applied both ways.
    """

    to_grid: Tensor
    from_grid: Tensor

    def __init__(
        self, lmax: int, rows: list[int], n_beta: int, n_alpha: int, row_scale: NDArray | None = None
    ):
        super().__init__()
        beta = pi * (np.arange(n_beta) + 0.5) / n_beta
        alpha = 2 * pi * np.arange(n_alpha) / n_alpha
        odd = 2 * np.arange(n_beta // 2) + 1
        weight = (4 / n_beta) * np.sin(beta) * (np.sin(odd * beta[:, None]) / odd).sum(axis=1)
        points = np.meshgrid(beta, alpha, indexing="ij")
        y = spherical_harmonics(lmax, points[0].ravel(), points[1].ravel())[:, rows]  # [G, R]
        if row_scale is not None:
            y = y * row_scale
        self.register_buffer("to_grid", torch.tensor(y), persistent=False)
        quadrature = (2 * pi / n_alpha) * np.repeat(weight, n_alpha)[:, None] * y
        self.register_buffer("from_grid", torch.tensor(quadrature.T), persistent=False)

    def to_values(self, x: Tensor) -> Tensor:
        """Return values ``[..., G, C]`` of coefficients ``[..., R, C]``."""
        return torch.matmul(self.to_grid.to(x.dtype), x)

    def to_coefficients(self, f: Tensor) -> Tensor:
        """Return coefficients ``[..., R, C]`` of values ``[..., G, C]``."""
        return torch.matmul(self.from_grid.to(f.dtype), f)


class SO3Linear(nn.Module):
    """One linear map of the channels per degree; a bias on l = 0 only.

    Args:
        lmax: largest degree.
        c_in: channels of the input.
        c_out: channels of the output.
    """

    def __init__(self, lmax: int, c_in: int, c_out: int):
        super().__init__()
        bound = 1 / sqrt(c_in)
        self.lmax = lmax
        self.weight = nn.Parameter(torch.empty(lmax + 1, c_out, c_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Map ``[n, 2l + 1, c_in]`` of each degree to ``[n, 2l + 1, c_out]``."""
        biases = [self.bias, *[None] * self.lmax]
        return [F.linear(xl, w, b) for xl, w, b in zip(x, self.weight, biases, strict=True)]
