"""Moving rows between atoms and edges."""

from typing import Any

import torch
from torch import Tensor


def rotated_rows(rotation: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """Return ``rotation[e] @ h[index[e]]``, ``[E, R, C]``.

    The gathered rows, as large as the result, are gathered again in the backward pass instead of being kept.

    Args:
        rotation: ``[E, R, S]``.
        h: ``[n, S, C]``.
        index: ``[E]`` rows of h.
    """
    return _RotatedRows.apply(rotation, h, index)


class _RotatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rotation: Tensor, h: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rotation, h, index)
        return torch.bmm(rotation, h.index_select(0, index))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rotation, h, index = ctx.saved_tensors
        d_rotation = d_h = None
        gradient = gradient.to(h.dtype)  # the product may have been taken in lower precision
        if ctx.needs_input_grad[0]:
            d_rotation = torch.bmm(gradient, h.index_select(0, index).transpose(1, 2))
        if ctx.needs_input_grad[1]:
            d_h = torch.zeros_like(h).index_add(0, index, torch.bmm(rotation.transpose(1, 2), gradient))
        return d_rotation, d_h, None
