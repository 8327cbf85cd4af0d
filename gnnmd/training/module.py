"""One training step and one validation step, as Lightning wants them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from gnnmd.graph import AtomBatch, AtomGraph, NeighborList
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext
from gnnmd.predict.metrics import ErrorMeter
from gnnmd.training.losses import LossConfig, loss_sums, weighted_sum
from gnnmd.training.optim import OptimConfig, build_optimizer, update_average


@dataclass(frozen=True)
class LabelledGraph:
    """A batch with its graph, on one device."""

    labels: AtomBatch
    graph: AtomGraph

    def to(self, device: torch.device) -> "LabelledGraph":
        """Return the batch and its graph on ``device``."""
        return LabelledGraph(self.labels.to(device), self.graph.to(device))


class PotentialModule(LightningModule):
    """Trains `potential`; validates and exports `average`, the average of its weights over the last steps.

    The average is a second copy of the model rather than a swap of weights around validation: no code path
    can then save or train the wrong set, and Lightning's checkpoint holds both.

    Attributes:
        potential: the model that is trained.
        average: the model that is validated and exported.
        train_errors: errors of the predictions made while training in this epoch.
        val_errors: errors of this epoch's validation, eV/atom, eV/A, eV/A^3; empty where there was none.
        val_loss: loss of the last validation, with the weights of the end of the training so that epochs
            compare.
    """

    def __init__(
        self,
        potential: Potential,
        loss: LossConfig,
        optim: OptimConfig,
        total_steps: int,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.potential = potential
        self.average = copy.deepcopy(potential).requires_grad_(False).eval()
        self.loss = loss
        self.optim = optim
        self._total_steps = total_steps
        self.train_errors = ErrorMeter()
        self.train_loss = torch.zeros(2, dtype=torch.float64)  # sum over steps, number of steps
        self.val_errors: dict[str, float] = {}
        self.val_loss = float("nan")
        self._random_state: Tensor | None = None
        self._cuda_random_state: list[Tensor] | None = None
        self._val_meter = ErrorMeter()
        self._val_sums: list[dict[str, Tensor]] = []
        if autocast is not None:
            _autocast_backbone(potential, autocast)

    def train(self, mode: bool = True) -> "PotentialModule":
        """Set training mode of the trained copy; the average always predicts."""
        super().train(mode)
        self.average.eval()
        return self

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> LabelledGraph:
        """Build the graph on the CPU, where looking at its values costs no synchronisation."""
        return labelled_graph(self.potential, batch)

    def transfer_batch_to_device(
        self, batch: LabelledGraph, device: torch.device, dataloader_idx: int
    ) -> LabelledGraph:
        """Move both to the device."""
        return batch.to(device)

    def training_step(self, batch: LabelledGraph, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        weights = self.loss.weights(self.global_step / max(1, self._total_steps))
        gp = GPContext.single(len(batch.labels.numbers))
        prediction = self.potential(batch.labels.positions, batch.graph, gp, stress="stress" in weights)
        sums = loss_sums(self.loss, set(weights), prediction, batch.labels, batch.graph.n_atoms)
        loss = weighted_sum(sums, weights, gp)
        self.train_errors.update(prediction, batch.labels)
        self.train_loss = self.train_loss.to(loss.device) + torch.stack(
            [loss.detach(), torch.ones_like(loss)]
        )
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then let the average follow."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_average(self.average, self.potential, self.optim.ema_decay, step)

    def on_train_epoch_start(self) -> None:
        """Start counting errors afresh."""
        self.train_errors = ErrorMeter()
        self.train_loss = torch.zeros_like(self.train_loss)
        self.val_errors = {}

    def on_validation_epoch_start(self) -> None:
        """Start counting errors afresh."""
        self._val_meter, self._val_sums = ErrorMeter(), []

    def validation_step(self, batch: LabelledGraph, batch_idx: int) -> None:
        """Add the errors of one batch."""
        weights = self.loss.weights(1.0)
        prediction = predict(self.average, batch, stress="stress" in weights)
        self._val_meter.update(prediction, batch.labels)
        sums = loss_sums(self.loss, set(weights), prediction, batch.labels, batch.graph.n_atoms)
        self._val_sums.append({name: torch.stack([s.total, s.count]) for name, s in sums.items()})

    def on_validation_epoch_end(self) -> None:
        """Divide sums by counts, once."""
        weights = self.loss.weights(1.0)
        loss = 0.0
        for name in self._val_sums[0]:
            total, count = torch.stack([sums[name] for sums in self._val_sums]).sum(0).tolist()
            loss += weights[name] * total / max(1.0, count)
        self.val_errors, self.val_loss = self._val_meter.errors(), loss
        self.log("val_loss", loss, logger=False)  # for early stopping

    def configure_optimizers(self) -> Any:
        """Return AdamW and its schedule, stepped every step."""
        optimizer, schedule = build_optimizer(self.potential, self.optim, self._total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient."""
        if self.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.potential.parameters(), self.optim.clip_norm, foreach=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the errors of the epoch that is under way, and the random state."""
        checkpoint["epoch_errors"] = {"sums": dict(self.train_errors.sums), "loss": self.train_loss}
        checkpoint["random_state"] = torch.get_rng_state()
        if torch.cuda.is_available():
            checkpoint["cuda_random_state"] = torch.cuda.get_rng_state_all()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored."""
        self.train_errors.sums = dict(checkpoint["epoch_errors"]["sums"])
        self.train_loss = checkpoint["epoch_errors"]["loss"]
        self._random_state = checkpoint["random_state"]
        self._cuda_random_state = checkpoint.get("cuda_random_state")

    def on_train_start(self) -> None:
        """Restore the random state of a resumed run, after everything that draws from it while starting."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
        if self._cuda_random_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._cuda_random_state])


def labelled_graph(potential: Potential, data: Any) -> LabelledGraph:
    """Turn a PyG batch with precomputed edges into labels and the graph that ``potential`` reads."""
    labels = AtomBatch.from_data(data)
    neighbors = NeighborList(data.edge_index, data.shift, potential.r_cut)
    return LabelledGraph(labels, potential.graph(labels, neighbors))


def predict(potential: Potential, batch: LabelledGraph, *, stress: bool = True) -> Prediction:
    """Evaluate; Lightning validates under no_grad, but forces need a gradient."""
    gp = GPContext.single(len(batch.labels.numbers))
    with torch.enable_grad():
        return potential(batch.labels.positions, batch.graph, gp, stress=stress)


def _autocast_backbone(potential: Potential, dtype: torch.dtype) -> None:
    """Run the backbone's matrix products in ``dtype``; positions, heads and energy sums stay as they are."""
    forward = potential.backbone.forward

    def mixed(g: AtomGraph, gp: GPContext) -> Tensor:
        with torch.autocast(g.numbers.device.type, dtype):
            return forward(g, gp)

    potential.backbone.forward = mixed  # type: ignore[method-assign]
