"""From atoms to energy, forces and stress, once for all models."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """What a potential says about a batch of systems.

    Attributes:
        energy: ``[B]`` float64, eV.
        forces: ``[n_owned, 3]`` float64, eV/A.
        stress: ``[B, 3, 3]`` float64, eV/A^3, dE/dstrain / V (positive = tension); NaN for systems whose cell has
            no volume; None when it was not asked for.
        node_energies: ``[n_owned]`` float64, eV, summing to the energy.
        descriptors: ``[n_owned, C]`` invariant node features, or None when they were not asked for.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    node_energies: Tensor
    descriptors: Tensor | None = None
