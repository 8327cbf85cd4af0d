"""Published checkpoints of fairchem-core and deepmd-kit, read without these packages.

Both are pickles, which can run code. They go through torch's weights-only reader, which calls nothing but
what makes tensors and containers, and admits further classes by name: those in `_ADMITTED`.
"""

import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from gnnmd.models.convert import deepmd_file, fairchem_file
from gnnmd.models.potential import Potential


class _FairchemCheckpoint:
    """In the place of fairchem's class: nothing but its fields."""

    model_config: Any
    ema_state_dict: Any
    tasks_config: Any


_ADMITTED: list[Any] = [
    (_FairchemCheckpoint, "fairchem.core.units.mlip_unit.api.inference.MLIPInferenceCheckpoint"),
    *(DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode, defaultdict),
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, tuple, str, int, float, bool)),
    (Any, "typing.Any"),
]

#: What a damaged pickle or archive can raise.
_DAMAGE = (
    *(RuntimeError, EOFError, UnpicklingError, zipfile.BadZipFile, struct.error),
    *(ValueError, TypeError, LookupError, AttributeError),
)

_WANTED = (
    "gnnmd reads inference checkpoints of fairchem-core (.pt) and training checkpoints of deepmd-kit's "
    "PyTorch backend (model.ckpt-....pt)"
)


def load_upstream(
    path: str | Path, *, task: str | None = None, head: str | None = None
) -> tuple[Potential, dict[str, Any]]:
    """Build a potential from a checkpoint of fairchem-core (UMA, eSEN) or deepmd-kit (DPA-2, DPA-3).

    Args:
        path: the file, as published or as written in training.
        task: which data set of a fairchem model, for instance "omat"; None if it has one only.
        head: which head of a deepmd-kit model of multi-task training; None if it has one only.

    Returns:
        The potential on the CPU in the precision of its weights, and where it comes from, as plain data for
        `save_checkpoint(extra=...)`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: another format, a damaged file, a pickle that asks for anything but data, or a model that
            is not supported.
    """
    path = Path(path)
    content = _read(path)
    with path.open("rb") as file:
        origin: dict[str, Any] = {"file": path.name, "sha256": file_digest(file, "sha256").hexdigest()}
    try:
        if isinstance(content, _FairchemCheckpoint):
            if head is not None:
                raise ValueError(f"head={head!r} is for deepmd-kit; choose a data set of fairchem with task=")
            model, averaged, tasks = (_field(content, name) for name in _FairchemCheckpoint.__annotations__)
            potential, chosen = fairchem_file.build(model, averaged, tasks, task)
            origin["format"] = "fairchem-core inference checkpoint"
        else:
            state = _deepmd_state(content)
            if task is not None:
                raise ValueError(f"task={task!r} is for fairchem; choose a head of deepmd-kit with head=")
            potential, chosen = deepmd_file.build(state, head)
            origin["format"] = "deepmd-kit training checkpoint"
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return potential, {"name": path.name, "converted_from": origin | chosen}


def _deepmd_state(content: Any) -> Mapping[str, Any]:
    state = content.get("model", content) if isinstance(content, Mapping) else None
    extra = state.get("_extra_state") if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(extra, Mapping) or "model_params" not in extra:
        raise ValueError(f"it holds no model that is known. {_WANTED}")
    return state


def _field(checkpoint: _FairchemCheckpoint, name: str) -> Any:
    value = getattr(checkpoint, name, None)
    if not value:
        raise ValueError(f"the checkpoint has no {name}; export it again with fairchem-core 2")
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(f"options of {name} refer to themselves; the file is damaged") from None


def _plain(value: Any) -> Any:
    """Return a configuration as dictionaries and lists, with the values that it refers to in their place."""
    if isinstance(value, DictConfig | ListConfig):
        root = OmegaConf.to_container(value._get_root(), resolve=False)
        return _resolved(OmegaConf.to_container(value, resolve=False), root)
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _resolved(value: Any, root: Any) -> Any:
    """Replace ``${a.b}`` by what stands there; omegaconf itself would call functions that a string names."""
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        found = root
        for key in match[1].split("."):
            if not isinstance(found, dict) or key not in found:
                raise ValueError(f"an option refers to {value}, which is not in the file")
            found = found[key]
        return _resolved(found, root)
    if isinstance(value, dict):
        return {key: _resolved(x, root) for key, x in value.items()}
    return [_resolved(x, root) for x in value] if isinstance(value, list) else value


def _read(path: Path) -> Any:
    """Return what is in a file after checking that it holds data only."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. {_WANTED}")
    _refuse_other_formats(path)
    with safe_globals(_ADMITTED):
        try:
            refused = get_unsafe_globals_in_checkpoint(path)
            content = None if refused else torch.load(path, "cpu", mmap=True, weights_only=True)
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged, or no file that torch.save wrote ({error}). Download it again"
            ) from error
    if refused:
        raise ValueError(
            f"{path} was not loaded: it asks for {', '.join(sorted(refused))}, but only data is admitted "
            "(tensors, containers, options). A pickle that calls functions can do anything; if you trust it, "
            "save its weights without them"
        )
    return content


def _refuse_other_formats(path: Path) -> None:
    """Say what to export instead of a file that is not an archive of torch.save."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        if path.suffix == ".pb":
            raise ValueError(f"{path} is a frozen TensorFlow graph. {_WANTED}")
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} needs no conversion: load it with PredictUnit.from_checkpoint")
        raise ValueError(f"{path} is not an archive that torch.save wrote. {_WANTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if bad := archive.testzip():  # torch does not compare checksums
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). Download it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        kind = "a frozen TorchScript model (.pth)"
    elif any("/aotinductor/" in name or name.endswith("archive_format") for name in names):
        kind = "a compiled model (.pt2)"
    else:
        return
    raise ValueError(
        f"{path} is {kind}, which has no options to rebuild the model from. Give the checkpoint it was made "
        f"from. {_WANTED}"
    )
