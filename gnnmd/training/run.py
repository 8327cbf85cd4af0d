"""A whole training run: data, model, fit, test errors, pictures."""

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import Logger
from rich.console import Console

from gnnmd.data.datamodule import AtomsDataModule, AtomsLoader
from gnnmd.data.statistics import Statistics
from gnnmd.models.build import PotentialConfig, build_potential, to_dict
from gnnmd.models.potential import Potential
from gnnmd.predict.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint, write_atomically
from gnnmd.predict.metrics import ErrorMeter, error_table
from gnnmd.predict.parity_plot import Parity, save_parity_plot
from gnnmd.training.callbacks import BEST, LAST, STATE, Checkpoints, StopOnInterrupt
from gnnmd.training.finetune import find_source, refit_references, start_from
from gnnmd.training.history import History, LiveBar
from gnnmd.training.learning_curve import save_learning_curve
from gnnmd.training.module import PotentialModule, labelled_graph, predict
from gnnmd.training.settings import TrainConfig, TrainerConfig, seconds

CONFIG = "config.yaml"
METRICS = "metrics.csv"
ERRORS = "errors.json"
_DATE = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?"


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        folder: the run folder.
        checkpoint: the best model in it (the last one if none was validated).
        errors: errors of that model on ``split``, eV/atom, eV/A, eV/A^3; empty after an interruption.
        split: "test", or "val" where there is no test set.
        interrupted: stopped by Ctrl-C; ``gnnmd train resume=<folder>`` continues.
    """

    folder: Path
    checkpoint: Path
    errors: dict[str, float]
    split: str
    interrupted: bool


def train(
    config: TrainConfig, *, console: Console | None = None, callbacks: list[Callback] | None = None
) -> TrainingResult:
    """Train a potential and report its test errors.

    Args:
        config: everything about the run.
        console: where progress is told; standard output by default.
        callbacks: Lightning callbacks of your own, called before the built-in ones.

    Raises:
        FileNotFoundError: data, a checkpoint or a run folder that does not exist.
        ValueError: data or settings that do not fit together.
        FloatingPointError: the loss became NaN.
    """
    quiet = config.trainer.progress == "none"
    console = console or Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    accelerator = _accelerator(config.trainer)
    folder, resumed = run_folder(config)
    source = None if config.init_from is None else load_checkpoint(find_source(config.init_from))
    r_cut = config.model.r_cut if source is None else source[0].r_cut
    data = AtomsDataModule(config.data, r_cut, seed=config.seed)
    data.setup()
    torch.manual_seed(config.seed)
    potential = (
        _fresh_potential(config, data) if source is None else _continued(config, data, source, console)
    )
    if config.trainer.precision == "float64":
        potential.double()
    _describe(console, potential, data.statistics)
    _write_config(folder, resumed, config, potential)
    console.print(f"{'continuing in' if resumed else 'run folder'} {folder}")

    def export(path: Path, model: Potential, summary: dict[str, Any]) -> None:
        extra = {"name": config.name, "seed": config.seed, **summary}
        save_checkpoint(path, model, to_dict(model.config), data.statistics.to_dict(), extra)

    steps = config.trainer.max_epochs * len(data.train_dataloader())
    autocast = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    module = PotentialModule(potential, config.loss, config.optim, steps, autocast=autocast)
    keep, stop = Checkpoints(folder, export), StopOnInterrupt(console.print)
    shown = _shown(config, console, folder, steps)
    with _quiet_lightning():
        trainer = _trainer(config, folder, accelerator, [*(callbacks or []), *shown, stop, keep])
        try:
            trainer.fit(module, data, ckpt_path=folder / STATE if resumed else None, weights_only=True)
        except SystemExit:  # how Lightning ends on KeyboardInterrupt; the callbacks have saved everything
            if not keep.interrupted:
                raise
    checkpoint = folder / BEST if (folder / BEST).exists() else folder / LAST
    split = "val" if data.test_set is None else "test"
    errors: dict[str, float] = {}
    if stop.interrupted:
        console.print(f"interrupted after step {trainer.global_step}; kept {checkpoint} and {folder / STATE}")
        console.print(f"continue with: gnnmd train resume={folder}")
    else:
        errors = _report(checkpoint, split, data, module.device, console)
    return TrainingResult(folder, checkpoint, errors, split, stop.interrupted)


def run_folder(config: TrainConfig) -> tuple[Path, bool]:
    """Return the folder of the run and whether it holds a state to resume from.

    Raises:
        FileNotFoundError: ``resume`` names a folder without a saved state.
    """
    runs = Path(config.runs)
    if config.resume == "auto":
        started = re.compile(rf"{_DATE}-{re.escape(config.name)}")
        found = sorted(path for path in runs.glob(f"*/{STATE}") if started.fullmatch(path.parent.name))
        if found:
            return found[-1].parent, True
    elif config.resume is not None:
        folder = Path(config.resume)
        folder = folder if folder.is_dir() else folder.parent
        if not (folder / STATE).exists():
            raise FileNotFoundError(
                f"resume={config.resume}: no {STATE} there. Give a run folder that has one, or resume=auto "
                f"for the newest run of this name in {config.runs}/"
            )
        return folder, True
    date = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder, number = runs / f"{date}-{config.name}", 1
    while folder.exists():  # two runs within one second
        number += 1
        folder = runs / f"{date}_{number}-{config.name}"
    return folder, False


def evaluate(
    potential: Potential, loader: AtomsLoader, device: torch.device
) -> tuple[dict[str, float], Parity]:
    """Return the errors of a potential on the frames of a loader, and the pairs for a parity plot."""
    potential = potential.to(device).eval()
    meter, parity = ErrorMeter(per_element=True), Parity()
    for data in loader:
        batch = labelled_graph(potential, data).to(device)
        prediction = predict(potential, batch)
        meter.update(prediction, batch.labels)
        parity.update(prediction, batch.labels)
    return meter.errors(), parity


def _report(
    checkpoint: Path, split: str, data: AtomsDataModule, device: torch.device, console: Console
) -> dict[str, float]:
    """Evaluate the exported model as a user would load it; write errors and pictures."""
    potential, info = load_checkpoint(checkpoint)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    errors, parity = evaluate(potential, loader, device)
    extra = {**info.extra, f"{split}_errors": errors}
    save_checkpoint(checkpoint, potential.cpu(), info.config, info.statistics, extra)
    folder = checkpoint.parent
    (folder / ERRORS).write_text(json.dumps({"split": split, **errors}, indent=2))
    if pairs := parity.pairs():
        save_parity_plot(folder / "parity.png", pairs, f"{split} set")
    save_learning_curve(folder / METRICS, folder / "learning_curve.png")
    frames = len(loader.dataset)
    console.print(f"\nerrors on the {split} set ({frames} frames) of {checkpoint}")
    console.print(error_table(errors))
    console.print(f"pictures: {folder / 'parity.png'}, {folder / 'learning_curve.png'}")
    console.print(
        f"use it: gnnmd md model={checkpoint} ... or PredictUnit.from_checkpoint({str(checkpoint)!r})",
    )
    return errors


def _fresh_potential(config: TrainConfig, data: AtomsDataModule) -> Potential:
    """Build the potential of the configuration, with references and scale from the training data."""
    known = data.statistics
    potential = build_potential(
        PotentialConfig(config.model, config.heads, datasets=_datasets(data), elements=known.elements)
    )
    potential.element_energies.copy_(torch.tensor(known.element_energies))
    scales = [x for x in (known.force_rms, known.energy_std) if x > 0]  # NaN where there is no label
    potential.energy_scale.fill_(scales[0] if scales else 1.0)
    return potential


def _continued(
    config: TrainConfig, data: AtomsDataModule, source: tuple[Potential, CheckpointInfo], console: Console
) -> Potential:
    """Build the potential from a checkpoint and fit its references to the training data."""
    potential, report = start_from(
        *source, heads=config.heads, datasets=_datasets(data), elements=data.statistics.elements
    )
    refit_references(potential, data.train_set)
    console.print(report)
    mine, theirs = asdict(config.model), asdict(potential.config.model)
    if changed := [f"{key}={theirs[key]}" for key in theirs if theirs[key] != mine[key]]:
        console.print(f"  the checkpoint's architecture is kept: {', '.join(changed)}")
    return potential


def _datasets(data: AtomsDataModule) -> tuple[str, ...]:
    return tuple(sorted({str(name) for name in data.train_set.labels("dataset")} - {""}))


def _describe(console: Console, potential: Potential, statistics: Statistics) -> None:
    weights = sum(p.numel() for p in potential.parameters())
    console.print(
        f"{statistics.n_frames} frames, {statistics.n_atoms} atoms, {statistics.mean_edges:.0f} edges/atom\n"
        f"labels: {statistics.n_energies} energies, forces of {statistics.n_forces} atoms (RMS "
        f"{statistics.force_rms:.3f} eV/A), {statistics.n_stresses} stresses\n"
        f"model: {type(potential.backbone).__name__} with {weights:,} weights",
    )


def _shown(config: TrainConfig, console: Console, folder: Path, steps: int) -> list[Callback]:
    shown: list[Callback] = [History(folder / METRICS, console)]
    if config.trainer.progress == "auto" and console.is_terminal:
        shown.append(LiveBar(steps, console))
    return shown


def _trainer(config: TrainConfig, folder: Path, accelerator: str, callbacks: list[Callback]) -> Trainer:
    given = config.trainer
    limits: list[Callback] = []
    if given.max_time is not None:
        limits.append(Timer(timedelta(seconds=seconds(given.max_time)), verbose=False))
    if given.early_stop is not None:
        limits.append(EarlyStopping("val_loss", patience=given.early_stop, verbose=False))
    return Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=given.max_epochs,
        check_val_every_n_epoch=given.validate_every,
        callbacks=[*limits, *callbacks],
        logger=_loggers(config, folder),
        default_root_dir=folder,
        deterministic=True if given.deterministic else None,
        inference_mode=False,  # forces are derivatives also in validation
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    given = config.logger
    if given.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        return [TensorBoardLogger(folder, name="", version="tensorboard")]
    if given.kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(
            name=folder.name,
            id=folder.name,  # a resumed run continues its own curves
            project=given.project,
            entity=given.entity,
            offline=given.offline,
            save_dir=folder,
        )
        logger.log_hyperparams(asdict(config))
        return [logger]
    return []


def _accelerator(config: TrainerConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "trainer.device=cuda, but torch finds no GPU. Set trainer.device=cpu, or install CUDA's torch"
        )
    if config.device == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    return "gpu" if config.device == "cuda" else "cpu"


def _write_config(folder: Path, resumed: bool, config: TrainConfig, potential: Potential) -> None:
    """Write the resolved configuration into the run folder.

    Raises:
        ValueError: a resumed run has another architecture, so that its weights would not fit.
    """
    mine = _plain({**asdict(config), "model": asdict(potential.config.model)})
    if resumed:
        saved = yaml.safe_load((folder / CONFIG).read_text())
        changed = [f"heads={saved['heads']}"] if saved["heads"] != mine["heads"] else []
        changed += [f"model.{k}={v}" for k, v in saved["model"].items() if mine["model"].get(k) != v]
        if changed:
            raise ValueError(
                f"resume={folder}: that run has {', '.join(changed)}, this configuration has not. Drop the "
                f"change, or use init_from={folder} to start a new run from its weights"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(mine, sort_keys=False).encode())


def _plain(value: Any) -> Any:
    """Return ``value`` with lists instead of tuples, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says about itself (devices, tips, worker counts); errors still come through."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
