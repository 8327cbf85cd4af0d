"""What a simulation tells while it runs: the interface that all reporters share, and what they can see."""

from dataclasses import dataclass
from typing import Any

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

    def scalars(self) -> dict[str, float]:
        """Return temperature (K), energies (eV), pressure (GPa), ...; computed once per step. Collective.

        The pressure is NaN where the cell has no volume or the potential no stress. Reporters that read it
        set ``needs_stress``.
        """
        if self._scalars is None:
            s, engine = self.state, self.engine
            kinetic = kinetic_energy(s, engine)
            stress = s.stress + kinetic_stress(s, engine)
            values = torch.stack(
                (
                    s.energy,
                    kinetic,
                    self.integrator.conserved(s, engine),
                    -torch.trace(stress) / 3 * GPA_PER_EV_A3,
                    s.volume,
                )
            ).tolist()
            names = ("potential_energy", "kinetic_energy", "conserved", "pressure", "volume")
            scalars = dict(zip(names, values, strict=True))
            freedom = max(self.integrator.freedom(engine), 1)
            self._scalars = {
                "step": self.step,
                "time": self.time,
                "temperature": 2 * scalars["kinetic_energy"] / (freedom * BOLTZMANN),
                "total_energy": scalars["potential_energy"] + scalars["kinetic_energy"],
                **scalars,
            }
        return self._scalars

    def gather(self, column: Tensor) -> Tensor:
        """Return rows ``[N, ...]`` of all atoms in the order of the input; for output only. Collective."""
        return self.engine.plan.gather_owned(column)


class Reporter:
    """Something that looks at a simulation every ``interval`` steps, on the ranks.

    Reporters are sent to worker processes: they must be picklable before `begin`, and open files there.

    Attributes:
        interval: steps between two reports; step 0 is reported, and so is the last step of a run.
        needs_stress: whether reported steps must have the stress.
    """

    interval: int = 100
    needs_stress: bool = False

    def begin(self, view: View) -> None:
        """Get ready; drop output of steps after ``view.step`` (a resumed run). Collective."""

    def report(self, view: View) -> dict[str, Any] | None:
        """Look at one step; what the first rank returns is passed to the caller's process. Collective."""

    def end(self, view: View) -> None:
        """Write what is left; the run ends here, or goes on later with `begin`. Collective."""

    def show(self, row: dict[str, Any]) -> None:
        """Tell the user what `report` returned; called in the caller's process."""

    def saved(self) -> dict[str, Tensor]:
        """Return all that was found so far, summed over ranks and the same on each. Collective.

        A restart keeps it. The caller's own object takes it back at the end of a run, so that methods that
        evaluate it work there, whoever holds the atoms.
        """
        return {}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take back what `saved` returned; before `begin`, or in the caller's process after a run."""
