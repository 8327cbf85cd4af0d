"""Functions of the edge length."""

import torch
from torch import Tensor

from gnnmd.nn.float64 import Float64Buffers


def envelope(distance: Tensor, r_cut: float) -> Tensor:
    """Return the polynomial cutoff (p = 5) of Gasteiger et al. (arXiv 2003.03123): 1 at 0, 0 at r_cut.

    Value, first and second derivative vanish at the cutoff.
    """
    u = distance / r_cut
    inside = 1 + u**5 * (-21 + u * (35 - 15 * u))
    return torch.where(u < 1, inside, torch.zeros_like(inside))


class GaussianBasis(Float64Buffers):
    """Gaussians of the distance, centres uniform on [0, r_cut], width two spacings.

    Args:
        r_cut: cutoff, Angstrom.
        n_basis: number of Gaussians, at least 2.
    """

    centres: Tensor

    def __init__(self, r_cut: float, n_basis: int):
        super().__init__()
        self.width = 2 * r_cut / (n_basis - 1)
        centres = torch.linspace(0, r_cut, n_basis, dtype=torch.float64)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """Return ``[E, n_basis]`` of distances ``[E]``, Angstrom."""
        u = (distance[:, None] - self.centres.to(distance.dtype)) / self.width
        return torch.exp(-0.5 * u * u)
