"""Molecular dynamics driven by ASE's integrators: constant energy (velocity Verlet) and Langevin.

A run is described by one dataclass, `MDConfig`; ``gnnmd md key=value ...`` fills it from the command line.
"""

import io
import json
import math
import re
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from ase.io import iread, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from gnnmd.interfaces.ase import GNNMDCalculator
from gnnmd.predict import InferenceSettings, PredictUnit
from gnnmd.predict.checkpoint import write_atomically
from gnnmd.predict.workers import check_alone

_BUILT_IN_REPEAT = (4, 4, 4)


@dataclass
class MDConfig:
    """One run of molecular dynamics.

    Attributes:
        model: checkpoint file, or the name of one that comes with the package.
        structure: file that ASE reads (its last frame), or the symbol of an element for its cubic crystal.
        repeat: copies along each lattice vector; None is 4 4 4 for a symbol and 1 1 1 for a file.
        ensemble: "nve" (velocity Verlet) or "nvt" (Langevin).
        temperature: K; of the first velocities, unless the structure has some, and of the Langevin bath.
        timestep: fs.
        steps: number of the last step; a resumed run goes on to it.
        friction: 1/fs, of the Langevin bath.
        seed: of the first velocities and the Langevin noise.
        device: "cpu", "cuda", "cuda:1", ...; None takes a GPU if there is one.
        workers: GPUs (or processes, on the CPU) that share the atoms; None is one.
        dtype: arithmetic of the network, "float32" or "float64".
        dataset: level of theory, for models that know several; None takes it from the structure.
        skin: Angstrom, of the neighbour list.
        log_interval: steps between two reported lines and rows of the result.
        trajectory: extxyz file with positions, momenta, energy and forces; None writes none.
        trajectory_interval: steps between two frames.
        restart: file that holds the state of the run; None keeps none.
        restart_interval: steps between two writes of it; also written when the run ends or is interrupted.
        resume: go on from ``restart`` instead of starting again (and replacing the files of the last run).
        max_temperature: K; a hotter system stops the run. None is ten times ``temperature``, at least 5000 K.
    """

    model: str = "silver"
    structure: str = "Ag"
    repeat: tuple[int, int, int] | None = None
    ensemble: Literal["nve", "nvt"] = "nve"
    temperature: float = 300.0
    timestep: float = 5.0
    steps: int = 1000
    friction: float = 0.01
    seed: int = 0
    device: str | None = None
    workers: int | None = None
    dtype: str = "float32"
    dataset: str | None = None
    skin: float = 0.5
    log_interval: int = 10
    trajectory: str | None = "md.extxyz"
    trajectory_interval: int = 100
    restart: str | None = "md.restart.npz"
    restart_interval: int = 1000
    resume: bool = False
    max_temperature: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        if self.ensemble not in ("nve", "nvt"):
            raise ValueError(f"ensemble={self.ensemble!r} is not known; set nve or nvt")
        if self.repeat is not None and (len(self.repeat) != 3 or min(self.repeat) < 1):
            raise ValueError(f"repeat={list(self.repeat)} must be three positive integers, e.g. [4,4,4]")
        if self.resume and self.restart is None:
            raise ValueError("resume=true needs restart=FILE, the state to go on from")
        for name in ("timestep", "friction", "log_interval", "trajectory_interval", "restart_interval"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("temperature", "steps", "skin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class MDStatus:
    """Where a run is: step of how many, temperature (K), energies (eV/atom), speed and seconds left."""

    step: int
    steps: int
    temperature: float
    potential: float
    total: float
    ns_per_day: float
    eta: float

    def __str__(self) -> str:
        """Return one line for the terminal; the speed is known after the first step."""
        line = (
            f"step {self.step:>7}/{self.steps}  T {self.temperature:7.1f} K  E_tot {self.total:12.6f} eV/atom"
        )
        if math.isnan(self.eta):
            return line
        minutes, seconds = divmod(round(self.eta), 60)
        return f"{line}  {self.ns_per_day:8.3f} ns/day  ETA {minutes:>3}:{seconds:02}"


@dataclass(frozen=True)
class MDResult:
    """What a run gives.

    Attributes:
        atoms: last state, with the calculator.
        step: number of the last step.
        finished: False if the run was interrupted from the keyboard.
        ns_per_day: simulated time per wall time; NaN if no step was made.
        time: ``[M]`` fs, every ``log_interval`` steps.
        temperature: ``[M]`` K.
        potential: ``[M]`` eV/atom.
        total: ``[M]`` potential + kinetic energy, eV/atom.
    """

    atoms: Atoms
    step: int
    finished: bool
    ns_per_day: float
    time: np.ndarray
    temperature: np.ndarray
    potential: np.ndarray
    total: np.ndarray


class DynamicsError(FloatingPointError):
    """The run has lost its meaning; the message names the step, the atoms and the saved state."""


def run_md(
    config: MDConfig,
    *,
    calculator: Calculator | None = None,
    report: Callable[[MDStatus], None] | None = None,
) -> MDResult:
    """Run molecular dynamics; stops at the last step or, with the state saved, at Ctrl-C.

    Args:
        config: the run.
        calculator: used in place of ``config.model``.
        report: called every ``config.log_interval`` steps.

    Raises:
        FileNotFoundError: no such structure, checkpoint or restart file.
        ValueError: a structure that cannot be read, or a restart file of another system.
        DynamicsError: forces that are not finite, or a temperature above the limit.
    """
    atoms = starting_structure(config)
    rng = np.random.default_rng(config.seed)
    first = _load_state(Path(config.restart or ""), atoms, rng) if config.resume else 0
    if not config.resume:
        _draw_velocities(atoms, config.temperature, rng)
    atoms.calc = calculator or _calculator(config)
    trajectory, restart = (Path(name) if name else None for name in (config.trajectory, config.restart))
    newest_frame = first if config.resume else -1
    if trajectory:
        _drop_frames_after(trajectory, newest_frame)
    dynamics = _integrator(config, atoms, rng)
    rows: list[tuple[float, float, float, float]] = []
    step, began = first, time.perf_counter()
    with _interrupt_between_steps() as interrupted:
        while True:
            _check(config, atoms, step)
            last = step >= config.steps or interrupted()
            if last or step % config.log_interval == 0:
                status = _status(config, atoms, step, step - first, time.perf_counter() - began)
                rows.append((step * config.timestep, status.temperature, status.potential, status.total))
                if report:
                    report(status)
            if trajectory and step % config.trajectory_interval == 0 and step > newest_frame:
                _append_frame(trajectory, atoms, step, config.timestep)
            if restart and (last or step % config.restart_interval == 0):
                _save_state(restart, atoms, rng, step)  # after the frame: a resumed run misses none
            if last:
                break
            dynamics.step()
            step += 1
    columns = np.array(rows).T
    return MDResult(atoms, step, step >= config.steps, status.ns_per_day, *columns)


def starting_structure(config: MDConfig) -> Atoms:
    """Return the structure a run starts from, repeated as asked.

    Raises:
        FileNotFoundError: neither a file nor the symbol of an element.
        ValueError: a file without atoms that ASE can read.
    """
    if Path(config.structure).is_file():
        try:
            atoms, repeat = next(iread(config.structure, index=-1)), config.repeat or (1, 1, 1)
        except Exception as error:  # ASE raises whatever its many readers raise
            raise ValueError(f"ASE cannot read a structure from {config.structure}: {error!r}") from error
    elif config.structure in atomic_numbers and config.structure != "X":
        atoms, repeat = bulk(config.structure, cubic=True), config.repeat or _BUILT_IN_REPEAT
    else:
        raise FileNotFoundError(
            f"structure={config.structure!r} is neither a file (seen from {Path.cwd()}) nor a chemical symbol"
        )
    return atoms.repeat(repeat)


def _calculator(config: MDConfig) -> GNNMDCalculator:
    """Return the calculator; its workers, if any, live as long as it does."""
    check_alone(config.workers)
    settings = InferenceSettings(dtype=config.dtype)
    unit = PredictUnit.from_checkpoint(
        config.model, device=config.device, settings=settings, workers=config.workers
    )
    return GNNMDCalculator(unit, skin=config.skin, dataset=config.dataset)


def _draw_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Give the atoms velocities at a temperature, without drift or rotation; keep those they have."""
    if atoms.get_momenta().any():
        return
    # drawn here because ASE's function for it was renamed
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * width[:, None])
    if not atoms.constraints and len(atoms) > 1:
        Stationary(atoms)
        if not atoms.pbc.any():
            ZeroRotation(atoms)


def _integrator(config: MDConfig, atoms: Atoms, rng: np.random.Generator) -> VelocityVerlet | Langevin:
    timestep = config.timestep * units.fs
    if config.ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    friction = config.friction / units.fs
    # fixcm=True does not sample the canonical ensemble (ASE warns): the centre of mass diffuses, as it should
    return Langevin(
        atoms, timestep, temperature_K=config.temperature, friction=friction, fixcm=False, rng=rng
    )


def _status(config: MDConfig, atoms: Atoms, step: int, done: int, elapsed: float) -> MDStatus:
    n, potential = len(atoms), atoms.get_potential_energy()
    per_step = elapsed / done if done else math.nan
    return MDStatus(
        step=step,
        steps=config.steps,
        temperature=atoms.get_temperature(),
        potential=potential / n,
        total=(potential + atoms.get_kinetic_energy()) / n,
        ns_per_day=config.timestep * 1e-6 * 86400 / per_step,
        eta=(config.steps - step) * per_step,
    )


def _check(config: MDConfig, atoms: Atoms, step: int) -> None:
    """Stop a run that has lost its meaning, and save the state it had."""
    bad = np.flatnonzero(~np.isfinite(atoms.get_forces()).all(1))
    temperature = atoms.get_temperature()
    limit = max(10 * config.temperature, 5000.0) if config.max_temperature is None else config.max_temperature
    if len(bad):
        fault = f"the forces on atoms {', '.join(map(str, bad[:10]))} ({len(bad)} in all) are not finite"
    elif temperature > limit:
        fault = f"the temperature is {temperature:.0f} K, above max_temperature={limit:.0f} K"
    else:
        return
    base = Path(config.restart or config.trajectory or "md")
    path = base.with_name(f"{base.name.split('.')[0]}.stopped.extxyz")
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, momenta=atoms.get_momenta())
    write(path, bare, format="extxyz")
    raise DynamicsError(
        f"stopped at step {step}: {fault}. Positions and momenta are in {path}. Look for atoms that start "
        f"too close, a too long timestep ({config.timestep} fs), or a structure unlike the training set"
    )


def _append_frame(path: Path, atoms: Atoms, step: int, timestep: float) -> None:
    frame = atoms.copy()
    frame.info |= {"step": step, "time_fs": step * timestep}
    results = {
        key: atoms.calc.results[key] for key in ("energy", "forces", "stress") if key in atoms.calc.results
    }
    frame.calc = SinglePointCalculator(frame, **results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, frame, format="extxyz", append=True)


def _drop_frames_after(path: Path, step: int) -> None:
    """Cut a trajectory behind the frame of ``step``: what was written after the restart file comes again."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        while head := file.readline():
            start = file.tell() - len(head)
            number = re.search(rb"\bstep=(\d+)", file.readline())
            if number is None or int(number[1]) > step:
                file.truncate(start)
                return
            for _ in range(int(head)):
                file.readline()


def _save_state(path: Path, atoms: Atoms, rng: np.random.Generator, step: int) -> None:
    """Write all that the next step depends on, to the last digit."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        step=step,
        numbers=atoms.numbers,
        positions=atoms.positions,
        momenta=atoms.get_momenta(),
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        rng=json.dumps(rng.bit_generator.state),
    )
    write_atomically(path, buffer.getvalue())


def _load_state(path: Path, atoms: Atoms, rng: np.random.Generator) -> int:
    """Put the state of a restart file into the atoms and the generator; return its step."""
    if not path.is_file():
        raise FileNotFoundError(f"resume=true, but there is no restart file {path}; run without resume first")
    try:
        with np.load(path, allow_pickle=False) as file:
            state = dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not a restart file of gnnmd md: {error}") from error
    if not np.array_equal(state["numbers"], atoms.numbers):
        raise ValueError(
            f"{path} holds {len(state['numbers'])} atoms that are not those of the structure ({len(atoms)} "
            "atoms); give the structure and repeat that the run was started with"
        )
    atoms.set_cell(state["cell"])
    atoms.pbc = state["pbc"]
    atoms.positions = state["positions"]  # not set_positions: constraints would move them
    atoms.set_momenta(state["momenta"], apply_constraint=False)
    rng.bit_generator.state = json.loads(str(state["rng"]))
    return int(state["step"])


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C finish the step it falls into: positions and velocities then belong together."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
        return

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)  # a second one stops at once

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
