"""The folder of a run: its name, its configuration, and whether a run may go on in it."""

import pickle
import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from gnnmd.models.build import build_potential, from_dict
from gnnmd.models.potential import Potential
from gnnmd.predict.checkpoint import write_atomically
from gnnmd.training.callbacks import STATE
from gnnmd.training.module import SHAPE
from gnnmd.training.settings import TrainConfig

CONFIG = "config.yaml"
METRICS = "metrics.csv"
ERRORS = "errors.json"
#: What may change when a run goes on: where, in how many parts, for how long, and what is told of it.
_MAY_CHANGE = re.compile(
    r"name|runs|resume|init_from|(launch|logger|parallel)\..*|data\.(num_workers|max_(frames|atoms|edges))"
    r"|trainer\.(max_epochs|max_time|early_stop|validate_every|edge_chunk|device|deterministic|progress)"
)
_DATE = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?"


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


def again(folder: Path) -> tuple[Path, bool]:
    """Return the folder of a job and whether it holds a state, as `run_folder` does."""
    return folder, (folder / STATE).exists()


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


def stored_shape(folder: Path) -> Potential:
    """Build the potential of a run to resume; its weights are loaded with the rest of the state."""
    try:
        shape = torch.load(folder / STATE, "cpu", weights_only=True, mmap=True)[SHAPE]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):  # what torch makes of junk
        raise ValueError(
            f"resume={folder}: {STATE} is damaged or no state of gnnmd. Copy it again, or use "
            f"init_from={folder} to start a new run from the weights beside it"
        ) from None
    return build_potential(from_dict(shape))


def write_config(folder: Path, config: TrainConfig, potential: Potential) -> None:
    """Write the resolved configuration into the run folder; what a resumed run once started from stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / CONFIG, resolved(config, potential)
    if path.exists():
        content["init_from"] = yaml.safe_load(path.read_text())["init_from"]
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())


def resolved(config: TrainConfig, potential: Potential) -> Any:
    """Return the configuration with the shape that the potential really has, as plain values."""
    return _plain({**asdict(config), "model": asdict(potential.config.model)})


def _plain(value: Any) -> Any:
    """Return ``value`` with lists instead of tuples, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
