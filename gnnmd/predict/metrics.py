"""Errors of predictions: mean absolute and root mean squared, of energy per atom, forces and stress."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from ase.data import chemical_symbols
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.parallel import Mesh
from gnnmd.units import MEV

#: Quantity -> unit in which its errors are shown (a thousandth of eV/atom, eV/A, eV/A^3).
SHOWN_UNITS = {"energy": "meV/atom", "forces": "meV/A", "stress": "meV/A^3"}


class ErrorMeter:
    """Accumulates errors over batches, on their device and without waiting for it, in float64.

    Missing labels (NaN) do not count. Forces and stress are counted by component, so the force MAE is the
    mean of |F_x|, |F_y|, |F_z| errors.

    Attributes:
        sums: sum |e|, sum e^2 and count, ``[3]`` per quantity and ``[119, 3]`` for "elements"; ``[3]`` for
            "cosine": sum of the cosines between predicted and true forces, 0, number of atoms.
    """

    def __init__(self, *, per_element: bool = False) -> None:
        self._per_element = per_element
        self.sums: dict[str, Tensor] = {}

    def update(self, prediction: Prediction, labels: AtomBatch, n_atoms: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            prediction: on the device of the labels.
            labels: those of the atoms that this rank owns.
            n_atoms: ``[B]`` atoms of each system over all ranks; None takes those of the labels.
        """
        n_atoms = labels.n_atoms if n_atoms is None else n_atoms
        self._add("energy", prediction.energy / n_atoms, labels.energy / n_atoms)
        self._add("forces", prediction.forces, labels.forces)
        self._sum("cosine", _cosine_sums(prediction.forces, labels.forces))
        if prediction.stress is not None:
            self._add("stress", prediction.stress, labels.stress)
        if self._per_element:
            rows = _error_sums(prediction.forces, labels.forces)  # [N, 3]
            table = self.sums.setdefault("elements", rows.new_zeros(119, 3))
            table.index_add_(0, labels.numbers, rows)

    def total(self, mesh: Mesh) -> "ErrorMeter":
        """Return the errors on all ranks; collective, and the ranks need not have seen the same quantities.

        Forces are partial sums over the atoms that a rank owns, energies and stress are known in full to all
        ranks that share a graph.
        """
        device = next((s.device for s in self.sums.values()), mesh.world.device)
        none = torch.zeros(3, dtype=torch.float64, device=device)
        table = none.expand(119, 3)
        names = (*SHOWN_UNITS, "cosine")
        rows = [mesh.once(self.sums.get(n, none), partial=n in ("forces", "cosine")) for n in names]
        elements = [self.sums.get("elements", table)] if self._per_element else []
        summed = mesh.world.sum(torch.cat([torch.stack(rows), *elements]))
        total = ErrorMeter(per_element=self._per_element)
        total.sums = dict(zip(names, summed, strict=False))
        if self._per_element:
            total.sums["elements"] = summed[len(names) :]
        return total

    def errors(self) -> dict[str, float]:
        """Return ``energy_mae``, ``energy_rmse``, ``forces_mae``, ... in eV/atom, eV/A, eV/A^3.

        ``forces_cosine`` is the mean cosine between predicted and true forces, 1 if all directions are right.

        A quantity without any label is absent. With ``per_element``, also ``forces_mae_Ag`` and so on.
        """
        found: dict[str, float] = {}
        for name in SHOWN_UNITS:
            if name in self.sums:
                _put(found, name, "", self.sums[name].tolist())
        if "cosine" in self.sums:
            cosine, _, count = self.sums["cosine"].tolist()
            if count:
                found["forces_cosine"] = cosine / count
        if "elements" in self.sums:
            for number, row in enumerate(self.sums["elements"].tolist()):
                _put(found, "forces", f"_{chemical_symbols[number]}", row)
        return found

    def _add(self, name: str, prediction: Tensor, label: Tensor) -> None:
        row = _error_sums(prediction.reshape(1, -1), label.reshape(1, -1))[0]
        self._sum(name, row)

    def _sum(self, name: str, row: Tensor) -> None:
        self.sums[name] = self.sums[name] + row if name in self.sums else row


def only_dataset(labels: AtomBatch, name: str) -> AtomBatch:
    """Return labels of which those of other data sets than ``name`` are missing."""
    other = torch.tensor([dataset != name for dataset in labels.dataset], device=labels.energy.device)
    return replace(
        labels,
        energy=labels.energy.masked_fill(other, torch.nan),
        forces=labels.forces.masked_fill(other[labels.system, None], torch.nan),
        stress=labels.stress.masked_fill(other[:, None, None], torch.nan),
    )


def error_table(errors: Mapping[str, float]) -> str:
    """Return errors as a small text table in meV units, one line per quantity (and element, if several)."""
    lines = [f"{'':10}{'MAE':>10}{'RMSE':>10}"]
    for name, unit in SHOWN_UNITS.items():
        if f"{name}_mae" in errors:
            mae, rmse = errors[f"{name}_mae"] * MEV, errors[f"{name}_rmse"] * MEV
            lines.append(f"{name:10}{mae:10.3f}{rmse:10.3f}  {unit}")
    prefix = "forces_mae_"
    symbols = [key.removeprefix(prefix) for key in errors if key.startswith(prefix)]
    for symbol in symbols if len(symbols) > 1 else []:
        mae, rmse = errors[f"forces_mae_{symbol}"] * MEV, errors[f"forces_rmse_{symbol}"] * MEV
        lines.append(f"{'forces ' + symbol:10}{mae:10.3f}{rmse:10.3f}  {SHOWN_UNITS['forces']}")
    prefix = "forces_mae@"
    for name in [key.removeprefix(prefix) for key in errors if key.startswith(prefix)]:
        mae, rmse = errors[f"forces_mae@{name}"] * MEV, errors[f"forces_rmse@{name}"] * MEV
        lines.append(f"{'forces ' + name:10}{mae:10.3f}{rmse:10.3f}  {SHOWN_UNITS['forces']}")
    return "\n".join(lines)


def _error_sums(prediction: Tensor, label: Tensor) -> Tensor:
    """Return sum |e|, sum e^2 and the number of labels along dim 1, stacked last.

    Only a missing label is left out: a prediction that is NaN must show.
    """
    known = ~label.isnan()
    error = (prediction.detach().double() - label).masked_fill(~known, 0.0)
    return torch.stack([error.abs().sum(1), error.square().sum(1), known.sum(1).to(error.dtype)], -1)


def _cosine_sums(prediction: Tensor, label: Tensor) -> Tensor:
    """Return the sum of cosines, 0 and the number of atoms ``[3]``; only forces with a direction count."""
    size = label.norm(dim=1)
    known = size > 0  # NaN is not
    forces = prediction.detach().double()
    cosine = (forces * label).sum(1) / (forces.norm(dim=1) * size).clamp_min(1e-300)
    count = known.sum().to(cosine.dtype)
    return torch.stack([cosine.masked_fill(~known, 0.0).sum(), torch.zeros_like(count), count])


def _put(found: dict[str, float], name: str, suffix: str, sums: list[float]) -> None:
    absolute, squared, count = sums
    if count:
        found[f"{name}_mae{suffix}"] = absolute / count
        found[f"{name}_rmse{suffix}"] = math.sqrt(squared / count)
