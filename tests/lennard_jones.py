"""Lennard-Jones as a backbone: a potential with known energies, for tests of everything around models."""

import torch
from torch import Tensor, nn

from gnnmd.graph import AtomGraph
from gnnmd.graph.geometry import edge_vectors
from gnnmd.models.backbone import Backbone
from gnnmd.models.potential import Potential
from gnnmd.parallel import GPContext


class LennardJones(Backbone):
    """Half the pair energies of each atom, brought to zero at the cutoff with two continuous derivatives.

    Charge and dataset scale the energy, so that a test sees whether they arrive.
    """

    max_number = 118

    def __init__(self, r_cut: float, epsilon: float, sigma: float):
        super().__init__()
        self.r_cut = r_cut
        self.epsilon = nn.Parameter(torch.tensor(epsilon))
        self.sigma = nn.Parameter(torch.tensor(sigma))
        self.n_calls = 0

    def forward(self, g: AtomGraph, gp: GPContext) -> Tensor:
        self.n_calls += 1
        target = g.edge_index[1]
        r = edge_vectors(g).norm(dim=1).to(self.sigma.dtype)
        attraction = (self.sigma / r) ** 6
        scale = self.epsilon * (1 + 0.1 * g.charge.to(r) + 0.5 * g.dataset)[g.system[target]]
        pair = 4 * scale * (attraction**2 - attraction) * (1 - (r / self.r_cut) ** 2) ** 3
        return pair.new_zeros(gp.n_owned).index_add(0, target, pair / 2)[:, None, None]


class Hungry(LennardJones):
    """Needs more memory than rank 1 has."""

    def forward(self, g: AtomGraph, gp: GPContext) -> Tensor:
        if gp.group is not None and gp.group.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(g, gp)


class FirstFeature(nn.Module):
    """Head that takes the first feature of an atom for its energy."""

    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        return features[:, 0, 0]


def lennard_jones(
    *, r_cut: float = 5.0, epsilon: float = 0.3, sigma: float = 2.63, **known: tuple[str | int, ...]
) -> Potential:
    """Return a float64 potential with about the lattice constant and stiffness of silver."""
    backbone = LennardJones(r_cut, epsilon, sigma)
    return Potential(backbone, {"energy": FirstFeature()}, **known).double()
