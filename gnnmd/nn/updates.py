"""How a layer adds its updates to a feature (DPA-2, arXiv 2312.15492; DPA-3, arXiv 2506.01686)."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

UPDATE_STYLES = ("res_residual", "res_avg", "res_incr")
RESIDUAL_INITS = ("const", "norm")


class Update(nn.Module):
    """Combine a feature x with its updates u_1 .. u_n.

    - "res_residual": x + sum_m rho_m * u_m with learned vectors rho_m,
    - "res_avg": (x + sum_m u_m) / sqrt(n + 1),
    - "res_incr": x + sum_m u_m / sqrt(n).

    Args:
        style: one of `UPDATE_STYLES`.
        n_updates: n.
        channels: C.
        residual: first value of rho, or its standard deviation.
        residual_init: "const" or "norm".
    """

    def __init__(
        self, style: str, n_updates: int, channels: int, residual: float = 0.1, residual_init: str = "const"
    ):
        super().__init__()
        self.style = style
        self.rho = None
        if style == "res_residual":
            start = torch.full((n_updates, channels), residual)
            if residual_init == "norm":
                start = residual * torch.randn(n_updates, channels)
            self.rho = nn.Parameter(start)

    def forward(self, x: Tensor, updates: Sequence[Tensor]) -> Tensor:
        """Return ``[m, C]`` of x ``[m, C]`` and its updates, each ``[m, C]``, in order."""
        if self.rho is not None:
            for m, update in enumerate(updates):
                x = self.add(x, m, update)
            return x
        total = sum(updates[1:], updates[0])
        if self.style == "res_avg":
            return (x + total) / sqrt(len(updates) + 1)
        return x + total / sqrt(len(updates))

    def add(self, x: Tensor, m: int, update: Tensor) -> Tensor:
        """Return x + rho_m * u_m ("res_residual" only), for layers that go on with it before the next one."""
        assert self.rho is not None
        return torch.addcmul(x, self.rho[m], update)
