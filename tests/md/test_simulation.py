import numpy as np
import pytest
from ase.build import bulk
from ase.constraints import FixAtoms, FixCom
from ase.stress import full_3x3_to_voigt_6_stress

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.graph import AtomBatch
from gnnmd.md import NVE, Bussi, Langevin, NoseHoover, Simulation
from gnnmd.md.engine import Engine
from gnnmd.md.reporters import Thermo, Trajectory
from gnnmd.md.state import State
from gnnmd.models.emt import emt
from gnnmd.models.escn_md import ExpertsConfig
from gnnmd.models.merge import merged
from tests.models.systems import slab
from tests.models.test_escn_md import escn_md

EXACT = InferenceSettings(dtype="float64")


def crystal():
    return bulk("Ag", cubic=True) * (4, 3, 3)


def unit(workers=None):
    return PredictUnit(emt(), device="cpu", settings=EXACT, workers=workers)


def test_the_trajectory_does_not_depend_on_the_number_of_workers():
    integrator, ends = Langevin(timestep=5, temperature=600), []
    for workers in (None, 2):
        with unit(workers) as u:
            ends.append(Simulation(crystal(), u, integrator, temperature=600).run(30).run(20).atoms)
    one, two = ends
    np.testing.assert_allclose(two.positions, one.positions, rtol=0, atol=1e-11)
    np.testing.assert_allclose(two.get_momenta(), one.get_momenta(), rtol=0, atol=1e-11)
    assert np.abs(one.positions - crystal().positions).max() > 0.1


def test_steps_that_were_looked_at_too_late_are_repeated_and_change_nothing(monkeypatch):
    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 1e9)  # the caller's questions are readings too
    ends = []
    for margin in (0.95, 5.0):
        monkeypatch.setattr("gnnmd.md.engine.MARGIN", margin)
        simulation = Simulation(crystal(), unit(), NVE(timestep=5), temperature=900, skin=0.5).run(60)
        ends.append((simulation.counters, simulation.atoms))
    assert ends[0][0].repeated == 0
    assert ends[1][0].repeated > 0
    np.testing.assert_array_equal(ends[1][1].positions, ends[0][1].positions)


@pytest.mark.parametrize("integrator", [NVE(5), Langevin(5), Bussi(5), NoseHoover(5)])
def test_fixed_atoms_stay_and_others_move(integrator):
    atoms = crystal()
    atoms.set_constraint(FixAtoms([0, 5]))
    end = Simulation(atoms, unit(), integrator, temperature=600, skin=0.5).run(20).atoms
    moved = np.linalg.norm(end.positions - atoms.positions, axis=1)
    assert (moved[[0, 5]] == 0).all()
    assert (np.delete(moved, [0, 5]) > 0).all()
    (still,) = end.constraints  # so that another simulation holds them too
    assert still.index.tolist() == [0, 5]


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="no velocities"):
        Simulation(crystal(), unit(), NVE())
    atoms = crystal()
    atoms.set_constraint(FixCom())
    with pytest.raises(ValueError, match="only FixAtoms"):
        Simulation(atoms, unit(), NVE(), temperature=300)
    atoms.set_constraint(FixAtoms([3, 144]))
    with pytest.raises(ValueError, match="FixAtoms holds atom 144, but there are 144 atoms, 0 to 143"):
        Simulation(atoms, unit(), NVE(), temperature=300)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"temperature": -10.0}, "temperature must be finite and not negative, got -10.0 K"),
        (
            {"masses": 0.0},
            {"temperature": 10.0},
            "the mass of atom 0 must be positive, got 0.0 .144 such atoms",
        ),
        ({"momenta": np.nan}, {}, "the momentum of atom 0 must be finite"),
        ({}, {"integrator": "nvt"}, "the integrator must be one like NVE.timestep=1.0., got 'nvt'"),
        ({}, {"unit": "silver"}, "the unit must be a PredictUnit or a Potential, got 'silver'"),
        ({}, {"reporters": ["thermo"]}, "reporters must be a list of reporters"),
        ({}, {"reporters": [Trajectory("a"), Thermo(path="./a")]}, "2 reporters write .*/a"),
    ],
)
def test_what_means_nothing_is_refused_before_it_is_simulated(change, options, message):
    atoms = crystal()
    for name, value in change.items():
        atoms.set_array(name, np.full((len(atoms), 3) if name == "momenta" else len(atoms), value))
    with pytest.raises((ValueError, TypeError), match=message):
        Simulation(**{"atoms": atoms, "unit": unit(), "integrator": Langevin(), **options})


@pytest.mark.parametrize("steps", [2.5, 10.0, "many"])
def test_steps_are_whole_numbers(steps):
    simulation = Simulation(crystal(), unit(), Langevin())
    with pytest.raises(TypeError, match=f"steps must be a whole number, got {steps!r}"):
        simulation.run(steps)
    assert simulation.run(np.int64(2)).step == 2


def test_processes_that_were_started_together_do_not_write_the_same_files(monkeypatch, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for options in ({"restart": tmp_path / "r"}, {"reporters": [Thermo(path=tmp_path / "a")]}):
        with pytest.raises(ValueError, match=f"2 processes.* write the same {tmp_path}.*workers='auto' or 2"):
            Simulation(crystal(), unit(), Langevin(), **options)
    with pytest.raises(ValueError, match="workers='auto' or 2"):
        Simulation.resume(tmp_path / "r", unit())
    assert not list(tmp_path.iterdir())
    assert Simulation(crystal(), unit(), Langevin(), reporters=[Thermo(path=None)]).run(1).step == 1


def test_the_skin_that_is_found_changes_nothing_but_the_pace():
    ends = []
    for skin in (None, 0.4):
        simulation = Simulation(crystal(), unit(), NVE(timestep=5), temperature=600, skin=skin).run(60)
        ends.append(simulation.atoms.positions)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-11)


def test_the_stress_that_is_asked_for_later_is_that_of_the_current_step():
    looked_at, left_alone = (Simulation(crystal(), unit(), NVE(5), temperature=600, skin=0.5) for _ in "12")
    for simulation in (looked_at, left_alone):
        simulation.run(20)
    stress, pressure = looked_at.atoms.get_stress(), looked_at.scalars()["pressure"]
    end = left_alone.run(20).atoms
    np.testing.assert_array_equal(looked_at.run(20).atoms.positions, end.positions)
    for then, now in ((stress, end.get_stress()), (pressure, left_alone.scalars()["pressure"])):
        assert np.abs(now - then).max() > 1e-5
    np.testing.assert_allclose(end.get_stress(), now_and_here(end), rtol=0, atol=1e-12)


def test_the_stress_of_a_step_that_failed_is_not_that_of_the_state_it_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"temperature": 900, "skin": 0.3, "reporters": [Thermo(path=None, interval=20)]}
    simulation, call = Simulation(crystal(), unit(), NVE(5), **options).run(25), Engine.call

    def failing(engine: Engine, s: State, *, stress: bool = False, exact: bool = True) -> None:
        call(engine, s, stress=stress, exact=exact)
        if stress:
            raise MemoryError

    monkeypatch.setattr(Engine, "call", failing)
    with pytest.raises(MemoryError):
        simulation.run(20)
    monkeypatch.undo()
    end = simulation.atoms
    np.testing.assert_allclose(end.get_stress(), now_and_here(end), rtol=0, atol=1e-12)


def now_and_here(atoms):
    """Return the stress of atoms, evaluated anew."""
    return full_3x3_to_voigt_6_stress(unit().predict(atoms).stress[0].numpy())


def test_a_potential_without_stress_gives_no_pressure():
    potential = escn_md(heads="direct", lmax=1, mmax=1)
    assert not potential.has_stress
    simulation = Simulation(
        slab(), PredictUnit(potential, device="cpu", settings=EXACT), NVE(), temperature=10, skin=0.5
    )
    assert np.isnan(simulation.run(1).scalars()["pressure"])
    assert "stress" not in simulation.atoms.calc.results


def test_atoms_that_leave_the_cell_have_not_moved_farther_than_they_have():
    """Displacements are those of unwrapped positions: crossing a boundary uses up no skin."""
    atoms = crystal()
    atoms.positions -= 0.01  # a layer on each side of three boundaries
    atoms.set_momenta(atoms.get_masses()[:, None] * np.full(3, 2e-3))  # 0.02 A in 100 fs
    simulation = Simulation(atoms, unit(), NVE(timestep=5), skin=0.5)
    before = simulation.scalars()["total_energy"]
    end = simulation.run(100)
    assert end.counters.rebuilds == 0
    assert (end.atoms.positions[0] > 0).all()
    assert end.scalars()["total_energy"] == pytest.approx(before, abs=1e-10)


def test_a_merged_mixture_of_experts_runs_on_ranks_and_refuses_other_systems():
    potential = merged(escn_md(experts=ExpertsConfig(count=3)), AtomBatch.from_ase(slab()))
    ends = []
    for workers in (None, 2):
        with PredictUnit(potential, device="cpu", settings=EXACT, workers=workers) as u:
            ends.append(Simulation(slab(), u, NVE(), temperature=10, skin=0.5).run(2).atoms.positions)
            with pytest.raises(ValueError, match="the experts were merged for"):
                Simulation(slab()[:-1], u, NVE(), temperature=10)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-11)
