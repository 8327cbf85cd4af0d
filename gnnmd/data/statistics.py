"""What a model needs to know about its training set before the first step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnnmd.data.dataset import AtomsDataset

#: Singular values of the composition matrix below this fraction of the largest one are rounding, not
#: information.
RANK_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Statistics:
    """Statistics of a training set; a value that no label determines is NaN (JSON null).

    Attributes:
        element_energies: 119 reference energies by atomic number, eV; 0 for elements that do not occur.
        energy_std: standard deviation over frames of the energy per atom after subtracting the references,
            eV.
        force_rms: root mean square of the force components, eV/A.
        elements: atomic numbers that occur, ascending.
        n_frames: frames.
        n_atoms: atoms.
        n_energies: frames with an energy.
        n_forces: atoms with forces.
        n_stresses: frames with a stress.
        mean_edges: directed edges per atom within the cutoff; NaN where nobody counted them.
    """

    element_energies: tuple[float, ...]
    energy_std: float
    force_rms: float
    elements: tuple[int, ...]
    n_frames: int
    n_atoms: int
    n_energies: int
    n_forces: int
    n_stresses: int
    mean_edges: float

    @classmethod
    def from_dataset(cls, dataset: AtomsDataset) -> "Statistics":
        """Compute the statistics of a data set in one pass over its labels."""
        composition = torch.stack([torch.bincount(z, minlength=119) for z in dataset.labels("z")])  # [F, 119]
        energy = torch.cat(dataset.labels("energy"))
        forces = torch.cat(dataset.labels("forces"))
        stress = torch.cat(dataset.labels("stress"))
        known = ~energy.isnan()
        references, energy_std = element_references(energy[known], composition[known])
        has_forces = ~forces.isnan().any(dim=1)
        n_atoms = int(dataset.n_atoms.sum())
        return cls(
            element_energies=tuple(references.tolist()),
            energy_std=energy_std,
            force_rms=float(forces[has_forces].square().mean().sqrt()),
            elements=tuple(composition.any(dim=0).nonzero().flatten().tolist()),
            n_frames=len(dataset),
            n_atoms=n_atoms,
            n_energies=int(known.sum()),
            n_forces=int(has_forces.sum()),
            n_stresses=int((~stress.isnan().any(dim=(1, 2))).sum()),
            mean_edges=math.nan if dataset.n_edges is None else int(dataset.n_edges.sum()) / n_atoms,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Statistics":
        """Invert `to_dict`, also after a round trip through JSON."""
        restored: dict[str, Any] = {k: math.nan if value is None else value for k, value in values.items()}
        restored["element_energies"] = tuple(restored["element_energies"])
        restored["elements"] = tuple(restored["elements"])
        return cls(**restored)


def element_references(energy: Tensor, composition: Tensor) -> tuple[Tensor, float]:
    """Fit one reference energy per element to total energies.

    Least squares of E/n on the fractions of the elements: frames count equally whatever their size. Where
    compositions do not determine the references (water: two atoms of H for every O) the solution of minimum
    norm is taken.

    Args:
        energy: ``[F]`` eV.
        composition: ``[F, 119]`` atoms per element.

    Returns:
        References ``[119]`` (eV, 0 for elements that do not occur) and the standard deviation over frames of
        the energy per atom that is left, NaN where there are no frames.
    """
    references = torch.zeros(119, dtype=torch.float64)
    if not len(energy):
        return references, math.nan
    present = composition.any(dim=0)
    n_atoms = composition.sum(dim=1).double()  # torch divides integers in float32
    fractions = (composition[:, present] / n_atoms[:, None]).numpy()
    per_atom = (energy / n_atoms).numpy()
    solution = np.linalg.lstsq(fractions, per_atom, rcond=RANK_TOLERANCE)[0]
    references[present] = torch.from_numpy(solution)
    return references, float(np.std(per_atom - fractions @ solution))
