"""Parity plots: predicted against reference energy per atom, forces and stress."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.parallel import Mesh
from gnnmd.predict.metrics import SHOWN_UNITS
from gnnmd.units import MEV

_AXES = {"energy": "energy (eV/atom)", "forces": "force component (eV/Å)", "stress": "stress (eV/Å³)"}
_MOST_POINTS = 100_000  # per panel; more cannot be told apart


class Parity:
    """Collects pairs of reference and prediction over batches, on the CPU; missing labels are left out."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[np.ndarray]] = {name: [] for name in _AXES}

    def update(self, prediction: Prediction, labels: AtomBatch, n_atoms: Tensor | None = None) -> None:
        """Add one batch; arguments as in `ErrorMeter.update`."""
        n_atoms = labels.n_atoms if n_atoms is None else n_atoms
        self._add("energy", labels.energy / n_atoms, prediction.energy / n_atoms)
        self._add("forces", labels.forces, prediction.forces)
        if prediction.stress is not None:
            self._add("stress", labels.stress, prediction.stress)

    def total(self, mesh: Mesh) -> "Parity":
        """Return the pairs of all ranks, on the first; the others get none. Collective."""
        total = Parity()
        for name, parts in self._pairs.items():
            mine = np.concatenate([np.empty((2, 0)), *parts], axis=1)
            rows = torch.from_numpy(mine.T.copy()).to(mesh.world.device)
            rows = rows if name == "forces" or mesh.gp.rank == 0 else rows[:0]  # see `ErrorMeter.total`
            to_first = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            (arrived,), _ = mesh.world.send_rows((rows,), to_first)
            total._pairs[name].append(arrived.T.cpu().numpy())
        return total

    def pairs(self) -> dict[str, np.ndarray]:
        """Return reference and prediction ``[2, M]`` by quantity, eV/atom, eV/A, eV/A^3."""
        joined = {name: np.concatenate(parts, axis=1) for name, parts in self._pairs.items() if parts}
        return {name: pairs for name, pairs in joined.items() if pairs.shape[1]}

    def _add(self, name: str, reference: Tensor, predicted: Tensor) -> None:
        pairs = (
            torch.stack([reference.double().flatten(), predicted.detach().double().flatten()]).cpu().numpy()
        )
        self._pairs[name].append(pairs[:, np.isfinite(pairs).all(0)])


def save_parity_plot(path: Path, pairs: Mapping[str, np.ndarray], title: str = "") -> Path:
    """Draw one panel per quantity and write a PNG.

    Args:
        path: file to write.
        pairs: `Parity.pairs`.
        title: printed above the panels.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    if not pairs:
        raise ValueError("no labels to compare with: the data hold neither energies nor forces nor stress")
    figure = Figure(figsize=(4.6 * len(pairs), 4.4), dpi=130, layout="constrained")
    rng = np.random.default_rng(0)
    for axes, (name, (reference, predicted)) in zip(
        figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True
    ):
        mae = np.abs(predicted - reference).mean() * MEV
        shown = rng.permutation(len(reference))[:_MOST_POINTS]
        span = [min(reference.min(), predicted.min()), max(reference.max(), predicted.max())]
        axes.plot(span, span, color="0.7", lw=1)
        axes.plot(reference[shown], predicted[shown], ".", ms=2, color="tab:blue", alpha=0.5, rasterized=True)
        axes.set(title=f"{name}, MAE {mae:.2f} {SHOWN_UNITS[name]}", xlabel=f"reference {_AXES[name]}")
        axes.set(ylabel="predicted", box_aspect=1)
    figure.suptitle(title)
    figure.savefig(path)
    return path
