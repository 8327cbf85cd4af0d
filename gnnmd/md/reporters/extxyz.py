"""Trajectories of small systems in one extended XYZ file."""

import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.geometry import wrap_positions
from ase.io import write

from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.files import Beside, Recorder, cannot_write
from gnnmd.md.reporters.frames import atoms_of


@dataclass(eq=False)
class Trajectory(Recorder):
    """Writes frames in the order of the input, gathered on the first rank; for up to some 1e5 atoms.

    A frame has energy, step and ``time_fs``, momenta, forces, stress and which atoms are fixed. It is written
    while the simulation goes on; what fails is raised on every rank at the next report, or when the run ends.
    Larger systems take `ZarrTrajectory`.

    Attributes:
        path: extxyz file.
        interval: steps between two frames.
        wrap: put atoms into the cell along periodic directions; unwrapped positions show how far they went.
        velocities: write momenta (ASE's unit).
        forces: write forces, eV/A.
        stress: write the stress without its kinetic part, eV/A^3.
    """

    path: str | Path = "md.extxyz"
    interval: int = 1000
    wrap: bool = False
    velocities: bool = True
    forces: bool = True
    stress: bool = True

    _writer: Beside | None = None

    def __post_init__(self) -> None:
        """Check the interval."""
        super().__post_init__()
        self.needs_stress = self.stress

    def end(self, view: View) -> None:
        """Wait until all frames are written. Collective."""
        self._finish()
        self._writer = None

    def close(self) -> None:
        """Let the last frame be written, if it can; another run cuts the file anew."""
        if self._writer is not None:
            with suppress(Exception):  # the run has failed already
                self._writer.finish()
        self._writer = self._newest = None

    def saved(self) -> dict[str, torch.Tensor]:
        """Put the frames on the disk: a restart counts on them. Collective."""
        self._finish(to_disk=True)
        return {}

    def _open(self, view: View, keep: int) -> int:
        newest = -1
        with self._ranks.together(f"opening {self.path}"):
            if view.first:
                path = Path(self.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                newest = cut_extxyz(path, keep)
        return self._ranks.from_first(newest)

    def _write(self, view: View) -> None:
        names = ["numbers", "positions", "masses", "mobile"]
        names += ["velocities"] if self.velocities else []
        names += ["forces"] if self.forces else []
        rows = view.gather_on_first(*names)
        self._finish()
        if rows is not None:
            self._writer = self._writer or Beside()
            known = {**{name: value.numpy() for name, value in rows.items()}, **view.whole(self.stress)}
            self._writer.start(_append, Path(self.path), known, view.step, view.time, self.wrap)

    def _finish(self, *, to_disk: bool = False) -> None:
        with self._ranks.together(f"writing {self.path}"):
            if self._writer is not None:
                self._writer.finish()
                if to_disk:
                    with Path(self.path).open("rb") as file:
                        os.fsync(file.fileno())


def cut_extxyz(path: Path, step: int) -> int:
    """Cut a trajectory behind its last complete frame up to ``step``; return the step of that, -1 if none.

    The file is made if it does not exist.
    """
    newest = -1
    with path.open("r+b" if path.is_file() else "w+b") as file:
        start = 0
        while head := file.readline():
            number = re.search(rb"\bstep=(\d+)\b", file.readline())
            if number is None or int(number[1]) > step:
                break
            line = b"\n"
            for _ in range(int(head)):
                line = file.readline()
            if not line.endswith(b"\n"):
                break
            start, newest = file.tell(), int(number[1])
        file.truncate(start)
    return newest


def _append(path: Path, known: dict[str, np.ndarray], step: int, time: float, wrap: bool) -> None:
    if wrap:
        known["positions"] = wrap_positions(known["positions"], known["cell"], known["pbc"])
    atoms = atoms_of(known)
    atoms.info |= {"step": step, "time_fs": time}
    text = io.StringIO()
    write(text, atoms, format="extxyz")
    try:
        with path.open("ab") as file:
            start = file.tell()
            try:
                file.write(text.getvalue().encode())
                file.flush()
            except OSError:
                with suppress(OSError):
                    file.truncate(start)  # no half frame
                raise
    except OSError as error:
        raise cannot_write(path, step, error) from error
