import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.constraints import FixAtoms, FixCom
from torch.overrides import TorchFunctionMode

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.graph import AtomBatch
from gnnmd.md import MTK, NVE, Bussi, Langevin, NoseHoover, Simulation, StochasticCell
from gnnmd.md.engine import Engine
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.emt import emt
from gnnmd.models.escn_md import EscnMDConfig, ExpertsConfig
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


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="no velocities"):
        Simulation(crystal(), unit(), NVE())
    atoms = crystal()
    atoms.set_constraint(FixCom())
    with pytest.raises(ValueError, match="only FixAtoms"):
        Simulation(atoms, unit(), NVE(), temperature=300)


def test_the_skin_that_is_found_changes_nothing_but_the_pace():
    ends = []
    for skin in (None, 0.4):
        simulation = Simulation(crystal(), unit(), NVE(timestep=5), temperature=600, skin=skin).run(60)
        ends.append(simulation.atoms.positions)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("evaluation", ["standing", "captured"])
def test_edges_in_the_skin_change_nothing(evaluation):
    ends = []
    for how in ("compact", evaluation):
        simulation = Simulation(
            crystal(), unit(), NVE(timestep=5), temperature=600, skin=0.5, evaluation=how
        ).run(40)
        assert simulation.counters.rebuilds > 1
        ends.append(simulation.atoms)
    np.testing.assert_allclose(ends[0].positions, ends[1].positions, rtol=0, atol=1e-11)
    np.testing.assert_allclose(ends[0].get_stress(), ends[1].get_stress(), rtol=0, atol=1e-11)


def test_an_unknown_evaluation_is_refused():
    with pytest.raises(ValueError, match="evaluation='fast' is not one of compact, standing, captured"):
        Simulation(crystal(), unit(), NVE(), temperature=300, evaluation="fast")


def test_a_merged_mixture_of_experts_runs_on_ranks_and_refuses_other_systems():
    potential = merged(escn_md(experts=ExpertsConfig(count=3)), AtomBatch.from_ase(slab()))
    ends = []
    for workers in (None, 2):
        with PredictUnit(potential, device="cpu", settings=EXACT, workers=workers) as u:
            ends.append(Simulation(slab(), u, NVE(), temperature=10, skin=0.5).run(2).atoms.positions)
            with pytest.raises(ValueError, match="the experts were merged for"):
                Simulation(slab()[:-1], u, NVE(), temperature=10)
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-11)


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device: numbers, lists and shapes that depend on values."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        mask = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        self.count += mask or name in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "integrator", [NVE(5), Langevin(5), Bussi(5), NoseHoover(5), StochasticCell(5), MTK(5)]
)
def test_between_rebuilds_the_host_waits_for_readings_only(integrator, monkeypatch):
    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 1e9)
    found = []
    options = {"temperature": 10, "skin": 2.0, "evaluation": "standing"}
    for steps in (20, 60):
        simulation = Simulation(crystal(), unit(), integrator, **options)
        with Waits() as waits:
            simulation.run(steps)
        assert simulation.counters.rebuilds == simulation.counters.repeated == 0
        found.append((waits.count, simulation.counters.readings))
    (few, few_readings), (many, many_readings) = found
    assert many - few == many_readings - few_readings
    assert 2 <= many_readings - few_readings <= 4


@pytest.fixture
def network() -> PredictUnit:
    """A network to which spare edges make no difference."""
    torch.manual_seed(0)
    shape = {"channels": 4, "hidden_channels": 4, "edge_channels": 4, "num_basis": 8, "num_layers": 2}
    config = PotentialConfig(EscnMDConfig(r_cut=4.0, lmax=1, mmax=1, **shape))
    return PredictUnit(build_potential(config), device="cpu", settings=EXACT)


@pytest.fixture
def roomy(monkeypatch) -> list[Engine]:
    """As on a GPU, lists keep room for more edges; the engines that do so."""
    engines, begin = [], Engine.begin

    def with_room(self: Engine, *args):
        self.has_room = self.potential.backbone.spares_are_free
        engines.append(self)
        return begin(self, *args)

    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 1e9)
    monkeypatch.setattr(Engine, "begin", with_room)
    return engines


@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_with_room_for_more_edges_the_host_waits_for_readings_only(network, roomy, evaluation):
    found = []
    for steps in (20, 60):
        simulation = Simulation(crystal(), network, NVE(1), temperature=10, skin=2.0, evaluation=evaluation)
        with Waits() as waits:
            simulation.run(steps)
        assert simulation.counters.rebuilds == simulation.counters.repeated == 0
        found.append((waits.count, simulation.counters.readings))
    (few, few_readings), (many, many_readings) = found
    assert many - few == 2 * (many_readings - few_readings)  # the reading itself, and the number of edges
    assert len(roomy) == 2
    assert all(engine.has_room for engine in roomy)


@pytest.mark.parametrize("enough", [True, False])
@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_room_for_more_edges_changes_nothing_even_if_it_does_not_suffice(
    network, roomy, evaluation, enough, monkeypatch
):
    monkeypatch.setattr("gnnmd.md.engine.FEWEST_SPARE", 0)
    monkeypatch.setattr("gnnmd.md.engine.SPARE", 2 if enough else 10**9)
    options = {"temperature": 900, "skin": 0.6, "evaluation": evaluation}
    simulation = Simulation(crystal(), network, NVE(4), **options).run(40)
    assert roomy.pop().has_room
    assert (simulation.counters.repeated == 0) == enough
    monkeypatch.undo()
    expected = Simulation(crystal(), network, NVE(4), temperature=900, skin=0.6).run(40)
    assert expected.counters.rebuilds > 0
    np.testing.assert_allclose(simulation.atoms.positions, expected.atoms.positions, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("temperature", "most"), [(300, 0.35), (900, 0.4)])
def test_atoms_are_looked_at_about_twice_per_rebuild(temperature, most, monkeypatch):
    """At every reading the host waits: the next one foresees when the skin will be used up."""
    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 1e9)
    langevin = Langevin(timestep=5, temperature=temperature)
    simulation = Simulation(crystal(), unit(), langevin, temperature=2 * temperature, skin=0.5).run(100)
    counters = simulation.counters
    assert counters.rebuilds > 8
    assert counters.repeated == 0
    assert counters.readings < most * 100
