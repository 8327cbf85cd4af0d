"""What a simulation tells while it runs: the interface that all reporters share, and what they can see."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnnmd.md.engine import Engine
from gnnmd.md.integrators import Integrator, kinetic_energy, kinetic_stress
from gnnmd.md.state import State
from gnnmd.units import BOLTZMANN, GPA_PER_EV_A3


@dataclass
class View:
    """A simulation at one step, as reporters see it on every rank.

    Methods that say so are collective: every rank calls them, in the same order.

    Attributes:
        state: the atoms of this rank. Reporters may add ``state.columns``, which then travel with the atoms,
            and must change nothing else.
        engine: the plan (``engine.plan``), the ranks (``engine.ranks``), and sums over all atoms.
        integrator: the equations of motion.
        performance: wall seconds per step lately; NaN before the first steps.
        last_step: at which the current run ends.
    """

    state: State
    engine: Engine
    integrator: Integrator
    performance: float
    last_step: int
    _measured: dict[str, Tensor] | None = None
    _scalars: dict[str, float] | None = None

    @property
    def step(self) -> int:
        """Number of steps since the beginning."""
        return self.state.step

    @property
    def time(self) -> float:
        """Simulated time, fs."""
        return self.state.step * self.integrator.timestep

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files that only one may write."""
        return self.engine.ranks.rank == 0

    def measured(self) -> dict[str, Tensor]:
        """Return what `scalars` does, and the stress, on the device; computed once per step. Collective.

        Returns:
            Scalars by their names, and ``stress`` ``[3, 3]`` eV/A^3, with its kinetic part.
        """
        if self._measured is None:
            s, engine = self.state, self.engine
            kinetic = kinetic_energy(s, engine)
            stress = s.stress + kinetic_stress(s, engine)
            freedom = max(self.integrator.freedom(engine), 1)
            self._measured = {
                "temperature": 2 * kinetic / (freedom * BOLTZMANN),
                "potential_energy": s.energy,
                "kinetic_energy": kinetic,
                "total_energy": s.energy + kinetic,
                "conserved": self.integrator.conserved(s, engine),
                "pressure": -torch.trace(stress) / 3 * GPA_PER_EV_A3,
                "volume": s.volume,
                "stress": stress,
            }
        return self._measured

    def scalars(self) -> dict[str, float]:
        """Return temperature (K), energies (eV), pressure (GPa), ...; computed once per step. Collective.

        The pressure is NaN where the cell has no volume or the potential no stress. Reporters that read it
        set ``needs_stress``.
        """
        if self._scalars is None:
            measured = {name: value for name, value in self.measured().items() if not value.ndim}
            values = torch.stack(list(measured.values())).tolist()
            self._scalars = {"step": self.step, "time": self.time, **dict(zip(measured, values, strict=True))}
        return self._scalars

    def gather(self, column: Tensor) -> Tensor:
        """Return rows ``[N, ...]`` of all atoms in the order of the input; for output only. Collective."""
        return self.engine.plan.gather_owned(column)

    def gather_on_first(self, *names: str) -> dict[str, Tensor] | None:
        """Return per-atom columns of the state, all atoms in the order of the input, on the CPU. Collective.

        Only the first rank gets them, and only it needs the memory; the others get None.
        """
        s = self.state
        columns = tuple(getattr(s, name) for name in names)
        (ids, *rows), _ = self.engine.ranks.send_rows((s.ids, *columns), torch.zeros_like(s.ids))
        if not self.first:
            return None
        place = torch.argsort(ids)
        return {name: column[place].cpu() for name, column in zip(names, rows, strict=True)}

    def whole(self, stress: bool) -> dict[str, np.ndarray]:
        """Return copies of cell, pbc, energy and stress; the latter is NaN if not asked for or undefined."""
        s = self.state
        known = {name: getattr(s, name).cpu().clone().numpy() for name in ("cell", "pbc", "energy", "stress")}
        if not (stress and s.volume > 0):
            known["stress"] = np.full((3, 3), np.nan)
        return known


class Reporter:
    """Something that looks at a simulation every ``interval`` steps, on the ranks.

    Reporters are sent to worker processes: they must be picklable before `begin`, and open files there.

    Attributes:
        interval: steps between two reports; step 0 is reported, and so is the last step of a run.
        needs_stress: whether reported steps must have the stress.
    """

    interval: int = 100
    needs_stress: bool = False

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}")

    def begin(self, view: View) -> None:
        """Get ready; drop output of steps after ``view.step`` (a resumed run). Collective."""

    def report(self, view: View) -> dict[str, Any] | None:
        """Look at one step; what the first rank returns is passed to the caller's process. Collective."""

    def end(self, view: View) -> None:
        """Write what is left; the run ends here, or goes on later with `begin`. Collective."""

    def close(self) -> None:
        """Let go of open files; called on every rank when a run has failed, in place of `end`."""

    def show(self, row: dict[str, Any]) -> None:
        """Tell the user what `report` returned; called in the caller's process (under torchrun, the first).

        What it raises is raised in all of them.
        """

    def saved(self) -> dict[str, Tensor]:
        """Return all that was found so far, summed over ranks and the same on each. Collective.

        A restart keeps it. The caller's own object takes it back at the end of a run, so that methods that
        evaluate it work there, whoever holds the atoms.
        """
        return {}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` returned; before `begin`, or in the caller's process after a run."""
