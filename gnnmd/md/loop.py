"""A simulation on one rank: steps, steps that are repeated, reporters, and where it stops."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md import signals
from gnnmd.md.engine import Counters, Engine, Limits, RepeatSteps
from gnnmd.md.integrators import Integrator
from gnnmd.md.reporters import Reporter, View
from gnnmd.md.tuning import FIRST_SKIN, WATCHED, cheapest_skin
from gnnmd.parallel import share_of
from gnnmd.predict.evaluation import RankPotential

#: Weight of the newest step in the running mean of the time per step.
_FORGET = 0.05


@dataclass(frozen=True)
class Setup:
    """Everything a rank needs to know to begin.

    Attributes:
        batch: the system, in full or this rank's piece of it.
        columns: ``velocities``, ``masses`` and ``mobile`` of its atoms (see `State`).
        integrator: the equations of motion.
        reporters: who looks at it.
        skin: Angstrom; None finds the cheapest in the first steps.
        seed: of all random numbers.
        limits: what stops it.
        partition: see `build_plan`.
        headroom: see `build_plan`.
        compact: see `Engine`.
    """

    batch: AtomBatch
    columns: dict[str, Tensor]
    integrator: Integrator
    reporters: Sequence[Reporter]
    skin: float | None
    seed: int
    limits: Limits
    partition: str = "auto"
    headroom: float = 0.0
    compact: bool = True


@dataclass(frozen=True)
class Progress:
    """What a rank has done since it was last asked.

    Attributes:
        step: where it is.
        rows: what reporters said, with their place in ``Setup.reporters``.
        signalled: number of the signal that asked it to stop; 0 if none did.
        converged: the integrator has nothing more to do (minimisation).
        seconds: wall time per step lately, of the slowest rank; NaN before the first steps.
        counters: of the engine.
    """

    step: int
    rows: list[tuple[int, dict[str, Any]]]
    signalled: int
    converged: bool
    seconds: float
    counters: Counters


class Loop:
    """The part of one rank in a simulation.

    Args:
        share: potential and ranks.
        setup: the simulation.
    """

    def __init__(self, share: RankPotential, setup: Setup) -> None:
        self.integrator, self.reporters = setup.integrator, tuple(setup.reporters)
        piece, ids = share_of(setup.batch, share.ranks)
        self.engine = Engine(
            share,
            piece.to(share.device),
            ids.to(share.device),
            {name: column[ids].to(share.device) for name, column in setup.columns.items()},
            timestep=setup.integrator.timestep,
            skin=FIRST_SKIN if setup.skin is None else setup.skin,
            changes_cell=setup.integrator.changes_cell,
            seed=setup.seed,
            partition=setup.partition,
            headroom=setup.headroom,
            compact=setup.compact,
            limits=setup.limits,
            wish=signals.asked,
        )
        self.engine.tunes = setup.skin is None and self.engine.plan.skin > 0
        self.state = self.engine.begin()
        self.integrator.begin(self.state, self.engine)
        self._good = self.state.copy()
        self._last = 0
        self._listening = ExitStack()

    def begin_run(self, last: int) -> Progress:
        """Start a run that ends at step ``last``: reporters get ready and see the first step. Collective."""
        self._last = last
        self._listening.enter_context(signals.listening())
        for reporter in self.reporters:
            reporter.begin(self._view())
        self._good = self.state.copy()  # reporters may have added columns
        return self._progress(self._report() if self.state.step == 0 else [])

    def advance(self, until: int) -> Progress:
        """Make steps until ``until``, or a signal, or convergence. Collective.

        Raises:
            SimulationError: it has lost its meaning; `failed_state` is the last good one.
            RankFailure: something failed on a rank.
        """
        rows: list[tuple[int, dict[str, Any]]] = []
        converged = False
        while self.state.step < until and not self.engine.wished and not converged:
            if self._step(until):
                rows += self._report()
                converged = self.integrator.converged(self.state, self.engine)
        return self._progress(rows, converged)

    def end_run(self) -> list[dict[str, Tensor]]:
        """End a run; return what every reporter found, as it would be saved. Collective."""
        self._listening.close()
        for reporter in self.reporters:
            reporter.end(self._view())
        return [reporter.saved() for reporter in self.reporters]

    def scalars(self) -> dict[str, float]:
        """Return temperature, energies, ... of the current step; see `View.scalars`. Collective."""
        return self._view().scalars()

    def gather(self, names: Sequence[str], good: bool = False) -> dict[str, Tensor]:
        """Return columns of all atoms in the order of the input, and what is known of the whole. Collective.

        Args:
            names: per-atom columns of `State`.
            good: of the last state that was looked at and found good, instead of the current one.
        """
        s, plan = self._good if good else self.state, self.engine.plan
        rows = {name: plan.gather_owned(getattr(s, name)).cpu() for name in names}
        whole = {name: getattr(s, name).cpu() for name in ("cell", "pbc", "energy", "stress")}
        return {**rows, **whole}

    def _step(self, until: int) -> bool:
        """Make one step; tell whether somebody looks at it."""
        engine, begun = self.engine, time.perf_counter()
        due = [r for r in self.reporters if self._due(r, self.state.step + 1)]
        looked_at = bool(due) or self.state.step + 1 == until
        if looked_at:
            engine.read_next()
        engine.wants_stress = any(r.needs_stress for r in due)
        try:
            self.integrator.step(self.state, engine)
        except RepeatSteps:
            engine.go_back(self.state.step)
            self.state = self._good.copy()
            return False
        if engine.was_read:
            self._good = self.state.copy()
        if engine.tunes and self.state.step >= WATCHED:
            engine.tunes, engine.next_skin = False, cheapest_skin(engine, self.state)
        taken = time.perf_counter() - begun
        lately = taken if math.isnan(engine.own_pace) else engine.own_pace
        engine.own_pace = lately + _FORGET * (taken - lately)
        return looked_at

    def _due(self, reporter: Reporter, step: int) -> bool:
        return step % reporter.interval == 0 or step == self._last

    def _report(self) -> list[tuple[int, dict[str, Any]]]:
        view, rows = self._view(), []
        for i, reporter in enumerate(self.reporters):
            if self._due(reporter, self.state.step):
                row = reporter.report(view)
                if row is not None:
                    rows.append((i, row))
        self._good = self.state.copy()  # with what reporters keep in columns
        return rows

    def _view(self) -> View:
        return View(self.state, self.engine, self.integrator, self.engine.pace, self._last)

    def _progress(self, rows: list[tuple[int, dict[str, Any]]], converged: bool = False) -> Progress:
        engine = self.engine
        return Progress(
            self.state.step, rows, engine.wished, converged, engine.pace, replace(engine.counters)
        )


#: The simulations of which this process holds atoms, by the handle that their caller knows them by.
_loops: dict[int, Loop] = {}


def begin(share: RankPotential, handle: int, setup: Setup) -> None:
    """Take this rank's part in a new simulation. Collective."""
    _loops[handle] = Loop(share, setup)


def call(share: RankPotential, handle: int, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of this rank's `Loop`. Collective."""
    return getattr(_loops[handle], method)(*args, **kwargs)


def forget(share: RankPotential, handle: int) -> None:
    """Let go of a simulation."""
    _loops.pop(handle, None)
