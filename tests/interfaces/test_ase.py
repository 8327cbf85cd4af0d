from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.md.verlet import VelocityVerlet
from ase.units import fs
from numpy.testing import assert_allclose

from gnnmd import AtomBatch, GNNMDCalculator
from gnnmd.parallel import GPContext
from gnnmd.predict import InferenceSettings, PredictUnit
from tests.lennard_jones import lennard_jones

FLOAT64 = InferenceSettings(dtype="float64")
UNIT = PredictUnit(lennard_jones(datasets=("pbe", "scan")), device="cpu", settings=FLOAT64)


def calculator(**options: object) -> GNNMDCalculator:
    return GNNMDCalculator(UNIT, dataset="pbe", **options)


def crystal() -> Atoms:
    atoms = bulk("Ag", cubic=True) * (2, 2, 1)  # 4 A thick: every pair has several images within 5 A
    atoms.set_cell(
        atoms.cell @ (np.eye(3) + [[0.02, 0.03, 0], [0, -0.01, 0], [0.04, 0, 0]]), scale_atoms=True
    )
    atoms.rattle(0.1, seed=0)
    return atoms


def results(atoms: Atoms) -> dict[str, np.ndarray]:
    """All results, from a calculator that has seen nothing else."""
    fresh = atoms.copy()
    fresh.calc = calculator()
    return everything(fresh)


def everything(atoms: Atoms) -> dict[str, np.ndarray]:
    return {
        "energy": atoms.get_potential_energy(),
        "free_energy": atoms.get_potential_energy(force_consistent=True),
        "forces": atoms.get_forces(),
        "energies": atoms.get_potential_energies(),
        **({"stress": atoms.get_stress()} if atoms.pbc.any() else {}),
    }


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_allclose(a[name], b[name], atol=1e-12, rtol=1e-13, err_msg=name)


def test_results_are_those_of_the_unit() -> None:
    atoms = crystal()
    found = results(atoms)
    atoms.info["dataset"] = "pbe"
    expected = UNIT.predict(atoms)
    assert found["energy"] == found["free_energy"] == expected.energy.item()
    assert found["energies"].sum() == pytest.approx(found["energy"], abs=1e-12)
    assert_allclose(found["forces"], expected.forces, atol=0)
    s = expected.stress[0]
    voigt = [s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]]
    assert len(set(np.round(voigt, 6))) == 6  # the order shows
    assert_allclose(found["stress"], voigt, atol=1e-15)


def test_forces_and_stress_are_derivatives_of_the_energy() -> None:
    atoms = crystal()
    atoms.calc = calculator()
    assert_allclose(
        atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4, force_consistent=False), atol=1e-7
    )
    assert_allclose(
        atoms.get_stress(), calculate_numerical_stress(atoms, 3e-5, force_consistent=False), atol=1e-8
    )


def shear(atoms: Atoms) -> None:
    atoms.set_cell(atoms.cell.array @ [[1, 0.02, 0], [0, 1.01, 0], [0, 0.01, 1]], scale_atoms=True)


def grow_empty_space(atoms: Atoms) -> None:
    atoms.cell[2] *= 2


def open_one_axis(atoms: Atoms) -> None:
    atoms.pbc[1] = False


def jump(atoms: Atoms) -> None:
    atoms.positions[3] += atoms.cell[0] - 2 * atoms.cell[2]


def wrap(atoms: Atoms) -> None:
    atoms.positions += [1.9, 0.3, 2.2]
    atoms.wrap()


def swap(atoms: Atoms) -> None:
    atoms.positions[[0, 1]] = atoms.positions[[1, 0]]


def exchange_elements(atoms: Atoms) -> None:
    atoms.numbers[:] = 79


def remove_an_atom(atoms: Atoms) -> None:
    del atoms[5]


def charge(atoms: Atoms) -> None:
    atoms.info["charge"] = 2


def level_of_theory(atoms: Atoms) -> None:
    atoms.info["dataset"] = "scan"


def move_far(atoms: Atoms) -> None:
    atoms.rattle(0.4, seed=9)


def move_near(atoms: Atoms) -> None:
    atoms.rattle(0.01, seed=9)


CHANGES = [shear, grow_empty_space, open_one_axis, jump, wrap, swap, exchange_elements]
CHANGES += [remove_an_atom, charge, level_of_theory, move_far, move_near]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_calls_gives_what_a_fresh_calculator_gives(
    change: Callable[[Atoms], None],
) -> None:
    atoms = crystal()
    atoms.calc = calculator(skin=1.0)
    before = everything(atoms)
    change(atoms)
    assert_same(everything(atoms), results(atoms))
    atoms.rattle(0.05, seed=2)  # and once more, on the list that the change left behind
    assert_same(everything(atoms), results(atoms))
    if change in (charge, level_of_theory):
        assert abs(atoms.get_potential_energy() - before["energy"]) > 0.1


@pytest.fixture(scope="module")
def shared() -> Iterator[PredictUnit]:
    """The same potential in two processes."""
    potential = lennard_jones(datasets=("pbe", "scan"))
    with PredictUnit(potential, device="cpu", settings=FLOAT64, workers=2) as unit:
        yield unit


def test_changes_between_calls_reach_the_workers(shared: PredictUnit) -> None:
    calculator = GNNMDCalculator(shared, dataset="pbe", skin=1.0)
    for change in CHANGES:
        atoms = crystal()
        atoms.calc = calculator
        everything(atoms)
        change(atoms)
        assert_same(everything(atoms), results(atoms))
        atoms.rattle(0.05, seed=2)
        assert_same(everything(atoms), results(atoms))
    atoms += Atoms("Ag", [[0.1, 0.2, -2.5]])
    assert_same(everything(atoms), results(atoms))
    water = molecule("H2O")
    water.calc = calculator
    assert_same(everything(water), results(water))


def test_workers_keep_their_plan_along_dynamics_with_wrapping(shared: PredictUnit) -> None:
    atoms = bulk("Ag", cubic=True) * (2, 2, 5)
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.03, size=(80, 3)))  # 1200 K
    atoms.calc = GNNMDCalculator(shared, dataset="pbe", skin=0.8)
    dynamics = VelocityVerlet(atoms, 4 * fs)
    wrapped = 0
    for step in range(24):
        dynamics.step()
        before = atoms.positions.copy()
        atoms.wrap()
        wrapped += int((np.abs(atoms.positions - before) > 1).any())
        if step % 8 == 7:
            shear(atoms)
        assert_same(everything(atoms), results(atoms))
    assert wrapped > 5
    assert 2 <= atoms.calc.n_builds <= 8  # neither never nor always, and never for wrapping


def test_workers_of_a_model_with_a_limit_of_neighbours_search_every_time() -> None:
    potential = lennard_jones()
    potential.backbone.max_neighbors = 8
    atoms, alone = crystal(), PredictUnit(potential, device="cpu", settings=FLOAT64)
    with PredictUnit(potential, device="cpu", settings=FLOAT64, workers=1) as unit:
        atoms.calc = GNNMDCalculator(unit, skin=1.0)
        for n_builds in (1, 2, 3):
            atoms.rattle(0.02, seed=n_builds)
            assert_allclose(atoms.get_forces(), alone.predict(atoms).forces, atol=1e-12)
            assert atoms.calc.n_builds == n_builds


@pytest.mark.parametrize("key", ["charge", "dataset"])
def test_a_change_of_info_alone_is_noticed(key: str) -> None:
    atoms = crystal()
    atoms.calc = calculator()
    before = atoms.get_potential_energy()
    atoms.info[key] = {"charge": 1, "dataset": "scan"}[key]
    assert atoms.calc.calculation_required(atoms, ["energy"])
    assert atoms.get_potential_energy() == pytest.approx(before * {"charge": 1.1, "dataset": 1.5}[key])
    del atoms.info[key]
    assert atoms.get_potential_energy() == before


def test_nothing_is_computed_twice() -> None:
    atoms = crystal()
    atoms.calc = calculator()
    everything(atoms)
    calls = UNIT.potential.backbone.n_calls
    atoms.info["comment"] = "seen"
    atoms.set_initial_magnetic_moments([1.0] * len(atoms))
    everything(atoms)
    assert UNIT.potential.backbone.n_calls == calls


def test_results_are_copies() -> None:
    atoms = crystal()
    atoms.calc = calculator()
    forces = atoms.get_forces()
    forces += 1
    first = atoms.calc.results["forces"]
    assert_same(everything(atoms), results(atoms))
    atoms.rattle(0.1, seed=4)
    atoms.get_forces()
    assert_same({"forces": first}, {"forces": forces - 1})


def test_neighbour_reuse_along_dynamics_is_exact() -> None:
    atoms = bulk("Ag", cubic=True) * 3
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.03, size=(108, 3)))  # 1200 K
    atoms.calc = calculator(skin=0.5)
    dynamics = VelocityVerlet(atoms, 4 * fs)
    for _ in range(60):
        dynamics.step()
        atoms.wrap()
        assert_same(everything(atoms), results(atoms))
    assert 3 <= atoms.calc.n_builds <= 25  # every 5 steps or so, neither never nor always


def test_model_with_a_limit_of_neighbours_is_searched_every_time() -> None:
    potential = lennard_jones()
    potential.backbone.max_neighbors = 8
    atoms = crystal()
    atoms.calc = GNNMDCalculator(potential, device="cpu", settings=FLOAT64, skin=1.0)
    for seed in range(3):
        atoms.rattle(0.02, seed=seed)
        fresh = atoms.copy()
        fresh.calc = GNNMDCalculator(potential, device="cpu", settings=FLOAT64)
        assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=1e-12)
        batch = AtomBatch.from_ase(atoms)
        direct = potential(batch.positions, potential.graph(batch), GPContext.single(16))
        assert_allclose(atoms.get_forces(), direct.forces.detach(), atol=1e-12)


def test_a_molecule_has_no_stress() -> None:
    atoms = molecule("C2H6")
    atoms.calc = calculator()
    assert atoms.get_forces().shape == (8, 3)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    atoms.center(vacuum=5.0)  # a cell, but open
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    atoms.pbc = True
    assert atoms.get_stress().shape == (6,)


def test_inside_inference_mode_and_outside_alternately() -> None:
    atoms = crystal()
    atoms.calc = calculator(skin=1.0)
    for seed in range(4):
        atoms.rattle(0.02, seed=seed)
        with torch.inference_mode(seed % 2 == 0):
            found = everything(atoms)
        assert_same(found, results(atoms))
    assert atoms.calc.n_builds == 1


def test_atoms_in_the_same_place_end_the_calculation() -> None:
    atoms = crystal()
    atoms.calc = calculator()
    atoms.positions[5] = atoms.positions[2]
    with pytest.raises(CalculationFailed, match="forces on atoms .*2.* are not finite"):
        atoms.get_forces()
    assert not atoms.calc.results
    atoms.positions[5] += 1.5
    assert np.isfinite(atoms.get_forces()).all()


def test_errors_at_the_door() -> None:
    atoms = crystal()
    atoms.calc = calculator()
    atoms.positions[4, 0] = np.nan
    with pytest.raises(ValueError, match="atom 4 of system 0"):
        atoms.get_forces()
    with pytest.raises(ValueError, match="belong to the PredictUnit"):
        GNNMDCalculator(UNIT, device="cpu")
    with pytest.raises(FileNotFoundError, match="no checkpoint 'absent'"):
        GNNMDCalculator("absent")
    with pytest.raises(ValueError, match="skin"):
        GNNMDCalculator(UNIT, skin=-1)
