import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms

from gnnmd import PredictUnit
from gnnmd.md import NVE, Langevin, Ramp, Simulation, loop, shards
from gnnmd.md.evaluation import Evaluation
from gnnmd.md.restart import read_atoms
from gnnmd.md.setup import from_plain, to_plain
from gnnmd.models.potential import Potential
from tests.lennard_jones import FirstFeature, LennardJones
from tests.md.jobs import EXACT, Lines, Squares, Stop, unit_on

HOT = Langevin(timestep=5, temperature=Ramp(300, 1500, 100), friction=0.02)


def crystal() -> Atoms:
    atoms = bulk("Ag", cubic=True) * (4, 3, 3)
    atoms.set_constraint(FixAtoms([7]))
    return atoms


def start(group, **options) -> Simulation:
    return Simulation(crystal(), unit_on(group), HOT, seed=3, skin=0.5, **options)


def bits(simulation: Simulation) -> dict[str, object]:
    end = simulation.atoms
    arrays = {"x": end.positions, "v": end.get_momenta(), "f": end.get_forces(), "c": end.cell.array}
    return {name: array.tobytes() for name, array in arrays.items()} | simulation.scalars()


def stopped(simulation: Simulation, steps: int) -> None:
    with pytest.raises(SystemExit) as end:
        simulation.run(steps)
    assert end.value.code == 128 + signal.SIGTERM


# --- the same number of ranks
# ------------------------------------------------------------------------------------


def interrupted(group, folder: str, at: int, skin: float | None = 0.5) -> dict[str, tuple]:
    """Run 60 steps at once, and with a restart in between; return what is found, both times."""
    whole, again, unit = Squares(), Squares(), unit_on(group)
    never = 1_000_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnnmd.md.loop.cheapest", lambda *_: ("compact", 0.4))  # whatever the clock says
        options = {"seed": 3, "skin": skin}
        uninterrupted = Simulation(crystal(), unit, HOT, reporters=[whole, Stop(never)], **options).run(60)
        reporters = [Squares(), Stop(at, rank=1)]
        first = Simulation(crystal(), unit, HOT, reporters=reporters, restart=folder, **options)
        stopped(first, 60)
        resumed = Simulation.resume(folder, unit, reporters=[again, Stop(never)])
        at_restart = bits(first), bits(resumed)
        resumed.run(60 - at)
    return {
        "step": (first.step, at),
        "restart": at_restart,
        "end": (bits(uninterrupted), bits(resumed)),
        "steps": (whole.steps, again.steps),
        "total": (float(whole.total), float(again.total)),
        "rebuilds": (uninterrupted.counters.rebuilds, resumed.counters.rebuilds),
    }


@pytest.mark.parametrize(("at", "skin"), [(1, 0.5), (31, 0.5), (44, 0.5), (30, None), (44, None)])
def test_the_same_ranks_go_on_to_the_last_bit(pool, tmp_path, at, skin):
    for found in pool.run(2, interrupted, str(tmp_path / "r"), at, skin):
        for name, (one, two) in found.items():
            assert one == two, name
        assert found["rebuilds"][0] > 3
        assert found["steps"][0] == list(range(0, 61, 4))


def test_a_plan_that_is_not_kept_shows_in_the_last_bits(pool, tmp_path):
    """The comparison above can fail: without the plan the order of sums is another one."""
    found = pool.run(2, interrupted_without_plan, str(tmp_path / "r"))[0]
    one, two = found["end"]
    assert one != two
    assert one["potential_energy"] == pytest.approx(two["potential_energy"], abs=1e-8)


read = shards.read


def interrupted_without_plan(group, folder: str) -> dict[str, tuple]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "read", lambda *args: replace(read(*args), plan={}))
        return interrupted(group, folder, 31)


# --- other numbers of ranks
# --------------------------------------------------------------------------------------


def ends_of(group, folder: str, how: str) -> tuple[np.ndarray, list[int], float]:
    squares = Squares()
    if how == "begin":
        simulation = start(group, reporters=[squares], restart=folder).run(32)
    elif how == "go on":
        simulation = Simulation.resume(folder, unit_on(group), reporters=[squares]).run(28)
    else:
        simulation = start(group, reporters=[squares]).run(32).run(28)
    return simulation.atoms.positions, squares.steps, float(squares.total)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 4), (4, 1)])
def test_other_numbers_of_ranks_go_on_to_rounding(pool, tmp_path, before, after):
    pool.run(before, ends_of, str(tmp_path / "r"), "begin")
    x, steps, total = pool.run(after, ends_of, str(tmp_path / "r"), "go on")[0]
    whole_x, whole_steps, whole_total = ends_of(None, "", "whole")
    np.testing.assert_allclose(x, whole_x, rtol=0, atol=1e-10)
    assert np.abs(x - crystal().positions).max() > 0.2
    assert steps == whole_steps
    assert total == pytest.approx(whole_total, rel=1e-10)


def test_more_ranks_than_atoms_read_a_restart(pool, tmp_path):
    pool.run(4, few_atoms, str(tmp_path / "r"), "begin")
    found = pool.run(5, few_atoms, str(tmp_path / "r"), "go on")
    np.testing.assert_allclose(found[0], few_atoms(None, "", "whole"), rtol=0, atol=1e-12)


def few_atoms(group, folder: str, how: str) -> np.ndarray:
    atoms = Atoms("Ag3", [[0, 0, 0], [2.6, 0, 0], [0, 2.7, 0]])
    if how == "go on":
        return Simulation.resume(folder, unit_on(group)).run(10).atoms.positions
    options = {"restart": folder} if how == "begin" else {}
    simulation = Simulation(atoms, unit_on(group), NVE(timestep=2), temperature=300, **options).run(10)
    return simulation.atoms.positions if how == "begin" else simulation.run(10).atoms.positions


# --- changes on purpose, and those that are refused
# --------------------------------------------------------------


def test_everything_comes_from_the_restart_unless_it_is_changed(tmp_path):
    atoms = crystal()
    atoms.info.update(charge=1, spin=2)
    unit = unit_on(None)
    Simulation(atoms, unit, HOT, seed=5, skin=0.7, restart=tmp_path / "r", restart_interval=7, keep=3).run(20)
    assert shards.steps_in(tmp_path / "r") == [7, 14, 20]
    simulation = Simulation.resume(tmp_path / "r", unit)
    assert (simulation.step, simulation.integrator) == (20, HOT)
    assert simulation.atoms.info == {"charge": 1, "spin": 2}
    assert simulation.run(5).step == 25
    assert shards.steps_in(tmp_path / "r") == [20, 21, 25]
    colder = Langevin(timestep=1, temperature=10)
    other = Simulation.resume(tmp_path / "r", unit, integrator=colder, keep=1, skin=0.2)
    assert other.integrator == colder
    other.run(3)
    assert shards.steps_in(tmp_path / "r") == [28]
    assert Simulation.resume(tmp_path / "r", unit).integrator == colder


def test_another_potential_is_refused_unless_it_is_meant(tmp_path):
    simulation = start(None, restart=tmp_path / "r").run(3)
    lj = PredictUnit(Potential(LennardJones(5.0, 0.3, 2.63), {"energy": FirstFeature()}), settings=EXACT)
    with pytest.raises(ValueError, match="another potential"):
        Simulation.resume(tmp_path / "r", lj)
    other = Simulation.resume(tmp_path / "r", lj, new_potential=True)
    np.testing.assert_array_equal(other.atoms.positions, simulation.atoms.positions)
    expected = float(lj.predict(simulation.atoms).energy[0])
    assert other.scalars()["potential_energy"] == pytest.approx(expected, abs=1e-9)
    assert expected != pytest.approx(simulation.scalars()["potential_energy"], abs=1)


def test_a_machine_with_other_choices_chooses_again(tmp_path, monkeypatch):
    """What a CPU found to be the fastest is no reason for a GPU not to try a CUDA graph."""
    options = {"seed": 3, "restart": tmp_path / "r"}
    begun = Simulation(crystal(), unit_on(None), HOT, **options).run(40)
    chosen, known = [], loop.cheapest
    monkeypatch.setattr("gnnmd.md.loop.cheapest", lambda *args: chosen.append(args) or known(*args))
    Simulation.resume(tmp_path / "r", unit_on(None)).run(40)
    assert not chosen

    class Choosing(Evaluation):
        def __init__(self, *args):
            super().__init__(*args)
            self.choices = ("standing", "compact")

    monkeypatch.setattr("gnnmd.md.engine.Evaluation", Choosing)
    again = Simulation.resume(tmp_path / "r", unit_on(None)).run(40)
    assert again.step == begun.step + 80
    assert len(chosen) == 1


def test_a_new_simulation_does_not_replace_the_restarts_of_another(tmp_path):
    start(None, restart=tmp_path / "r").run(3)
    with pytest.raises(FileExistsError, match="another simulation, which this one would replace"):
        start(None, restart=tmp_path / "r")


def test_integrators_are_kept_as_plain_data_of_known_classes():
    assert from_plain(json.loads(json.dumps(to_plain(HOT)))) == HOT
    for name in ("Simulation", "os.system", ""):
        with pytest.raises(ValueError, match="gnnmd.md does not have"):
            from_plain({"class": name, "timestep": 1.0})
    with pytest.raises(ValueError, match="other fields"):
        from_plain({"class": "NVE", "friction": 1.0})
    with pytest.raises(TypeError, match="not Tensor"):
        to_plain((1.0, torch.zeros(2)))


# --- damage
# ------------------------------------------------------------------------------------------------------


def three_restarts(group, folder: str) -> None:
    start(group, restart=folder, restart_interval=10, keep=3).run(30)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda p: os.truncate(p / "rank-000001.safetensors", 500),
    "flipped bit": lambda p: flip(p / "rank-000000.safetensors"),
    "missing": lambda p: (p / "rank-000001.safetensors").unlink(),
    "no description": lambda p: (p / "restart.json").unlink(),
    "edited": lambda p: (p / "restart.json").write_text(
        (p / "restart.json").read_text().replace('"seed": 3', '"seed": 4')
    ),
    "foreign": lambda p: (p / "restart.json").write_text('{"hello": [1, 2]}'),
    "half a description": lambda p: os.truncate(p / "restart.json", 300),
    "shared": lambda p: flip(p / "shared.safetensors"),
}


def resumed_step(group, folders: list[str]) -> list[tuple]:
    found = []
    for folder in folders:
        expected = pytest.warns(UserWarning, match="going on from step 20")
        with expected if group.rank() == 0 else nullcontext():
            simulation = Simulation.resume(folder, unit_on(group), restart_interval=100)
        found.append((simulation.step, shards.steps_in(Path(folder))))
        simulation.run(5)
        found[-1] += (shards.steps_in(Path(folder)),)
    return found


def test_the_newest_good_restart_is_taken_and_the_damaged_one_leaves(pool, tmp_path):
    pool.run(2, three_restarts, str(tmp_path / "r"))
    folders = []
    for name, damage in DAMAGES.items():
        shutil.copytree(tmp_path / "r", tmp_path / name)
        damage(shards.step_folder(tmp_path / name, 30))
        folders.append(str(tmp_path / name))
    for found in pool.run(2, resumed_step, folders):
        assert found == [(20, [10, 20, 30], [10, 20, 25])] * len(DAMAGES)


def test_without_a_good_restart_it_is_said_what_is_wrong_with_each(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no restart"):
        Simulation.resume(tmp_path / "r", unit_on(None))
    three_restarts(None, str(tmp_path / "r"))
    for step in (10, 20, 30):
        flip(shards.step_folder(tmp_path / "r", step) / "rank-000000.safetensors")
    with pytest.raises(ValueError, match="(?s)step-000000000030.*checksum.*step-000000000010.*checksum"):
        Simulation.resume(tmp_path / "r", unit_on(None))


def test_a_later_format_is_refused_with_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FORMAT", shards.FORMAT + 1)
    start(None, restart=tmp_path / "r").run(1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Upgrade gnnmd"):
        Simulation.resume(tmp_path / "r", unit_on(None))


def test_an_interrupted_write_leaves_the_older_ones(tmp_path, monkeypatch):
    three_restarts(None, str(tmp_path / "r"))
    simulation = Simulation.resume(tmp_path / "r", unit_on(None))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_settle", killed)
    with pytest.raises(KeyboardInterrupt):
        simulation.run(3)
    monkeypatch.undo()
    assert shards.steps_in(tmp_path / "r") == [10, 20, 30]
    assert list((tmp_path / "r").glob(".step-*33*"))
    again = Simulation.resume(tmp_path / "r", unit_on(None))
    assert again.step == 30
    again.run(3)
    assert shards.steps_in(tmp_path / "r") == [20, 30, 33]
    assert not list((tmp_path / "r").glob(".*"))


def test_going_back_to_an_earlier_restart_drops_the_later_ones(tmp_path):
    three_restarts(None, str(tmp_path / "r"))
    early = Simulation.resume(shards.step_folder(tmp_path / "r", 10), unit_on(None))
    assert early.step == 10
    early.run(5)
    assert shards.steps_in(tmp_path / "r") == [10, 15]


# --- looking at it, and what reporters wrote
# -----------------------------------------------------------------------


def test_a_restart_can_be_looked_at(tmp_path):
    end = start(None, restart=tmp_path / "r").run(5).atoms
    seen = read_atoms(tmp_path / "r")
    for one, two in ((seen, end), (read_atoms(shards.step_folder(tmp_path / "r", 5)), end)):
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_allclose(one.get_momenta(), two.get_momenta(), rtol=1e-15)
        np.testing.assert_array_equal(one.get_forces(), two.get_forces())
        assert one.get_potential_energy() == two.get_potential_energy()


def test_atoms_of_a_restart_are_fixed_as_they_were(tmp_path):
    atoms = crystal()
    atoms.set_constraint(FixAtoms([1, 7]))
    Simulation(atoms, unit_on(None), HOT, skin=0.5, restart=tmp_path / "r").run(1)
    (held,) = read_atoms(tmp_path / "r").constraints
    assert held.index.tolist() == [1, 7]


def test_lines_are_neither_lost_nor_doubled(tmp_path):
    start(None, reporters=[Lines(tmp_path / "whole")]).run(60)
    options = {"restart": tmp_path / "r", "restart_interval": 10, "keep": 3}
    stopped(start(None, reporters=[Lines(tmp_path / "parts"), Stop(23)], **options), 60)
    again = Simulation.resume(tmp_path / "r", unit_on(None), reporters=[Lines(tmp_path / "parts"), Stop(41)])
    stopped(again, 37)
    # As if it had been killed after step 40: frames are on disk that no restart knows.
    back = Simulation.resume(
        shards.step_folder(tmp_path / "r", 30), unit_on(None), reporters=[Lines(tmp_path / "parts")]
    )
    assert (tmp_path / "parts").read_text().splitlines()[-1].startswith("40 ")
    back.run(30)
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()
