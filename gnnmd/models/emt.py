"""Effective medium theory over edges: the exact oracle for everything distributed, without a network.

Each atom's energy depends on its neighbours' positions only, so one exchange forward (positions) and one back
(forces) make it parallel. Same energies as `ase.calculators.emt.EMT` (``asap_cutoff=False``).
"""

import math

import torch
from ase.calculators.emt import beta as BETA
from ase.calculators.emt import parameters as ASE_PARAMETERS
from ase.data import atomic_numbers
from ase.units import Bohr
from torch import Tensor, nn

from gnnmd.graph.geometry import edge_vectors
from gnnmd.graph.graph import AtomGraph
from gnnmd.models.backbone import Backbone, Block, SystemSum
from gnnmd.models.potential import N_ELEMENTS, Potential

# Units of ASE's columns E0, s0, V0, eta2, kappa, lambda, n0 in eV and Angstrom.
_UNITS = (1.0, Bohr, 1.0, 1 / Bohr, 1 / Bohr, 1 / Bohr, 1 / Bohr**3)


def emt() -> Potential:
    """Return effective medium theory as a potential with the published parameters (trainable)."""
    return Potential(
        EffectiveMedium(), {"energy": _NodeEnergy()}, elements=[atomic_numbers[s] for s in ASE_PARAMETERS]
    )


class EffectiveMedium(Backbone):
    """Embedding and pair energies of Jacobsen, Stoltze and Norskov, Surf. Sci. 366, 394 (1996), in one block.

    Attributes:
        table: ``[119, 7]`` float64: E0 [eV], s0 [A], V0 [eV], eta2, kappa, lambda [1/A], n0 [1/A^3].
    """

    def __init__(self) -> None:
        super().__init__()
        rows = {
            atomic_numbers[s]: [x * u for x, u in zip(p, _UNITS, strict=True)]
            for s, p in ASE_PARAMETERS.items()
        }
        # Unknown elements get silver's row: finite, and refused by `Potential.graph`.
        self.table = nn.Parameter(
            torch.tensor([rows.get(z, rows[47]) for z in range(N_ELEMENTS)], dtype=torch.float64)
        )
        window = _Window(BETA * max(row[1] for row in rows.values()))
        self.blocks = nn.ModuleList([_AtomInMedium(window)])
        self.norm = nn.Identity()
        self.r_cut = window.r_cut
        self.max_number = N_ELEMENTS - 1

    def edge_basis(self, g: AtomGraph, n_owned: int, system_sum: SystemSum) -> Tensor:
        """Return the lengths of all edges, ``[E]`` Angstrom."""
        return torch.linalg.vector_norm(edge_vectors(g), dim=1)

    def embed(self, g: AtomGraph, basis: Tensor) -> Tensor:
        """Return the parameters of every atom, ``[n_all, 7]``."""
        return self.table[g.numbers]


class _Window:
    """Smooth cutoff between the third and the fourth neighbours of the largest element in fcc.

    Args:
        nearest: its first-neighbour distance, Angstrom.
    """

    def __init__(self, nearest: float) -> None:
        self.middle = nearest * 0.5 * (math.sqrt(3) + 2)
        self.slope = math.log(1e4 - 1) / (2 * nearest - self.middle)
        self.r_cut = self.middle + 0.5

    def __call__(self, r: Tensor) -> Tensor:
        return torch.sigmoid(-self.slope * (r - self.middle))


class _AtomInMedium(Block):
    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, own: Tensor, parameters: Tensor, r: Tensor, g: AtomGraph) -> tuple[Tensor, Tensor]:
        """Return the energies of the owned atoms, ``[n_owned, 1, 1]`` eV."""
        source, target = g.edge_index
        inside = r < self.window.r_cut  # edges in the skin contribute exactly zero
        w = torch.where(inside, self.window(r), 0.0)
        e0, s0, v0, eta2, kappa, lam, n0 = parameters.unbind(1)  # [n_all]
        gamma1, gamma2 = self._gammas(s0, eta2, kappa)

        def sum_edges(x: Tensor) -> Tensor:
            return x.new_zeros(len(own)).index_add(0, target, x)

        def density(of: Tensor, at: Tensor, rate: Tensor, d: Tensor) -> Tensor:
            """Tail of atom ``of`` at its neighbour ``at``."""
            return n0[of] / n0[at] * torch.exp(-rate[of] * d) * w

        sigma1 = sum_edges(density(source, target, eta2, r - BETA * s0[source]))
        pair = v0[target] / gamma2[target] * density(source, target, kappa, r / BETA - s0[source])
        pair = pair + v0[source] / gamma2[source] * density(target, source, kappa, r / BETA - s0[target])

        e0, v0, eta2, kappa, lam, gamma1 = (x[: len(own)] for x in (e0, v0, eta2, kappa, lam, gamma1))
        bound = sum_edges(inside.to(r.dtype)) > 0
        ds = -torch.log(torch.where(bound, sigma1, 1.0) / (12 * gamma1)) / (BETA * eta2)
        embedding = e0 * (1 + lam * ds) * torch.exp(-lam * ds) + 6 * v0 * torch.exp(-kappa * ds)
        energy = torch.where(bound, embedding, 0.0) - 0.25 * sum_edges(pair) - e0
        return energy[:, None, None], r

    def _gammas(self, s0: Tensor, eta2: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the first three shells of fcc that normalise the densities, ``[n]`` each."""
        r = BETA * s0[:, None] * s0.new_tensor([1.0, 2.0, 3.0]).sqrt()  # [n, 3]
        weight = self.window(r) * s0.new_tensor([12.0, 6.0, 24.0]) / 12
        stretch = r - BETA * s0[:, None]
        gamma1 = (weight * torch.exp(-eta2[:, None] * stretch)).sum(1)
        gamma2 = (weight * torch.exp(-kappa[:, None] / BETA * stretch)).sum(1)
        return gamma1, gamma2


class _NodeEnergy(nn.Module):
    def forward(self, features: Tensor, g: AtomGraph) -> Tensor:
        """Return ``[n_owned]`` eV."""
        return features[:, 0, 0].to(torch.float64)
