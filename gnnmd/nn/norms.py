"""Normalisation of spherical-harmonic features, never mixing rows of one degree."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.float64 import Float64Buffers
from gnnmd.nn.so3 import degrees, n_rows

EPS = 1e-5
NORMS = ("rms_norm_sh", "layer_norm", "layer_norm_sh")


class DegreeNorm(Float64Buffers):
    """Divide every degree by a root mean square; l = 0 is centred over the channels first.

    With p_l the mean of x^2 over the rows of degree l and the channels of one atom, degree l is divided by
    sqrt(v_l + 1e-5), where

    - "layer_norm": v_l = p_l,
    - "rms_norm_sh": v_l = the mean of p over all degrees,
    - "layer_norm_sh": v_0 = p_0, and v_l = the mean of p over the degrees > 0 for these.

    Args:
        kind: one of `NORMS`.
        lmax: largest degree.
        channels: C.
    """

    degree: Tensor
    mean_power: Tensor

    def __init__(self, kind: str, lmax: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        degree = torch.tensor(degrees(lmax))
        pooled = {"layer_norm": degree, "rms_norm_sh": 0 * degree, "layer_norm_sh": degree.clamp(max=1)}[kind]
        together = (pooled[:, None] == pooled[None, :]).to(torch.float64)  # [S, S] rows that share v
        share = together / (2 * degree + 1)[:, None]
        self.register_buffer("mean_power", share / share.sum(dim=0), persistent=False)
        self.register_buffer("degree", degree, persistent=False)
        assert len(degree) == n_rows(lmax)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Normalise ``[n, S, C]``, and add a shift ``[1 or n, C]`` to the scalars of the result."""
        others = x.shape[1] - 1
        scalars, rest = x.split([1, others], dim=1)
        x = torch.cat([scalars - scalars.mean(dim=-1, keepdim=True), rest], dim=1)
        v = (x * x).mean(dim=-1) @ self.mean_power.to(x.dtype)  # [n, S]
        bias = self.bias[None] if shift is None else self.bias + shift
        bias = F.pad(bias[:, None], (0, 0, 0, others))  # [1 or n, S, C]
        x = x * torch.rsqrt(v + EPS)[:, :, None]
        return torch.addcmul(bias, x, self.weight.index_select(0, self.degree))
