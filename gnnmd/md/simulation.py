"""Molecular dynamics from a script or notebook: one class, whoever holds the atoms."""

import itertools
import operator
import signal
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.graph.boxed import check_boxes
from gnnmd.md import handles, random, signals
from gnnmd.md.engine import Counters
from gnnmd.md.guards import Limits
from gnnmd.md.handles import Resumed
from gnnmd.md.integrators import Integrator
from gnnmd.md.loop import Progress
from gnnmd.md.reporters import Reporter
from gnnmd.md.reporters.frames import fixed_atoms
from gnnmd.md.setup import Setup
from gnnmd.models.potential import Potential
from gnnmd.parallel import World
from gnnmd.predict import PredictUnit
from gnnmd.predict.evaluation import check_systems
from gnnmd.predict.unit import without_labels
from gnnmd.units import BOLTZMANN

#: The caller hears of a run about this often, seconds.
_HEAR = 0.5
_handles = itertools.count()


class Simulation:
    """Molecular dynamics (or minimisation) of one system, on as many ranks as the unit has.

    State, forces and integration stay on the ranks that own the atoms; only reporters gather. The trajectory
    does not depend on the number of ranks beyond rounding.

    Args:
        atoms: the start; velocities from its momenta if it has some, charge, spin and dataset from
            ``atoms.info``, fixed atoms from `FixAtoms`. It is copied; ``simulation.atoms`` is the last state.
        unit: the potential. Under torchrun or srun all processes make the same calls.
        integrator: `NVE`, `Langevin`, ...
        reporters: who looks at it.
        temperature: K, of the first velocities if the atoms have none (without drift; 0 is rest); None takes
            the integrator's.
        seed: of all random numbers.
        skin: how much farther than the cutoff neighbours are listed, Angstrom; None finds the fastest in the
            first steps. Results are the same to rounding; to the last bit they repeat only with a number.
        limits: what stops the run; None are generous ones (of a minimisation: none).
        partition: how atoms are divided over ranks, see `build_plan`.
        evaluation: "compact", "standing" or "captured", see `gnnmd.md.evaluation.EVALUATIONS`; None chooses.
        restart: folder in which restarts are written, every so many steps and at the end of every run, from
            which `resume` goes on. All ranks must see it.
        restart_interval: steps between two restarts.
        keep: how many restarts stay.

    Attributes:
        step: number of steps made.
        counters: what the engine did.

    Raises:
        ValueError: no velocities and no temperature, or numbers that mean nothing; a system that the
            potential cannot describe; constraints other than fixed atoms; several writers of one file.
        FileExistsError: the folder holds restarts of another simulation.
        SimulationError: forces or energy of the start are not finite.
    """

    def __init__(
        self,
        atoms: Atoms,
        unit: PredictUnit | Potential,
        integrator: Integrator,
        *,
        reporters: Sequence[Reporter] = (),
        temperature: float | None = None,
        seed: int = 0,
        skin: float | None = None,
        limits: Limits | None = None,
        partition: str = "auto",
        evaluation: str | None = None,
        restart: str | Path | None = None,
        restart_interval: int = 1000,
        keep: int = 2,
    ) -> None:
        if not isinstance(integrator, Integrator):
            raise TypeError(f"the integrator must be one like NVE(timestep=1.0), got {integrator!r}")
        self._take_place(unit, reporters, restart)
        start = without_labels(atoms)
        batch = AtomBatch.from_ase(start)
        check_systems(batch)
        check_boxes(batch)
        setup = Setup(
            integrator=integrator,
            reporters=tuple(reporters),
            skin=skin,
            seed=seed,
            limits=limits or integrator.limits,
            partition=partition,
            evaluation=evaluation,
            restart=None if restart is None else Path(restart).absolute(),
            restart_interval=restart_interval,
            keep=keep,
        )
        self.integrator, self._info = integrator, start.info
        columns = initial_columns(atoms, integrator, temperature, seed)
        self._unit.on_ranks(handles.begin, self._handle, setup, batch, columns)

    @classmethod
    def resume(
        cls,
        restart: str | Path,
        unit: PredictUnit | Potential,
        *,
        reporters: Sequence[Reporter] = (),
        integrator: Integrator | None = None,
        limits: Limits | None = None,
        skin: float | None = None,
        partition: str | None = None,
        restart_interval: int | None = None,
        keep: int | None = None,
        new_potential: bool = False,
    ) -> "Simulation":
        """Go on from a restart, on any number of ranks and any device.

        What is None is as it was. On the same number of ranks of a CPU the simulation goes on to the last bit
        as if it had not been interrupted, on others to rounding. Output that reporters wrote after the
        restart is dropped, so that it is neither lost nor doubled.

        Args:
            restart: the folder of restarts, of which the newest good one is taken, or one of the folders in
                it; restarts are written there from now on.
            unit: the potential of then; it is compared.
            reporters: who looks at it: the same as then, or others. Those of a class that was there then go
                on with what they had found, in their order; their intervals may be other ones.
            integrator: other equations of motion; they begin without memory (of thermostats, say).
            limits: see `Simulation`.
            skin: see `Simulation`.
            partition: see `Simulation`.
            restart_interval: see `Simulation`.
            keep: see `Simulation`.
            new_potential: go on even if the potential is another one.

        Raises:
            FileNotFoundError: there is no restart.
            ValueError: all of them are damaged, or the potential is another one.
            RankFailure: likewise, with several ranks.
        """
        simulation = cls.__new__(cls)
        simulation._take_place(unit, reporters, restart)
        given: dict[str, Any] = {
            "integrator": integrator,
            "limits": limits,
            "skin": skin,
            "partition": partition,
            "restart_interval": restart_interval,
            "keep": keep,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        changes["reporters"] = simulation.reporters
        folder = Path(restart).absolute()
        resumed: Resumed = simulation._unit.on_ranks(
            handles.resume, simulation._handle, folder, changes, new_potential
        )
        simulation.integrator, simulation._info = resumed.integrator, resumed.info
        simulation._take_in(resumed.progress)
        if resumed.faults and simulation._unit.first:
            faults = "\n".join(resumed.faults)
            warnings.warn(f"going on from step {simulation.step}: {faults}", stacklevel=2)
        return simulation

    def _take_place(
        self, unit: PredictUnit | Potential, reporters: Sequence[Reporter], restart: str | Path | None
    ) -> None:
        self._unit = PredictUnit(unit) if isinstance(unit, Potential) else unit
        if not isinstance(self._unit, PredictUnit):
            raise TypeError(f"the unit must be a PredictUnit or a Potential, got {unit!r}")
        _check_writers(self._unit, reporters, restart)
        self.reporters = tuple(reporters)
        self.step, self.counters = 0, Counters()
        self._handle = next(_handles)
        weakref.finalize(self, _forget, self._unit, self._handle)

    @property
    def atoms(self) -> Atoms:
        """The current state, with fixed atoms, momenta, and energy, forces and stress in a calculator."""
        known = self._loop("gather", ("numbers", "positions", "velocities", "forces", "masses", "mobile"))
        atoms = Atoms(known["numbers"].numpy(), cell=known["cell"].numpy(), pbc=known["pbc"].numpy())
        atoms.info.update(self._info)
        atoms.positions = known["positions"].numpy()
        atoms.set_masses(known["masses"].numpy())
        atoms.set_momenta((known["velocities"] * known["masses"][:, None]).numpy())
        atoms.set_constraint(fixed_atoms(known["mobile"].numpy()))
        results: dict[str, Any] = {"energy": float(known["energy"]), "forces": known["forces"].numpy()}
        if known["stress"].isfinite().all():
            results["stress"] = full_3x3_to_voigt_6_stress(known["stress"].numpy())
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def scalars(self) -> dict[str, float]:
        """Return step, time (fs), temperature (K), energies (eV), pressure (GPa) and volume (A^3) now."""
        return self._loop("scalars")

    def run(self, steps: int) -> "Simulation":
        """Make steps; Ctrl-C, SIGTERM and SIGUSR1 stop between two of them. In the end a restart is written.

        Returns:
            This simulation; another call goes on.

        Raises:
            TypeError, ValueError: not a whole number of steps, or a negative one.
            KeyboardInterrupt: Ctrl-C.
            SystemExit: SIGTERM or SIGUSR1, with the code 128 + its number.
            SimulationError: the simulation has lost its meaning. A note says where its last good state is.
            RankFailure: something failed on a rank, or could not be written; likewise. Under torchrun and
                srun also what a `Callback` raises on the first process.
            OSError: something could not be written.
            WorkerDied: a worker was killed; `resume` goes on from the last restart.
        """
        try:
            steps = operator.index(steps)
        except TypeError:
            raise TypeError(f"steps must be a whole number, got {steps!r}") from None
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        last = self.step + steps
        with signals.listening():
            progress = self._take_in(self._loop("begin_run", last))
            while self.step < last and not progress.signalled and not progress.converged:
                ahead = int(_HEAR / progress.seconds) if progress.seconds > 0 else 1
                until = min(self.step + max(1, ahead), last)
                progress = self._take_in(self._loop("advance", until, signals.asked()))
            finally_saved, signalled = self._loop("end_run", signals.asked())
        for reporter, saved in zip(self.reporters, finally_saved, strict=True):
            reporter.restore(saved)
        if signalled == signal.SIGINT:
            raise KeyboardInterrupt
        if signalled:
            raise SystemExit(128 + signalled)
        return self

    def _take_in(self, progress: Progress) -> Progress:
        self.step, self.counters = progress.step, progress.counters
        with self._unit.callers.together("showing what reporters found"):
            if self._unit.first:
                for i, row in progress.rows:
                    self.reporters[i].show(row)
        return progress

    def _loop(self, method: str, *args: Any) -> Any:
        return self._unit.on_ranks(handles.call, self._handle, method, *args)


def _forget(unit: PredictUnit, handle: int) -> None:
    try:
        unit.on_ranks_soon(handles.forget, handle)
    except Exception:  # the workers are gone already, or the ranks have parted
        handles.drop(handle)


def initial_columns(
    atoms: Atoms, integrator: Integrator, temperature: float | None, seed: int
) -> dict[str, Tensor]:
    """Return velocities ``[N, 3]``, masses ``[N]`` and mobile ``[N, 1]`` of all atoms."""
    _check_each("mass", atoms.get_masses()[:, None] > 0, atoms.get_masses(), "positive")
    _check_each("momentum", np.isfinite(atoms.get_momenta()), atoms.get_momenta(), "finite")
    masses = torch.tensor(atoms.get_masses())
    mobile = torch.ones(len(atoms), 1, dtype=torch.float64)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise ValueError(
                f"the atoms have the constraint {type(constraint).__name__}, but only FixAtoms is "
                "supported: remove it"
            )
        index = np.asarray(constraint.index)
        outside = index[(index < -len(atoms)) | (index >= len(atoms))]
        if len(outside):
            raise ValueError(
                f"FixAtoms holds atom {outside[0]}, but there are {len(atoms)} atoms, 0 to {len(atoms) - 1}: "
                "set the constraint anew"
            )
        mobile[torch.as_tensor(index)] = 0.0
    velocities = torch.tensor(atoms.get_momenta()) / masses[:, None]
    if not velocities.any():
        temperature = integrator.start_temperature() if temperature is None else temperature
        if temperature is None:
            raise ValueError(
                "the atoms have no velocities and the integrator no temperature: pass temperature= to "
                "Simulation (0 to start at rest), or atoms with momenta"
            )
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature} K")
        velocities = _drawn(masses, mobile, temperature, seed)
    return {"velocities": velocities * mobile, "masses": masses, "mobile": mobile}


def _check_each(name: str, good: np.ndarray, values: np.ndarray, what: str) -> None:
    """Refuse atoms with a number that means nothing."""
    bad = ~good.all(1)
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"the {name} of atom {i} must be {what}, got {values[i].tolist()} ({bad.sum()} such atoms "
            "in all); set it before the simulation"
        )


def _check_writers(unit: PredictUnit, reporters: Sequence[Reporter], restart: str | Path | None) -> None:
    """Refuse several writers of one file: reporters of a simulation, or simulations of several processes."""
    for reporter in reporters:
        if not isinstance(reporter, Reporter):
            raise TypeError(f"reporters must be a list of reporters like Thermo(), got {reporter!r} in it")
    paths = [Path(path).absolute() for r in reporters if (path := getattr(r, "path", None)) is not None]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{paths.count(path)} reporters write {path}: give each a path of its own")
    world = World.from_environment()
    alone = unit.workers is None and unit.callers.size == 1
    if alone and world is not None and world.size > 1 and (paths or restart is not None):
        raise ValueError(
            f"torchrun or srun has started {world.size} processes, and each would run this simulation by "
            f"itself and write the same {restart if restart is not None else paths[0]}. Make the PredictUnit "
            f"with workers='auto' or {world.size} to share the atoms; for simulations of their own, with "
            "files of their own, remove RANK and SLURM_STEP_ID from os.environ before"
        )


def _drawn(masses: Tensor, mobile: Tensor, temperature: float, seed: int) -> Tensor:
    """Return velocities at a temperature, without drift where nothing is fixed."""
    noise = random.normals(seed, 0, random.VELOCITIES, torch.arange(len(masses)))[:, :3]
    velocities = noise * torch.sqrt(BOLTZMANN * temperature / masses)[:, None] * mobile
    if mobile.all() and len(masses) > 1:
        velocities -= (masses[:, None] * velocities).sum(0) / masses.sum()
    return velocities
