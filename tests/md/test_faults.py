"""What goes wrong in simulations: each fault against one rank that looks at every step, or against ASE."""

import errno
import os
import re
import resource
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.io import read
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet

from gnnmd.md import NVE, Limits, Simulation, SimulationError, StochasticCell, shards
from gnnmd.md.engine import MARGIN, Engine
from gnnmd.md.restart import read_atoms
from gnnmd.md.state import State
from gnnmd.models.emt import emt
from gnnmd.parallel import Plan, RankFailure, build_plan
from tests.md.jobs import SmallFiles, breaking, unit_on
from tests.md.test_restart import start


def warm(atoms: Atoms, temperature: float, seed: int = 0) -> Atoms:
    thermalize_momenta(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    return atoms


def by_ase(atoms: Atoms, timestep: float, steps: int) -> Atoms:
    """Return the end of ASE's own dynamics, with ASE's own potential and neighbours of every step."""
    atoms = atoms.copy()
    atoms.calc = EMT(asap_cutoff=False)
    VelocityVerlet(atoms, timestep * units.fs).run(steps)
    return atoms


@dataclass
class End:
    """How a simulation ended on a rank."""

    positions: np.ndarray
    momenta: np.ndarray
    rebuilds: int
    repeated: int
    owned: list[int]  # atoms of each rank
    moved: int  # atoms that have another owner than at first


def simulated(group, atoms: Atoms, steps: int, integrator=None, **options) -> End:
    options = {"temperature": 0, "limits": Limits(temperature=1e6), **options}
    simulation = Simulation(atoms, unit_on(group), integrator or NVE(timestep=5), **options)
    before = owners(simulation)
    simulation.run(steps)
    after, end, counters = owners(simulation), simulation.atoms, simulation.counters
    size = 1 if group is None else group.size()
    return End(
        end.positions,
        end.get_momenta(),
        counters.rebuilds,
        counters.repeated,
        torch.bincount(after, minlength=size).tolist(),
        int((before != after).sum()),
    )


def owners(simulation: Simulation) -> torch.Tensor:
    return simulation._unit.on_ranks(_owners, simulation._handle)


def _owners(share, handle: int) -> torch.Tensor:
    from gnnmd.md.handles import _loops

    plan = _loops[handle].engine.plan
    return plan.gather_owned(torch.full((plan.gp.n_owned,), share.ranks.rank))


def assert_as_in_ase(pool, n: int, atoms: Atoms, timestep: float, steps: int, **options) -> End:
    expected = by_ase(atoms, timestep, steps)
    ends = pool.run(n, simulated_with, atoms, steps, timestep, options)
    for end in ends:
        np.testing.assert_allclose(end.positions, expected.positions, rtol=0, atol=1e-9)
        np.testing.assert_allclose(end.momenta, expected.get_momenta(), rtol=0, atol=1e-9)
    return ends[0]


def simulated_with(group, atoms: Atoms, steps: int, timestep: float, options: dict) -> End:
    with pytest.MonkeyPatch.context() as patch:
        if options.pop("partition_always", False):
            patch.setattr("gnnmd.parallel.plan.REPARTITION", 0.0)
        patch.setattr("gnnmd.md.engine.MARGIN", options.pop("margin", MARGIN))
        return simulated(group, atoms, steps, NVE(timestep=timestep), **options)


# --- motion
# ------------------------------------------------------------------------------------------------------


def test_atoms_that_cross_ranks_at_every_rebuild_arrive(pool):
    """Two halves of a crystal fly past each other around the box; the plan is rebuilt at every step."""
    atoms = warm(bulk("Ag", cubic=True) * (2, 2, 4), 300)
    flight = np.where(atoms.positions[:, :1] < atoms.cell[0, 0] / 2 - 0.1, 0.08, -0.08) / units.fs
    atoms.set_velocities(atoms.get_velocities() + flight * [0, 0, 1])
    end = assert_as_in_ase(pool, 2, atoms, 5, 15, skin=0.1, partition_always=True)
    assert end.rebuilds == 15
    assert end.moved > len(atoms) / 4


def test_a_projectile_crosses_the_box(pool):
    """Readings that allow for the fastest atom find it in time."""
    atoms = warm(bulk("Ag", cubic=True) * (2, 2, 4), 300)
    del atoms[[a.index for a in atoms if abs(a.position[0]) < 0.1 and abs(a.position[1]) < 0.1]]
    atoms += Atoms("Ag", [[0.0, 0.0, 1.0]], velocities=[[0, 0, 0.11 / units.fs]])
    end = assert_as_in_ase(pool, 2, atoms, 2, 100, skin=0.5)
    assert (end.positions - atoms.positions)[-1, 2] > atoms.cell[2, 2]


def test_atoms_that_are_suddenly_faster_than_foreseen_miss_no_neighbour(pool):
    """Two atoms at rest that repel each other, foreseen badly: steps since the last reading come again."""
    atoms = Atoms("Ag2", [[0, 0, 0], [1.7, 0, 0]]) + Atoms("Ag", [[9.0, 0.5, 0]])
    end = assert_as_in_ase(pool, 2, atoms, 2.0, 100, skin=1.0, margin=10.0)
    assert end.repeated > 0
    assert np.abs(end.positions - atoms.positions).max() > 5


def test_a_slab_evaporates_into_vacuum(pool):
    atoms = warm(fcc111("Ag", (3, 3, 4), vacuum=6.0, periodic=True), 30_000)
    end = assert_as_in_ase(pool, 3, atoms, 2.5, 200)
    z = end.positions[:, 2]
    assert z.max() - z.min() > atoms.cell[2, 2]  # some have left the cell
    assert min(end.owned) > 0


def test_an_atom_leaves_a_box_without_periodicity(pool):
    atoms = warm(bulk("Ag", cubic=True) * (2, 2, 2), 300)
    atoms.pbc = False
    velocities = atoms.get_velocities()
    velocities[5] = [-0.6 / units.fs, 0.1 / units.fs, 0]
    atoms.set_velocities(velocities)
    end = assert_as_in_ase(pool, 2, atoms, 2, 80)
    assert np.linalg.norm(end.positions[5]) > 80
    assert sum(end.owned) == len(atoms)


# --- few atoms, many ranks
# ---------------------------------------------------------------------------------------


def test_more_ranks_than_atoms(pool):
    atoms = warm(Atoms("Ag3", [[0, 0, 0], [2.7, 0, 0], [0, 2.7, 0]]), 300)
    end = assert_as_in_ase(pool, 5, atoms, 4, 40)
    assert end.owned.count(0) >= 2


def test_all_atoms_on_one_rank_of_two(pool):
    atoms = Atoms("Ag", cell=[20, 20, 20], pbc=True, velocities=[[0.01 / units.fs, 0, 0]])
    end = assert_as_in_ase(pool, 2, atoms, 4, 60, skin=0.1)
    assert sorted(end.owned) == [0, 1]


# --- the cell
# --------------------------------------------------------------------------------------------------------


def squeezed(group, atoms: Atoms) -> tuple[Atoms, int]:
    press = StochasticCell(
        timestep=4, temperature=1, pressure=100, pressure_time_constant=50, cell="flexible"
    )
    simulation = Simulation(atoms, unit_on(group), press, skin=0.3).run(40)
    return simulation.atoms, simulation.counters.rebuilds


def test_a_cell_shrinks_below_two_cutoffs_at_constant_pressure(pool):
    atoms = warm(bulk("Ag", cubic=True) * (3, 3, 3), 1)  # so that nothing else uses up the skin
    (two, rebuilds), (one, _) = pool.run(2, squeezed, atoms)[0], squeezed(None, atoms)
    assert atoms.cell[0, 0] > 2 * emt().r_cut > 1.02 * two.cell[0, 0]
    assert rebuilds >= 1
    np.testing.assert_allclose(two.positions, one.positions, rtol=0, atol=1e-10)
    for end in (one, two):
        fresh = end.copy()
        fresh.calc = EMT(asap_cutoff=False)
        np.testing.assert_allclose(end.get_forces(), fresh.get_forces(), rtol=0, atol=1e-9)
        assert end.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-9)


# --- simulations that lose their meaning
# -------------------------------------------------------------------------


def broken(group, folder: str, interval: int) -> dict[str, object]:
    """Run until atom 5, of one rank, has no forces any more."""
    atoms = warm(bulk("Ag", cubic=True) * (2, 2, 4), 10)
    atoms.positions[5, 0] = 12.0
    velocities = np.zeros((64, 3))
    velocities[5, 0] = 0.01 / units.fs
    atoms.set_velocities(velocities)
    atoms.pbc = False
    unit = unit_on(group, breaking(12.5))
    simulation = Simulation(atoms, unit, NVE(timestep=5), skin=0.5, restart=folder, restart_interval=interval)
    with pytest.raises(SimulationError) as error:
        simulation.run(100)
    return {"message": str(error.value), "notes": error.value.__notes__, "step": simulation.step}


@pytest.mark.parametrize(("n", "interval"), [(1, 3), (3, 1)])
def test_forces_that_are_not_finite_stop_every_rank_and_are_never_kept(pool, tmp_path, n, interval):
    found = pool.run(n, broken, str(tmp_path / "r"), interval)
    assert all(f == found[0] for f in found)
    message, (note,) = found[0]["message"], found[0]["notes"]
    assert "positions, velocities or forces of atoms 5 are not finite" in message
    step = int(re.search(r"at step (\d+) ", message)[1])
    assert re.match(rf"rank \d of {n} failed while looking at step {step}", message)
    (kept,) = (tmp_path / "r").glob("stopped-step-*")
    assert f"is in {kept}: look at atoms.extxyz there" in note
    good = [*(shards.step_folder(tmp_path / "r", s) for s in shards.steps_in(tmp_path / "r")), kept]
    assert len(good) == 3
    for path in good:
        seen = read_atoms(path)  # ends with the kept one
        assert np.isfinite([seen.positions, seen.get_momenta(), seen.get_forces()]).all()
        assert seen.positions[5, 0] <= 12.5
    assert step - int(kept.name.split("-")[-1]) <= 5
    picture = read(kept / "atoms.extxyz")
    np.testing.assert_allclose(picture.positions, seen.positions, atol=1e-7)
    np.testing.assert_allclose(picture.get_forces(), seen.get_forces(), atol=1e-7)
    on = Simulation.resume(kept, unit_on(None), new_potential=True)
    assert on.run(20).step == int(kept.name.split("-")[-1]) + 20


LIMITS = {
    r"the temperature is \d+ K, above 250 K; the fastest atom is \d+ \(on rank [01]\)": (
        0.15,
        0,
        250.0,
        10.0,
    ),
    r"the potential energy has fallen by 0.\d\d eV per atom .* on atom \d+ \(on rank [01]\)": (
        0.15,
        0,
        1e4,
        0.02,
    ),
    r"the potential energy has risen by 0.\d\d eV per atom .* on atom \d+ \(on rank [01]\)": (
        0.0,
        900,
        1e4,
        0.02,
    ),
}


def beyond_limits(group, folder: str, rattled: float, start: float, temperature: float, energy: float):
    atoms = bulk("Ag", cubic=True) * (4, 2, 2)
    atoms.rattle(rattled, seed=1)
    limits = Limits(temperature, energy)
    options = {"temperature": start, "limits": limits, "restart": folder, "skin": 0.5}
    simulation = Simulation(atoms, unit_on(group), NVE(timestep=5), **options)
    with pytest.raises(SimulationError) as error:
        simulation.run(200)
    return str(error.value), error.value.__notes__


@pytest.mark.parametrize("message", LIMITS, ids=["hot", "fallen", "risen"])
def test_limits_stop_every_rank(pool, tmp_path, message):
    found = pool.run(2, beyond_limits, str(tmp_path), *LIMITS[message])
    assert found[0] == found[1]
    assert re.match(rf"at step \d+ {message}", found[0][0])
    (kept,) = tmp_path.glob("stopped-step-*")
    assert str(kept) in found[0][1][0]
    on = Simulation.resume(kept, unit_on(None), limits=Limits())
    assert on.step < int(re.search(r"\d+", found[0][0])[0])
    assert on.run(50).step > 50


def test_atoms_that_overlap_at_the_start_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atoms = bulk("Ag", cubic=True) * (2, 2, 2)
    atoms.positions[9] = atoms.positions[20] + [0.5, 0, 0]
    with pytest.raises(
        SimulationError, match="step . the temperature is .* the fastest atom is (9|20) .*FIRE"
    ):
        Simulation(atoms, unit_on(None), NVE(timestep=2), temperature=0).run(50)
    atoms.positions[9] = atoms.positions[20]
    with pytest.raises(SimulationError, match="atoms 9 and 20 are 0.0e.00 A from each other"):
        Simulation(atoms, unit_on(None), NVE(timestep=2), temperature=0)


def losing(group, folder: str, lost: int) -> tuple[str, list[str]]:
    """Run with plans that lose an atom when they are rebuilt."""
    rebuild = Plan.rebuild

    def without(plan, positions, cell, carried, skin=None):
        plan = rebuild(plan, positions, cell, carried, skin=skin)
        kept = plan.ids[: plan.gp.n_owned] != lost
        piece = replace(
            plan._batch,
            positions=plan.positions[kept],
            numbers=plan.graph.numbers[: len(kept)][kept],
            system=plan.graph.system[: len(kept)][kept],
            forces=plan.positions[kept],
        )
        columns = tuple(column[kept] for column in plan.carried)
        ids = plan.ids[: len(kept)][kept]
        return build_plan(piece, ids, plan.r_cut, plan.ranks, carried=columns, skin=plan.skin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "rebuild", without)
        simulation = start(group, restart=folder)
        with pytest.raises(SimulationError) as error:
            simulation.run(60)
    return str(error.value), error.value.__notes__


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        # the ids of the others are still 0, 1, ..., each once
        (143, r"there are 143 atoms of 144: atoms 143 were lost, of ranks \[[01]\]"),
        (40, r"the plan could not be rebuilt: the ids of the 143 atoms .* missing .*: 40 \(0 times\)"),
    ],
)
def test_atoms_that_a_rebuild_loses_are_named_on_every_rank(pool, tmp_path, lost, message):
    for error, (note,) in pool.run(2, losing, str(tmp_path), lost):
        assert re.match(rf"at step \d+ {message}", error)
        (kept,) = tmp_path.glob("stopped-step-*")
        assert str(kept) in note
    assert len(read_atoms(kept)) == 144


# --- disks
# -----------------------------------------------------------------------------------------------------------


def run_into_a_full_disk(group, folder: str) -> tuple[str, list[str], int]:
    simulation = start(group, reporters=[SmallFiles(25, rank=1)], restart=folder, restart_interval=20)
    try:
        with pytest.raises(RankFailure) as error:
            simulation.run(100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    going_on = Simulation.resume(folder, unit_on(group))
    step = going_on.step
    return str(error.value), error.value.__notes__, step, going_on.run(5).step


def test_a_full_disk_of_one_rank_stops_all_and_older_restarts_stay(pool, tmp_path):
    for message, notes, step, end in pool.run(2, run_into_a_full_disk, str(tmp_path / "r")):
        assert "rank 1 of 2 failed while writing" in message
        assert str(tmp_path / "r" / "step-000000000040") in message
        assert "File too large" in message
        assert "see to space and permissions there, then go on with Simulation.resume" in message
        assert "could not be kept" in notes[0]
        assert (step, end) == (20, 25)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["step-000000000020", "step-000000000025"]


def test_no_space_left_is_told_with_the_place(tmp_path, monkeypatch):
    simulation = start(None, restart=tmp_path / "r", restart_interval=20).run(10)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match="step-000000000020 could not be written: .*No space left on device"
        ):
            simulation.run(20)
    assert Simulation.resume(Path(tmp_path / "r"), unit_on(None)).step == 10


# --- half a step
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_a_run_that_ended_within_a_step_goes_on_from_the_last_reading(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, simulation = start(None).run(40), start(None)
    ended_at, call = [], Engine.call

    def failing(engine: Engine, s: State, **options: bool) -> None:
        if engine.counters.evaluations % 4 == 3:
            engine.counters.evaluations += 1
            ended_at.append(engine.plan)
            raise kind
        call(engine, s, **options)

    monkeypatch.setattr(Engine, "call", failing)
    while simulation.step < 40:
        with suppress(kind):
            simulation.run(40 - simulation.step)
    monkeypatch.undo()
    assert len(ended_at) > len({id(plan) for plan in ended_at}) > 2  # some were new, some were not
    np.testing.assert_allclose(simulation.atoms.positions, whole.atoms.positions, rtol=0, atol=1e-11)
    assert simulation.counters.repeated == 0
