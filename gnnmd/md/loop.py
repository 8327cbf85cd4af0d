"""A simulation on one rank: steps, steps that are repeated, reporters, restarts, and where it stops."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from ase.io import write
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md import restart, shards, signals
from gnnmd.md.engine import Counters, Engine, RepeatSteps
from gnnmd.md.guards import SimulationError, check_finite
from gnnmd.md.reporters import Reporter, View
from gnnmd.md.setup import Setup, to_plain
from gnnmd.md.state import State
from gnnmd.md.tuning import FIRST_SKIN, SKINS, WATCHED, cheapest
from gnnmd.parallel import RankFailure
from gnnmd.predict.evaluation import RankPotential

#: Weight of the newest step in the running mean of the time per step.
_FORGET = 0.05


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
        piece: the system, with the atoms that this rank holds at first.
        ids: ``[n]`` int64 their global numbers.
        columns: their ``velocities``, ``masses``, ``mobile`` (see `State`) and further columns.
        kept: a restart from which ``piece``, ``ids`` and ``columns`` are; None begins at step 0.
        new_potential: whether the potential need not be that of the restart.
    """

    def __init__(
        self,
        share: RankPotential,
        setup: Setup,
        piece: AtomBatch,
        ids: Tensor,
        columns: dict[str, Tensor],
        *,
        kept: shards.Shards | None = None,
        new_potential: bool = False,
    ) -> None:
        self.setup, self.integrator, self.reporters = setup, setup.integrator, tuple(setup.reporters)
        self._potential = restart.fingerprint(share)
        if kept is not None and not new_potential:
            restart.check_potential(kept, self._potential)
        stood = restart.standing_plan(kept, setup, share.potential.r_cut) if kept else None
        skin = FIRST_SKIN if setup.skin is None else setup.skin
        self.engine = Engine(
            share,
            piece.to(share.device),
            ids.to(share.device),
            {name: column.to(share.device) for name, column in columns.items()},
            timestep=setup.integrator.timestep,
            skin=stood["skin"] if stood else skin,
            changes_cell=setup.integrator.changes_cell,
            seed=setup.seed,
            partition=setup.partition,
            headroom=setup.headroom,
            evaluation=setup.evaluation,
            limits=setup.limits,
            wish=signals.asked,
            saved={k: v.to(share.device) for k, v in kept.plan.items()} if kept and stood else None,
        )
        choices = self.engine.evaluation.choices
        self.engine.tunes = self.engine.plan.skin > 0 and (setup.skin is None or len(choices) > 1)
        if stood:
            self.engine.next_skin = stood["next_skin"]
            if stood.get("choices") == list(choices):  # else what was chosen was for another machine
                self.engine.tunes = stood["tunes"]
                self.engine.evaluation.switch(stood["evaluation"])
        if kept is None:
            self.state = self.engine.begin()
            self.integrator.begin(self.state, self.engine)
        else:
            self.state = self._resumed(kept, new_potential)
        # The state at the last reading, and the one before, of which the last reading has found no fault.
        self._mark_good()
        self._sound = self._good
        self._watched_from = self.state.step
        self._last = 0
        # The steps of the restart that this one goes on from, and of the newest in its folder.
        self._since = None if kept is None else self.state.step
        newest = shards.step_folder(setup.restart, self.state.step) if kept and setup.restart else None
        self._kept_at = self.state.step if kept and kept.path == newest else -1
        self._listening = ExitStack()

    def _resumed(self, kept: shards.Shards, new_potential: bool) -> State:
        s = restart.state(kept, self.engine)
        if new_potential:
            self.engine.compute_first(s)
        if kept.known["setup"]["integrator"] != to_plain(self.integrator):
            if self.integrator.needs_stress:  # what is kept may be that of an earlier step
                self.engine.call(s, stress=True)
            s.variables = {}
            self.integrator.begin(s, self.engine)
        restart.restore_reporters(kept, self.reporters)
        return s

    def begin_run(self, last: int) -> Progress:
        """Start a run that ends at step ``last``: reporters get ready and see the first step. Collective."""
        self._last = last
        self.engine.wished = 0
        self._listening.close()  # of a run that did not end in order
        self._listening.enter_context(signals.listening())
        with self._saving_the_last_good():
            for reporter in self.reporters:
                reporter.begin(self._view())
            self._mark_good()  # reporters may have added columns
            return self.progress(self._report() if self.state.step == 0 else [])

    def advance(self, until: int, asked: int = 0) -> Progress:
        """Make steps until ``until``, or a signal, or convergence. Collective.

        Args:
            until: number of a step.
            asked: a signal that has reached the caller; 0 for none.

        Raises:
            SimulationError: it has lost its meaning. Notes say where its last good state is.
            RankFailure: something failed on a rank; likewise.
        """
        signals.note(asked)
        rows: list[tuple[int, dict[str, Any]]] = []
        converged = False
        with self._saving_the_last_good():
            while self.state.step < until and not self.engine.wished and not converged:
                if self._step(until):
                    converged = self._converged()
                    rows += self._report()
                    if self._restart_due(self.state.step):
                        self._keep([reporter.saved() for reporter in self.reporters])
        return self.progress(rows, converged)

    def end_run(self, asked: int = 0) -> tuple[list[dict[str, Tensor]], int]:
        """End a run and write a restart. Collective.

        Args:
            asked: see `advance`.

        Returns:
            What every reporter found, and the signal that has come to any rank, if only while the last step
            was made; 0 for none.
        """
        signals.note(asked)
        signalled = self.engine.ranks.max(torch.tensor(signals.asked(), device=self.state.ids.device))
        with self._saving_the_last_good():
            for reporter in self.reporters:
                reporter.end(self._view())
            saved = [reporter.saved() for reporter in self.reporters]
            self._keep(saved)
        self._listening.close()
        return [{name: value.cpu() for name, value in found.items()} for found in saved], int(signalled)

    def progress(self, rows: list[tuple[int, dict[str, Any]]], converged: bool = False) -> Progress:
        """Return where this simulation stands."""
        engine = self.engine
        return Progress(
            self.state.step, rows, engine.wished, converged, engine.pace, replace(engine.counters)
        )

    def scalars(self) -> dict[str, float]:
        """Return temperature, energies, ... of the current step; see `View.scalars`. Collective."""
        self._know_stress()
        return self._view().scalars()

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return columns of all atoms in the order of the input, and what is known of the whole. Collective.

        Args:
            names: per-atom columns of `State`.
        """
        self._know_stress()
        s, plan = self.state, self.engine.plan
        rows = {name: plan.gather_owned(getattr(s, name)).cpu() for name in names}
        whole = {name: getattr(s, name).cpu() for name in ("cell", "pbc", "energy", "stress")}
        return {**rows, **whole}

    def _step(self, until: int) -> bool:
        """Make one step; tell whether somebody looks at it."""
        engine, begun = self.engine, time.perf_counter()
        due = [r for r in self.reporters if self._due(r, self.state.step + 1)]
        looked_at = bool(due) or self.state.step + 1 == until or self._restart_due(self.state.step + 1)
        looked_at = looked_at or self._asks_whether_done(self.state.step + 1)
        if looked_at:
            engine.read_next()
        engine.wants_stress = any(r.needs_stress for r in due)
        try:
            self.integrator.step(self.state, engine)
        except BaseException as error:  # also what leaves half a step behind: Ctrl-C, too little memory
            engine.go_back(self._good_plan, self.state.step)
            self.state = self._good.copy()
            if isinstance(error, RepeatSteps):
                return False
            raise
        if engine.was_read:
            self._sound = self._good
            self._mark_good()
        if engine.tunes and self.state.step - self._watched_from >= WATCHED:
            skins = SKINS if self.setup.skin is None else (self.setup.skin,)
            how, engine.next_skin = cheapest(engine, self.state, skins)
            engine.evaluation.switch(how)
            engine.tunes = False
        taken = time.perf_counter() - begun
        lately = taken if math.isnan(engine.own_pace) else engine.own_pace
        engine.own_pace = lately + _FORGET * (taken - lately)
        return looked_at

    def _converged(self) -> bool:
        """Ask the integrator whether it is done; then this step is the last one, which is reported."""
        if not (
            self._asks_whether_done(self.state.step) and self.integrator.converged(self.state, self.engine)
        ):
            return False
        self._last = self.state.step
        if any(r.needs_stress for r in self.reporters):
            self._know_stress()
        return True

    def _know_stress(self) -> None:
        """Compute the stress of the current step, unless it is known. Collective."""
        if not self.engine.knows_stress:
            s = replace(self.state)  # whose energy and forces stay as they are, to the last bit
            self.engine.call(s, stress=True)
            self.state.stress = s.stress

    def _asks_whether_done(self, step: int) -> bool:
        # Not at every step that is looked at: some are because of the clock.
        every = self.integrator.done_interval
        return every is not None and step % every == 0

    def _restart_due(self, step: int) -> bool:
        return self.setup.restart is not None and step % self.setup.restart_interval == 0

    def _keep(self, found: list[dict[str, Tensor]]) -> None:
        """Write a restart of the current step, unless there is one; drop old ones."""
        folder, s, ranks = self.setup.restart, self.state, self.engine.ranks
        if folder is None or self._kept_at == s.step:
            return
        check_finite(s, ranks)
        restart.write(shards.step_folder(folder, s.step), s, self.engine, self.setup, self._potential, found)
        with ranks.together(f"removing old restarts in {folder}"):
            if ranks.rank == 0:
                shards.prune(folder, s.step, self.setup.keep, self._since)
        self._kept_at, self._since = s.step, None

    @contextmanager
    def _saving_the_last_good(self) -> Iterator[None]:
        """When the simulation fails, write its last good state, and say where in a note of the exception."""
        try:
            yield
        except Exception as error:
            # Of other exceptions the other ranks may not know: they would not come here.
            if self.engine.ranks.size == 1 or isinstance(error, SimulationError | RankFailure):
                error.add_note(self._save_the_last_good())
            for reporter in self.reporters:
                reporter.close()
            self._listening.close()  # here, not on whatever thread collects the garbage
            raise

    def _save_the_last_good(self) -> str:
        # What reporters had found by then is not known any more, so neither is what they keep in columns.
        s, ranks = replace(self._sound, columns={}), self.engine.ranks
        folder = self.setup.restart or Path.cwd() / "stopped"
        names = (folder / f"stopped-step-{s.step}{f'-{n}' if n else ''}" for n in count())
        path = ranks.from_first(next(name for name in names if not name.exists()))
        try:
            restart.write(path, s, self.engine, self.setup, self._potential, [], with_plan=False)
            with ranks.together(f"writing {path}"):
                if ranks.rank == 0:
                    write(path / "atoms.extxyz", restart.read_atoms(path))
        except Exception as error:  # what happened first matters more
            return f"the last good state could not be kept: {error}"
        return (
            f"the last state that was found good, of step {s.step}, is in {path}: look at atoms.extxyz "
            "there, or go on from it with Simulation.resume"
        )

    def _due(self, reporter: Reporter, step: int) -> bool:
        return step % reporter.interval == 0 or step == self._last

    def _report(self) -> list[tuple[int, dict[str, Any]]]:
        view, rows = self._view(), []
        for i, reporter in enumerate(self.reporters):
            if self._due(reporter, self.state.step):
                row = reporter.report(view)
                if row is not None:
                    rows.append((i, row))
        self._mark_good()  # with what reporters keep in columns
        return rows

    def _mark_good(self) -> None:
        """Remember where to go back to."""
        self._good, self._good_plan = self.state.copy(), self.engine.plan

    def _view(self) -> View:
        return View(self.state, self.engine, self.integrator, self.engine.pace, self._last)
