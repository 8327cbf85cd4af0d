"""Rotation of every edge to the y axis and its Wigner matrices."""

import numpy as np
import torch
from torch import Tensor

from gnnmd.nn.float64 import Float64Buffers
from gnnmd.nn.so3 import coupling, m_major_rows, n_rows


def edge_frames(direction: Tensor) -> Tensor:
    """Return rotations ``[E, 3, 3]`` that take each unit vector ``[E, 3]`` to +y.

    The roll about y is fixed by the formula, so results are deterministic. It jumps where y changes sign and
    is smooth and free of singularities elsewhere; a model that rotates back does not see the roll.
    """
    s = torch.where(direction[:, 1] < 0, -1.0, 1.0).to(direction.dtype)
    a, b, c = s * direction[:, 0], s * direction[:, 1], direction[:, 2]
    k = 1 / (1 + b)  # b >= 0
    rows = [
        *(s * (1 - a * a * k), -s * a, -a * c * k),
        *(s * a, s * b, c),
        *(-s * a * c * k, -s * c, 1 - c * c * k),
    ]
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)


class WignerD(Float64Buffers):
    """Wigner matrices of rotations: Y_l(R p) = D_l Y_l(p).

    D_1 is R itself in the order (x, y, z); D_(l+1) is the coupling of D_1 and D_l, one product with a
    constant matrix.

    Args:
        lmax: largest degree.
        mmax: rows with larger |m| are left out.
    """

    place: Tensor

    def __init__(self, lmax: int, mmax: int):
        super().__init__()
        self.lmax = lmax
        for l in range(1, lmax):
            c = coupling(l)
            table = np.einsum("abc,xyd->axbycd", c, c).reshape(9 * (2 * l + 1) ** 2, (2 * l + 3) ** 2)
            self.register_buffer(f"table_{l + 1}", torch.tensor(table), persistent=False)
        # where the entries of [R, S] lie among those of all D_l; the last place holds a zero
        s = n_rows(lmax)
        place = torch.full((s, s), sum((2 * l + 1) ** 2 for l in range(lmax + 1)))
        start = 0
        for l in range(lmax + 1):
            block, n = slice(l * l, (l + 1) ** 2), (2 * l + 1) ** 2
            place[block, block] = torch.arange(start, start + n).reshape(2 * l + 1, 2 * l + 1)
            start += n
        self.register_buffer("place", place[m_major_rows(lmax, mmax)].flatten(), persistent=False)

    def forward(self, rotation: Tensor) -> Tensor:
        """Return ``[E, R, S]``, rows m-major and columns l-major, of rotations ``[E, 3, 3]``."""
        e = len(rotation)
        blocks = [rotation.new_ones(e, 1), rotation.reshape(e, 9)][: self.lmax + 1]
        for l in range(1, self.lmax):
            product = blocks[1][:, :, None] * blocks[l][:, None, :]  # [E, 9, (2l+1)^2]
            table = getattr(self, f"table_{l + 1}").to(rotation.dtype)
            blocks.append(product.flatten(1) @ table)
        entries = torch.cat([*blocks, rotation.new_zeros(e, 1)], dim=1)
        return entries.index_select(1, self.place).unflatten(
            1, (len(self.place) // n_rows(self.lmax), n_rows(self.lmax))
        )
