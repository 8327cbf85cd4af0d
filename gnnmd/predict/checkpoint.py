"""Checkpoints: one `.safetensors` file with the weights, and JSON in its metadata with everything else.

Nothing here reads or writes a pickle, so a checkpoint from a stranger cannot run code.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gnnmd import __version__
from gnnmd.models.build import build_potential, from_dict, to_dict
from gnnmd.models.potential import Potential

FORMAT = 1
_KEY = (
    "gnnmd"  # one metadata entry: several would be written in random order, and equal models in unequal files
)
_PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        format: version of the layout of the file.
        gnnmd: version of the package that wrote it.
        torch: version of torch that wrote it.
        config: the `PotentialConfig` as a plain dictionary; enough to build the model.
        n_parameters: trainable numbers.
        dtype: name of the weights' dtype.
        r_cut: cutoff, Angstrom.
        elements: atomic numbers the model was trained on; empty if it takes all.
        datasets: names of the data sets the model distinguishes.
        statistics: statistics of the training data, as the trainer stored them.
        extra: training summary, test errors and provenance, as the writer stored them.
        checksum: CRC-32 of the weights.
    """

    format: int
    gnnmd: str
    torch: str
    config: dict[str, Any]
    n_parameters: int
    dtype: str
    r_cut: float
    elements: tuple[int, ...]
    datasets: tuple[str, ...]
    statistics: dict[str, Any]
    extra: dict[str, Any]
    checksum: int


def save_checkpoint(
    path: str | Path,
    potential: Potential,
    config: Mapping[str, Any] | None = None,
    statistics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a potential to ``path``, either completely or not at all.

    Args:
        path: file name ending in ``.safetensors``; an existing file is replaced once the new one is on disk.
        potential: the model whose weights are written.
        config: `models.build.to_dict` of its `PotentialConfig`; None takes the one it was built from.
        statistics: statistics of the training data.
        extra: training summary, test errors, provenance; printed by ``gnnmd info``.

    Returns:
        The path.

    Raises:
        ValueError: another file extension, a weight that is NaN or infinite, or no configuration.
        TypeError: a value that JSON cannot hold.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoints end in .safetensors, got {path.name!r}; rename the file")
    if config is None and potential.config is None:
        raise ValueError(
            "build_potential did not make this potential, so it has no configuration; pass config"
        )
    # clones, because safetensors refuses layers that share a weight
    weights = {name: t.detach().cpu().contiguous().clone() for name, t in potential.state_dict().items()}
    bad = [name for name, t in weights.items() if not t.isfinite().all()]
    if bad:
        raise ValueError(
            f"not writing {path}: NaN or infinite weights in {', '.join(bad[:5])} (training diverged)"
        )
    info = CheckpointInfo(
        format=FORMAT,
        gnnmd=__version__,
        torch=str(torch.__version__),
        config=to_dict(potential.config) if config is None else dict(config),
        n_parameters=sum(p.numel() for p in potential.parameters()),
        dtype=_dtype_name(potential),
        r_cut=float(potential.r_cut),
        elements=tuple(potential.elements),
        datasets=tuple(potential.datasets),
        statistics=dict(statistics or {}),
        extra=dict(extra or {}),
        checksum=checksum(weights),
    )
    write_atomically(path, save(weights, {_KEY: json.dumps(asdict(info), default=_plain)}))
    return path


def read_info(path: str | Path) -> CheckpointInfo:
    """Return what a checkpoint says about itself without building the model; raises as `load_checkpoint`."""
    return _read(find_checkpoint(path))[0]


def load_checkpoint(path: str | Path) -> tuple[Potential, CheckpointInfo]:
    """Build the potential of a checkpoint.

    Args:
        path: a file, or the name of a checkpoint that comes with the package ("silver").

    Returns:
        The potential on the CPU in the dtype it was saved in, and what the file says about it.

    Raises:
        FileNotFoundError: no such file or name.
        ValueError: not a gnnmd checkpoint, damaged, written by a later format, or weights that do not fit the
            configuration stored beside them.
    """
    path = find_checkpoint(path)
    info, weights = _read(path)
    if checksum(weights) != info.checksum:
        raise ValueError(
            f"{path} is damaged: its weights do not match their checksum. Copy or download it again"
        )
    # weights are drawn and then overwritten, so the caller's random numbers must not move
    with torch.random.fork_rng(devices=[]):
        potential = build_potential(from_dict(info.config)).to(getattr(torch, info.dtype))
    _check_fit(path, info.gnnmd, potential.state_dict(), weights)
    potential.load_state_dict(weights)
    return potential, info


def find_checkpoint(path: str | Path) -> Path:
    """Return the file meant by a path or by the name of a checkpoint that comes with the package.

    Raises:
        FileNotFoundError: neither exists.
        IsADirectoryError: the path is a folder.
    """
    packaged = _PRETRAINED / f"{path}.safetensors"
    if Path(path).is_file():
        return Path(path)
    if Path(path).name == str(path) and packaged.is_file():
        return packaged
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the .safetensors file in it")
    names = ", ".join(sorted(p.stem for p in _PRETRAINED.glob("*.safetensors"))) or "none"
    raise FileNotFoundError(
        f"no checkpoint {str(path)!r}: no such file (from {Path.cwd()}), and not one that comes with gnnmd "
        f"({names}). Give the path of a .safetensors file"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: whatever happens in between, it holds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # same file system, as os.replace needs
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path, remedy: str) -> None:
    """Refuse a folder that cannot be made or written to, before hours of work go into it.

    Args:
        folder: it or the next one above it that exists is tried.
        remedy: end of the message, such as "choose another one with runs=".

    Raises:
        ValueError: names the folder and the reason.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({existing}: {error.strerror}); {remedy}") from None


def _read(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Return the metadata and the weights of a file after checking that it is one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        with path.open("rb") as file:  # only now: a good file may begin like a pickle
            start = file.read(4)
        if start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise ValueError(
                f"{path} is a pickle (torch.save, Lightning .ckpt), which can run code; gnnmd does not load "
                "it. Use the .safetensors file that training wrote beside it; weights of fairchem-core and "
                "deepmd-kit go through gnnmd convert first"
            ) from None
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}). Copy it again") from error
    if _KEY not in metadata:
        raise ValueError(f"{path} holds tensors but no gnnmd description; it was not written by gnnmd")
    try:
        content = json.loads(metadata[_KEY])
        if content["format"] > FORMAT:
            raise ValueError(
                f"{path} has format {content['format']}, written by gnnmd {content['gnnmd']}; "
                f"gnnmd {__version__} reads up to format {FORMAT}. Upgrade gnnmd"
            )
        content["elements"], content["datasets"] = tuple(content["elements"]), tuple(content["datasets"])
        return CheckpointInfo(**content), weights
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has a damaged description ({error!r}). Copy or download it again"
        ) from error


def _check_fit(path: Path, version: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names, shapes and dtypes of the weights are those of the model."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        want, got = expected[name], found[name]
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            faults.append(f"{name} is {list(got.shape)} {got.dtype}, not {list(want.shape)} {want.dtype}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path} (written by gnnmd {version}) does not fit the model that its configuration describes: "
            f"{'; '.join(sorted(faults)[:5])}{more}. It was changed by another program, or written by a "
            "version whose networks were different; write it again with save_checkpoint"
        )


def checksum(weights: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of all weights in the order of their names (4 GB/s; a flipped bit is found)."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _dtype_name(potential: Potential) -> str:
    parameter = next(potential.parameters(), None)
    return "float64" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it knows."""
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"a checkpoint stores plain values, not {type(value).__name__} ({value!r}); convert it first"
    )
