"""Invariants from sums of vectors times features (DPA-2, arXiv 2312.15492; DPA-3, arXiv 2506.01686)."""

import torch
from torch import Tensor

from gnnmd.nn.scatter import weighted_sums


def vector_sums(h: Tensor, x: Tensor, target: Tensor, n_atoms: int) -> Tensor:
    """Return G_i = sum_j h_ij (x) x_ij, ``[n_atoms, 3, C]``.

    Args:
        h: ``[E, 3]`` vectors, times what the edges are weighted by.
        x: ``[E, C]`` features.
        target: ``[E]`` atom i of each edge.
        n_atoms: number of atoms.
    """
    return weighted_sums(h, x, target, n_atoms)


def symmetrised(g: Tensor, axis: int) -> Tensor:
    """Return (G[:, :axis]^T G) / 3 flattened row by row, ``[n, axis * C]``, of sums G ``[n, 3, C]``."""
    return torch.einsum("nxa,nxc->nac", g[:, :, :axis], g).flatten(1) / 3
