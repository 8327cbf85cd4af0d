"""The ASE calculator."""

from math import isfinite
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Potential, Prediction
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.unit import Follower, without_labels

_STATE = ("charge", "spin", "dataset")  # keys of atoms.info that a potential reads


class GNNMDCalculator(Calculator):
    """Energy, forces, stress and energies per atom of a potential, as an ASE calculator.

    Charge, spin and dataset are read from ``atoms.info`` at every call, and may change between calls like
    everything else. Neighbours are searched within ``r_cut + skin`` and searched again once an atom has moved
    by half the skin, or the cell, periodicity or atoms have changed; results are always those of a new list.

    Args:
        model: a `PredictUnit`, a `Potential`, a checkpoint file, or the name of one that comes with gnnmd.
        skin: Angstrom; larger means fewer searches and more pairs to look through at each call.
        dataset: data set (level of theory) used where ``atoms.info`` names none.
        device: where to compute, if ``model`` is not a unit already.
        settings: likewise.

    Attributes:
        unit: the `PredictUnit`.
        n_builds: neighbour searches so far.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]
    ignored_changes = {"initial_charges", "initial_magmoms"}

    def __init__(
        self,
        model: PredictUnit | Potential | str | Path = "silver",
        *,
        skin: float = 0.5,
        dataset: str | None = None,
        device: str | None = None,
        settings: InferenceSettings | None = None,
    ) -> None:
        super().__init__()
        self.unit = _unit(model, device, settings)
        self.dataset = dataset
        self._follower = Follower(self.unit, skin)

    @property
    def n_builds(self) -> int:
        """Neighbour searches so far."""
        return self._follower.n_builds

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what changed since the last calculation; ASE itself does not look into ``atoms.info``."""
        changes = super().check_state(atoms, tol)
        if self.atoms is not None and any(self.atoms.info.get(k) != atoms.info.get(k) for k in _STATE):
            changes.append("info")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute all properties; called by ASE.

        The stress is there only for a periodic cell with a volume, so that ASE raises its
        `PropertyNotImplementedError` for a molecule.

        Raises:
            CalculationFailed: energy or forces are not finite numbers.
            ValueError: see `PredictUnit.predict`.
        """
        super().calculate(atoms, properties or ["energy"], system_changes)
        bare = without_labels(self.atoms)
        if self.dataset is not None:
            bare.info.setdefault("dataset", self.dataset)
        prediction = self._follower.evaluate(AtomBatch.from_ase(bare))
        _check_finite(prediction)
        energy = prediction.energy.item()
        self.results: dict[str, Any] = {
            "energy": energy,
            "free_energy": energy,
            "forces": prediction.forces.numpy(),
            "energies": prediction.node_energies.numpy(),
        }
        if prediction.stress is not None and bare.cell.rank == 3 and bare.pbc.any():
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].numpy())


def _check_finite(prediction: Prediction) -> None:
    energy = prediction.energy.item()
    bad = (~prediction.forces.isfinite()).any(1).nonzero()[:, 0].tolist()
    if not isfinite(energy) or bad:
        atoms = (
            f"atoms {', '.join(map(str, bad[:10]))}{', ...' if len(bad) > 10 else ''}" if bad else "no atom"
        )
        raise CalculationFailed(
            f"the energy is {energy} eV and the forces on {atoms} are not finite. Atoms in the same place, "
            "or much closer than any that the potential was trained on, give this: look at the shortest "
            "distances, or take a shorter time step"
        )


def _unit(
    model: PredictUnit | Potential | str | Path, device: str | None, settings: InferenceSettings | None
) -> PredictUnit:
    if isinstance(model, PredictUnit):
        if device is not None or settings is not None:
            raise ValueError("device and settings belong to the PredictUnit that was passed; set them there")
        return model
    if isinstance(model, Potential):
        return PredictUnit(model, device=device, settings=settings)
    return PredictUnit.from_checkpoint(model, device=device, settings=settings)
