"""Z-order keys: one number per atom such that atoms near in space are mostly near in number."""

import torch
from torch import Tensor

#: Bits of a key; with the sign this fills an int64.
BITS = 63


def morton_keys(u: Tensor, edge: Tensor, system: Tensor) -> Tensor:
    """Return ``[n]`` int64 keys in [0, 2^63).

    The next bit always comes from the axis along which the cells of the curve are longest in Angstrom, so
    that they stay as cubic as the box allows. Scaling every axis to its own extent is up to 27 times worse on
    rods.

    Args:
        u: ``[n, 3]`` coordinates in [0, 1) of the occupied box.
        edge: ``[B, 3]`` edges of the box, Angstrom.
        system: ``[n]`` int64.
    """
    axis = _schedule(edge)  # [B, 63]
    x = u.clone()
    key = torch.zeros_like(system)
    rows = torch.arange(len(u), device=u.device)
    for bit in range(BITS):
        a = axis[system, bit]
        twice = 2 * x[rows, a]
        one = twice >= 1
        x[rows, a] = twice - one.to(x.dtype)  # exact: a subtraction of nearby floats
        key = 2 * key + one
    return key


def _schedule(edge: Tensor) -> Tensor:
    """Return ``[B, 63]`` the axis each bit of the key is taken from."""
    length = edge.clone()
    taken = []
    for _ in range(BITS):
        axis = length.argmax(1, keepdim=True)
        length.scatter_(1, axis, length.gather(1, axis) / 2)
        taken.append(axis)
    return torch.cat(taken, 1)
