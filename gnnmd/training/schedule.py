"""Curves over the course of a training: the learning rate, and the weights of the loss terms.

Every curve is a pure function of the progress (fraction of the planned steps done), so a resumed run is on
the same point of it without storing anything.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class ScheduleConfig:
    """The learning rate over a training, as a factor of the highest one.

    Attributes:
        kind: shape of the decay after the warm-up.
        warmup: fraction of the training during which the rate grows linearly from a hundredth to one.
        final: factor at the end of the training.
    """

    kind: Literal["cosine", "exponential", "constant"] = "cosine"
    warmup: float = 0.02
    final: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the training, 0 <= warmup < 1; got {self.warmup}")
        if not 0 < self.final <= 1:
            raise ValueError(f"final is a factor of the learning rate, 0 < final <= 1; got {self.final}")


@dataclass
class RampConfig:
    """When and how the weights of the loss move from ``weight`` to ``final_weight``.

    Attributes:
        shape: straight in the weight ("linear"), with flat ends ("cosine"), straight in its logarithm
            ("exponential"), or with the factor of the learning rate, from 1 to 0 ("learning_rate"; the ends
            are then not used).
        start: fraction of the training at which the weights leave ``weight``.
        end: fraction at which they have reached ``final_weight``.
    """

    shape: Literal["linear", "cosine", "exponential", "learning_rate"] = "cosine"
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end need 0 <= start < end <= 1; got {self.start} and {self.end}")


def learning_rate_factor(config: ScheduleConfig, progress: float) -> float:
    """Return the factor of the learning rate at ``progress`` in [0, 1]; beyond 1 it stays final."""
    if progress < config.warmup:
        return max(0.01, progress / config.warmup)
    if config.kind == "constant":
        return 1.0
    done = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    if config.kind == "exponential":
        return config.final**done
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))


def ramp(config: RampConfig, first: float, last: float, progress: float, lr_factor: float) -> float:
    """Return the weight at ``progress``: from ``first`` to ``last`` between the ends of the ramp."""
    if config.shape == "learning_rate":
        return last + (first - last) * lr_factor
    done = min(1.0, max(0.0, (progress - config.start) / (config.end - config.start)))
    if config.shape == "exponential":
        if min(first, last) <= 0:
            raise ValueError(
                f"an exponential ramp needs positive weights, got {first} and {last}; use cosine"
            )
        return first * (last / first) ** done
    if config.shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return first + (last - first) * done
