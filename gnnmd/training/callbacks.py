"""What a run keeps: the best and the last model, the state to resume from, also after Ctrl-C."""

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gnnmd.models.potential import Potential
from gnnmd.training.module import PotentialModule

STATE = "last.ckpt"
BEST = "best.safetensors"
LAST = "last.safetensors"


class Checkpoints(Callback):
    """Writes three files into the run folder, each in one step so that none is ever half written.

    - ``best.safetensors``: the model (averaged weights) of the lowest validation loss;
    - ``last.safetensors``: the model at the end, or when the run was interrupted;
    - ``last.ckpt``: the whole state, to resume.
    """

    def __init__(self, folder: Path, export: Callable[[Path, Potential, dict[str, Any]], None]) -> None:
        self._folder = folder
        self._export = export
        self.best = math.inf
        self.interrupted = False
        self._saved_mid_epoch = False

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest validation loss so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
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
        if isinstance(exception, KeyboardInterrupt):
            self.interrupted = True
            self._save_state(trainer)
            self._write_model(LAST, trainer, pl_module)

    def _save_state(self, trainer: Trainer) -> None:
        partial = self._folder / f".{STATE}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        os.replace(partial, self._folder / STATE)

    def _write_model(self, name: str, trainer: Trainer, module: PotentialModule) -> None:
        summary = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "val_loss": module.val_loss,
        }
        self._export(self._folder / name, module.average, {**summary, "val_errors": dict(module.val_errors)})


class StopOnInterrupt(Callback):
    """Turns the first Ctrl-C into "stop after this step": the saved state is one between two steps."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: Any = None
        self.interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for the signal; Python delivers it to the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(signum: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            trainer.should_stop = True
            self._say("Ctrl-C: stopping after this step; once more stops at once")

        self._before = signal.signal(signal.SIGINT, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signal back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signal back."""
        self.interrupted = self.interrupted or isinstance(exception, KeyboardInterrupt)
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
