"""Dense layers with skips, the networks of the DeePMD family (arXiv 1805.09003, section 2)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def dense(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear map with normal weights, variance 1 / (n_in + n_out), and normal bias, variance 1."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=(n_in + n_out) ** -0.5)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


class ResidualLayer(nn.Module):
    """act(W x + b), plus x where the widths are equal, plus [x, x] where the output is twice as wide.

    Args:
        n_in: columns of the input.
        n_out: columns of the output.
        activation: element-wise function.
        bias: whether there is b.
        scaled: whether the activation is multiplied by a learned vector ``idt`` before x is added; only where
            something is added.

    Attributes:
        copies: how often x is added side by side: 0, 1 or 2.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        activation: Callable[[Tensor], Tensor],
        *,
        bias: bool = True,
        scaled: bool = False,
    ):
        super().__init__()
        self.linear = dense(n_in, n_out, bias=bias)
        self.activation = activation
        self.copies = {n_in: 1, 2 * n_in: 2}.get(n_out, 0)
        self.idt = nn.Parameter(torch.normal(0.1, 0.001, (n_out,))) if scaled and self.copies else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., n_in]`` to ``[..., n_out]``."""
        y = self.activation(self.linear(x))
        if self.idt is not None:
            y = y * self.idt
        return y + torch.cat([x] * self.copies, dim=-1) if self.copies else y


class ResNetMLP(nn.Module):
    """Residual layers in a row: an embedding network, or all but the last layer of a fitting network.

    Args:
        widths: columns of the input and of the output of every layer.
        activation: element-wise function of every layer, the last one included.
        scaled: see `ResidualLayer`.
    """

    def __init__(
        self, widths: Sequence[int], activation: Callable[[Tensor], Tensor], *, scaled: bool = False
    ):
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualLayer(*pair, activation, scaled=scaled) for pair in pairwise(widths))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., widths[0]]`` to ``[..., widths[-1]]``."""
        return self.layers(x)
