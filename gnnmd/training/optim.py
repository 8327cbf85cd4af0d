"""The optimiser and the average of the weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gnnmd.training.muon import Muon
from gnnmd.training.schedule import ScheduleConfig, learning_rate_factor


@dataclass
class OptimConfig:
    """The optimiser, its learning rate over time, clipping, and the average of the weights.

    Attributes:
        kind: "adamw", or "muon" for the weight matrices and AdamW for the rest (see `gnnmd.training.muon`).
        lr: highest learning rate.
        weight_decay: decay of weight matrices; biases, norms and (unless asked for) embeddings are left
            alone.
        decay_embeddings: decay the tables of elements, charges, spins and data sets too.
        beta1: memory of the mean gradient.
        beta2: memory of the mean squared gradient.
        clip_norm: largest norm of the whole gradient; 0 turns clipping off.
        ema_decay: memory of the average of the weights that validation and the exported model use; 0 uses the
            weights themselves. It starts shorter: min(ema_decay, (1 + step) / (10 + step)).
        schedule: the learning rate over time.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-3
    weight_decay: float = 1e-3
    decay_embeddings: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 10.0
    ema_decay: float = 0.99
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the parameters into those that decay (weight matrices) and those that do not, and those for Muon.

    Biases shift and norms scale features: pulling them to zero changes what the network computes without
    making it smoother. The rows of an embedding are not used together, and a map to one number is no more
    than a vector: they are not for Muon.
    """
    matrices: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    fixed: list[nn.Parameter] = []
    for owner, name, parameter in _owned_parameters(module):
        is_norm = "norm" in type(owner).__name__.lower()
        spared = isinstance(owner, nn.Embedding) and not config.decay_embeddings
        plain = is_norm or spared or parameter.ndim < 2 or "bias" in name
        if (
            config.kind == "muon"
            and not (plain or isinstance(owner, nn.Embedding))
            and min(parameter.shape) > 1
        ):
            matrices.append(parameter)
        else:
            (fixed if plain else decaying).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": fixed, "weight_decay": 0.0},
    ]
    if config.kind == "muon":
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "muon": True})
    return groups


def build_optimizer(
    module: nn.Module, config: OptimConfig, total_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Return the optimiser of the trainable parameters, and its schedule, to be stepped once per step."""
    groups = parameter_groups(module, config)
    kind = Muon if config.kind == "muon" else torch.optim.AdamW
    # foreach: a few large kernels per step instead of ten per parameter
    optimizer = kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=True)

    def factor(step: int) -> float:
        return learning_rate_factor(config.schedule, (step + 1) / max(1, total_steps))

    return optimizer, LambdaLR(optimizer, factor)


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float, step: int) -> None:
    """Move ``average`` towards ``current``: a = d a + (1 - d) w with d = min(decay, (1 + step)/(10 + step)).

    Buffers are copied. The early, shorter memory forgets the random start, which a fixed 0.999 would carry
    for thousands of steps.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - decay)
    for mine, other in zip(average.buffers(), current.buffers(), strict=True):
        mine.copy_(other)


def _owned_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield every trainable parameter once, with the module that owns it and its name there."""
    seen: set[Tensor] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield owner, name, parameter
