"""Where metrics go besides metrics.csv: Weights & Biases or TensorBoard; rank 0 alone makes these."""

import netrc
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

from gnnmd.predict.checkpoint import write_atomically
from gnnmd.training.settings import LoggerConfig, TrainConfig

#: Holds the name of the run in W&B, where folders of other places have the same names.
WANDB_ID = "wandb_id"


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Return the loggers of a run in ``folder``; one that is resumed continues its own curves."""
    given = config.logger
    if given.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        try:
            return [TensorBoardLogger(folder, name="", version="tensorboard")]
        except ModuleNotFoundError:
            raise ValueError(
                "logger=tensorboard needs a package that is not installed: pip install tensorboard, or "
                "drop it (metrics.csv is always written)"
            ) from None
    if given.kind == "wandb":
        import wandb

        logger = WandbLogger(
            name=folder.name,
            id=wandb_id(folder),
            project=given.project,
            entity=given.entity,
            offline=is_offline(given),
            save_dir=folder,
            settings=wandb.Settings(console="off", silent=True),
        )
        logger.log_hyperparams(asdict(config))
        return [logger]
    return []


def wandb_id(folder: Path) -> str:
    """Return the id of a run in W&B: random, and kept in its folder for when it is resumed."""
    file = folder / WANDB_ID
    if not file.exists():
        write_atomically(file, secrets.token_hex(8).encode())
    return file.read_text().strip()


def is_offline(config: LoggerConfig) -> bool:
    """Return whether W&B keeps its files here: where it was told so, or would have to ask for a key.

    A job has nobody to ask. ``wandb sync`` sends the files later.
    """
    if config.offline or os.environ.get("WANDB_MODE") == "offline":
        return True
    if os.environ.get("WANDB_API_KEY"):
        return False
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is None
    except (OSError, netrc.NetrcParseError):
        return True


def close_loggers(loggers: Iterable[Logger], models: Iterable[Path], *, failed: bool = False) -> None:
    """Give W&B the models and end its run: the next run of this process must not log into this one."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb  # takes a second

        if wandb.run is not None:
            for path in models:
                if path.exists():
                    artifact = wandb.Artifact(f"{path.parent.name}-{path.stem}", type="model")
                    artifact.add_file(str(path))
                    wandb.run.log_artifact(artifact)
            wandb.run.finish(exit_code=int(failed))
