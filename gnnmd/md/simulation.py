"""Molecular dynamics from a script or notebook: one class, whoever holds the atoms."""

import itertools
import signal
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.graph.boxed import check_boxes
from gnnmd.md import loop, random, signals
from gnnmd.md.engine import Counters, Limits, SimulationError
from gnnmd.md.integrators import Integrator
from gnnmd.md.loop import Progress, Setup
from gnnmd.md.reporters import Reporter
from gnnmd.models.potential import Potential
from gnnmd.parallel import RankFailure
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

    Attributes:
        step: number of steps made.
        counters: what the engine did in the last run.

    Raises:
        ValueError: no velocities and no temperature, a system that the potential cannot describe, or
            constraints other than fixed atoms.
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
    ) -> None:
        self._unit = PredictUnit(unit) if isinstance(unit, Potential) else unit
        self.integrator, self.reporters = integrator, tuple(reporters)
        self._template = without_labels(atoms)
        batch = AtomBatch.from_ase(self._template)
        check_systems(batch)
        check_boxes(batch)
        setup = Setup(
            batch=batch,
            columns=initial_columns(atoms, integrator, temperature, seed),
            integrator=integrator,
            reporters=self.reporters,
            skin=skin,
            seed=seed,
            limits=limits or integrator.limits,
            partition=partition,
        )
        self.step, self.counters = 0, Counters()
        self._handle = next(_handles)
        self._unit.on_ranks(loop.begin, self._handle, setup)
        weakref.finalize(self, _forget, self._unit, self._handle)

    @property
    def atoms(self) -> Atoms:
        """The current state: positions, momenta, cell, and energy, forces and stress in a calculator."""
        return self._atoms(good=False)

    def scalars(self) -> dict[str, float]:
        """Return step, time (fs), temperature (K), energies (eV), pressure (GPa) and volume (A^3) now."""
        return self._loop("scalars")

    def run(self, steps: int) -> "Simulation":
        """Make steps; Ctrl-C, SIGTERM and SIGUSR1 stop between two of them.

        Returns:
            This simulation; another call goes on.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            SystemExit: SIGTERM or SIGUSR1, with the code 128 + its number.
            SimulationError: the simulation has lost its meaning; a file with its last good state is named.
            RankFailure: something failed on a rank; likewise.
            WorkerDied: a worker was killed.
        """
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        last = self.step + steps
        with signals.listening(then=self._pass_on):
            progress = self._take_in(self._loop("begin_run", last))
            try:
                while self.step < last and not progress.signalled and not progress.converged:
                    ahead = int(_HEAR / progress.seconds) if progress.seconds > 0 else 1
                    until = self.step + max(1, ahead)
                    progress = self._take_in(self._loop("advance", min(until, last)))
            except (SimulationError, RankFailure) as error:
                error.add_note(f"stopped after step {self.step}; {self._keep_last_good()}")
                raise
            finally_saved = self._loop("end_run")
        for reporter, saved in zip(self.reporters, finally_saved, strict=True):
            reporter.restore(saved)
        if progress.signalled == signal.SIGINT:
            raise KeyboardInterrupt
        if progress.signalled:
            raise SystemExit(128 + progress.signalled)
        return self

    def _take_in(self, progress: Progress) -> Progress:
        self.step, self.counters = progress.step, progress.counters
        if self._unit.first:
            for i, row in progress.rows:
                self.reporters[i].show(row)
        return progress

    def _loop(self, method: str, *args: Any) -> Any:
        return self._unit.on_ranks(loop.call, self._handle, method, *args)

    def _pass_on(self, number: int) -> None:
        self._unit.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    def _keep_last_good(self) -> str:
        """Write the last state that was found good; return where it is."""
        try:
            atoms = self._atoms(good=True)
            if self._unit.first:
                write("md.stopped.extxyz", atoms)
        except Exception as error:  # what happened first matters more
            return f"its last good state could not be kept: {error}"
        return "the last state that was found good is in md.stopped.extxyz"

    def _atoms(self, *, good: bool) -> Atoms:
        known = self._loop("gather", ("positions", "velocities", "forces", "masses"), good)
        atoms = self._template.copy()
        atoms.set_cell(known["cell"].numpy())
        atoms.positions = known["positions"].numpy()
        atoms.set_masses(known["masses"].numpy())
        atoms.set_momenta((known["velocities"] * known["masses"][:, None]).numpy())
        results: dict[str, Any] = {"energy": float(known["energy"]), "forces": known["forces"].numpy()}
        if known["stress"].isfinite().all():
            results["stress"] = full_3x3_to_voigt_6_stress(known["stress"].numpy())
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


def _forget(unit: PredictUnit, handle: int) -> None:
    try:
        unit.on_ranks(loop.forget, handle)
    except Exception:  # the workers are gone already
        return


def initial_columns(
    atoms: Atoms, integrator: Integrator, temperature: float | None, seed: int
) -> dict[str, Tensor]:
    """Return velocities ``[N, 3]``, masses ``[N]`` and mobile ``[N, 1]`` of all atoms."""
    masses = torch.tensor(atoms.get_masses())
    mobile = torch.ones(len(atoms), 1, dtype=torch.float64)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise ValueError(
                f"the atoms have the constraint {type(constraint).__name__}, but only FixAtoms is "
                "supported: remove it"
            )
        mobile[torch.as_tensor(np.asarray(constraint.index))] = 0.0
    velocities = torch.tensor(atoms.get_momenta()) / masses[:, None]
    if not velocities.any():
        temperature = integrator.start_temperature() if temperature is None else temperature
        if temperature is None:
            raise ValueError(
                "the atoms have no velocities and the integrator no temperature: pass temperature= to "
                "Simulation (0 to start at rest), or atoms with momenta"
            )
        velocities = _drawn(masses, mobile, temperature, seed)
    return {"velocities": velocities * mobile, "masses": masses, "mobile": mobile}


def _drawn(masses: Tensor, mobile: Tensor, temperature: float, seed: int) -> Tensor:
    """Return velocities at a temperature, without drift where nothing is fixed."""
    noise = random.normals(seed, 0, random.VELOCITIES, torch.arange(len(masses)))[:, :3]
    velocities = noise * torch.sqrt(BOLTZMANN * temperature / masses)[:, None] * mobile
    if mobile.all() and len(masses) > 1:
        velocities -= (masses[:, None] * velocities).sum(0) / masses.sum()
    return velocities
