"""What a restart keeps of a simulation, and how a simulation goes on from it.

A restart also keeps how the plan stood, so that a run on the same number of ranks of a CPU goes on to the
last bit as if it had not been interrupted. On another number the atoms are partitioned anew.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from gnnmd.graph import AtomBatch
from gnnmd.md import shards
from gnnmd.md.engine import KEPT, Counters, Engine
from gnnmd.md.reporters import Reporter
from gnnmd.md.reporters.frames import fixed_atoms
from gnnmd.md.setup import Setup
from gnnmd.md.shards import Shards
from gnnmd.md.state import State
from gnnmd.parallel import Ranks
from gnnmd.predict.checkpoint import checksum
from gnnmd.predict.evaluation import RankPotential

#: Per-atom columns of a `State` that a restart keeps besides ``columns``.
_ROWS = ("ids", "numbers", "masses", "positions", "velocities", "forces", "mobile")
_COLUMN, _VARIABLE, _REPORTER = "columns.", "variables.", "reporters."


def write(
    path: Path,
    s: State,
    engine: Engine,
    setup: Setup,
    potential: dict[str, Any],
    reporters: list[dict[str, Tensor]],
    *,
    with_plan: bool = True,
) -> None:
    """Write a restart; collective.

    Args:
        path: its folder.
        s: the state at a step that was looked at and found good.
        engine: what moves it.
        setup: the rest of the simulation.
        potential: `fingerprint` of the potential.
        reporters: what each of ``setup.reporters`` has found.
        with_plan: whether the plan of the engine is that of the state, and to be kept.

    Raises:
        OSError, RankFailure: it cannot be written; says where and why.
    """
    batch, plan = engine.system, engine.plan
    known = {
        "step": s.step,
        "n_atoms": engine.n_atoms,
        "cell": s.cell.tolist(),
        "pbc": s.pbc.tolist(),
        "charge": int(batch.charge[0]),
        "spin": int(batch.spin[0]),
        "dataset": batch.dataset[0],
        "energy": float(s.energy),
        "stress": s.stress.tolist(),
        "first_energy": engine.first_energy,
        "counters": asdict(engine.counters),
        "plan": {
            "r_cut": plan.r_cut,
            "skin": plan.skin,
            "next_skin": engine.next_skin,
            "tunes": engine.tunes,
            "evaluation": engine.evaluation.how,
            "choices": engine.evaluation.choices,
        },
        "potential": potential,
        "setup": setup.kept(),
        "reporters": [type(reporter).__name__ for reporter in setup.reporters],
    }
    shared = {_VARIABLE + name: value for name, value in s.variables.items()}
    for i, saved in enumerate(reporters):
        shared |= {f"{_REPORTER}{i}.{name}": value for name, value in saved.items()}
    rows = {name: getattr(s, name) for name in _ROWS}
    rows |= {_COLUMN + name: value for name, value in s.columns.items()}
    shards.write(path, engine.ranks, known, shared, rows, plan.saved() if with_plan else {})


def piece(kept: Shards) -> tuple[AtomBatch, Tensor, dict[str, Tensor]]:
    """Return the atoms that this rank holds at first, their global numbers and their columns, on the CPU."""
    known, rows = kept.known, dict(kept.rows)
    n = len(rows["ids"])
    none = torch.tensor(torch.nan, dtype=torch.float64)
    batch = AtomBatch(
        positions=rows["positions"],
        numbers=rows["numbers"],
        system=torch.zeros(n, dtype=torch.int64),
        cell=_float64(known["cell"])[None],
        pbc=torch.tensor(known["pbc"])[None],
        charge=torch.tensor([known["charge"]]),
        spin=torch.tensor([known["spin"]]),
        dataset=(known["dataset"],),
        energy=none.expand(1),
        forces=none.expand(n, 3),
        stress=none.expand(1, 3, 3),
    )
    columns = {name: rows[name] for name in ("velocities", "masses", "mobile")}
    columns |= dict(zip(KEPT, (rows["positions"], rows["forces"]), strict=True))
    columns |= {name.removeprefix(_COLUMN): rows[name] for name in rows if name.startswith(_COLUMN)}
    return batch, rows["ids"], columns


def state(kept: Shards, engine: Engine) -> State:
    """Return the state of a restart, in an engine that was given its `piece`."""
    known = kept.known
    s = engine.resume(
        known["step"],
        _float64(known["cell"]),
        _float64(known["energy"]),
        _float64(known["stress"]),
        known["first_energy"],
    )
    device = s.positions.device
    s.variables = {
        name.removeprefix(_VARIABLE): value.to(device)
        for name, value in kept.shared.items()
        if name.startswith(_VARIABLE)
    }
    engine.counters = Counters(**{**known["counters"], "skin": engine.plan.skin})
    return s


def standing_plan(kept: Shards, setup: Setup, r_cut: float) -> dict[str, Any] | None:
    """Return what is known of the plan of a restart, if it is one that these ranks would go on with."""
    known = kept.known
    same = all(known["setup"][name] == getattr(setup, name) for name in ("skin", "partition", "headroom"))
    return known["plan"] if kept.plan and same and known["plan"]["r_cut"] == r_cut else None


def restore_reporters(kept: Shards, reporters: tuple[Reporter, ...]) -> None:
    """Give reporters back what those of their class had found; the first of a class what the first had."""
    names = list(kept.known["reporters"])
    for reporter in reporters:
        name = type(reporter).__name__
        if name in names:
            i = names.index(name)
            names[i] = ""
            mine = f"{_REPORTER}{i}."
            found = {
                key.removeprefix(mine): value for key, value in kept.shared.items() if key.startswith(mine)
            }
            if found:
                reporter.restore(found)


def fingerprint(share: RankPotential) -> dict[str, Any]:
    """Return what tells a potential from others: its weights, as they are evaluated. Collective."""
    weights: dict[str, Any] = {}
    if share.ranks.rank == 0:
        tensors = {k: v.detach().cpu().contiguous() for k, v in share.potential.state_dict().items()}
        weights = {
            "checksum": checksum(tensors),
            "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
            "r_cut": float(share.potential.r_cut),
        }
    return share.ranks.from_first(weights)


def check_potential(kept: Shards, found: dict[str, Any]) -> None:
    """Refuse to go on with another potential than that of the restart.

    Raises:
        ValueError: with both.
    """
    if kept.known["potential"] != found:
        raise ValueError(
            f"{kept.path} was written with another potential, {kept.known['potential']}, than the one it "
            f"shall go on with, {found}. Take the same checkpoint and dtype, or call Simulation.resume "
            "with new_potential=True if that is what you want"
        )


def read_atoms(path: str | Path) -> Atoms:
    """Return the atoms of a restart, with fixed atoms, momenta, energy and forces, to look at.

    Args:
        path: a folder of restarts (the newest good one is taken) or one of them.

    Raises:
        FileNotFoundError, ValueError: see `shards.find`.
    """
    found, _ = shards.find(Path(path), Ranks())
    kept = shards.read(found, Ranks())
    order = torch.argsort(kept.rows["ids"])
    rows = {name: kept.rows[name][order].numpy() for name in _ROWS}
    atoms = Atoms(
        rows["numbers"], rows["positions"], cell=kept.known["cell"], pbc=kept.known["pbc"], info=info(kept)
    )
    atoms.set_masses(rows["masses"])
    atoms.set_momenta(rows["velocities"] * rows["masses"][:, None])
    atoms.set_constraint(fixed_atoms(rows["mobile"]))
    atoms.calc = SinglePointCalculator(atoms, energy=kept.known["energy"], forces=rows["forces"])
    return atoms


def info(kept: Shards) -> dict[str, Any]:
    """Return charge, spin and dataset as ``atoms.info`` holds them."""
    return {name: kept.known[name] for name in ("charge", "spin", "dataset") if kept.known[name]}


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
