"""Simulations with EMT on the ranks of the tests' pool, without the caller's side."""

from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk

from gnnmd.graph import AtomBatch
from gnnmd.md.guards import Limits
from gnnmd.md.handles import start
from gnnmd.md.integrators import NVE, Integrator
from gnnmd.md.loop import Loop
from gnnmd.md.reporters import Reporter
from gnnmd.md.setup import Setup
from gnnmd.md.simulation import _drawn
from gnnmd.models.emt import emt
from gnnmd.parallel import Ranks
from gnnmd.predict.evaluation import RankPotential, frozen_copy
from gnnmd.predict.settings import InferenceSettings

SETTINGS = InferenceSettings(dtype="float64")
CPU = torch.device("cpu")
#: NVE at 5 fs: atoms of a hot crystal change ranks.
DYNAMICS = NVE(timestep=5.0)


def alloy() -> Atoms:
    """A hot crystal of silver and copper that is longer than two cutoffs, in an oblique cell."""
    atoms = bulk("Ag", cubic=True) * (2, 2, 5)
    atoms.numbers[::3] = 29
    atoms.set_cell(atoms.cell.array + [[0, 0.3, 0], [0, 0, -0.2], [0.4, 0, 0]], scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def loop_of(
    group: Any,
    atoms: Atoms,
    reporters: Sequence[Reporter],
    *,
    integrator: Integrator = DYNAMICS,
    columns: dict[str, torch.Tensor] | None = None,
    step: int = 0,
    temperature: float = 1500.0,
    partition: str = "auto",
) -> Loop:
    """Return this rank's part of a simulation that begins at ``step``, with EMT."""
    masses, mobile = torch.tensor(atoms.get_masses()), torch.ones(len(atoms), 1, dtype=torch.float64)
    velocities = _drawn(masses, mobile, temperature, seed=3) + torch.tensor([0.005, 0.0, 0.01])  # drift
    known = {"velocities": velocities, "masses": masses, "mobile": mobile, **(columns or {})}
    setup = Setup(
        integrator=integrator,
        reporters=reporters,
        skin=0.3,
        seed=0,
        limits=Limits(),
        partition=partition,
    )
    share = RankPotential(frozen_copy(emt(), CPU, SETTINGS), SETTINGS, Ranks(group), CPU)
    loop = start(share, setup, AtomBatch.from_ase(atoms), known)
    loop.state.step = step
    return loop


def run(
    group: Any,
    atoms: Atoms,
    reporters: Sequence[Reporter],
    runs: Sequence[int],
    **how: Any,
) -> tuple[list[dict[str, torch.Tensor]], list[tuple[int, dict[str, Any]]], Loop]:
    """Make runs that end at given steps; return what reporters saved, the rows they told, and the loop."""
    loop, rows = loop_of(group, atoms, reporters, **how), []
    for last in runs:
        rows += loop.begin_run(last).rows
        rows += loop.advance(last).rows
        saved, _ = loop.end_run()
    return saved, rows, loop


def run_on_pool(
    group: Any,
    atoms: Atoms,
    reporters: Sequence[Reporter],
    runs: Sequence[int],
    how: Any,
) -> Any:
    """Run and return what can be sent back: saved, rows, the largest number of rebuilds, atoms per rank."""
    saved, rows, loop = run(group, atoms, reporters, runs, **how)
    return saved, rows, loop.engine.counters.rebuilds, loop.state.ids.tolist()
