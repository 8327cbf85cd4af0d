"""What a run tells while it lasts: a table on the screen, metrics.csv, and the configured logger."""

import csv
import io
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gnnmd.predict.checkpoint import write_atomically
from gnnmd.predict.metrics import SHOWN_UNITS
from gnnmd.training.module import LabelledGraph, PotentialModule
from gnnmd.training.stopwatch import COMMUNICATION, PARTS, Stopwatch
from gnnmd.units import MEV

#: Columns that a clock or the memory of the process enters: nothing else differs from run to run.
MEASURED = (
    *("seconds", "atoms_per_s", "edges_per_s"),
    *(f"{part}_seconds" for part in (*PARTS, COMMUNICATION)),
    "peak_memory_MB",
)
#: Of metrics.csv; errors in eV/atom, eV/A, eV/A^3, as everywhere but on the screen. Columns of elements and
#: data sets, where there are several, follow: ``val_forces_mae_Ag``, ``val_energy_mae@NAME``.
COLUMNS = (
    *("epoch", "step", "seconds", "lr", "train_loss", "val_loss"),
    *(f"{split}_{name}_{s}" for split in ("train", "val") for name in SHOWN_UNITS for s in ("mae", "rmse")),
    *("train_forces_cosine", "val_forces_cosine", "grad_norm"),
    *MEASURED[1:],
)


class History(Callback):
    """Writes one row per epoch; a resumed run continues the file from the row of its checkpoint.

    A file of our own instead of Lightning's CSVLogger: that one deletes the rows of the run that is resumed.
    """

    def __init__(self, path: Path, console: Console, stopwatch: Stopwatch) -> None:
        self._path, self._console, self._stopwatch = path, console, stopwatch
        self._rows: list[dict[str, str]] = []
        self._epoch_start = 0.0
        self._atoms = self._edges = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the rows up to the checkpoint; print the head of the table."""
        if trainer.global_step and self._path.exists():
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            # an epoch that was left in its middle gets its row again at its end
            self._rows = [row for row in rows if int(row["epoch"]) <= trainer.current_epoch]
        units = "".join(f"{f'{name} {unit}':>20}" for name, unit in SHOWN_UNITS.items())
        self._console.print(f"{'':7}{'':10}mean absolute errors, training | validation (averaged weights)")
        self._console.print(f"{'epoch':>7}{'lr':>10}{units}{'s/epoch':>9}")
        self._epoch_start = time.monotonic()  # Lightning does not announce an epoch that it resumes

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._epoch_start = time.monotonic()
        self._atoms = self._edges = 0
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Count the rank's share of the batch."""
        batch: LabelledGraph = given[0]
        self._atoms += len(batch.labels.numbers)  # shapes: nothing waits for the device
        self._edges += batch.graph.edge_index.shape[1]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of this epoch: the same numbers on every rank, one of which writes.

        Raises:
            FloatingPointError: the loss is no longer a number.
        """
        assert isinstance(pl_module, PotentialModule)
        errors, loss = pl_module.epoch_errors()
        total, batches = loss.tolist()
        train_loss = total / max(1.0, batches)
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"the training diverged in epoch {trainer.current_epoch + 1} (loss {train_loss}). Lower "
                f"optim.lr (now {pl_module.optim.lr:g}) or optim.clip_norm, or look for outliers in the data"
            )
        train, val = errors.errors(), pl_module.val_errors
        spent = time.monotonic() - self._epoch_start
        mesh = pl_module.mesh
        parts = self._stopwatch.seconds()
        names = (*PARTS, COMMUNICATION)
        mine = [self._atoms, self._edges, *(parts.get(name, 0.0) for name in names)]
        atoms, edges, *times = mesh.world.sum(
            torch.tensor(mine, dtype=torch.float64, device=mesh.world.device)
        ).tolist()
        split = {part: total / mesh.world.size for part, total in zip(names, times, strict=True)}
        memory = float(mesh.world.max(torch.tensor(_peak_memory(), device=mesh.world.device)))
        trained = max(1e-9, spent - split["validation"])
        before = float(self._rows[-1]["seconds"]) if self._rows else 0.0
        values: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(before + spent, 3),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": train_loss,
            **{f"train_{name}": error for name, error in train.items()},
        }
        values |= {
            "grad_norm": pl_module.grad_norm,
            "atoms_per_s": round(atoms / trained, 1),
            "edges_per_s": round(edges / trained, 1),
            **{f"{part}_seconds": round(mean, 3) for part, mean in split.items()},
            "peak_memory_MB": round(memory, 1),
        }
        if val:
            values |= {"val_loss": pl_module.val_loss}
            values |= {f"val_{name}": error for name, error in val.items()}
        self._rows.append({name: repr(value) for name, value in values.items()})
        if trainer.is_global_zero:
            self._write()
        for logger in trainer.loggers:
            logger.log_metrics({k: float(v) for k, v in values.items()}, step=trainer.global_step)
        self._print(values, spent)

    def _write(self) -> None:
        text = io.StringIO(newline="")
        names = dict.fromkeys([*COLUMNS, *(name for row in self._rows for name in row)])
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self._path, text.getvalue().encode())

    def _print(self, values: Mapping[str, Any], spent: float) -> None:
        pairs = ""
        for name in SHOWN_UNITS:
            train, val = (values.get(f"{split}_{name}_mae") for split in ("train", "val"))
            shown = " | ".join("-" if v is None else f"{MEV * v:.2f}" for v in (train, val))
            pairs += f"{shown:>20}"
        self._console.print(f"{values['epoch']:7d}{values['lr']:10.1e}{pairs}{spent:9.1f}")


def _peak_memory() -> float:
    """Return the largest memory in MB: on the GPU in this epoch, or of the process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class LiveBar(Callback):
    """A bar over the whole training with errors and speed of the running epoch; refreshed twice a second."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total = total_steps
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._shown = self._start = 0.0
        self._atoms = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._bar.start()
        self._task = self._bar.add_task("training", total=self._total, completed=trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._start, self._atoms = time.monotonic(), 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Refresh the bar; reading errors waits for the device, so not after every step."""
        assert isinstance(pl_module, PotentialModule)
        batch: LabelledGraph = given[1]
        self._atoms += len(batch.labels.numbers)
        if time.monotonic() - self._shown < 0.5:
            return
        errors = pl_module.train_errors.errors()  # of the atoms this rank owns
        shown = [
            f"{name} {errors[f'{name}_mae'] * MEV:.1f} {SHOWN_UNITS[name]}"
            for name in ("energy", "forces")
            if f"{name}_mae" in errors
        ]
        self._shown = time.monotonic()
        # Ranks have shares of about one size; asking them would take a collective.
        speed = self._atoms * pl_module.mesh.world.size / (self._shown - self._start)
        shown.append(f"{speed:,.0f} atoms/s")
        text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(shown)}"
        self._bar.update(self._task, description=text, completed=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar."""
        self._bar.stop()
