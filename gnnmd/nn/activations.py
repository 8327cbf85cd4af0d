"""Nonlinearities: of spherical-harmonic features, and element-wise ones by name."""

from collections.abc import Callable, Sequence
from functools import partial
from math import exp

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.so3 import SphereGrid, degrees, m_major_rows, n_rows


def degree_gate(x: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    """Return SiLU of the scalars, and every degree > 0 times the sigmoid of a gate of its own per channel.

    Args:
        x: ``[n, 2l + 1, H]`` of each degree.
        gates: ``[n, lmax * H]`` before the sigmoid, degree slow.
    """
    gates = torch.sigmoid(gates).unflatten(1, (len(x) - 1, 1, x[0].shape[2]))
    return [F.silu(x[0]), *(xl * gate for xl, gate in zip(x[1:], gates.unbind(1), strict=True))]


class SphereSiLU(nn.Module):
    """SiLU of the function on the sphere that the features describe; scalars come from numbers of their own.

    On a grid this is equivariant only up to aliasing, and in the frame of an edge it depends on the roll.

    Args:
        lmax: largest degree.
        mmax: largest order.
        channels: H.
        resolution: polar and azimuthal points, or None for the smallest grid.
    """

    def __init__(self, lmax: int, mmax: int, channels: int, resolution: int | None = None):
        super().__init__()
        self.extra = self.channels = channels
        rows = m_major_rows(lmax, mmax)
        n_alpha = 2 * mmax + 1 if mmax < lmax else 2 * mmax + 3
        degree = torch.tensor(degrees(lmax))[rows].to(torch.float64)
        # the missing orders of l > mmax are made up for by a larger amplitude of those that are there
        scale = torch.where(degree > mmax, (2 * degree + 1) / (2 * mmax + 1), 1.0).sqrt()
        self.grid = SphereGrid(lmax, rows, resolution or 2 * (lmax + 1), resolution or n_alpha, scale.numpy())

    def forward(self, y: list[Tensor]) -> list[Tensor]:
        """Apply to features whose m = 0 begins with ``extra`` numbers that become the row l = 0."""
        scalars, features = torch.cat(y, dim=1).tensor_split([self.extra], dim=1)
        values = self.grid.to_values(features.unflatten(1, (-1, self.channels)))
        x = self.grid.to_coefficients(F.silu(values)).flatten(1)
        x = torch.cat([F.silu(scalars), x[:, self.channels :]], dim=1)
        return list(x.split([y[0].shape[1] - self.extra, *(ym.shape[1] for ym in y[1:])], dim=1))


def node_grid(lmax: int, resolution: int | None = None) -> SphereGrid:
    """Return the grid for features of atoms, all rows l-major; there and back is the identity."""
    rows = list(range(n_rows(lmax)))
    return SphereGrid(lmax, rows, resolution or 2 * (lmax + 1), resolution or 2 * (lmax + 1) + 1)


def silut(x: Tensor, threshold: float = 3.0) -> Tensor:
    """Return SiLU that turns into a tanh at a threshold, so that it is bounded.

    x sigmoid(x) for x < T, and T sigmoid(T) + tanh(s (x - T)) beyond; s is the slope of SiLU at T, so that
    value and slope are continuous.

    Args:
        x: any shape.
        threshold: T > 0.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() and x.amax() < threshold:
        return F.silu(x)  # the usual case for a large T, at a third of the time
    sigmoid = 1 / (1 + exp(-threshold))
    slope = sigmoid * (1 + threshold * (1 - sigmoid))
    return F.silu(x.clamp(max=threshold)) + torch.tanh(slope * F.relu(x - threshold))


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silut": silut,
    "tanh": torch.tanh,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_tf": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "linear": _identity,
    "none": _identity,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return an element-wise function by its name, "silut:10" with a threshold; case does not matter.

    Raises:
        ValueError: a name that is not known, or a threshold that is not a positive number.
    """
    base, _, threshold = name.lower().partition(":")
    if base not in _ACTIVATIONS or (threshold and base != "silut"):
        raise ValueError(
            f"activation {name!r} is not known; use one of {', '.join(_ACTIVATIONS)}, or 'silut:T' with a "
            "threshold T"
        )
    if not threshold:
        return _ACTIVATIONS[base]
    try:
        t = float(threshold)
    except ValueError:
        t = 0.0
    if not 0 < t < float("inf"):
        raise ValueError(f"activation {name!r}: the threshold must be a positive number, as in 'silut:10'")
    return partial(silut, threshold=t)
