"""A whole training run: data, model, fit, test errors, pictures."""

import json
import logging
import math
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console

from gnnmd.data.datamodule import AtomsDataModule, AtomsLoader
from gnnmd.data.statistics import Statistics
from gnnmd.models.build import PotentialConfig, build_potential, from_dict, to_dict
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import Mesh, Ranks, WorkerDied, Workers, World
from gnnmd.predict.checkpoint import (
    CheckpointInfo,
    check_writable,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from gnnmd.predict.metrics import ErrorMeter, error_table
from gnnmd.predict.parity_plot import Parity, save_parity_plot
from gnnmd.runs.record import RunRecord
from gnnmd.training.callbacks import BEST, LAST, STATE, STOPPING, Checkpoints, Pace, StopBetweenSteps
from gnnmd.training.finetune import find_source, refit_references, start_from
from gnnmd.training.history import History, LiveBar
from gnnmd.training.learning_curve import save_learning_curve
from gnnmd.training.loggers import close_loggers, make_loggers
from gnnmd.training.module import SHAPE, PotentialModule, labelled_graph, predict
from gnnmd.training.settings import TrainConfig, TrainerConfig
from gnnmd.training.stopwatch import Stopwatch
from gnnmd.training.strategy import MeshStrategy, copy_from_first
from gnnmd.units import seconds

CONFIG = "config.yaml"
METRICS = "metrics.csv"
ERRORS = "errors.json"
#: Frames that settle what a fresh network says of each element.
FRESH_FRAMES = 10
#: What may change when a run goes on: where, in how many parts, for how long, and what is told of it.
_MAY_CHANGE = re.compile(
    r"name|runs|resume|init_from|(launch|logger|parallel)\..*|data\.(num_workers|max_(frames|atoms|edges))"
    r"|trainer\.(max_epochs|max_time|early_stop|validate_every|edge_chunk|device|deterministic|progress)"
)
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
    folder, resumed = ranks.from_first(run_folder(config) if folder is None else _again(folder))
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
        potential = _stored_shape(folder)
        if config.finetune.freeze_backbone:
            potential.backbone.requires_grad_(False)
    elif source is None:
        potential = _fresh_potential(config, data, mesh)
    else:
        potential = _continued(config, data, source, console, mesh)
    potential.to(_dtype(config))
    potential.backbone.edge_chunk = config.trainer.edge_chunk
    _describe(console, potential, data.statistics, mesh)
    if ranks.rank == 0:
        _write_config(folder, config, potential)
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
        errors = _report(checkpoint, split, data, module, mesh, console)
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


def _again(folder: Path) -> tuple[Path, bool]:
    return folder, (folder / STATE).exists()


def evaluate(
    potential: Potential, loader: AtomsLoader, device: torch.device, mesh: Mesh | None = None
) -> tuple[dict[str, float], Parity]:
    """Return errors of a potential on the frames of a loader, and the pairs for a parity plot; collective.

    Args:
        potential: the same on all ranks.
        loader: the frames of this replica.
        device: where to compute.
        mesh: all processes; None is this one alone. The pairs are the first one's.
    """
    mesh = mesh or Mesh()
    potential = potential.to(device).eval()
    meter, parity = ErrorMeter(per_element=True, sources=loader.dataset.sources), Parity()
    for i, data in enumerate(loader):
        if loader.repeats(i):
            continue
        batch = labelled_graph(potential, data, mesh.gp).to(device)
        prediction = predict(potential, batch)
        meter.update(prediction, batch.labels, batch.graph.n_atoms, batch.source)
        parity.update(prediction, batch.labels, batch.graph.n_atoms)
    return meter.total(mesh).errors(), parity.total(mesh)


def _report(
    checkpoint: Path,
    split: str,
    data: AtomsDataModule,
    module: PotentialModule,
    mesh: Mesh,
    console: Console,
) -> dict[str, float]:
    """Evaluate the exported model as a user would load it; write errors and pictures."""
    first = mesh.world.rank == 0
    potential = module.average
    if first:
        potential, info = load_checkpoint(checkpoint)
        potential.backbone.edge_chunk = module.average.backbone.edge_chunk
    device = module.device if mesh.world.group is None else mesh.world.device
    copy_from_first(potential.to(device), mesh.world)
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    errors, parity = evaluate(potential, loader, device, mesh)
    if not first:
        return errors
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


def _fresh_potential(config: TrainConfig, data: AtomsDataModule, mesh: Mesh) -> Potential:
    """Build the potential of the configuration; its references, scale and statistics are the data's."""
    known = data.statistics
    potential = build_potential(
        PotentialConfig(config.model, config.heads, datasets=_datasets(data), elements=known.elements)
    )
    potential.element_energies.copy_(torch.tensor(known.element_energies))
    scales = [x for x in (known.force_rms, known.energy_std) if x > 0]  # NaN where there is no label
    potential.energy_scale.fill_(scales[0] if scales else 1.0)
    if potential.backbone.needs_statistics:
        _set_statistics(potential.to(mesh.gp.device), data, mesh)
    if not isinstance(config.model, EscnMDConfig):
        # A fresh fitting net says some energy per element: left there, it would rule the first steps.
        refit_references(potential.to(mesh.gp.device), data.train_set, mesh.gp, FRESH_FRAMES)
    return potential


def _set_statistics(potential: Potential, data: AtomsDataModule, mesh: Mesh) -> None:
    """Let the backbone normalise what it sees by the training data; collective."""
    backbone, loader = potential.backbone, data.train_dataloader()
    sums: list[torch.Tensor] = []
    for i, frames in enumerate(loader):
        batch = labelled_graph(potential, frames, mesh.gp).to(mesh.gp.device)
        g = batch.graph.with_positions(batch.gp.exchange(batch.labels.positions), batch.graph.cell)
        sums.append((not loader.repeats(i)) * backbone.statistics(g, batch.gp.n_owned))
    # Replicas of one rank count on the CPU, but their sums travel where the ranks are.
    backbone.set_statistics(mesh.world.sum(torch.stack(sums).sum(0).to(mesh.world.device)))


def _continued(
    config: TrainConfig,
    data: AtomsDataModule,
    source: tuple[Potential, CheckpointInfo],
    console: Console,
    mesh: Mesh,
) -> Potential:
    """Build the potential from a checkpoint and fit its references to the training data."""
    potential, report = start_from(
        *source,
        heads=config.heads,
        datasets=_datasets(data),
        elements=data.statistics.elements,
        settings=config.finetune,
        prepare=lambda fresh: _set_statistics(fresh.to(mesh.gp.device), data, mesh),
    )
    refit_references(potential.to(mesh.gp.device, _dtype(config)), data.train_set, mesh.gp)
    console.print(report)
    mine, theirs = asdict(config.model), asdict(potential.config.model)
    if theirs["type"] != mine["type"]:
        changed = [f"type={theirs['type']}"]
    else:
        changed = [f"{key}={theirs[key]}" for key in theirs if theirs[key] != mine[key]]
    if changed:
        console.print(f"  the checkpoint's architecture is kept: {', '.join(changed)}")
    return potential


def _datasets(data: AtomsDataModule) -> tuple[str, ...]:
    return tuple(sorted({str(name) for name in data.train_set.labels("dataset")} - {""}))


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


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.float64 if config.trainer.precision == "float64" else torch.float32


def check_resumable(folder: Path, config: TrainConfig) -> None:
    """Refuse to go on in the folder of a run that is another one by its meaning.

    Raises:
        FileNotFoundError: nothing tells what the run is.
        ValueError: names what differs.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"resume={folder}: no {CONFIG} there, so nothing tells whether this is the same run. Copy the "
            f"whole run folder, or use init_from={folder} to start a new run from its weights"
        )
    saved, mine = _read_config(folder), _plain(asdict(config))
    changed = []
    if config.init_from is not None:
        saved["model"] = mine["model"]  # the run has that of its source instead
        if config.init_from != saved.get("init_from"):
            changed.append(f"init_from={saved.get('init_from')}")
    changed += _differences(saved, mine)
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 5 else ""
        raise ValueError(
            f"resume={folder}: that run has {', '.join(changed[: 4 if more else 5])}{more}, this "
            "configuration has not. Drop the change, leave resume out to start a fresh run, or use "
            f"init_from={folder} to start a new run from its weights"
        )


def _differences(saved: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Return ``key=value`` of a saved configuration where another one means a run of its own."""
    if saved["model"].get("type") != mine["model"]["type"]:  # then the other keys mean something else
        return [f"model.type={saved['model'].get('type')}"]
    values = _flat(mine)
    changed = [
        f"{key}={'null' if value is None else value}"
        for key, value in _flat(saved).items()
        if not _MAY_CHANGE.fullmatch(key) and value != values.get(key, value)
    ]
    for limit in ("max_frames", "max_atoms", "max_edges"):  # of every replica
        before, now = (
            c["data"].get(limit) and c["data"][limit] * (c["parallel"].get("dp") or 1) for c in (saved, mine)
        )
        if before != now:
            changed.append(f"data.{limit} x parallel.dp={'null' if before is None else before}")
    return changed


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted keys; an optional section is "on" or None."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        is_section = isinstance(value, dict)
        flat[prefix + key] = "on" if is_section else value
        flat |= _flat(value, f"{prefix}{key}.") if is_section else {}
    return flat


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text())
    except (ValueError, yaml.YAMLError):
        saved = None
    sections = ("model", "data", "parallel")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), dict) for name in sections):
        raise ValueError(
            f"resume={folder}: {CONFIG} is damaged. Copy it again from where the run was made, or use "
            f"init_from={folder} to start a new run from its weights"
        )
    return saved


def _stored_shape(folder: Path) -> Potential:
    """Build the potential of a run to resume; its weights are loaded with the rest of the state."""
    try:
        shape = torch.load(folder / STATE, "cpu", weights_only=True, mmap=True)[SHAPE]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):  # what torch makes of junk
        raise ValueError(
            f"resume={folder}: {STATE} is damaged or no state of gnnmd. Copy it again, or use "
            f"init_from={folder} to start a new run from the weights beside it"
        ) from None
    return build_potential(from_dict(shape))


def _write_config(folder: Path, config: TrainConfig, potential: Potential) -> None:
    """Write the resolved configuration into the run folder; what a resumed run once started from stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path, resolved = folder / CONFIG, _resolved(config, potential)
    if path.exists():
        resolved["init_from"] = yaml.safe_load(path.read_text())["init_from"]
    write_atomically(path, yaml.safe_dump(resolved, sort_keys=False).encode())


def _resolved(config: TrainConfig, potential: Potential) -> Any:
    return _plain({**asdict(config), "model": asdict(potential.config.model)})


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
