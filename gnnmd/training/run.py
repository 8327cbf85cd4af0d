"""A whole training run: data, model, fit, test errors, pictures."""

import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console

from gnnmd.data.datamodule import AtomsDataModule
from gnnmd.data.statistics import Statistics
from gnnmd.models.build import to_dict
from gnnmd.models.potential import Potential
from gnnmd.parallel import Mesh, Ranks, WorkerDied, Workers, World
from gnnmd.predict.checkpoint import check_writable, load_checkpoint, save_checkpoint
from gnnmd.runs.record import RunRecord
from gnnmd.training.callbacks import BEST, LAST, STATE, STOPPING, Checkpoints, Pace, StopBetweenSteps
from gnnmd.training.finetune import find_source
from gnnmd.training.folder import METRICS, again, check_resumable, run_folder, stored_shape, write_config
from gnnmd.training.history import History, LiveBar
from gnnmd.training.loggers import close_loggers, make_loggers
from gnnmd.training.module import PotentialModule
from gnnmd.training.report import report
from gnnmd.training.settings import TrainConfig, TrainerConfig
from gnnmd.training.start import continued_potential, dtype_of, fresh_potential
from gnnmd.training.stopwatch import Stopwatch
from gnnmd.training.strategy import MeshStrategy
from gnnmd.units import seconds


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
    config: TrainConfig,
    *,
    folder: Path | None = None,
    console: Console | None = None,
    callbacks: list[Callback] | None = None,
) -> TrainingResult:
    """Train a potential and report its test errors, in as many processes as ``config.parallel`` says.

    Started by torchrun or srun, this is one of them; else the run starts them itself if it needs more than
    one.

    Args:
        config: everything about the run.
        folder: the run folder, to go on in if it holds a state already (a job that is started again); None
            follows ``config``.
        console: where progress is told; standard output by default, and always that of processes of its own.
        callbacks: Lightning callbacks of your own, called before the built-in ones; processes of the run's
            own get copies.

    Raises:
        FileNotFoundError: data, a checkpoint or a run folder that does not exist.
        ValueError: data or settings that do not fit together, or another number of processes than was
            started.
        FloatingPointError: the loss became NaN.
        WorkerDied: a process of its own was killed.
    """
    _device(config.trainer)  # refused before anything is written
    world = World.from_environment()
    if world is not None and world.size > 1:
        parallel = config.parallel.over(world.size, f"{world.size} were started")
        with world.joined(_device(config.trainer)) as ranks:
            return train_on(ranks, replace(config, parallel=parallel), console, callbacks, folder)
    parallel = replace(config.parallel, dp=config.parallel.dp or 1)
    config = replace(config, parallel=parallel)
    if parallel.processes == 1:
        return train_on(Ranks(), config, console, callbacks, folder)
    with Workers(parallel.processes, _device(config.trainer)) as workers, _stopping(workers):
        result: TrainingResult = workers.call(train_on, config, None, callbacks, folder)[0]
    return result


def train_on(
    ranks: Ranks,
    config: TrainConfig,
    console: Console | None = None,
    callbacks: list[Callback] | None = None,
    folder: Path | None = None,
) -> TrainingResult:
    """Do the part of one process in `train`; all ranks get the same result, the first tells and writes."""
    with RunRecord() as record:
        return _train_on(ranks, config, console, callbacks, folder, record)


def _train_on(
    ranks: Ranks,
    config: TrainConfig,
    console: Console | None,
    callbacks: list[Callback] | None,
    folder: Path | None,
    record: RunRecord,
) -> TrainingResult:
    mesh = Mesh.of(ranks, config.parallel.gp)
    quiet = config.trainer.progress == "none"
    console = console or Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    if ranks.rank:  # the first one tells what all of them find
        console = Console(quiet=True)
        warnings.simplefilter("ignore")
    folder, resumed = ranks.from_first(run_folder(config) if folder is None else again(folder))
    check_writable(folder, "free some space, or choose another place with runs=")
    if resumed:
        check_resumable(folder, config)
    source = None if config.init_from is None else load_checkpoint(find_source(config.init_from))
    known = config.model if source is None else source[0].backbone
    data = AtomsDataModule(
        config.data,
        known.r_cut,
        max_neighbors=known.max_neighbors,
        seed=config.seed,
        num_replicas=mesh.n_replicas,
        rank=mesh.replica,
        accumulate=config.trainer.accumulate,
        share_graphs=mesh.gp.size > 1,
        progress=ranks.rank == 0,
    )
    data.setup()
    torch.manual_seed(config.seed)
    if resumed:
        potential = stored_shape(folder)
        if config.finetune.freeze_backbone:
            potential.backbone.requires_grad_(False)
    elif source is None:
        potential = fresh_potential(config, data, mesh)
    else:
        potential = continued_potential(config, data, source, console, mesh)
    potential.to(dtype_of(config))
    potential.backbone.edge_chunk = config.trainer.edge_chunk
    _describe(console, potential, data.statistics, mesh)
    if ranks.rank == 0:
        write_config(folder, config, potential)
        facts = {"name": config.name, "seed": config.seed, "gp": mesh.gp.size, "dp": mesh.n_replicas}
        record.start(folder, "train", facts)
    console.print(f"{'continuing in' if resumed else 'run folder'} {folder}")

    def export(path: Path, model: Potential, summary: dict[str, Any]) -> None:
        extra = {"name": config.name, "seed": config.seed, **summary}
        save_checkpoint(path, model, to_dict(model.config), data.statistics.to_dict(), extra)

    pace = Pace(len(data.train_dataloader()), config.trainer.accumulate)
    steps = config.trainer.max_epochs * pace.batches_per_epoch // pace.batches_per_step
    autocast = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    module = PotentialModule(
        potential,
        config.loss,
        config.optim,
        steps,
        autocast=autocast,
        mesh=mesh,
    )
    keep, stop = Checkpoints(folder, export, pace), StopBetweenSteps(console.print, mesh)
    watch = Stopwatch()
    shown = _shown(config, console, folder, steps, watch)
    with _quiet_lightning():
        trainer = _trainer(config, folder, mesh, [*(callbacks or []), *shown, stop, keep, watch])
        try:
            trainer.fit(module, data, ckpt_path=folder / STATE if resumed else None, weights_only=True)
        except SystemExit:  # how Lightning ends on KeyboardInterrupt; the callbacks have saved everything
            if not keep.interrupted:
                raise
        except BaseException:
            close_loggers(trainer.loggers, [], failed=True)
            raise
    checkpoint = folder / ranks.from_first(BEST if (folder / BEST).exists() else LAST)
    split = "val" if data.test_set is None else "test"
    errors: dict[str, float] = {}
    if stop.interrupted:
        console.print(f"interrupted after step {trainer.global_step}; kept {checkpoint} and {folder / STATE}")
        console.print(f"continue with: gnnmd train resume={folder}")
    else:
        errors = report(checkpoint, split, data, module, mesh, console)
    epochs = trainer.global_step * pace.batches_per_step // pace.batches_per_epoch  # whole ones
    done = {"steps": trainer.global_step, "epochs": epochs}
    record.finish("interrupted" if stop.interrupted else "finished", split=split, errors=errors, **done)
    for logger in trainer.loggers:
        logger.log_metrics({f"{split}/{name}": error for name, error in errors.items()})
    close_loggers(trainer.loggers, [folder / BEST, folder / LAST])
    return TrainingResult(folder, checkpoint, errors, split, stop.interrupted)


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    """Let the first signal ask the workers to stop between two steps; the second ends them."""
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        workers.send_signal(signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield
    except WorkerDied:
        if not asked:
            raise
        raise KeyboardInterrupt from None  # it was not training yet, or no longer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(console: Console, potential: Potential, statistics: Statistics, mesh: Mesh) -> None:
    weights = sum(p.numel() for p in potential.parameters())
    edges = "" if math.isnan(statistics.mean_edges) else f", {statistics.mean_edges:.0f} edges/atom"
    console.print(
        f"{statistics.n_frames} frames, {statistics.n_atoms} atoms{edges}\n"
        f"labels: {statistics.n_energies} energies, forces of {statistics.n_forces} atoms (RMS "
        f"{statistics.force_rms:.3f} eV/A), {statistics.n_stresses} stresses\n"
        f"model: {type(potential.backbone).__name__} with {weights:,} weights",
    )
    if mesh.world.size > 1:
        console.print(
            f"{mesh.world.size} processes: dp={mesh.n_replicas} replicas of gp={mesh.gp.size} ranks that "
            "share every structure"
        )


def _shown(
    config: TrainConfig, console: Console, folder: Path, steps: int, watch: Stopwatch
) -> list[Callback]:
    shown: list[Callback] = [History(folder / METRICS, console, watch)]
    if config.trainer.progress == "auto" and console.is_terminal:
        shown.append(LiveBar(steps, console))
    return shown


def _trainer(config: TrainConfig, folder: Path, mesh: Mesh, callbacks: list[Callback]) -> Trainer:
    given = config.trainer
    alone = mesh.world.group is None
    limits: list[Callback] = []
    if given.max_time is not None:
        limits.append(Timer(timedelta(seconds=seconds(given.max_time)), verbose=False))
    if given.early_stop is not None:
        limits.append(EarlyStopping("val_loss", patience=given.early_stop, verbose=False))
    return Trainer(
        accelerator="gpu" if _device(given) == "cuda" else "cpu",
        devices=1,
        strategy="auto" if alone else MeshStrategy(mesh),
        # Without it Lightning looks for torchrun and Slurm, whose signals it handles in ways of its own.
        plugins=[LightningEnvironment()],
        accumulate_grad_batches=given.accumulate,
        max_epochs=given.max_epochs,
        check_val_every_n_epoch=given.validate_every,
        callbacks=[*limits, *callbacks],
        logger=make_loggers(config, folder) if mesh.world.rank == 0 else [],
        default_root_dir=folder,
        deterministic=True if given.deterministic else None,
        inference_mode=False,  # forces are derivatives also in validation
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _device(config: TrainerConfig) -> Literal["cuda", "cpu"]:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "trainer.device=cuda, but torch finds no GPU. Set trainer.device=cpu, or install CUDA's torch"
        )
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


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
