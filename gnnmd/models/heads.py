"""From features of atoms to energies, and to forces and stress where these are not derivatives.

Features are ``[n_owned, K, C]``; rows 0, 1..3 and 4..8 of the second axis hold degrees 0, 1 and 2. A head is
called with the features and the graph and knows no ranks: what it sums over a system is the share of this
rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.graph.graph import AtomGraph
from gnnmd.nn.activations import activation
from gnnmd.nn.experts import ExpertLinear, Routing
from gnnmd.nn.float64 import Float64Buffers
from gnnmd.nn.resnet_mlp import ResNetMLP, dense


class EnergyHead(nn.Module):
    """Energy of each atom from its scalars.

    Args:
        channels: C.
        hidden: widths of the hidden layers; () = a linear map.
        expert_of: which expert each of the potential's data sets uses; () = all share one network.
    """

    expert_of: Tensor

    def __init__(self, channels: int, hidden: Sequence[int], expert_of: Sequence[int] = ()):
        super().__init__()
        self.experts = len(set(expert_of))
        self.register_buffer("expert_of", torch.tensor(list(expert_of), dtype=torch.int64), persistent=False)
        widths = [channels, *hidden, 1]
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList(ExpertLinear(*pair, experts=self.experts) for pair in pairs)

    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        """Return ``[n_owned]``."""
        routing = None
        if self.experts:
            coefficients = F.one_hot(self.expert_of[g.dataset], self.experts).to(features.dtype)
            routing = Routing.of(coefficients, g.system[: len(features)])
        x = features[:, 0]
        for layer in self.layers[:-1]:
            x = F.silu(layer(x, routing))
        return self.layers[-1](x, routing).squeeze(-1)


class ForceHead(nn.Module):
    """Forces from the degree-1 features, whose rows are x, y, z. They need not sum to zero.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, 1, bias=False)

    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        """Return ``[n_owned, 3]``."""
        return self.linear(features[:, 1:4]).squeeze(-1)


class StressHead(Float64Buffers):
    """Stress from the scalars (its trace) and the degree-2 features, averaged over the atoms of a system.

    Args:
        channels: C.
        hidden: width of the two hidden layers of the scalar part.
        reduce: "mean", or "sum", which grows with the number of atoms and is there for published weights.
    """

    basis: Tensor

    def __init__(self, channels: int, hidden: int, reduce: str = "mean"):
        super().__init__()
        self.reduce = reduce
        self.scalar = EnergyHead(channels, (hidden, hidden))
        self.linear = nn.Linear(channels, 1, bias=False)
        r2, r3, r6 = 1 / sqrt(2), 1 / sqrt(3), 1 / sqrt(6)
        basis = torch.zeros(6, 3, 3, dtype=torch.float64)  # orthonormal: the trace, then m = -2..2
        basis[0] = r3 * torch.eye(3, dtype=torch.float64)
        basis[1, 0, 2] = basis[1, 2, 0] = r2
        basis[2, 0, 1] = basis[2, 1, 0] = r2
        basis[3] = r6 * torch.diag(torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64))
        basis[4, 1, 2] = basis[4, 2, 1] = r2
        basis[5] = r2 * torch.diag(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        """Return the share ``[B, 3, 3]`` of these atoms, float64; the sum over ranks is the stress."""
        trace = self.scalar(features, g)[:, None]
        t = torch.cat([trace, self.linear(features[:, 4:9]).squeeze(-1)], dim=1).to(torch.float64)  # [n, 6]
        total = t.new_zeros(g.n_systems, 6).index_add(0, g.system[: len(t)], t)
        if self.reduce == "mean":
            total = total / g.n_atoms.clamp(min=1)[:, None]
        return torch.einsum("bk,kxy->bxy", total, self.basis)


@dataclass
class FittingNetConfig:
    """Shape of a `FittingNet`, by the names that DeePMD-kit gave.

    Attributes:
        neuron: widths of the hidden layers.
        activation_function: of the hidden layers, see `nn.activations.activation`.
        resnet_dt: whether hidden layers that add their input have a learned factor per column.
    """

    neuron: tuple[int, ...] = (240, 240, 240)
    activation_function: str = "tanh"
    resnet_dt: bool = True

    def __post_init__(self) -> None:
        self.neuron = tuple(self.neuron)
        activation(self.activation_function)


class FittingNet(nn.Module):
    """Energy of each atom from its scalars by a residual network, the same for all elements.

    Args:
        channels: C.
        config: its shape.
    """

    def __init__(self, channels: int, config: FittingNetConfig):
        super().__init__()
        self.config, self.widths = config, [channels, *config.neuron]
        act = activation(config.activation_function)
        self.hidden = ResNetMLP(self.widths, act, scaled=config.resnet_dt)
        self.output = dense(self.widths[-1], 1)

    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        """Return ``[n_owned]``."""
        return self.output(self.hidden(features[:, 0])).squeeze(-1)
