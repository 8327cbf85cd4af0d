"""What the launcher knows of a command: how it is described, spread over processes, started and resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gnnmd.config import load_config, load_values
from gnnmd.data.datamodule import SILVER
from gnnmd.data.readers import check_exist
from gnnmd.data.structures import read_structure
from gnnmd.md.settings import MDConfig
from gnnmd.md.shards import steps_in
from gnnmd.parallel.settings import LaunchConfig
from gnnmd.predict.checkpoint import check_writable, read_info
from gnnmd.training.settings import TrainConfig

#: Where jobs of molecular dynamics keep their files.
_RUNS = "runs"


@dataclass(frozen=True)
class Command:
    """A command that can be launched.

    Attributes:
        load: arguments -> configuration, with a section ``launch``.
        spread: configuration -> the same for the processes that ``launch`` starts, resolved; refuses what
            would not run, as far as that can be known before.
        place: configuration -> the run folder, made, and the configuration for it.
        run: do it in all processes that were started, in the run folder (None follows the configuration) and
            from the state that it holds; returns the exit code, which is not 0 if a signal stopped it with
            its state saved.
        title: configuration -> a few words for people.
    """

    load: Callable[[Sequence[str]], Any]
    spread: Callable[[Any], Any]
    place: Callable[[Any], tuple[Any, Path]]
    run: Callable[[Any, Path | None], int]
    title: Callable[[Any], str]


def place_groups(gp: int, launch: LaunchConfig) -> None:
    """Check that ranks that share a graph are on one host, or fill several.

    Raises:
        ValueError: some graphs would be on two hosts without need.
    """
    per_node = launch.per_node
    if gp <= per_node and per_node % gp:
        fitting = ", ".join(str(n) for n in range(1, per_node + 1) if per_node % n == 0)
        raise ValueError(
            f"parallel.gp={gp} does not divide the {per_node} processes of a host: some graphs would be "
            f"shared over the network between hosts. Set gp to one of {fitting}, or take {gp} per host"
        )
    if gp > per_node and gp % per_node:
        raise ValueError(
            f"parallel.gp={gp} is more than the {per_node} processes of a host, but no multiple of them: set "
            f"gp to {gp // per_node * per_node} or {(gp // per_node + 1) * per_node}"
        )


def _spread_training(config: TrainConfig) -> TrainConfig:
    launch = config.launch
    per_node = "gpus_per_node" if launch.gpus_per_node else "tasks_per_node"
    started = f"launch.nodes={launch.nodes} x launch.{per_node}={launch.per_node} starts {launch.processes}"
    parallel = config.parallel.over(launch.processes, started)
    place_groups(parallel.gp, launch)
    _check_inputs(config)
    device = "cuda" if launch.gpus_per_node and config.trainer.device == "auto" else config.trainer.device
    return replace(config, parallel=parallel, trainer=replace(config.trainer, device=device))


def _check_inputs(config: TrainConfig) -> None:
    """Refuse files that are missing and runs that cannot be resumed."""
    from gnnmd.training.finetune import find_source
    from gnnmd.training.folder import check_resumable, run_folder

    for split in ("train", "val", "test"):
        source = getattr(config.data, split)
        if source not in (None, SILVER):
            check_exist(source)
    if config.init_from is not None:
        read_info(find_source(config.init_from))
    folder, resumed = run_folder(config)
    if resumed:
        check_resumable(folder, config)
    check_writable(folder, "free some space, or choose another place with runs=")


def _place_training(config: TrainConfig) -> tuple[TrainConfig, Path]:
    from gnnmd.training.folder import run_folder

    folder, _ = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    return config, folder


def _train(config: TrainConfig, folder: Path | None) -> int:
    from gnnmd.training.run import train

    return 130 if train(config, folder=folder).interrupted else 0


def _load_md(arguments: Sequence[str]) -> MDConfig:
    """Return the configuration of a run; one to resume begins with its own."""
    from gnnmd.md.run import CONFIG

    config = load_values(MDConfig, arguments)
    begun = Path(config.restart or "") / CONFIG
    if config.resume and begun.is_file():
        return load_values(MDConfig, [str(begun), *arguments])
    return config


def _spread_md(config: MDConfig) -> MDConfig:
    from gnnmd.md.run import check_resumable

    launch = config.launch
    if config.workers not in (None, launch.processes):
        raise ValueError(
            f"workers={config.workers}, but the workers of a job are its {launch.processes} processes: leave "
            "it out, and set launch.nodes and launch.gpus_per_node"
        )
    if not config.resume:
        read_structure(config.structure, config.repeat)
    elif steps_in(Path(config.restart or "")):
        check_resumable(config)
    else:
        raise FileNotFoundError(
            f"resume=true, but {config.restart} holds no restart: leave resume out, or set restart="
        )
    read_info(config.model)
    check_writable(Path(_RUNS), "free some space, or start in another folder")
    device = "cuda" if launch.gpus_per_node and config.device is None else config.device
    workers = launch.processes if launch.kind == "local" else config.workers  # a job starts them itself
    return replace(config, device=device, workers=workers)


def _place_md(config: MDConfig) -> tuple[MDConfig, Path]:
    date, number = f"{datetime.now():%Y-%m-%d_%H-%M-%S}", 1
    folder = Path(_RUNS) / f"{date}-md"
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{date}_{number}-md")
    folder.mkdir(parents=True)
    if config.resume:
        return config, folder

    def inside(name: str | None) -> str | None:
        return None if name is None else str(folder.absolute() / name)

    files = {name: inside(getattr(config, name)) for name in ("log", "trajectory", "restart")}
    return replace(config, **files), folder  # type: ignore[arg-type]


def _md(config: MDConfig, folder: Path | None) -> int:
    from gnnmd.md.run import md

    if folder is not None and config.restart is not None and steps_in(Path(config.restart)):
        config = replace(config, resume=True)
    return md(config)


COMMANDS = {
    "train": Command(
        load_config,
        _spread_training,
        _place_training,
        _train,
        lambda c: f"training {c.name} as dp={c.parallel.dp} x gp={c.parallel.gp}",
    ),
    "md": Command(
        _load_md,
        _spread_md,
        _place_md,
        _md,
        lambda c: f"{c.ensemble} of {c.structure}, {c.steps} steps",
    ),
}
