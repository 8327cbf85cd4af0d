"""Linear maps whose weights are mixed from several experts, per system."""

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERT_NORMS = ("softmax", "pnorm")

#: Added to every softmax coefficient, so that no expert is ever switched off.
SOFTMAX_FLOOR = 0.005


@dataclass(frozen=True)
class Routing:
    """Which experts the rows of a tensor use.

    Attributes:
        coefficients: ``[B, K]`` weight of each expert in each system.
        rows: number of rows of each system, which lie one after the other; None if there is one system.
    """

    coefficients: Tensor
    rows: list[int] | None

    @classmethod
    def of(cls, coefficients: Tensor, system: Tensor) -> "Routing":
        """Return the routing of rows that belong to the systems ``[n]``, ascending."""
        return cls(coefficients, rows_per_system(system, len(coefficients)))

    def of_rows(self, rows: list[int]) -> "Routing":
        """Return the same coefficients for another tensor."""
        return replace(self, rows=rows)


def rows_per_system(system: Tensor, n_systems: int) -> list[int] | None:
    """Return how many rows each system has; None for one system, which needs no host sync."""
    return None if n_systems == 1 else torch.bincount(system, minlength=n_systems).tolist()


class ExpertLinear(nn.Module):
    """Linear map, or a mixture of K linear maps with one bias that is not mixed.

    Weights are mixed, once per system, so a row costs the same with any number of experts.

    Args:
        c_in: columns of the input.
        c_out: columns of the output.
        bias: whether there is a bias.
        experts: number of experts K; 0 = a plain linear map.
    """

    def __init__(self, c_in: int, c_out: int, *, bias: bool = True, experts: int = 0):
        super().__init__()
        bound = 1 / sqrt(c_in)
        shape = (experts, c_out, c_in) if experts else (c_out, c_in)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(c_out).uniform_(-bound, bound)) if bias else None

    def weights(self, routing: Routing | None) -> Tensor:
        """Return ``[1, c_out, c_in]`` if all rows share their weights, else ``[B, c_out, c_in]``."""
        if self.weight.ndim == 2:
            return self.weight[None]
        assert routing is not None, "a layer with experts needs their coefficients"
        return torch.einsum("bk,koi->boi", routing.coefficients, self.weight)

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        """Map ``[n, c_in]`` to ``[n, c_out]``."""
        return grouped_linear(x, self.weights(routing), self.bias, routing)


def grouped_linear(x: Tensor, weights: Tensor, bias: Tensor | None, routing: Routing | None) -> Tensor:
    """Apply to the rows of system b their own weights.

    Args:
        x: ``[n, c_in]``.
        weights: ``[1 or B, c_out, c_in]``.
        bias: ``[c_out]`` or None.
        routing: which rows belong to which system; not read if all share their weights.
    """
    if len(weights) == 1:
        return F.linear(x, weights[0], bias)
    assert routing is not None
    assert routing.rows is not None
    groups = zip(x.split(routing.rows), weights, strict=True)
    return torch.cat([F.linear(part, weight, bias) for part, weight in groups])


class Router(nn.Module):
    """Coefficients of the experts from charge, spin and data set, and from the composition if asked.

    Args:
        channels: C.
        experts: K.
        norm: one of `EXPERT_NORMS`.
        composition_numbers: largest atomic number of the composition embedding; None = not routed by
            composition.
        dropout: of the network's output, in training.
    """

    def __init__(
        self, channels: int, experts: int, norm: str, composition_numbers: int | None, dropout: float
    ):
        super().__init__()
        self.norm = norm
        self.composition = None
        if composition_numbers is not None:
            self.composition = nn.Embedding(composition_numbers + 1, channels)
        width = channels if self.composition is None else 2 * channels
        self.network = nn.Sequential(
            *(nn.Linear(width, 2 * experts), nn.SiLU()),
            *(nn.Linear(2 * experts, 2 * experts), nn.SiLU()),
            *(nn.Linear(2 * experts, experts), nn.SiLU()),
            nn.Dropout(dropout),
        )

    def forward(self, system: Tensor, composition: Tensor | None) -> Tensor:
        """Return ``[B, K]`` of system embedding and mean composition embedding, each ``[B, C]``."""
        x = self.network(system if composition is None else torch.cat([composition, system], dim=1))
        if self.norm == "softmax":
            return x.softmax(dim=1) + SOFTMAX_FLOOR
        return F.normalize(x.abs() + 2 / len(x), p=1.0, dim=1)  # by the number of systems: as published
