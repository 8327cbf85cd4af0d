"""Functions that switch an interaction off between two distances."""

import torch
from torch import Tensor


def poly_switch(distance: Tensor, r_smooth: float, r_cut: float) -> Tensor:
    """Return the quintic of DPA-2 (arXiv 2312.15492): 1 up to r_smooth, 0 from r_cut on.

    Value, first and second derivative are continuous.

    Args:
        distance: any shape, Angstrom.
        r_smooth: where it begins to fall, Angstrom.
        r_cut: where it vanishes, Angstrom.
    """
    u = (distance.clamp(r_smooth, r_cut) - r_smooth) / (r_cut - r_smooth)
    return 1 + u**3 * (-10 + u * (15 - 6 * u))


def exp_switch(distance: Tensor, r_smooth: float, r_cut: float) -> Tensor:
    """Return exp(-exp(20 (r - r_smooth) / r_smooth)) of DPA-3 (arXiv 2506.01686), and 0 from r_cut on.

    It is small at r_cut, but not zero (8e-7 for 5.3 and 6 Angstrom): the energy has a step there.

    Args:
        distance: any shape, Angstrom.
        r_smooth: where it is 1/e, Angstrom.
        r_cut: where it is cut off, Angstrom.
    """
    near = distance.clamp(max=r_cut)  # beyond, the inner exponential would overflow
    return torch.where(distance < r_cut, torch.exp(-torch.exp(20 * (near - r_smooth) / r_smooth)), 0.0)
