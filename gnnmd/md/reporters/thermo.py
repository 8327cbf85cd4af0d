"""Temperature, energies, pressure and speed: rows of a CSV file and a line on the terminal."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gnnmd.md.reporters.base import View
from gnnmd.md.reporters.files import Recorder, cannot_write

_SCALARS = {
    "temperature_K": "temperature",
    "potential_eV": "potential_energy",
    "kinetic_eV": "kinetic_energy",
    "total_eV": "total_energy",
    "conserved_eV": "conserved",
    "pressure_GPa": "pressure",
    "volume_A3": "volume",
}
_LENGTHS = ("a_A", "b_A", "c_A")
_SPEED = ("ns_per_day", "katom_step_per_s")


@dataclass(eq=False)
class Thermo(Recorder):
    """Writes a row every few steps, and says where the simulation is.

    Attributes:
        interval: steps between two rows.
        path: CSV file; None writes none. Columns: step, time_fs, temperature_K, potential_eV, kinetic_eV,
            total_eV, conserved_eV, pressure_GPa, volume_A3, lengths of the cell if it may change, ns_per_day,
            katom_step_per_s. The speed is that of the last steps, NaN at the start.
        live: print a line for each row.
    """

    interval: int = 100
    path: str | Path | None = "md.csv"
    live: bool = True

    needs_stress = True
    _file: BinaryIO | None = None

    def show(self, row: dict[str, Any]) -> None:
        """Print one line: over the last one on a terminal, below it elsewhere."""
        if not self.live:
            return
        if sys.stdout.isatty():
            end = "\n" if row["step"] >= row["last_step"] else ""
            print(f"\r\033[K{live_line(row)}", end=end, flush=True)
        else:
            print(live_line(row), flush=True)

    def end(self, view: View) -> None:
        """Close the file; another run opens it again."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = self._newest = None

    def saved(self) -> dict[str, torch.Tensor]:
        """Put the rows on the disk: a restart counts on them."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
        return {}

    def _open(self, view: View, keep: int) -> int:
        newest = -1
        with self._ranks.together(f"opening {self.path}"):
            if self.path is not None and view.first:
                path = Path(self.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file, newest = _opened(path, _columns(view), keep)
        return self._ranks.from_first(newest)

    def _write(self, view: View) -> dict[str, Any] | None:
        row = {**_row(view), "last_step": view.last_step, "n_atoms": view.engine.n_atoms}
        with self._ranks.together(f"writing {self.path}"):
            if self._file is not None:
                text = ",".join(_text(row[name]) for name in _columns(view)) + "\n"
                try:
                    _write_all(self._file, text.encode())
                except OSError as error:
                    raise cannot_write(self.path, view.step, error) from error
        return row if view.first else None


def live_line(row: dict[str, Any]) -> str:
    """Return one line about a row of `Thermo`; speed and time left are known after the first steps."""
    last = row["last_step"]
    line = (
        f"step {row['step']:>{len(str(last))}}/{last}  T {row['temperature_K']:7.1f} K  "
        f"E_tot {row['total_eV'] / row['n_atoms']:11.5f} eV/atom"
    )
    if math.isfinite(row["pressure_GPa"]):
        line += f"  P {row['pressure_GPa']:8.3f} GPa"
    if math.isnan(row["katom_step_per_s"]):
        return line
    left = round((last - row["step"]) * row["n_atoms"] / (1e3 * row["katom_step_per_s"]))
    line += f"  {row['ns_per_day']:8.3f} ns/day  {row['katom_step_per_s']:8.2f} katom-step/s"
    return line + f"  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


def _columns(view: View) -> tuple[str, ...]:
    lengths = _LENGTHS if view.integrator.changes_cell else ()
    return ("step", "time_fs", *_SCALARS, *lengths, *_SPEED)


def _row(view: View) -> dict[str, float]:
    scalars, seconds = view.scalars(), view.performance
    row = {"step": view.step, "time_fs": view.time, **{name: scalars[key] for name, key in _SCALARS.items()}}
    if view.integrator.changes_cell:
        row |= dict(zip(_LENGTHS, view.state.cell.norm(dim=1).tolist(), strict=True))
    known = seconds > 0
    row["ns_per_day"] = view.integrator.timestep * 1e-6 * 86400 / seconds if known else math.nan
    row["katom_step_per_s"] = view.engine.n_atoms / seconds / 1e3 if known else math.nan
    return row


def _write_all(file: BinaryIO, content: bytes) -> None:
    """Write to an unbuffered file, which may take a part and say no word of what does not fit the disk."""
    while content:
        content = content[file.write(content) :]


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _opened(path: Path, columns: tuple[str, ...], keep: int) -> tuple[BinaryIO, int]:
    """Return the file, unbuffered, behind its row of step ``keep`` or the last before, and that step."""
    header = (",".join(columns) + "\n").encode()
    file = path.open("r+b" if path.is_file() and keep >= 0 else "w+b", buffering=0)
    found, *lines = file.read().splitlines(keepends=True) or [b""]
    if found not in (header, b""):
        file.close()
        raise ValueError(
            f"{path} has the columns {found.decode(errors='replace').strip()!r}, not those of this "
            f"simulation ({','.join(columns)}); move it away or choose another path"
        )
    kept, newest = header, -1
    for line in lines:
        if not line.endswith(b"\n") or int(line.split(b",", 1)[0]) > keep:
            break
        kept, newest = kept + line, int(line.split(b",", 1)[0])
    file.seek(0)
    if not found:
        file.write(header)
    file.truncate(len(kept))
    file.seek(len(kept))
    return file, newest
