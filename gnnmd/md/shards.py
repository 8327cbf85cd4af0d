"""Folders that several ranks write together, completely or not at all, and any number of ranks reads.

A folder ``step-000001000`` holds a safetensors file per rank with the rows of its atoms, one with tensors
that all ranks know, and ``restart.json`` with everything else and the checksums of the files. It is written
under another name and renamed when all is on disk. Nothing in it can run code. All ranks must see the same
file system.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from gnnmd import __version__
from gnnmd.parallel import RankFailure, Ranks

FORMAT = 1
_JSON, _SHARED, _PLAN = "restart.json", "shared.safetensors", "plan."
#: Bytes that are read at once to check a file.
_CHUNK = 2**24


@dataclass(frozen=True)
class Shards:
    """What a folder says to one rank.

    Attributes:
        path: the folder.
        known: plain data that all ranks know.
        shared: tensors that all ranks know.
        rows: ``[n, ...]`` columns of atoms: those this rank wrote, if there are as many ranks as then, or its
            share of them.
        plan: further tensors that this rank wrote; empty if there is another number of ranks.
    """

    path: Path
    known: dict[str, Any]
    shared: dict[str, Tensor]
    rows: dict[str, Tensor]
    plan: dict[str, Tensor]


def step_folder(folder: Path, step: int) -> Path:
    """Return the name of the restart of a step."""
    return folder / f"step-{step:012d}"


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the restarts in a folder, ascending; whether they are good is not looked at."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def write(
    path: Path,
    ranks: Ranks,
    known: dict[str, Any],
    shared: dict[str, Tensor],
    rows: dict[str, Tensor],
    plan: dict[str, Tensor],
) -> None:
    """Write a folder, replacing one of the same name; collective.

    Args:
        path: where.
        ranks: who writes.
        known: plain data, the same on every rank.
        shared: tensors, the same on every rank.
        rows: ``[n, ...]`` columns of the atoms of this rank.
        plan: further tensors of this rank.

    Raises:
        OSError: it cannot be written (on one rank).
        RankFailure: likewise, on several.
    """
    doing, partial = f"writing {path}", path.with_name(f".{path.name}.partial")
    with ranks.together(doing), _explained(path):
        if ranks.rank == 0 and partial.exists():  # left by a write that was interrupted
            shutil.rmtree(partial)
    try:
        sizes = torch.zeros(ranks.size, 3, dtype=torch.int64)
        with ranks.together(doing), _explained(path):
            partial.mkdir(parents=True, exist_ok=True)
            content = _packed({**rows, **{_PLAN + name: tensor for name, tensor in plan.items()}})
            _write_file(partial / _rank_file(ranks.rank), content)
            n_atoms = len(next(iter(rows.values())))
            sizes[ranks.rank] = torch.tensor([n_atoms, len(content), zlib.crc32(content)])
        sizes = ranks.sum(sizes.to(ranks.device)).cpu()
        with ranks.together(doing), _explained(path):
            if ranks.rank == 0:
                content = _packed(shared)
                _write_file(partial / _SHARED, content)
                files = [[_rank_file(r), *size] for r, size in enumerate(sizes.tolist())]
                files.append([_SHARED, 0, len(content), zlib.crc32(content)])
                _write_file(partial / _JSON, _described(known, files))
                _settle(partial)
                if path.exists():
                    shutil.rmtree(path)
                partial.rename(path)
                _settle(path.parent)
    except (OSError, RankFailure):  # of which all ranks know
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def find(folder: Path, ranks: Ranks) -> tuple[Path, list[str]]:
    """Return the newest restart that is complete and undamaged, and what is wrong with newer ones.

    Collective.

    Args:
        folder: of restarts, or one of them.
        ranks: who looks; each reads some of the files.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all are damaged, or written by a later version.
    """
    one = (folder / _JSON).exists()
    candidates = [folder] if one else [step_folder(folder, step) for step in reversed(steps_in(folder))]
    candidates = ranks.from_first(candidates)
    if not candidates:
        raise FileNotFoundError(
            f"{folder} (from {Path.cwd()}) holds no restart: no folder step-..., and no {_JSON}"
        )
    faults: list[str] = []
    for path in candidates:
        try:
            with ranks.together(f"reading {path}"):
                _check(path, ranks)
            return path, faults
        except (OSError, ValueError, RankFailure) as error:
            faults.append(f"{path}: {error}")
    raise ValueError(f"no restart in {folder} can be used:\n" + "\n".join(faults))


def read(path: Path, ranks: Ranks) -> Shards:
    """Read a folder that `find` has found: what this rank wrote, or its share; collective.

    Raises:
        OSError, ValueError: it cannot be read (on one rank).
        RankFailure: likewise, on several.
    """
    with ranks.together(f"reading {path}"):
        known, files = _describe(path)
        counts = [n for name, n, *_ in files if name != _SHARED]
        total = sum(counts)
        start, stop = ranks.rank * total // ranks.size, (ranks.rank + 1) * total // ranks.size
        same = len(counts) == ranks.size
        if same:
            start = sum(counts[: ranks.rank])
            stop = start + counts[ranks.rank]
        rows, plan = _rows(path, counts, start, stop), {}
        if same:
            with safe_open(path / _rank_file(ranks.rank), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(_PLAN)]  # noqa: SIM118
                plan = {name.removeprefix(_PLAN): file.get_tensor(name) for name in names}
        shared = load((path / _SHARED).read_bytes())
    return Shards(path, known, shared, rows, plan)


def prune(folder: Path, step: int, keep: int, since: int | None) -> None:
    """Remove all restarts but the newest ``keep``.

    Args:
        folder: of restarts.
        step: that of the newest.
        keep: how many stay.
        since: where the simulation that wrote it was resumed; those between are of another course of events,
            or damaged.
    """
    steps = steps_in(folder)
    stale = [s for s in steps if s > step or (since is not None and since < s < step)]
    old = [s for s in steps if s not in stale][:-keep]
    for s in stale + old:
        shutil.rmtree(step_folder(folder, s), ignore_errors=True)


def _rows(path: Path, counts: list[int], start: int, stop: int) -> dict[str, Tensor]:
    """Return the rows ``start .. stop - 1`` of all files laid end to end."""
    parts: dict[str, list[Tensor]] = {}
    before = 0
    for r, n in enumerate(counts):
        a, b = max(start - before, 0), min(stop - before, n)
        # Where nothing is wanted, one file gives the empty columns.
        if a < b or (start == stop and r == 0):
            with safe_open(path / _rank_file(r), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    if not name.startswith(_PLAN):
                        rows = file.get_slice(name)[a:b] if a < b else file.get_tensor(name)[:0]
                        parts.setdefault(name, []).append(rows)
        before += n
    return {name: torch.cat(columns) for name, columns in parts.items()}


def _check(path: Path, ranks: Ranks) -> None:
    """Refuse a folder that is incomplete or damaged; each rank checks some of its files."""
    _, files = _describe(path)
    for name, _, n_bytes, checksum in files[ranks.rank :: ranks.size]:
        file = path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        found = file.stat().st_size
        if found != n_bytes:
            raise ValueError(f"{name} has {found} bytes instead of {n_bytes}")
        crc = 0
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
        if crc != checksum:
            raise ValueError(f"{name} does not match its checksum")


def _described(known: dict[str, Any], files: list[list[Any]]) -> bytes:
    header = {"format": FORMAT, "gnnmd": __version__, "torch": str(torch.__version__)}
    content = {**header, "files": files, "known": known}
    return json.dumps({**content, "crc32": _checksum(content)}, indent=1).encode()


def _describe(path: Path) -> tuple[dict[str, Any], list[list[Any]]]:
    try:
        content = json.loads((path / _JSON).read_text())
        checksum = content.pop("crc32")
        if content["format"] > FORMAT:
            raise ValueError(
                f"it has format {content['format']}, written by gnnmd {content['gnnmd']}; gnnmd "
                f"{__version__} reads up to format {FORMAT}. Upgrade gnnmd"
            )
        if checksum != _checksum(content):
            raise ValueError(f"{_JSON} does not match its checksum")
        return content["known"], content["files"]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{_JSON} is damaged, or not of gnnmd ({error!r})") from error


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _rank_file(rank: int) -> str:
    return f"rank-{rank:06d}.safetensors"


def _packed(tensors: dict[str, Tensor]) -> bytes:
    # clones, because safetensors refuses columns that share memory
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _settle(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written: {error}. What was written before stays valid: see to space and "
            "permissions there, then go on with Simulation.resume"
        ) from error
