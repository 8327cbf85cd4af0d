"""When a run stops, and what it keeps: the best and the last model, the state to resume from."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gnnmd.models.potential import Potential
from gnnmd.parallel import Mesh
from gnnmd.training.module import PotentialModule

STATE = "last.ckpt"
BEST = "best.safetensors"
LAST = "last.safetensors"
#: What asks a run to stop: Ctrl-C; the end of a job; the warning before it (sbatch --signal=USR1@120).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Pace(NamedTuple):
    """How many batches make a step and an epoch, on every replica: a run is resumed at the same pace only."""

    batches_per_epoch: int
    batches_per_step: int


class Checkpoints(Callback):
    """Writes three files into the run folder, each in one step so that none is ever half written.

    Runs on every rank, since collecting the state needs all of them; the first one writes.

    - ``best.safetensors``: the model (averaged weights) of the lowest validation loss;
    - ``last.safetensors``: the model at the end, or when the run was interrupted;
    - ``last.ckpt``: the whole state, to resume.
    """

    def __init__(
        self, folder: Path, export: Callable[[Path, Potential, dict[str, Any]], None], pace: Pace
    ) -> None:
        self._folder, self._export, self._pace = folder, export, pace
        self.best = math.inf
        self.interrupted = False
        self._saved_mid_epoch = False

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest validation loss so far, and the pace."""
        return {"best": self.best, **self._pace._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it.

        Raises:
            ValueError: steps and epochs mean something else now.
        """
        before = Pace(*(state_dict[name] for name in Pace._fields))
        if before != self._pace:
            raise ValueError(
                f"the run to resume took {before.batches_per_epoch} batches per epoch and "
                f"{before.batches_per_step} per step on every replica; this one would take "
                f"{self._pace.batches_per_epoch} and {self._pace.batches_per_step}, and be elsewhere in its "
                "epoch and its learning rate. Keep the data, trainer.accumulate, and the product of "
                "parallel.dp and data.max_frames (max_atoms, max_edges), or start a new run with init_from"
            )
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the model if it is the best so far."""
        assert isinstance(pl_module, PotentialModule)
        if pl_module.val_loss < self.best:
            self.best = pl_module.val_loss
            self._write_model(BEST, trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save between two steps when the run is told to stop inside an epoch (time limit, Ctrl-C)."""
        if trainer.should_stop and not trainer.is_last_batch:
            self._save_state(trainer)
            self._saved_mid_epoch = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after every epoch."""
        if not self._saved_mid_epoch:
            self._save_state(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the last model."""
        assert isinstance(pl_module, PotentialModule)
        self._write_model(LAST, trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is after Ctrl-C; weights that led to an error are not worth keeping."""
        assert isinstance(pl_module, PotentialModule)
        if isinstance(exception, KeyboardInterrupt) and pl_module.mesh.world.size == 1:
            self.interrupted = True
            self._save_state(trainer)
            self._write_model(LAST, trainer, pl_module)

    def _save_state(self, trainer: Trainer) -> None:
        partial = self._folder / f".{STATE}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self._folder / STATE)

    def _write_model(self, name: str, trainer: Trainer, module: PotentialModule) -> None:
        if not trainer.is_global_zero:
            return
        summary = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "val_loss": module.val_loss,
        }
        self._export(self._folder / name, module.average, {**summary, "val_errors": dict(module.val_errors)})


class StopBetweenSteps(Callback):
    """Lets all ranks stop after the same step, whoever wants to stop and whenever he says so.

    Reasons are Ctrl-C, SIGTERM or SIGUSR1 (the end of a job's time) and ``trainer.should_stop`` of a time
    limit. They reach ranks at different steps, and between batches whose gradients are being accumulated;
    the ranks agree after the step.

    Attributes:
        interrupted: stopped by a signal.
    """

    def __init__(self, say: Callable[[str], None], mesh: Mesh) -> None:
        self._say, self._mesh = say, mesh
        self._before: dict[int, Any] = {}
        self._signalled = self._asked = self.interrupted = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals; Python delivers them to the main thread only."""
        self._step = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(signum: int, frame: FrameType | None) -> None:
            # torchrun repeats what the terminal has sent already, and one rank must not leave the others
            # alone: with many ranks only the first signal counts.
            if self._signalled and signum == signal.SIGINT and self._mesh.world.size == 1:
                raise KeyboardInterrupt
            if not self._signalled:
                self._say("interrupted: stopping after this step; Ctrl-C once more stops at once")
            self._signalled = True

        self._before = {number: signal.signal(number, stop) for number in STOPPING}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Agree, if this batch completed a step."""
        self._asked |= trainer.should_stop
        trainer.should_stop = False
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree: a validation can take as long as many steps."""
        self._asked |= trainer.should_stop
        self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self.interrupted = self.interrupted or isinstance(exception, KeyboardInterrupt)
        self._restore()

    def _agree(self, trainer: Trainer) -> None:
        world = self._mesh.world
        mine = 2 if self._signalled else int(self._asked)
        wish = int(world.max(torch.tensor(mine, device=world.device)))
        trainer.should_stop, self.interrupted = wish > 0, wish == 2

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
