"""Linear maps in the frame of an edge that commute with rotations about it (Passaro and Zitnick 2023).

Features in this frame are a list with one tensor ``[E, rows * C]`` per order, rows slow and channels fast:
for m = 0 the rows l = 0..lmax, for each m = 1..mmax the rows +m (l = m..lmax) before the rows -m.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from gnnmd.nn.experts import ExpertLinear, Routing, grouped_linear


def rows_per_order(lmax: int, mmax: int) -> list[int]:
    """Return the number of rows of each order m = 0..mmax."""
    return [lmax + 1] + [2 * (lmax - m + 1) for m in range(1, mmax + 1)]


class SO2Linear(nn.Module):
    """One linear map per order over its degrees and channels; for m > 0 it is complex, real part +m.

    Args:
        lmax: largest degree.
        mmax: largest order.
        c_in: channels of the input.
        c_out: channels of the output.
        extra: further invariant outputs.
        experts_m0: number of experts of the map of m = 0, 0 for a plain one.
        experts_m: number of experts of the other maps.
    """

    def __init__(
        self,
        lmax: int,
        mmax: int,
        c_in: int,
        c_out: int,
        *,
        extra: int = 0,
        experts_m0: int = 0,
        experts_m: int = 0,
    ):
        super().__init__()
        n0, *rows = rows_per_order(lmax, mmax)
        self.m0 = ExpertLinear(n0 * c_in, extra + n0 * c_out, experts=experts_m0)
        layers = [ExpertLinear(n // 2 * c_in, n * c_out, bias=False, experts=experts_m) for n in rows]
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(1 / sqrt(2))
        self.m = nn.ModuleList(layers)

    def forward(self, x: list[Tensor], routing: Routing | None) -> list[Tensor]:
        """Return features; those of m = 0 come after the extra invariants."""
        y = [self.m0(x[0], routing)]
        for layer, xm in zip(self.m, x[1:], strict=True):
            assert isinstance(layer, ExpertLinear)
            y.append(grouped_linear(xm, _complex(layer.weights(routing)), None, routing))
        return y


def _complex(weights: Tensor) -> Tensor:
    """Return the real matrices ``[B, 2o, 2i]`` of the complex ones ``[B, 2o, i]``, imaginary rows last."""
    real, imaginary = weights.chunk(2, dim=1)
    return torch.cat([torch.cat([real, -imaginary], dim=2), torch.cat([imaginary, real], dim=2)], dim=1)
