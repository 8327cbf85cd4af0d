"""Forces of a partitioned system, step after step: when a plan stands, when it is rebuilt, what is checked.

Between rebuilds a step needs no answer from the device. How far atoms have moved is followed on the device
at every step and read every few: the next reading is due before the fastest atom can have used up the skin.
Should it have been faster, the reading shows it, and the steps since the last good one are repeated with
closer readings. So no step ever stands whose edges may have been incomplete.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md.state import State
from gnnmd.parallel import Plan, build_plan
from gnnmd.predict.evaluation import RankPotential, own_arithmetic
from gnnmd.units import BOLTZMANN, FEMTOSECOND

#: A reading allows for atoms this much faster than the fastest one now.
HASTE = 1.5
#: Most steps between two readings.
LONGEST = 20


#: Per-atom columns of a `State` that every plan carries.
_OWN = ("velocities", "masses", "mobile")


class RepeatSteps(Exception):
    """Steps since the last reading may have missed an edge; raised on every rank."""


class SimulationError(FloatingPointError):
    """A simulation has lost its meaning; the message says what was found."""


@dataclass
class Counters:
    """What happened so far.

    Attributes:
        evaluations: calls of the network.
        rebuilds: plans made after the first.
        readings: times the host waited for the device to look how far atoms have moved.
        repeated: times that steps were repeated because atoms had been faster than foreseen.
    """

    evaluations: int = 0
    rebuilds: int = 0
    readings: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Limits:
    """Beyond these a simulation has lost its meaning and stops.

    Attributes:
        temperature: K, of all mobile atoms.
        energy: eV per atom by which the potential energy may lie below where the simulation began: atoms that
            fall together where the potential was never trained.
    """

    temperature: float = 20_000.0
    energy: float = 5.0


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
        compact: leave out the edges in the skin at every step: the network has less to do, but shapes change
            and the host waits for the device.
        limits: what stops the simulation.
        wish: returns a positive number to ask all ranks for attention (the signal that has come).

    Attributes:
        plan: who owns what, and the edges.
        n_atoms: of all ranks.
        n_mobile: those that are not held fixed.
        wants_stress: whether evaluations compute the stress, asked or not.
        was_read: whether the last evaluation was one that looked at the device.
        wished: the largest wish of all ranks at the last reading.
        own_pace: seconds per step on this rank; set by the loop.
        pace: the largest of all ranks at the last reading; NaN before.
        next_skin: skin of the plan from the next reading on, Angstrom; None leaves it.
        tunes: whether to note the next.
        travel: at every reading, how many steps the plan had stood and how far the farthest atom had moved,
            Angstrom.
        counters: what happened so far.
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
        compact: bool = True,
        limits: Limits | None = None,
        wish: Callable[[], int] = lambda: 0,
    ) -> None:
        self.ranks, self.potential = evaluator.ranks, evaluator.potential
        self.seed, self.compact = seed, compact
        self.counters = Counters()
        self.wants_stress = self.was_read = False
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
            dataset=self.potential.dataset_index(piece),
            max_neighbors=limit,
            backend=evaluator.settings.neighbors,
            headroom=headroom,
        )
        self.n_atoms = int(self.plan.graph.n_atoms.sum())
        self.n_mobile = round(float(self.total(self.plan.carried[_OWN.index("mobile")][:, 0])))
        self._settings, self._pbc = evaluator.settings, piece.pbc[0]
        self._dt, self._changes_cell = timestep * FEMTOSECOND, changes_cell
        self._wish = wish
        self._limits, self._first_energy = limits or Limits(), math.nan
        self._stood = self._watch_until = 0
        self._unread, self._every, self._worst = 0, 1, self.plan.positions.new_zeros(())

    def begin(self, step: int = 0) -> State:
        """Return the state at the start, with energy, forces and stress. Collective."""
        x = self.plan.positions
        s = State(
            step=step,
            positions=x.clone(),
            forces=torch.zeros_like(x),
            cell=self.plan.graph.cell[0].clone(),
            pbc=self._pbc,
            energy=x.new_zeros(()),
            stress=x.new_zeros(3, 3),
            **self._owned_columns(),
        )
        self.call(s, stress=True)
        self._first_energy = float(s.energy)
        return s

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``[n, ...]`` over the atoms of all ranks. Collective."""
        return self.ranks.sum(x.sum(0))

    def evaluate(self, s: State, *, stress: bool = False) -> None:
        """Compute energy and forces (and the stress) at the positions and cell of a state. Collective.

        May rebuild the plan: the state then holds other atoms, with all their columns.

        Raises:
            RepeatSteps: see there.
            RankFailure: positions or forces are not finite, or the plan could not be rebuilt.
            SimulationError: the simulation is beyond its limits.
        """
        used = self._skin_used(s)
        self._unread += 1
        self.was_read = self._unread >= self._every
        if self.was_read:
            self._read(s, used)
        else:
            self._worst = torch.maximum(self._worst, used)
        self.call(s, stress=stress or self.wants_stress)

    def read_next(self) -> None:
        """Let the next evaluation look at the device: its step will be reported."""
        self._every = 0

    def go_back(self, until: int) -> None:
        """Watch all steps before ``until``: those since the last reading are to be repeated."""
        self.counters.repeated += 1
        self._watch_until = until
        self._unread, self._every = 0, 1
        self._worst = torch.zeros_like(self._worst)

    def call(self, s: State, *, stress: bool = False) -> None:
        """Evaluate the potential with the plan as it is. Collective."""
        self.counters.evaluations += 1
        cell = s.cell[None]
        with own_arithmetic(s.positions.device, self._settings.tf32):
            if self.compact:
                graph = self.plan.within_cutoff(s.positions, cell)
            else:
                graph = replace(self.plan.graph, cell=cell)
            p = self.potential(s.positions, graph, self.plan.gp, stress=stress)
        s.energy, s.forces = p.energy[0], p.forces
        if stress and p.stress is not None:
            s.stress = p.stress[0]

    def _skin_used(self, s: State) -> Tensor:
        """Return the part of the skin that is used up, on this rank; above 1 an edge may be missing.

        With D the deformation of the cell since the build and d the largest displacement beyond it, pairs
        within r_cut now were within (r_cut + 2 d) |D^-1| then; 1 + |D^-1 - 1| (Frobenius) is not less than
        the norm of D^-1.
        """
        plan = self.plan
        if not self._changes_cell:
            moved, allowed = s.positions - plan.positions, max(plan.skin, 1e-12)
            return 2 * _longest(moved) / allowed
        inverse = torch.linalg.inv_ex(s.cell)[0]
        identity = torch.eye(3, dtype=inverse.dtype, device=inverse.device)
        before = plan.graph.cell[0]
        shrink = 1 + torch.linalg.vector_norm(inverse @ before - identity)
        moved = s.positions - plan.positions @ torch.linalg.inv_ex(before)[0] @ s.cell
        return 2 * _longest(moved) / ((plan.r_cut + plan.skin) / shrink - plan.r_cut).clamp(min=1e-12)

    def _read(self, s: State, used: Tensor) -> None:
        """Look how far atoms have moved; rebuild where that is due."""
        speed = _longest(s.velocities)
        said = used.new_tensor([self._wish(), 0.0 if math.isnan(self.own_pace) else self.own_pace])
        most = torch.cat((torch.stack((used, self._worst, speed)), said)).nan_to_num(nan=math.inf)
        kinetic = self.total(s.masses * s.velocities.square().sum(1)) / 2
        values = torch.cat((self.ranks.max(most), torch.stack((kinetic, s.energy)))).tolist()
        now, worst, fastest, wished, pace, kinetic_energy, energy = values
        self.counters.readings += 1
        self._check(s, [now, worst, fastest, energy], kinetic_energy)
        if worst > 1:
            raise RepeatSteps
        self.wished, self.pace = int(wished), pace or math.nan
        self._stood += self._unread
        if self.tunes:
            self.travel.append((self._stood, now * self.plan.skin / 2))
        if now > 1 or self.next_skin is not None:
            self._rebuild(s)
            now = 0.0
        left = (1 - now) * self.plan.skin / 2
        steps = left / max(HASTE * fastest * self._dt, 1e-12)
        self._unread, self._every = 0, int(min(max(steps, 1), LONGEST)) if s.step >= self._watch_until else 1
        self._worst = torch.zeros_like(self._worst)

    def _check(self, s: State, values: list[float], kinetic_energy: float) -> None:
        """Stop every rank if the simulation has lost its meaning."""
        if not all(map(math.isfinite, values)):
            with self.ranks.together("checking its atoms"):
                bad = ~(s.positions.isfinite() & s.velocities.isfinite() & s.forces.isfinite()).all(1)
                if bad.any():
                    raise SimulationError(
                        f"positions, velocities or forces of atoms {_some(s.ids[bad])} are not finite"
                    )
            raise SimulationError(
                f"the potential energy is {values[3]} eV or the cell is not finite: {s.cell.tolist()}"
            )
        temperature = 2 * kinetic_energy / (3 * max(self.n_mobile, 1) * BOLTZMANN)
        if temperature > self._limits.temperature:
            raise SimulationError(
                f"the temperature is {temperature:.0f} K, above {self._limits.temperature:.0f} K"
            )
        fallen = (self._first_energy - values[3]) / self.n_atoms
        if fallen > self._limits.energy:
            raise SimulationError(
                f"the potential energy fell by {fallen:.2f} eV per atom, more than {self._limits.energy} eV"
            )

    def _rebuild(self, s: State) -> None:
        carried = (s.velocities, s.masses, s.mobile, *(s.columns[name] for name in s.columns))
        self._columns = tuple(s.columns)
        self.plan = self.plan.rebuild(s.positions, s.cell[None], carried, skin=self.next_skin)
        self.counters.rebuilds += 1
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


def _some(ids: Tensor) -> str:
    shown = ", ".join(map(str, ids[:10].tolist()))
    return shown if len(ids) <= 10 else f"{shown}, ... ({len(ids)} in all)"
