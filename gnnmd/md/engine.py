"""Forces of a partitioned system, step after step: when a plan stands, when it is rebuilt.

Between rebuilds a step needs no answer from the device. How far atoms have moved is followed on the device
at every step and read every few: the next reading is due when an atom, flying on as it does, will have used
up the skin. Should it have been faster, the reading shows it, and the steps since the last good one are
repeated with closer readings. So no step ever stands whose edges may have been incomplete.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md.evaluation import Evaluation
from gnnmd.md.guards import Limits, SimulationError, check_apart, check_complete, check_finite, check_limits
from gnnmd.md.state import State
from gnnmd.parallel import Plan, RankFailure, build_plan
from gnnmd.predict.evaluation import RankPotential, own_arithmetic
from gnnmd.units import FEMTOSECOND

#: The next reading is at the first step that may use up this part of the skin, by what is known now.
MARGIN = 0.95
#: Most steps between two readings.
LONGEST = 20
#: What counts as a used-up skin where a list had too little room.
TOO_MANY = 2.0
#: Per-atom columns of a `State` that every plan carries.
_OWN = ("velocities", "masses", "mobile")
#: Names under which a restart gives positions and forces to the first plan.
KEPT = ("positions now", "forces now")


class RepeatSteps(Exception):
    """Steps since the last reading may have missed an edge; raised on every rank."""


@dataclass
class Counters:
    """What happened so far.

    Attributes:
        evaluations: calls of the network.
        rebuilds: plans made after the first.
        readings: times the host waited for the device to look how far atoms have moved.
        repeated: times that steps were repeated because atoms had been faster than foreseen (what others call
            dangerous builds, which here leave no trace), or more of them within the cutoff.
        skin: of the plan now, given or found, Angstrom.
    """

    evaluations: int = 0
    rebuilds: int = 0
    readings: int = 0
    repeated: int = 0
    skin: float = 0.0


class Engine:
    """A potential on every rank, the plan of one system, and sums over its atoms.

    Args:
        evaluator: the potential, its settings and the ranks.
        piece: the system, with the atoms that this rank holds at first (see `build_plan`).
        ids: ``[n]`` int64 their global numbers.
        columns: their velocities, masses, mobile (see `State`) and further columns that travel with them.
        timestep: fs, between two evaluations.
        skin: how much farther than the cutoff edges are listed, Angstrom.
        changes_cell: whether the cell may change from step to step.
        seed: of all random numbers.
        partition: see `build_plan`.
        headroom: see `build_plan`.
        evaluation: see `Evaluation`.
        limits: what stops the simulation.
        wish: returns a positive number to ask all ranks for attention (the signal that has come).
        saved: the plan of a restart, see `build_plan`.

    Attributes:
        plan: who owns what, and the edges.
        evaluation: how the potential is evaluated with it.
        system: periodicity, charge, spin and dataset; its atoms are those that this rank held at first.
        n_atoms: of all ranks.
        n_mobile: those that are not held fixed.
        wants_stress: whether evaluations compute the stress, asked or not.
        knows_stress: whether the last one did, so that the state's stress is not that of an earlier step.
        was_read: whether the last evaluation was one that looked at the device.
        wished: the largest wish of all ranks at the last reading.
        own_pace: seconds per step on this rank; set by the loop.
        pace: the largest of all ranks at the last reading; NaN before.
        next_skin: skin of the plan from the next reading on, Angstrom; None leaves it.
        tunes: whether to note the next.
        travel: at every reading, how many steps the plan had stood and how far the farthest atom had moved,
            Angstrom.
        counters: what happened so far.
        first_energy: potential energy at the beginning, eV.
    """

    def __init__(
        self,
        evaluator: RankPotential,
        piece: AtomBatch,
        ids: Tensor,
        columns: dict[str, Tensor],
        *,
        timestep: float,
        skin: float,
        changes_cell: bool = False,
        seed: int = 0,
        partition: str = "auto",
        headroom: float = 0.0,
        evaluation: str | None = None,
        limits: Limits | None = None,
        wish: Callable[[], int] = lambda: 0,
        saved: dict[str, Tensor] | None = None,
    ) -> None:
        self.ranks, self.potential = evaluator.ranks, evaluator.potential
        self.seed = seed
        self.counters = Counters()
        self.wants_stress = self.knows_stress = self.was_read = False
        self.wished = 0
        self.own_pace = self.pace = math.nan
        self.next_skin: float | None = None
        self.tunes = False
        self.travel: list[tuple[int, float]] = []
        limit = self.potential.backbone.max_neighbors
        self._columns = tuple(name for name in columns if name not in _OWN)
        self.plan: Plan = build_plan(
            piece,
            ids,
            self.potential.r_cut,
            self.ranks,
            # the nearest of a list with a skin are found by searching
            skin=0.0 if limit is not None else skin,
            near=self.potential.backbone.exchange_cut,
            partition=partition,
            carried=tuple(columns[name] for name in (*_OWN, *self._columns)),
            dataset=self.potential.dataset_index(piece, whole=False),
            max_neighbors=limit,
            backend=evaluator.settings.neighbors,
            headroom=headroom,
            saved=saved,
        )
        self.counters.skin = self.plan.skin
        self.n_atoms = int(self.plan.graph.n_atoms.sum())
        self.n_mobile = round(float(self.total(self.plan.carried[_OWN.index("mobile")][:, 0])))
        self.evaluation = Evaluation(evaluator, self.n_atoms, self.plan.skin, evaluation)
        self._tf32, self.system = evaluator.settings.tf32, piece
        self._dt, self._changes_cell = timestep * FEMTOSECOND, changes_cell
        self._wish = wish
        self._limits, self.first_energy = limits or Limits(), math.nan
        self._stood = self._watch_until = 0
        self._unread, self._every, self._worst = 0, 1, self.plan.positions.new_zeros(())

    def begin(self, step: int = 0) -> State:
        """Return the state at the start, with energy, forces and stress. Collective.

        Raises:
            SimulationError: these are not finite, or two atoms are in the same place.
        """
        check_apart(self.plan)
        s = self._first_state(step)
        self.compute_first(s)
        return s

    def resume(self, step: int, cell: Tensor, energy: Tensor, stress: Tensor, first_energy: float) -> State:
        """Return the state of a restart, computing nothing.

        Args:
            step: of the restart.
            cell: ``[3, 3]`` Angstrom; that of the plan may be an earlier one. Likewise positions and forces
                are `KEPT` columns that this engine was given.
            energy: eV.
            stress: ``[3, 3]`` eV/A^3.
            first_energy: eV, of the beginning.
        """
        s = self._first_state(step)
        s.positions, s.forces = (s.columns.pop(name) for name in KEPT)
        device = s.positions.device
        s.cell, s.energy, s.stress = cell.to(device), energy.to(device), stress.to(device)
        self.first_energy = first_energy
        return s

    def compute_first(self, s: State) -> None:
        """Compute energy, forces and stress of a first state. Collective.

        Raises:
            SimulationError: these are not finite.
        """
        self.call(s, stress=True)
        check_finite(s, self.ranks)
        self.first_energy = float(s.energy)

    def _first_state(self, step: int) -> State:
        x = self.plan.positions
        return State(
            step=step,
            positions=x.clone(),
            forces=torch.zeros_like(x),
            cell=self.plan.graph.cell[0].clone(),
            pbc=self.system.pbc[0],
            energy=x.new_zeros(()),
            stress=x.new_full((3, 3), math.nan),  # stays so where the potential has none
            **self._owned_columns(),
        )

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``[n, ...]`` over the atoms of all ranks. Collective."""
        return self.ranks.sum(x.sum(0))

    def evaluate(self, s: State, *, stress: bool = False) -> None:
        """Compute energy and forces (and the stress) at the positions and cell of a state. Collective.

        May rebuild the plan: the state then holds other atoms, with all their columns.

        Raises:
            RepeatSteps: see there.
            SimulationError: numbers are not finite or beyond their limits, or the plan could not be rebuilt.
        """
        moved, allowed = self._moved(s)
        used = _longest(moved) / allowed
        self._unread += 1
        self.was_read = self._unread >= self._every
        if self.was_read:
            self._read(s, moved, allowed, used)
        else:
            self._worst = torch.maximum(self._worst, used)
        self.call(s, stress=stress or self.wants_stress, exact=self.was_read)

    def read_next(self) -> None:
        """Let the next evaluation look at the device: its step will be reported."""
        self._every = 0

    def go_back(self, plan: Plan, until: int) -> None:
        """Take up the plan of the last reading, and watch all steps before ``until``, made once more."""
        self.plan, self.counters.skin = plan, plan.skin
        self._watch_until, self.knows_stress = until, False
        self._unread, self._every = 0, 1
        self._worst = torch.zeros_like(self._worst)
        self.evaluation.begin_anew()

    def call(self, s: State, *, stress: bool = False, exact: bool = True) -> None:
        """Evaluate the potential with the plan as it is. Collective.

        Args:
            s: the state, which gets energy, forces and stress.
            stress: whether to compute the stress.
            exact: else the next reading shows whether lists had too little room.
        """
        self.counters.evaluations += 1
        with own_arithmetic(s.positions.device, self._tf32):
            p = self.evaluation(self.plan, s.positions, s.cell[None], stress=stress, exact=exact)
        if self.evaluation.lacked is not None:
            self._worst = torch.maximum(self._worst, TOO_MANY * self.evaluation.lacked)
        s.energy, s.forces = p.energy[0], p.forces
        self.knows_stress = stress or p.stress is not None  # a replay always computes it
        if p.stress is not None:
            s.stress = p.stress[0]

    def _moved(self, s: State) -> tuple[Tensor, Tensor]:
        """Return how far atoms of this rank have moved, ``[n, 3]``, and how far they may, Angstrom.

        Beyond that an edge may be missing.

        With D the deformation of the cell since the build and d the largest displacement beyond it, pairs
        within r_cut now were within (r_cut + 2 d) |D^-1| then; 1 + |D^-1 - 1| (Frobenius) is not less than
        the norm of D^-1.
        """
        plan = self.plan
        if not self._changes_cell:
            return s.positions - plan.positions, s.positions.new_tensor(max(plan.skin, 1e-12) / 2)
        inverse = torch.linalg.inv_ex(s.cell)[0]
        identity = torch.eye(3, dtype=inverse.dtype, device=inverse.device)
        before = plan.graph.cell[0]
        shrink = 1 + torch.linalg.vector_norm(inverse @ before - identity)
        moved = s.positions - plan.positions @ torch.linalg.inv_ex(before)[0] @ s.cell
        return moved, (((plan.r_cut + plan.skin) / shrink - plan.r_cut) / 2).clamp(min=1e-12)

    def _foreseen(self, s: State, moved: Tensor) -> Tensor:
        """Return how far atoms of this rank will have moved after 1, 2, ... `LONGEST` steps, ``[LONGEST]``.

        With the velocity v half a step ago and the acceleration a of then, Verlet's steps lead from d to
        d + n v + n (n + 1) a / 2; the squared length is a polynomial in n, whose coefficients are the atoms'.
        """
        v = s.velocities * self._dt
        a = s.forces * s.mobile / s.masses[:, None] * self._dt**2
        products = ((moved, moved), (moved, v), (v, v), (moved, a), (v, a), (a, a))
        each = torch.stack([(one * other).sum(1) for one, other in products], dim=1)
        n = torch.arange(1, LONGEST + 1, dtype=v.dtype, device=v.device)
        b = n * (n + 1) / 2
        squared = each @ torch.stack((torch.ones_like(n), 2 * n, n * n, 2 * b, 2 * n * b, b * b))
        return torch.cat((squared, squared.new_zeros(1, LONGEST))).amax(0).clamp(min=0).sqrt()

    def _read(self, s: State, moved: Tensor, allowed: Tensor, used: Tensor) -> None:
        """Look how far atoms have moved, and will have; rebuild where that is due."""
        skin = self.plan.skin if self.next_skin is None else self.next_skin
        ahead = self._foreseen(s, moved) / allowed
        rebuilt = self._foreseen(s, torch.zeros_like(moved)) / max(skin / 2, 1e-12)
        speed = _longest(s.velocities)
        said = used.new_tensor([self._wish(), 0.0 if math.isnan(self.own_pace) else self.own_pace])
        most = torch.cat((torch.stack((used, self._worst, speed)), said, ahead, rebuilt))
        most = most.nan_to_num(nan=math.inf)
        kinetic = self.total(s.masses * s.velocities.square().sum(1)) / 2
        values = torch.cat((self.ranks.max(most), torch.stack((kinetic, s.energy)))).tolist()
        now, worst, fastest, wished, pace, *parts, kinetic_energy, energy = values
        self.counters.readings += 1
        if worst > 1:  # first: edges that were missing explain the strangest numbers
            self.counters.repeated += 1
            raise RepeatSteps
        check_limits(
            s,
            self.ranks,
            self._limits,
            self.n_mobile,
            moved=now,
            fastest=fastest,
            kinetic_energy=kinetic_energy,
            change=(energy - self.first_energy) / self.n_atoms,
        )
        self.wished, self.pace = int(wished), pace or math.nan
        self._stood += self._unread
        if self.tunes:
            self.travel.append((self._stood, now * self.plan.skin / 2))
        if now > 1 or self.next_skin is not None:
            self._rebuild(s)
            parts = parts[LONGEST:]
        due = next((n for n, part in enumerate(parts[:LONGEST], 1) if part > MARGIN), LONGEST)
        self._unread, self._every = 0, due if s.step >= self._watch_until else 1
        self._worst = torch.zeros_like(self._worst)

    def _rebuild(self, s: State) -> None:
        carried = (s.velocities, s.masses, s.mobile, *(s.columns[name] for name in s.columns))
        self._columns = tuple(s.columns)
        try:
            plan = self.plan.rebuild(s.positions, s.cell[None], carried, skin=self.next_skin)
        except (ValueError, RankFailure) as error:  # its checks, which fail on every rank
            raise SimulationError(f"at step {s.step} the plan could not be rebuilt: {error}") from error
        check_complete(s, self.n_atoms, plan)
        self.plan = plan
        self.evaluation.begin_anew()
        self.counters.rebuilds += 1
        self.counters.skin = plan.skin
        self.next_skin, self._stood = None, 0
        s.positions = self.plan.positions.clone()
        s.forces = torch.zeros_like(s.positions)
        for name, value in self._owned_columns().items():
            setattr(s, name, value)

    def _owned_columns(self) -> dict[str, Any]:
        """Return what the plan carries, by its name in a `State`."""
        n = self.plan.gp.n_owned
        carried = [column.clone() for column in self.plan.carried]
        own = dict(zip(_OWN, carried, strict=False))
        columns = dict(zip(self._columns, carried[len(_OWN) :], strict=True))
        return {**own, "ids": self.plan.ids[:n], "numbers": self.plan.graph.numbers[:n], "columns": columns}


def _longest(vectors: Tensor) -> Tensor:
    """Return the largest length of ``[n, 3]`` vectors, 0 if there are none."""
    squared = vectors.square().sum(1)
    return torch.cat((squared, squared.new_zeros(1))).amax().sqrt()
