"""Atoms as tensors: what users, readers and trainers hand over."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from torch import Tensor


@dataclass(frozen=True)
class LabelKeys:
    """Names of the labels in ``atoms.info`` / ``atoms.arrays`` or in an attached calculator.

    Readers turn a virial (eV, -stress * volume) into the stress of a frame that has none.
    """

    energy: str = "energy"
    forces: str = "forces"
    stress: str = "stress"
    virial: str = "virial"


@dataclass(frozen=True)
class AtomBatch:
    """One or many atomic systems, concatenated atom by atom.

    A label that is missing is NaN. Readers refuse NaN in files, so NaN has no other meaning.

    Attributes:
        positions: ``[N, 3]`` float64, Angstrom; need not lie inside the cell.
        numbers: ``[N]`` int64 atomic numbers.
        system: ``[N]`` int64, ascending: the system each atom belongs to.
        cell: ``[B, 3, 3]`` float64, Angstrom; rows are lattice vectors, zero rows where there is none.
        pbc: ``[B, 3]`` bool, periodicity along each lattice vector.
        charge: ``[B]`` int64, total charge in units of e.
        spin: ``[B]`` int64, spin multiplicity 2S+1; 0 where it is not given.
        dataset: one name per system, "" where it is not given; selects the level of theory of models that
            know several.
        energy: ``[B]`` float64, eV.
        forces: ``[N, 3]`` float64, eV/A.
        stress: ``[B, 3, 3]`` float64, eV/A^3, dE/dstrain / V (positive = tension).
    """

    positions: Tensor
    numbers: Tensor
    system: Tensor
    cell: Tensor
    pbc: Tensor
    charge: Tensor
    spin: Tensor
    dataset: tuple[str, ...]
    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def n_systems(self) -> int:
        """Number of systems B."""
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> Tensor:
        """``[B]`` int64, atoms per system."""
        return torch.bincount(self.system, minlength=self.n_systems)

    def __len__(self) -> int:
        """Return the number of systems."""
        return self.n_systems

    @classmethod
    def from_ase(cls, atoms: Atoms | Sequence[Atoms], keys: LabelKeys | None = None) -> "AtomBatch":
        """Build a batch from one or several ASE Atoms.

        Charge, spin and dataset are read from ``atoms.info``; labels from ``atoms.info`` / ``atoms.arrays``
        under ``keys``, else from the results stored in ``atoms.calc``, unless the atoms have changed since
        (nothing is computed).

        Raises:
            ValueError: no atoms, or a charge or spin that is not an integer.
        """
        images = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        if not images:
            raise ValueError("from_ase got an empty list; pass at least one Atoms object")
        keys = keys or LabelKeys()
        labels = [_ase_labels(a, keys) for a in images]
        counts = torch.tensor([len(a) for a in images])
        return cls(
            positions=torch.tensor(np.concatenate([a.positions for a in images]), dtype=torch.float64),
            numbers=torch.tensor(np.concatenate([a.numbers for a in images]), dtype=torch.int64),
            system=torch.repeat_interleave(torch.arange(len(images)), counts),
            cell=torch.tensor(np.stack([a.cell.array for a in images]), dtype=torch.float64),
            pbc=torch.tensor(np.stack([a.pbc for a in images])),
            charge=torch.tensor([_integer(a, "charge") for a in images]),
            spin=torch.tensor([_integer(a, "spin") for a in images]),
            dataset=tuple(str(a.info.get("dataset", "")) for a in images),
            energy=torch.tensor([energy for energy, _, _ in labels], dtype=torch.float64),
            forces=torch.tensor(np.concatenate([forces for _, forces, _ in labels]), dtype=torch.float64),
            stress=torch.tensor(np.stack([stress for _, _, stress in labels]), dtype=torch.float64),
        )

    def to_ase(self) -> list[Atoms]:
        """Return one ASE Atoms per system; labels that are present sit in a `SinglePointCalculator`."""
        images = []
        for b, rows in enumerate(torch.split(torch.arange(len(self.numbers)), self.n_atoms.tolist())):
            atoms = Atoms(
                numbers=self.numbers[rows].cpu().numpy(),
                positions=self.positions[rows].cpu().numpy(),
                cell=self.cell[b].cpu().numpy(),
                pbc=self.pbc[b].cpu().numpy(),
            )
            given = {"charge": int(self.charge[b]), "spin": int(self.spin[b]), "dataset": self.dataset[b]}
            atoms.info.update({key: value for key, value in given.items() if value})
            results: dict[str, Any] = {}
            if not self.energy[b].isnan():
                results["energy"] = float(self.energy[b])
            if len(rows) and not self.forces[rows].isnan().all():
                results["forces"] = self.forces[rows].cpu().numpy()
            if not self.stress[b].isnan().all():
                results["stress"] = full_3x3_to_voigt_6_stress(self.stress[b].cpu().numpy())
            if results:
                atoms.calc = SinglePointCalculator(atoms, **results)
            images.append(atoms)
        return images

    def to_data(self) -> list[Any]:
        """Return one `torch_geometric.data.Data` per system (``pos``, ``z``, ``cell``, ..., labels)."""
        from torch_geometric.data import Data

        items = []
        for b, rows in enumerate(torch.split(torch.arange(len(self.numbers)), self.n_atoms.tolist())):
            one = slice(b, b + 1)
            items.append(
                Data(
                    pos=self.positions[rows],
                    z=self.numbers[rows],
                    cell=self.cell[one],
                    pbc=self.pbc[one],
                    charge=self.charge[one],
                    spin=self.spin[one],
                    dataset=self.dataset[b],
                    energy=self.energy[one],
                    forces=self.forces[rows],
                    stress=self.stress[one],
                )
            )
        return items

    @classmethod
    def from_data(cls, data: Any) -> "AtomBatch":
        """Build a batch from a `torch_geometric.data.Data` or `Batch` with the fields of `to_data`."""
        system = getattr(data, "batch", None)
        dataset = data.dataset
        return cls(
            positions=data.pos,
            numbers=data.z,
            system=torch.zeros_like(data.z) if system is None else system,
            cell=data.cell,
            pbc=data.pbc,
            charge=data.charge,
            spin=data.spin,
            dataset=(dataset,) if isinstance(dataset, str) else tuple(dataset),
            energy=data.energy,
            forces=data.forces,
            stress=data.stress,
        )

    def to(self, device: torch.device | str) -> "AtomBatch":
        """Return the batch with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dataset"}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items()})


def _integer(atoms: Atoms, key: str) -> int:
    value = atoms.info.get(key, 0)
    try:
        exact = int(value) == value
    except (TypeError, ValueError, OverflowError):  # None, text, NaN, infinity
        exact = False
    if not exact:
        raise ValueError(f"atoms.info[{key!r}] must be an integer, got {value!r}")
    return int(value)


def _ase_labels(atoms: Atoms, keys: LabelKeys) -> tuple[float, np.ndarray, np.ndarray]:
    """Return energy, forces [n, 3] and stress [3, 3] of one frame, NaN where missing."""
    results = {} if atoms.calc is None or atoms.calc.check_state(atoms) else atoms.calc.results
    energy = atoms.info.get(keys.energy, results.get(keys.energy))
    forces = atoms.arrays.get(keys.forces, results.get(keys.forces))
    stress = atoms.info.get(keys.stress, results.get(keys.stress))
    energy = np.nan if energy is None else float(energy)
    forces = np.full((len(atoms), 3), np.nan) if forces is None else np.asarray(forces, float)
    stress = np.full((3, 3), np.nan) if stress is None else np.asarray(stress, float)
    if stress.size == 6:
        stress = voigt_6_to_full_3x3_stress(stress.reshape(6))
    return energy, forces, stress.reshape(3, 3)
