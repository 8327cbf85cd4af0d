"""One training step and one validation step, as Lightning wants them."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from gnnmd.data.datamodule import AtomsLoader
from gnnmd.graph import AtomBatch, AtomGraph, NeighborList
from gnnmd.models.build import to_dict
from gnnmd.models.potential import Potential, Prediction
from gnnmd.parallel import GPContext, Mesh, Ranks, TimedContext
from gnnmd.parallel.exchange import WaitClock
from gnnmd.predict.metrics import ErrorMeter
from gnnmd.training.losses import LossConfig, loss_sums, weighted_sum
from gnnmd.training.optim import OptimConfig, build_optimizer, update_average
from gnnmd.training.schedule import learning_rate_factor

#: Where a saved state holds the configuration of the potential.
SHAPE = "potential_config"


@dataclass(frozen=True)
class LabelledGraph:
    """A batch with its graph, or one rank's share of both, on one device.

    Attributes:
        labels: per-atom rows are those of the atoms this rank owns, per-system ones are complete.
        graph: owned and ghost atoms.
        gp: how the ghosts' rows are fetched.
        source: ``[B]`` int64, which of `AtomsDataset.sources` each system is of.
    """

    labels: AtomBatch
    graph: AtomGraph
    gp: GPContext
    source: Tensor

    def to(self, device: torch.device) -> "LabelledGraph":
        """Return the batch and its graph on ``device``; a share is where its ranks are already."""
        return replace(
            self, labels=self.labels.to(device), graph=self.graph.to(device), source=self.source.to(device)
        )


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
        graph_seconds: what this rank's host has spent on building graphs.
        wait_clock: is entered while a training step waits for the ranks that share its graph.

    Losses and errors of an epoch are this rank's share while it lasts; `epoch_errors` adds those of the
    others.
    """

    def __init__(
        self,
        potential: Potential,
        loss: LossConfig,
        optim: OptimConfig,
        total_steps: int,
        *,
        autocast: torch.dtype | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Take over the potential.

        Args:
            potential: to be trained.
            loss: what is minimised.
            optim: how.
            total_steps: of the whole training.
            autocast: arithmetic of the backbone's matrix products; None leaves it.
            mesh: the processes that train together; None is this one alone.
        """
        super().__init__()
        self.mesh = mesh or Mesh()
        self.potential = potential
        self.average = copy.deepcopy(potential).requires_grad_(False).eval()
        self.loss = loss
        self.optim = optim
        self._total_steps = total_steps
        self.train_errors = ErrorMeter()
        self._train_loss = torch.zeros(2, dtype=torch.float64)  # sum over batches, number of batches
        self._grad_norm = torch.zeros(2, dtype=torch.float64)  # sum over steps, number of steps
        self.val_errors: dict[str, float] = {}
        self.val_loss = float("nan")
        self.graph_seconds = 0.0
        self.wait_clock: WaitClock | None = None
        self._random_state: Tensor | None = None
        self._cuda_random_state: Tensor | None = None
        self._val_meter = ErrorMeter()
        self._val_sums: dict[str, Tensor] = {}
        if autocast is not None:
            _autocast_backbone(potential, autocast)

    def train(self, mode: bool = True) -> "PotentialModule":
        """Set training mode of the trained copy; the average, and a backbone that is frozen, predict."""
        super().train(mode)
        self.average.eval()
        if not any(p.requires_grad for p in self.potential.backbone.parameters()):
            self.potential.backbone.eval()  # dropout would disturb what cannot adapt to it
        return self

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> LabelledGraph:
        """Build the graph: on the CPU, where looking at its values costs no synchronisation, or shared."""
        start = time.monotonic()
        graph = labelled_graph(self.potential, batch, self.mesh.gp)
        self.graph_seconds += time.monotonic() - start
        return graph

    def transfer_batch_to_device(
        self, batch: LabelledGraph, device: torch.device, dataloader_idx: int
    ) -> LabelledGraph:
        """Move both to the device."""
        return batch.to(device)

    def training_step(self, batch: LabelledGraph, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        weights = self._weights(self.global_step / max(1, self._total_steps))
        gp = batch.gp
        if self.wait_clock is not None and gp.group is not None:
            gp = TimedContext.of(gp, self.wait_clock)
        prediction = self.potential(batch.labels.positions, batch.graph, gp, stress="stress" in weights)
        sums = loss_sums(self.loss, set(weights), prediction, batch.labels, batch.graph.n_atoms)
        loss = weighted_sum(sums, weights, gp, self.mesh)
        self.train_errors.update(prediction, batch.labels, batch.graph.n_atoms)
        self._train_loss = self._train_loss.to(loss.device) + torch.stack(
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
        self._train_loss = torch.zeros_like(self._train_loss)
        self._grad_norm = torch.zeros_like(self._grad_norm)
        self.val_errors = {}

    def epoch_errors(self) -> tuple[ErrorMeter, Tensor]:
        """Return the errors of this epoch's training, and sum and number of its losses; collective.

        The loss of a batch is the mean of what the replicas call so; all ranks of a replica agree on it.
        """
        world = self.mesh.world
        return self.train_errors.total(self.mesh), world.sum(self._train_loss) / world.size

    @property
    def grad_norm(self) -> float:
        """Mean norm of the gradient over the steps of this epoch, before clipping; waits for the device."""
        total, steps = self._grad_norm.tolist()
        return total / max(1.0, steps)

    def on_validation_epoch_start(self) -> None:
        """Start counting errors afresh."""
        loader = self.trainer.val_dataloaders
        assert isinstance(loader, AtomsLoader)
        self._val_meter = ErrorMeter(per_element=True, sources=loader.dataset.sources)
        self._val_sums = {}

    def validation_step(self, batch: LabelledGraph, batch_idx: int) -> None:
        """Add the errors of one batch, unless another replica has it too."""
        loader = self.trainer.val_dataloaders
        assert isinstance(loader, AtomsLoader)
        if loader.repeats(batch_idx):
            return
        weights = self._weights(1.0)
        prediction = predict(self.average, batch, stress="stress" in weights)
        self._val_meter.update(prediction, batch.labels, batch.graph.n_atoms, batch.source)
        sums = loss_sums(self.loss, set(weights), prediction, batch.labels, batch.graph.n_atoms)
        for name, s in sums.items():
            # Ranks that know a sum in full all add it, with its count: the mean is the same.
            mine = torch.stack([s.total, s.count])
            self._val_sums[name] = self._val_sums[name] + mine if name in self._val_sums else mine

    def on_validation_epoch_end(self) -> None:
        """Add the sums of all ranks and divide them by the counts, once."""
        weights = self._weights(1.0)
        none = torch.zeros(2, dtype=torch.float64, device=self.device)
        sums = self.mesh.world.sum(torch.stack([self._val_sums.get(name, none) for name in weights]))
        self.val_loss = sum(
            weight * total / max(1.0, count)
            for weight, (total, count) in zip(weights.values(), sums.tolist(), strict=True)
        )
        self.val_errors = self._val_meter.total(self.mesh).errors()
        self.log("val_loss", self.val_loss, logger=False)  # for early stopping

    def _weights(self, progress: float) -> dict[str, float]:
        return self.loss.weights(progress, learning_rate_factor(self.optim.schedule, progress))

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
        """Add up and clip the norm of the whole gradient, which all ranks know by now."""
        parameters = list(self.potential.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        self._grad_norm = self._grad_norm.to(norm.device) + torch.stack([norm, torch.ones_like(norm)])
        if self.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optim.clip_norm, norm, foreach=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store errors of the epoch under way, random state and shape of the potential; collective."""
        errors, loss = self.epoch_errors()
        checkpoint["epoch_errors"] = {"sums": errors.sums, "loss": loss, "grad_norm": self._grad_norm}
        checkpoint["random_state"] = torch.get_rng_state()
        checkpoint[SHAPE] = to_dict(self.potential.config)
        if torch.cuda.is_available():
            checkpoint["cuda_random_state"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored."""
        if self.mesh.world.rank == 0:  # sums over all ranks
            self.train_errors.sums = dict(checkpoint["epoch_errors"]["sums"])
        self._train_loss = checkpoint["epoch_errors"]["loss"]  # a mean over ranks
        self._grad_norm = checkpoint["epoch_errors"].get("grad_norm", self._grad_norm)
        self._random_state = checkpoint["random_state"]
        self._cuda_random_state = checkpoint.get("cuda_random_state")

    def on_train_start(self) -> None:
        """Restore the random state of a resumed run, after everything that draws from it while starting."""
        self.train_errors.sums = {name: s.to(self.device) for name, s in self.train_errors.sums.items()}
        self._train_loss = self._train_loss.to(self.device)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
        if self._cuda_random_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._cuda_random_state.cpu())


def labelled_graph(potential: Potential, data: Any, ranks: Ranks | None = None) -> LabelledGraph:
    """Turn a PyG batch into labels and the graph that ``potential`` reads, or one rank's share of both.

    Args:
        potential: the model.
        data: the batch; with precomputed edges where one rank has the graph to itself.
        ranks: they share the graph, and were given the same batch; None is this process alone.

    Raises:
        ValueError: the model cannot describe the batch.
    """
    labels = AtomBatch.from_data(data)
    if ranks is None or ranks.group is None:
        graph = potential.graph(labels, NeighborList(data.edge_index, data.shift, potential.r_cut))
        return LabelledGraph(labels, graph, GPContext.single(len(labels.numbers)), data.source)
    labels = labels.to(ranks.device)
    plan = potential.plan(labels, ranks, carried=(labels.forces,))
    n_owned = plan.gp.n_owned
    owned = replace(
        labels,
        positions=plan.positions,
        numbers=plan.graph.numbers[:n_owned],
        system=plan.graph.system[:n_owned],
        forces=plan.carried[0],
    )
    return LabelledGraph(owned, plan.graph, plan.gp, data.source.to(ranks.device))


def predict(potential: Potential, batch: LabelledGraph, *, stress: bool = True) -> Prediction:
    """Evaluate; Lightning validates under no_grad, but forces need a gradient."""
    with torch.enable_grad():
        return potential(batch.labels.positions, batch.graph, batch.gp, stress=stress)


def _autocast_backbone(potential: Potential, dtype: torch.dtype) -> None:
    """Run the backbone's matrix products in ``dtype``; positions, heads and energy sums stay as they are."""
    forward = potential.backbone.forward

    def mixed(g: AtomGraph, gp: GPContext) -> Tensor:
        with torch.autocast(g.numbers.device.type, dtype):
            return forward(g, gp)

    potential.backbone.forward = mixed  # type: ignore[method-assign]
