"""The simulations of which this process holds atoms, by the handle that their caller knows them by."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md import restart, shards
from gnnmd.md.integrators import Integrator
from gnnmd.md.loop import Loop, Progress
from gnnmd.md.setup import Setup
from gnnmd.parallel import share_of
from gnnmd.predict.evaluation import RankPotential

_loops: dict[int, Loop] = {}


@dataclass(frozen=True)
class Resumed:
    """What the caller hears of a simulation that goes on from a restart.

    Attributes:
        progress: where it stands.
        integrator: the equations of motion.
        info: charge, spin and dataset, as in ``atoms.info``.
        faults: why newer restarts were not taken.
    """

    progress: Progress
    integrator: Integrator
    info: dict[str, Any]
    faults: list[str]


def start(share: RankPotential, setup: Setup, batch: AtomBatch, columns: dict[str, Tensor]) -> Loop:
    """Return this rank's part in a new simulation of atoms that every rank was given. Collective.

    Args:
        share: potential and ranks.
        setup: the simulation.
        batch: the system.
        columns: ``velocities``, ``masses`` and ``mobile`` of all its atoms (see `State`).
    """
    share.potential.dataset_index(batch)  # refuses what the potential cannot describe, on every rank
    piece, ids = share_of(batch, share.ranks)
    return Loop(share, setup, piece, ids, {name: column[ids] for name, column in columns.items()})


def begin(
    share: RankPotential, handle: int, setup: Setup, batch: AtomBatch, columns: dict[str, Tensor]
) -> None:
    """Take this rank's part in a new simulation. Collective.

    Raises:
        FileExistsError, RankFailure: there are restarts already where it shall write its own.
    """
    with share.ranks.together("looking for restarts"):
        if setup.restart is not None and share.ranks.rank == 0 and shards.steps_in(setup.restart):
            raise FileExistsError(
                f"{setup.restart} holds the restarts of another simulation, which this one would replace: go "
                "on from them with Simulation.resume, choose another folder, or remove it"
            )
    _loops[handle] = start(share, setup, batch, columns)


def resume(
    share: RankPotential, handle: int, folder: Path, changes: Mapping[str, Any], new_potential: bool
) -> Resumed:
    """Take this rank's part in a simulation that goes on from a restart. Collective.

    Args:
        share: potential and ranks.
        handle: by which the caller will know it.
        folder: of restarts, or one of them.
        changes: fields of `Setup` that are not those of the restart.
        new_potential: whether the potential need not be that of the restart.

    Raises:
        FileNotFoundError, ValueError, RankFailure: there is no restart that can be used; says why.
    """
    path, faults = shards.find(folder, share.ranks)
    kept = shards.read(path, share.ranks)
    setup = Setup.resumed(kept.known["setup"], {"restart": path.parent, **changes})
    loop = Loop(share, setup, *restart.piece(kept), kept=kept, new_potential=new_potential)
    _loops[handle] = loop
    return Resumed(loop.progress([]), loop.integrator, restart.info(kept), faults)


def call(share: RankPotential, handle: int, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of this rank's `Loop`. Collective."""
    return getattr(_loops[handle], method)(*args, **kwargs)


def forget(share: RankPotential, handle: int) -> None:
    """Let go of a simulation."""
    drop(handle)


def drop(handle: int) -> None:
    """Let go of a simulation here: it holds the process group, which must be gone before Python ends."""
    _loops.pop(handle, None)
