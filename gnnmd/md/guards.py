"""Checks that a simulation still means something; what one rank finds stops all of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gnnmd.graph.geometry import edge_vectors
from gnnmd.md.state import State
from gnnmd.parallel import Plan, RankFailure, Ranks
from gnnmd.units import BOLTZMANN

#: Atoms nearer than this at the start are taken for the same one given twice, Angstrom.
CLOSEST = 0.01

#: What to do about a simulation that has lost its meaning.
_REMEDY = "Atoms that are too close at the start need `FIRE` first; else try a shorter time step"


class SimulationError(FloatingPointError):
    """A simulation has lost its meaning; the message says what was found."""


@dataclass(frozen=True)
class Limits:
    """Beyond these a simulation has lost its meaning and stops.

    Attributes:
        temperature: K, of all mobile atoms.
        energy: eV per atom by which the potential energy may differ from where the simulation began. It falls
            when atoms come together where the potential was never trained.
    """

    temperature: float = 20_000.0
    energy: float = 10.0


def check_limits(
    s: State,
    ranks: Ranks,
    limits: Limits,
    n_mobile: int,
    *,
    moved: float,
    fastest: float,
    kinetic_energy: float,
    change: float,
) -> None:
    """Stop every rank if the simulation has lost its meaning. Collective.

    Args:
        s: the state.
        ranks: who holds its atoms.
        limits: for temperature and energy.
        n_mobile: atoms that are not held fixed, of all ranks.
        moved: largest part of the skin that is used up. This and what follows is the same on every rank.
        fastest: largest speed.
        kinetic_energy: of all atoms, eV.
        change: of the potential energy since the beginning, eV per atom.

    Raises:
        SimulationError: numbers are not finite or beyond their limits; names atoms.
    """
    if not all(map(math.isfinite, (moved, fastest, kinetic_energy, change))):
        check_finite(s, ranks)
        raise SimulationError(
            f"at step {s.step} the largest part of the skin that is used up is {moved}, the largest "
            f"speed {fastest}, the kinetic energy {kinetic_energy} eV, the cell {s.cell.tolist()} A. "
            f"{_REMEDY}"
        )
    temperature = 2 * kinetic_energy / (3 * max(n_mobile, 1) * BOLTZMANN)
    if temperature > limits.temperature:
        raise SimulationError(
            f"at step {s.step} the temperature is {temperature:.0f} K, above "
            f"{limits.temperature:.0f} K; the fastest atom is {_extreme(s, s.velocities, ranks)}. "
            f"{_REMEDY}"
        )
    if abs(change) > limits.energy:
        raise SimulationError(
            f"at step {s.step} the potential energy has {'risen' if change > 0 else 'fallen'} by "
            f"{abs(change):.2f} eV per atom since the beginning, more than {limits.energy} eV; the "
            f"largest force acts on atom {_extreme(s, s.forces, ranks)}. {_REMEDY}"
        )


def check_finite(s: State, ranks: Ranks) -> None:
    """Stop every rank if a number of the state is not finite. Collective.

    Raises:
        SimulationError: names the step, the first rank that found some, and atoms.
    """
    with _stopping_all(ranks, f"looking at step {s.step}"):
        bad = ~(s.positions.isfinite() & s.velocities.isfinite() & s.forces.isfinite()).all(1)
        if bad.any():
            raise SimulationError(
                f"at step {s.step} positions, velocities or forces of atoms {_some(s.ids[bad])} are "
                f"not finite. {_REMEDY}"
            )
    if not (s.energy.isfinite() and s.cell.isfinite().all()):
        raise SimulationError(
            f"at step {s.step} the potential energy is {float(s.energy)} eV and the cell "
            f"{s.cell.tolist()} A; they must be finite. {_REMEDY}"
        )


def check_apart(plan: Plan) -> None:
    """Refuse atoms on top of each other: no force parts them. Collective.

    Raises:
        SimulationError: names two atoms.
    """
    g = plan.graph.with_positions(plan.gp.exchange(plan.positions), plan.graph.cell)
    lengths = torch.linalg.vector_norm(edge_vectors(g), dim=1)
    with _stopping_all(plan.ranks, "looking for atoms that overlap"):
        if len(lengths) and lengths.min() < CLOSEST:
            pair = plan.ids[g.edge_index[:, lengths.argmin()]].sort().values.tolist()
            raise SimulationError(
                f"atoms {pair[0]} and {pair[1]} are {float(lengths.min()):.1e} A from each other at the "
                "start, on top of each other; move or remove one of them"
            )


def check_complete(s: State, n_atoms: int, plan: Plan) -> None:
    """Refuse a plan that lacks atoms of a state. Collective.

    Args:
        s: the state for which the plan was made.
        n_atoms: of all ranks, in the state.
        plan: the plan.

    Raises:
        SimulationError: names the atoms, and the ranks that held them.
    """
    found = int(plan.graph.n_atoms.sum())
    if found == n_atoms:
        return
    owner = s.ids.new_full((2, n_atoms), -1)
    owner[0, s.ids] = owner[1, plan.ids[: plan.gp.n_owned]] = plan.ranks.rank
    before, after = plan.ranks.max(owner)
    lost = (after < 0).nonzero()[:, 0]
    raise SimulationError(
        f"at step {s.step} there are {found} atoms of {n_atoms}: atoms {_some(lost)} were lost, of ranks "
        f"{before[lost].unique().tolist()}"
    )


@contextmanager
def _stopping_all(ranks: Ranks, doing: str) -> Iterator[None]:
    """Run local checks; what one rank finds stops all of them."""
    try:
        with ranks.together(doing):
            yield
    except RankFailure as error:
        raise SimulationError(str(error)) from error


def _extreme(s: State, vectors: Tensor, ranks: Ranks) -> str:
    """Return the number and the rank of the atom with the longest of ``[n, 3]`` vectors. Collective."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    longest = length.max() if len(length) else length.new_tensor(-1.0)
    mine = longest == ranks.max(longest)
    atom = int(s.ids[length.argmax()]) if mine else -1
    atom, rank = ranks.max(s.ids.new_tensor([atom, ranks.rank if mine else -1])).tolist()
    return f"{atom} (on rank {rank})"


def _some(ids: Tensor) -> str:
    shown = ", ".join(map(str, ids[:10].tolist()))
    return shown if len(ids) <= 10 else f"{shown}, ... ({len(ids)} in all)"
