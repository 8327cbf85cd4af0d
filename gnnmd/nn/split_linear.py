"""A linear map of concatenated inputs, applied to one of them at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.resnet_mlp import dense


class SplitLinear(nn.Module):
    """W [x_0, x_1, ...] + b as a sum of parts; what acts on atoms is computed per atom and then gathered.

    Args:
        widths: columns of each input.
        n_out: columns of the output.
    """

    def __init__(self, widths: Sequence[int], n_out: int):
        super().__init__()
        self.widths = list(widths)
        self.linear = dense(sum(widths), n_out)

    def part(self, k: int, x: Tensor, *, bias: bool = False) -> Tensor:
        """Return W_k x ``[m, n_out]`` of the k-th input ``[m, widths[k]]``, with b if wanted."""
        weight = self.linear.weight.split(self.widths, dim=1)[k]
        return F.linear(x, weight, self.linear.bias if bias else None)

    def add_part(self, k: int, x: Tensor, y: Tensor) -> Tensor:
        """Return y + W_k x ``[m, n_out]``, in place of y where types allow it."""
        if torch.is_autocast_enabled(x.device.type):
            return y + self.part(k, x)
        return y.addmm_(x, self.linear.weight.split(self.widths, dim=1)[k].t())
