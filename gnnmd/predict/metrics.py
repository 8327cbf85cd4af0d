"""Errors of predictions: mean absolute and root mean squared, of energy per atom, forces and stress."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from ase.data import chemical_symbols
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.parallel import Mesh
from gnnmd.units import MEV

#: Quantity -> unit in which its errors are shown (a thousandth of eV/atom, eV/A, eV/A^3).
SHOWN_UNITS = {"energy": "meV/atom", "forces": "meV/A", "stress": "meV/A^3"}
#: Sums over the atoms that a rank owns; the others are known in full to all ranks that share a graph.
_PARTIAL = ("forces", "cosine", "elements")


class ErrorMeter:
    """Accumulates errors over batches, on their device and without waiting for it, in float64.

    Missing labels (NaN) do not count. Forces and stress are counted by component, so the force MAE is the
    mean of |F_x|, |F_y|, |F_z| errors.

    Attributes:
        sums: sum |e|, sum e^2 and count, ``[S, 3]`` for S sources and each quantity, ``[119, 3]`` for
            "elements"; "cosine": sum of the cosines between predicted and true forces, 0, number of atoms.
    """

    def __init__(self, *, per_element: bool = False, sources: Sequence[str] = ()) -> None:
        """Start with nothing.

        Args:
            per_element: tell the elements' forces apart.
            sources: names of the data sets to tell apart, see `update`.
        """
        self._sources = tuple(sources)
        self._rows = dict.fromkeys((*SHOWN_UNITS, "cosine"), max(1, len(sources)))  # of sums
        if per_element:
            self._rows["elements"] = len(chemical_symbols)
        self.sums: dict[str, Tensor] = {}

    def update(
        self,
        prediction: Prediction,
        labels: AtomBatch,
        n_atoms: Tensor | None = None,
        source: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            prediction: on the device of the labels.
            labels: those of the atoms that this rank owns.
            n_atoms: ``[B]`` atoms of each system over all ranks; None takes those of the labels.
            source: ``[B]`` int64, which of the sources each system is of; may be None if there is one.
        """
        n_atoms = labels.n_atoms if n_atoms is None else n_atoms
        atoms_source = None if source is None else source[labels.system]
        forces = _error_sums(prediction.forces, labels.forces)  # [N, 3]
        self._add("energy", _error_sums(prediction.energy / n_atoms, labels.energy / n_atoms), source)
        self._add("forces", forces, atoms_source)
        self._add("cosine", _cosine_sums(prediction.forces, labels.forces), atoms_source)
        if prediction.stress is not None:
            self._add("stress", _error_sums(prediction.stress, labels.stress), source)
        if "elements" in self._rows:
            self._add("elements", forces, labels.numbers)

    def total(self, mesh: Mesh) -> "ErrorMeter":
        """Return the errors on all ranks; collective. They need not have seen the same quantities."""
        device = next((s.device for s in self.sums.values()), mesh.world.device)
        none = torch.zeros(3, dtype=torch.float64, device=device)
        mine = [
            mesh.once(self.sums.get(name, none.expand(rows, 3)), partial=name in _PARTIAL)
            for name, rows in self._rows.items()
        ]
        summed = mesh.world.sum(torch.cat(mine)).split(list(self._rows.values()))
        total = ErrorMeter(per_element="elements" in self._rows, sources=self._sources)
        total.sums = dict(zip(self._rows, summed, strict=True))
        return total

    def errors(self) -> dict[str, float]:
        """Return ``energy_mae``, ``energy_rmse``, ``forces_mae``, ... in eV/atom, eV/A, eV/A^3.

        ``forces_cosine`` is the mean cosine between predicted and true forces, 1 if all directions are right.

        A quantity without any label is absent. Also ``forces_mae_Ag`` and so on with ``per_element``, where
        there are several elements, and ``energy_mae@NAME``, ... of each source, where there are several.
        """
        found: dict[str, float] = {}
        tables = {name: sums.tolist() for name, sums in self.sums.items()}
        elements = tables.pop("elements", [])
        for name, table in tables.items():
            _put(found, name, "", [sum(column) for column in zip(*table, strict=True)])
        if sum(count > 0 for _, _, count in elements) > 1:
            for symbol, row in zip(chemical_symbols, elements, strict=True):
                _put(found, "forces", f"_{symbol}", row)
        for i, source in enumerate(self._sources if len(self._sources) > 1 else ()):
            for name, table in tables.items():
                _put(found, name, f"@{source}", table[i])
        return found

    def _add(self, name: str, rows: Tensor, index: Tensor | None) -> None:
        """Add ``rows [n, 3]``, each to the row ``index [n]`` of a sum."""
        count = self._rows[name]
        if count == 1:  # and no atomics, whose order is left to a GPU
            sums = rows.sum(0, keepdim=True)
        else:
            assert index is not None, "several sources need to be told apart"
            sums = rows.new_zeros(count, 3).index_add_(0, index, rows)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums


def error_table(errors: Mapping[str, float]) -> str:
    """Return errors as a text table in meV units, one line per quantity, then per element and data set."""
    rows = []
    for key, mae in errors.items():
        if found := re.fullmatch(r"(energy|forces|stress)_mae([_@].*)?", key):
            name, of = found[1], found[2] or ""
            rows.append((f"{name} {of[1:]}", mae * MEV, errors[f"{name}_rmse{of}"] * MEV, SHOWN_UNITS[name]))
    width = max(10, *(len(title) + 2 for title, *_ in rows)) if rows else 10
    lines = [f"{title:{width}}{mae:10.3f}{rmse:10.3f}  {unit}" for title, mae, rmse, unit in rows]
    return "\n".join([f"{'':{width}}{'MAE':>10}{'RMSE':>10}", *lines])


def _error_sums(prediction: Tensor, label: Tensor) -> Tensor:
    """Return ``[n, 3]`` for ``[n, ...]``: sum |e|, sum e^2 and the number of labels of each row.

    Only a missing label is left out: a prediction that is NaN must show.
    """
    # reshape(n, -1) would not do: a rank may own no atom
    prediction, label = prediction.detach().double()[:, None].flatten(1), label[:, None].flatten(1)
    known = ~label.isnan()
    error = (prediction - label).masked_fill(~known, 0.0)
    return torch.stack([error.abs().sum(1), error.square().sum(1), known.sum(1).to(error.dtype)], -1)


def _cosine_sums(prediction: Tensor, label: Tensor) -> Tensor:
    """Return the cosine, 0 and 1 of each atom ``[N, 3]``; zeros where the force has no direction."""
    size = label.norm(dim=1)
    known = size > 0  # NaN is not
    forces = prediction.detach().double()
    cosine = (forces * label).sum(1) / (forces.norm(dim=1) * size).clamp_min(1e-300)
    return torch.stack(
        [cosine.masked_fill(~known, 0.0), torch.zeros_like(cosine), known.to(cosine.dtype)], -1
    )


def _put(found: dict[str, float], name: str, suffix: str, sums: list[float]) -> None:
    absolute, squared, count = sums
    if count and name == "cosine":
        found[f"forces_cosine{suffix}"] = absolute / count
    elif count:
        found[f"{name}_mae{suffix}"] = absolute / count
        found[f"{name}_rmse{suffix}"] = math.sqrt(squared / count)
