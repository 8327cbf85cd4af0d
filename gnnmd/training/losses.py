"""The loss: local sums and counts first, one division by the global counts at the end.

A label that is NaN is missing: it adds neither to a sum nor to a count. Errors are in eV/atom, eV/A and
eV/A^3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.models.potential import Prediction
from gnnmd.parallel import GPContext, Mesh
from gnnmd.training.schedule import RampConfig, ramp


@dataclass
class TermConfig:
    """One term of the loss: energy or stress.

    Attributes:
        kind: mean absolute error, mean squared error, or Huber's: quadratic below ``huber_width`` and then
            the absolute error (less half the width), so that "mae" and "huber" take the same weights.
        weight: factor of this term in the loss, at the start of the training if ``final_weight`` is given.
        final_weight: factor at the end, reached along ``loss.ramp``; None keeps ``weight``.
        huber_width: eV/atom or eV/A^3.
    """

    kind: Literal["mae", "mse", "huber"] = "mae"
    weight: float = 1.0
    final_weight: float | None = None
    huber_width: float = 0.01


@dataclass
class ForcesConfig:
    """The force term of the loss.

    Attributes:
        kind: mean length of the error vector ("l2", independent of the axes), mean absolute or mean squared
            error of the components.
        weight: as in the energy term.
        final_weight: as in the energy term.
    """

    kind: Literal["l2", "mae", "mse"] = "l2"
    weight: float = 1.0
    final_weight: float | None = None


@dataclass
class LossConfig:
    """Terms of the loss and how their weights change; a term of weight 0 is not computed."""

    energy: TermConfig = field(default_factory=lambda: TermConfig(weight=1.0))
    forces: ForcesConfig = field(default_factory=ForcesConfig)
    stress: TermConfig = field(default_factory=lambda: TermConfig(weight=1.0))
    ramp: RampConfig = field(default_factory=RampConfig)

    def weights(self, progress: float, lr_factor: float = 1.0) -> dict[str, float]:
        """Return the weights of the terms that count, at ``progress`` in [0, 1] and this learning rate."""
        weights: dict[str, float] = {}
        terms: list[tuple[str, TermConfig | ForcesConfig]]
        terms = [("energy", self.energy), ("forces", self.forces), ("stress", self.stress)]
        for name, term in terms:
            last = term.weight if term.final_weight is None else term.final_weight
            if term.weight or last:
                weights[name] = ramp(self.ramp, term.weight, last, progress, lr_factor)
        if not weights:
            raise ValueError(
                "every term of the loss has weight 0; set loss.energy.weight or loss.forces.weight"
            )
        return weights


@dataclass(frozen=True)
class LossSum:
    """Sum of a term over labels that exist, and their number, both on the device.

    Attributes:
        total: scalar float64, differentiable.
        count: scalar float64.
        partial: the sum covers this rank's atoms only. Energy and stress are known to every rank in full:
            summing them over ranks would leave the loss right and make every gradient too small by the
            number of ranks.
    """

    total: Tensor
    count: Tensor
    partial: bool = False


def loss_sums(
    config: LossConfig, terms: set[str], prediction: Prediction, labels: AtomBatch, n_atoms: Tensor
) -> dict[str, LossSum]:
    """Return the sums of the loss terms over this rank's labels.

    Args:
        config: kinds of the terms.
        terms: names of the terms to compute.
        prediction: of the same batch, with a graph.
        labels: energies ``[B]``, forces ``[N, 3]`` and stress ``[B, 3, 3]``; NaN where missing.
        n_atoms: ``[B]`` atoms per system.
    """
    sums = {}
    if "energy" in terms:
        sums["energy"] = _component_sum(
            config.energy, prediction.energy / n_atoms, labels.energy / n_atoms, labels.energy.isfinite()
        )
    if "forces" in terms:
        sums["forces"] = _force_sum(config.forces, prediction.forces, labels.forces)
    if "stress" in terms and prediction.stress is not None:
        known = (labels.stress.isfinite() & prediction.stress.isfinite()).all(-1).all(-1)
        sums["stress"] = _component_sum(
            config.stress, prediction.stress, labels.stress, known[:, None, None].expand_as(labels.stress)
        )
    return sums


def weighted_sum(
    sums: dict[str, LossSum], weights: dict[str, float], gp: GPContext, mesh: Mesh | None = None
) -> Tensor:
    """Return the loss: the weighted sum of the terms' means over the labels of all ranks; collective.

    Its mean over replicas is that loss; its gradient, summed over the ranks that share a graph and averaged
    over replicas, the gradient. A term without any label is 0.

    Args:
        sums: terms on this rank.
        weights: by term.
        gp: how this rank shares its graph.
        mesh: all processes; None is this one alone.
    """
    mesh = mesh or Mesh()
    counts = mesh.world.sum(torch.stack([mesh.once(s.count, partial=s.partial) for s in sums.values()]))
    terms = [
        weights[name] * (mesh.n_replicas * (gp.sum_ranks(s.total) if s.partial else s.total)) / count
        for (name, s), count in zip(sums.items(), counts.clamp(min=1), strict=True)
    ]
    return torch.stack(terms).sum()


def _component_sum(config: TermConfig, predicted: Tensor, label: Tensor, known: Tensor) -> LossSum:
    error = _error(predicted, label, known)
    size: Callable[[Tensor], Tensor] = {
        "mae": torch.abs,
        "mse": torch.square,
        "huber": lambda e: torch.nn.functional.smooth_l1_loss(
            e, torch.zeros_like(e), beta=config.huber_width, reduction="none"
        ),
    }[config.kind]
    return LossSum(size(error).sum(), known.sum().to(error.dtype))


def _force_sum(config: ForcesConfig, predicted: Tensor, label: Tensor) -> LossSum:
    known = label.isfinite().all(-1)  # [N]
    error = _error(predicted, label, known[:, None].expand_as(label))
    if config.kind == "l2":
        return LossSum(
            torch.linalg.vector_norm(error, dim=-1).sum(), known.sum().to(error.dtype), partial=True
        )
    size = error.abs() if config.kind == "mae" else error.square()
    return LossSum(size.sum(), 3 * known.sum().to(error.dtype), partial=True)


def _error(predicted: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """Return predicted - label, and 0 where the label is unknown.

    Both sides are replaced before the subtraction: a NaN behind `torch.where` still turns the gradient of
    what is in front of it (a square root, a division by the volume) into NaN.
    """
    zero = predicted.new_zeros(())
    return torch.where(known, predicted, zero) - torch.where(known, label, zero)
