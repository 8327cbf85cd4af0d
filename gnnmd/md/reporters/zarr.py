"""Trajectories of large systems: every rank writes its part of each frame into one Zarr directory.

Per-atom arrays are ``[frames, N, ...]`` in the order of the input, cut into chunks of consecutive atoms, each
written by one rank: rows travel from the ranks that own the atoms to the ranks that write their numbers.
So any reader of Zarr sees plain arrays, and nothing depends on how many ranks wrote them.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.files import Beside, Recorder, cannot_write
from gnnmd.md.reporters.frames import atoms_of

_FORMAT = "gnnmd-trajectory"
#: Largest chunk, atoms: 1.5 MB of float32 positions.
_MOST_ATOMS = 2**17
_UNITS = {
    "time": "fs",
    "positions": "Angstrom",
    "velocities": "sqrt(eV/amu)",
    "forces": "eV/Angstrom",
    "energy": "eV",
    "stress": "eV/Angstrom^3",
    "cell": "Angstrom",
    "masses": "amu",
}


@dataclass(eq=False)
class ZarrTrajectory(Recorder):
    """Writes frames of a system of any size, O(N/P) memory and work on each of P ranks.

    Chunks are written while the simulation goes on; a frame counts once all ranks have written theirs, which
    is known at the next report, when a restart is written, or at the end of the run. What fails is raised
    then, on every rank. `read_trajectory` reads it. All ranks must see the same file system.

    Attributes:
        path: directory.
        interval: steps between two frames.
        dtype: of positions, velocities and forces; float32 keeps 6e-5 A in a system of 1000 A.
        velocities: write velocities (ASE's unit).
        forces: write forces, eV/A.
        stress: write the stress without its kinetic part, eV/A^3.
        chunk: atoms per chunk, which is one file; None is N/P, at most 131,072. Fixed when the trajectory is
            begun; at most N/chunk ranks write.
    """

    path: str | Path = "md.zarr"
    interval: int = 1000
    dtype: Literal["float32", "float64"] = "float32"
    velocities: bool = True
    forces: bool = False
    stress: bool = True
    chunk: int | None = None

    _count = _size = 0
    _pending: int | None = None
    _writer: Beside | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 atom, got {self.chunk}")
        self.needs_stress = self.stress

    @property
    def _names(self) -> tuple[str, ...]:
        optional = {"velocities": self.velocities, "forces": self.forces}
        return ("positions", *(name for name, wanted in optional.items() if wanted))

    def end(self, view: View) -> None:
        """Wait until all frames are written. Collective."""
        self._finish()
        self._writer = None

    def close(self) -> None:
        """Let the last frame be written, if it can; it does not count, and another run cuts it off."""
        if self._writer is not None:
            with suppress(Exception):  # the run has failed already
                self._writer.finish()
        self._writer = self._newest = self._pending = None

    def saved(self) -> dict[str, Tensor]:
        """Complete the frame that is being written: a restart counts on it. Collective."""
        self._finish()
        return {}

    def _open(self, view: View, keep: int) -> int:
        path, n = Path(self.path), view.engine.n_atoms
        found = (-1, 0, self.chunk or min(-(-n // self._ranks.size), _MOST_ATOMS))
        new = keep < 0 or not self._ranks.from_first(path.exists())
        with self._ranks.together(f"opening {path}"):
            if view.first:
                if new:
                    _create(path, n, view.state.pbc.tolist(), found[2], self.dtype, self._names)
                else:
                    found = _cut(path, n, self._names, keep)
        newest, self._count, self._size = self._ranks.from_first(found)
        if new:
            low, columns = self._distribute(view, ("numbers", "masses"))
            with self._ranks.together(f"opening {path}"):
                _write_rows(path, None, low, columns)
        return newest

    def _write(self, view: View) -> None:
        low, columns = self._distribute(view, self._names)
        self._finish()
        path = Path(self.path)
        with self._ranks.together(f"writing {path}"):
            if view.first:
                _make_room(path, self._names, self._count + 1, view.step)
        whole: dict[str, np.ndarray] = {}
        if view.first:
            known = {**view.whole(self.stress), "time": np.array(view.time)}
            whole = {name: known[name] for name in ("time", "cell", "energy", "stress")}
        self._pending, self._writer = view.step, self._writer or Beside()
        self._writer.start(_write_frame, path, self._count, low, columns, whole, view.step)

    def _finish(self) -> None:
        """Wait for all ranks' parts of the last frame; then it counts."""
        with self._ranks.together(f"writing {self.path}"):
            if self._writer is not None:
                self._writer.finish()
        step, self._pending = self._pending, None
        if step is None:
            return
        with self._ranks.together(f"writing {self.path}"):
            if self._ranks.rank == 0:
                try:
                    _append(Path(self.path), "step", np.array(step), self._count)
                except OSError as error:
                    raise cannot_write(self.path, step, error) from error
        self._count += 1

    def _distribute(self, view: View, names: Sequence[str]) -> tuple[int, dict[str, np.ndarray]]:
        """Return consecutive atoms' rows, as many chunks as this rank writes, and the number of the first."""
        s, ranks = view.state, self._ranks
        n_chunks = -(-view.engine.n_atoms // self._size)
        writer = s.ids // self._size * ranks.size // n_chunks
        columns = tuple(getattr(s, name) for name in names)
        columns = tuple(c.to(getattr(torch, self.dtype)) if c.ndim == 2 else c for c in columns)
        (ids, *rows), _ = ranks.send_rows((s.ids, *columns), writer)
        place = torch.argsort(ids)
        low = int(ids[place[0]]) if len(ids) else 0
        return low, {name: row[place].cpu().numpy() for name, row in zip(names, rows, strict=True)}


class Frames(Sequence[Atoms]):
    """A trajectory that `ZarrTrajectory` wrote; frames are read when they are asked for.

    Args:
        path: directory.

    Attributes:
        steps: ``[frames]`` int64, number of steps of every frame.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self._group = _opened(Path(path), "r")
        self.steps = np.asarray(self._group["step"][:])
        self._numbers, self._masses = (self._group[name][:] for name in ("numbers", "masses"))

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> list[Atoms]: ...
    def __getitem__(self, index: int | slice) -> Atoms | list[Atoms]:
        """Return frames: unwrapped positions, momenta, and energy, forces and stress in a calculator."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        frame = range(len(self))[index]
        names = [name for name in ("velocities", "forces") if name in self._group]
        known = {
            name: np.asarray(self._group[name][frame], np.float64)
            for name in ("positions", "cell", "energy", "stress", *names)
        }
        known |= {"numbers": self._numbers, "masses": self._masses, "pbc": self._group.attrs["pbc"]}
        atoms = atoms_of(known)
        atoms.info |= {"step": int(self.steps[frame]), "time_fs": float(self._group["time"][frame])}
        return atoms

    def read(self, name: str, frames: int | slice = slice(None), atoms: Any = slice(None)) -> np.ndarray:
        """Return a part of an array: positions of some atoms over time, say, without reading the others.

        Args:
            name: "positions", "velocities", "forces" (if written), "cell", "energy", "stress", "time",
                "numbers" or "masses".
            frames: number of a frame, or a slice of them.
            atoms: numbers of atoms, or a slice; for per-atom arrays.
        """
        if name not in self._group:
            raise KeyError(f"{name!r} is not in the trajectory; it has {sorted(self._group.array_keys())}")
        array = self._group[name]
        if name in ("numbers", "masses"):
            return np.asarray(array[atoms])
        chosen = range(len(self))[frames]
        where = chosen if isinstance(chosen, int) else list(chosen)
        per_atom = name in ("positions", "velocities", "forces")
        return np.asarray(array.oindex[where, atoms] if per_atom else array.oindex[where])


def read_trajectory(path: str | Path) -> Frames:
    """Return the frames of a `ZarrTrajectory`; see `Frames`. It may still be written."""
    return Frames(path)


def _opened(path: Path, mode: Literal["r", "r+"]) -> Any:
    """Return the group of a trajectory.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is something else.
    """
    import zarr

    if not path.exists():
        raise FileNotFoundError(f"there is no trajectory {path} (seen from {Path.cwd()})")
    try:
        group = zarr.open_group(path, mode=mode)
        known = group.attrs.get("format") == _FORMAT
    except FileNotFoundError:
        known = False
    if not known:
        raise ValueError(f"{path} is not a trajectory of gnnmd; choose another path")
    return group


def _create(
    path: Path, n_atoms: int, pbc: list[bool], chunk: int, dtype: str, names: tuple[str, ...]
) -> None:
    """Make an empty trajectory, in place of one that is there."""
    import zarr
    from zarr.codecs import BloscCodec

    if path.exists():
        _opened(path, "r")  # nothing else is ever deleted
    group = zarr.open_group(path, mode="w")
    group.attrs.update({"format": _FORMAT, "version": 1, "pbc": pbc})
    codec = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")
    whole: dict[str, tuple[int, ...]] = {
        "step": (),
        "time": (),
        "cell": (3, 3),
        "energy": (),
        "stress": (3, 3),
    }
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
        **{name: ((0, *shape), (1024, *shape), "float64") for name, shape in whole.items()},
        **dict.fromkeys(names, ((0, n_atoms, 3), (1, chunk, 3), dtype)),
        "step": ((0,), (1024,), "int64"),
        "numbers": ((n_atoms,), (chunk,), "int64"),
        "masses": ((n_atoms,), (chunk,), "float64"),
    }
    for name, (shape, chunks, kind) in shapes.items():
        group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=kind,
            compressors=codec,
            fill_value=0 if kind == "int64" else np.nan,
            attributes={"units": _UNITS[name]} if name in _UNITS else {},
        )


def _cut(path: Path, n_atoms: int, names: tuple[str, ...], keep: int) -> tuple[int, int, int]:
    """Drop frames after step ``keep``; return the last step, the number of frames and the chunk's atoms."""
    group = _opened(path, "r+")
    found = (
        group["numbers"].shape[0],
        {name for name in ("positions", "velocities", "forces") if name in group},
    )
    if found != (n_atoms, set(names)):
        raise ValueError(
            f"{path} holds {' and '.join(sorted(found[1]))} of {found[0]} atoms, this simulation "
            f"{' and '.join(sorted(names))} of {n_atoms}; move it away or choose another path"
        )
    steps = group["step"][:]
    count = int(np.searchsorted(steps, keep, side="right"))
    for name in ("step", "time", "cell", "energy", "stress", *names):
        group[name].resize((count, *group[name].shape[1:]))
    return (int(steps[count - 1]) if count else -1), count, group["positions"].chunks[1]


def _make_room(path: Path, names: tuple[str, ...], frames: int, step: int) -> None:
    try:
        for name in names:
            array = _array(path, name)
            array.resize((frames, *array.shape[1:]))
    except OSError as error:
        raise cannot_write(path, step, error) from error


def _write_frame(
    path: Path,
    frame: int,
    low: int,
    columns: dict[str, np.ndarray],
    whole: dict[str, np.ndarray],
    step: int,
) -> None:
    """Write this rank's rows of a frame, and what is known of the whole."""
    try:
        _write_rows(path, frame, low, columns)
        for name, value in whole.items():
            _append(path, name, value, frame)
    except OSError as error:
        raise cannot_write(path, step, error) from error


def _write_rows(path: Path, frame: int | None, low: int, columns: dict[str, np.ndarray]) -> None:
    for name, rows in columns.items():
        if len(rows):
            where = slice(low, low + len(rows))
            _array(path, name)[where if frame is None else (frame, where)] = rows


def _append(path: Path, name: str, value: np.ndarray, frame: int) -> None:
    array = _array(path, name)
    array.resize((frame + 1, *array.shape[1:]))
    array[frame] = value


def _array(path: Path, name: str) -> Any:
    """Return an array as it is now: other ranks may have resized it."""
    import zarr

    return zarr.open_array(path / name, mode="r+")
