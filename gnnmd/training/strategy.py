"""How many ranks take one step: each computes a part of the gradient, all move by the whole of it."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from gnnmd.parallel import Mesh, Ranks


class MeshStrategy(SingleDeviceStrategy):
    """Lightning on one device, with gradients summed over the ranks of a graph and averaged over replicas.

    Lightning is not told of the other processes. All its decisions follow from numbers that are equal on
    every rank, so it needs no collectives of its own; the ones it has broadcast a signal before every step,
    and from inside signal handlers.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.world.device)
        self._mesh = mesh
        self.global_rank = mesh.world.rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes."""
        return self.global_rank == 0

    def setup(self, trainer: Trainer) -> None:
        """Start from rank 0's weights."""
        super().setup(trainer)
        assert self.model is not None
        copy_from_first(self.model, self._mesh.world)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Reduce the gradients after the backward pass of the step's last batch, before they are clipped."""

        def reduced() -> Any:
            result = closure()
            reduce_gradients([p for group in optimizer.param_groups for p in group["params"]], self._mesh)
            return result

        return super().optimizer_step(optimizer, reduced, model, **kwargs)


@torch.no_grad()
def reduce_gradients(parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
    """Replace every gradient by its sum over the ranks of a graph and its mean over replicas; collective.

    A parameter that has a gradient on some ranks only counts as zero on the others; one that has none
    anywhere keeps none, so that the optimiser leaves it alone as it does on one rank.
    """
    for _, same_type in groupby(sorted(parameters, key=_type), key=_type):
        chosen = list(same_type)
        present = chosen[0].new_tensor([float(p.grad is not None) for p in chosen])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        total = mesh.world.sum(torch.cat([present, *(part.flatten() for part in parts)]))
        ranks_with, flat = total[: len(chosen)].tolist(), total[len(chosen) :] / mesh.n_replicas
        pieces = flat.split([p.numel() for p in chosen])
        for p, piece, n_ranks in zip(chosen, pieces, ranks_with, strict=True):
            p.grad = piece.view_as(p) if n_ranks else None


@torch.no_grad()
def copy_from_first(module: nn.Module, ranks: Ranks) -> None:
    """Give parameters and buffers the values they have on rank 0; collective."""
    mine: list[Tensor] = [*module.parameters(), *module.buffers()]
    for tensor, first in zip(mine, ranks.from_first([t.cpu() for t in mine]), strict=True):
        tensor.copy_(first)


def _type(parameter: nn.Parameter) -> str:
    return str(parameter.dtype)
