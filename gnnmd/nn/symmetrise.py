"""Invariants from sums of vectors times features (DPA-2, arXiv 2312.15492; DPA-3, arXiv 2506.01686)."""

import torch
from torch import Tensor


def symmetrised(g: Tensor, axis: int) -> Tensor:
    """Return (G[:, :axis]^T G) / 3 flattened row by row, ``[n, axis * C]``.

    Args:
        g: ``[n, 3, C]``, G_i = sum_j h_ij (x) x_ij of vectors and features of the edges.
        axis: columns on the left.
    """
    return torch.einsum("nxa,nxc->nac", g[:, :, :axis], g).flatten(1) / 3
