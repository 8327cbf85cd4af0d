"""One run of molecular dynamics as plain values, for ``gnnmd md key=value ...``."""

from dataclasses import dataclass, field
from typing import Literal

from gnnmd.md.barostats import MTK, StochasticCell
from gnnmd.md.integrators import NVE, Integrator, Langevin, Ramp
from gnnmd.md.minimize import FIRE
from gnnmd.md.thermostats import Bussi, NoseHoover
from gnnmd.parallel.settings import LaunchConfig


@dataclass
class MDConfig:
    """One run of molecular dynamics.

    Attributes:
        model: checkpoint file, or the name of one that comes with the package.
        structure: file that ASE reads (its last frame), or the symbol of an element for its cubic crystal.
        repeat: copies along each lattice vector; None is 4 4 4 for a symbol and 1 1 1 for a file.
        ensemble: "nve" (constant energy), "nvt" (constant temperature), "npt" (constant temperature and
            pressure), or "minimize" (FIRE).
        thermostat: of nvt.
        barostat: of npt: stochastic cell rescaling with the bussi thermostat, or Martyna-Tobias-Klein.
        cell: how the cell may change, of npt and minimize; None is "isotropic" for npt and keeps the cell of
            minimize.
        temperature: K; of the bath, and of the first velocities unless the structure has some.
        final_temperature: K, which the bath reaches at the last step; None keeps ``temperature``.
        pressure: GPa, positive = compression, of npt and minimize.
        final_pressure: GPa, which the barostat reaches at the last step; None keeps ``pressure``.
        timestep: fs; minimize takes its own.
        steps: number of the last step; a resumed run goes on to it.
        friction: 1/fs, of the Langevin bath.
        time_constant: fs, in which the bussi, nose_hoover and npt baths act.
        pressure_time_constant: fs, of npt.
        max_force: eV/A, at which minimize is done.
        seed: of the first velocities and all noise.
        device: "cpu", "cuda", "cuda:1", ...; None takes a GPU if there is one.
        workers: GPUs (or processes, on the CPU) that share the atoms; None is one, or all processes that
            torchrun or srun has started.
        dtype: arithmetic of the network, "float32" or "float64".
        tf32: let matrix products round their factors to 11 bits on GPUs that can.
        edge_chunk: edges that the network handles at a time, to save memory; None handles all at once.
        dataset: level of theory, for models that know several; None takes it from the structure.
        skin: how much farther than the cutoff neighbours are listed, Angstrom; None finds the fastest.
        log: CSV file of temperature, energies, pressure, ...; None writes none.
        log_interval: steps between two of its rows and reported lines.
        trajectory: frames with positions, momenta, energy and forces: an extxyz file, or a folder whose
            name ends with .zarr, which all ranks write together, for large systems; None writes none.
        trajectory_interval: steps between two frames.
        restart: folder of restarts; None keeps none. Beside it lies ``run.json``, which says what ran,
            where, on which code and how it ended.
        restart_interval: steps between two restarts; one is also written when the run ends or is interrupted.
        keep: how many restarts stay.
        resume: go on from ``restart`` as that run was configured, on any number of workers; ``steps``, log,
            trajectory and the like may change, what decides the course of events may not.
        max_temperature: K; a hotter system stops the run. None is ten times ``temperature``, at least 5000 K.
    """

    model: str = "silver"
    structure: str = "Ag"
    repeat: tuple[int, int, int] | None = None
    ensemble: Literal["nve", "nvt", "npt", "minimize"] = "nve"
    thermostat: Literal["langevin", "bussi", "nose_hoover"] = "langevin"
    barostat: Literal["stochastic", "mtk"] = "stochastic"
    cell: str | None = None
    temperature: float = 300.0
    final_temperature: float | None = None
    pressure: float = 0.0
    final_pressure: float | None = None
    timestep: float = 5.0
    steps: int = 1000
    friction: float = 0.01
    time_constant: float = 100.0
    pressure_time_constant: float = 1000.0
    max_force: float = 0.01
    seed: int = 0
    device: str | None = None
    workers: int | None = None
    dtype: str = "float32"
    tf32: bool = False
    edge_chunk: int | None = None
    dataset: str | None = None
    skin: float | None = None
    log: str | None = "md.csv"
    log_interval: int = 10
    trajectory: str | None = "md.extxyz"
    trajectory_interval: int = 100
    restart: str | None = "md.restart"
    restart_interval: int = 1000
    keep: int = 2
    resume: bool = False
    max_temperature: float | None = None
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        if self.repeat is not None and (len(self.repeat) != 3 or min(self.repeat) < 1):
            raise ValueError(f"repeat={list(self.repeat)} must be three positive integers, e.g. [4,4,4]")
        if self.resume and self.restart is None:
            raise ValueError("resume=true needs restart=FOLDER, the restarts to go on from")
        for name in ("log_interval", "trajectory_interval", "restart_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "steps", "skin"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self.integrator()

    def integrator(self) -> Integrator:
        """Return the equations of motion.

        Raises:
            ValueError: a value out of range.
        """
        if self.ensemble == "nve":
            return NVE(timestep=self.timestep)
        if self.ensemble == "minimize":
            return FIRE(max_force=self.max_force, cell=self.cell, pressure=self.pressure)
        bath = self._ramp(self.temperature, self.final_temperature)
        if self.ensemble == "npt":
            at_pressure = {"stochastic": StochasticCell, "mtk": MTK}[self.barostat]
            return at_pressure(
                timestep=self.timestep,
                temperature=bath,
                time_constant=self.time_constant,
                pressure=self._ramp(self.pressure, self.final_pressure),
                pressure_time_constant=self.pressure_time_constant,
                cell=self.cell or "isotropic",
            )
        if self.thermostat == "langevin":
            return Langevin(timestep=self.timestep, temperature=bath, friction=self.friction)
        kind = {"bussi": Bussi, "nose_hoover": NoseHoover}[self.thermostat]
        return kind(timestep=self.timestep, temperature=bath, time_constant=self.time_constant)

    def _ramp(self, start: float, end: float | None) -> float | Ramp:
        return start if end is None else Ramp(start, end, max(self.steps, 1))
