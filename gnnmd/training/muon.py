"""Muon: steps along orthogonalised momentum for weight matrices, AdamW for the other parameters."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
#: Iterations of `orthogonalised`, and the coefficients of its polynomial (K. Jordan et al., 2024).
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
#: Size of a step's numbers in learning rates, the same as AdamW's usual one (arXiv 2502.16982).
USUAL_RMS = 0.2


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups of parameters with ``muon=True``.

    Their gradients' average is replaced by the nearest matrix whose singular values are all about 1, so that
    a step moves all directions of a map alike, the weak ones too. Parameters of more than two dimensions are
    stacks of matrices; all of one shape are handled together.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        if not moving:
            return
        for p in moving:
            if not self.state[p]:  # under the names that AdamW looks for when it loads a state
                self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        gradients, averages = [p.grad for p in moving], [self.state[p]["exp_avg"] for p in moving]
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, averages, MOMENTUM)  # as Nesterov
        alike = defaultdict(list)
        for p, update in zip(moving, ahead, strict=True):
            alike[update.shape].append((p, update))
        for shape, pairs in alike.items():
            weights, updates = zip(*pairs, strict=True)
            directions = orthogonalised(torch.stack(updates)).unbind()
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            scale = USUAL_RMS * max(shape[-2:]) ** 0.5
            torch._foreach_add_(weights, directions, alpha=-group["lr"] * scale)


def orthogonalised(x: Tensor) -> Tensor:
    """Return matrices ``[..., m, n]`` with the same singular vectors and singular values of 0.7 to 1.2.

    Newton-Schulz iterations with a polynomial that rises steeply at zero; singular values below a thousandth
    of the matrix' norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if turned else x
