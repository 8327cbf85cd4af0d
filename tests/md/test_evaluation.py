"""How steps are evaluated makes no difference, whatever the host knows of the lists."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch.overrides import TorchFunctionMode

from gnnmd import InferenceSettings, PredictUnit
from gnnmd.md import MTK, NVE, Bussi, Langevin, NoseHoover, Simulation, StochasticCell
from gnnmd.md.engine import Engine
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.emt import emt
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.models.heads import FittingNetConfig
from gnnmd.parallel import Ranks
from gnnmd.predict.capture import CapturedPotential, CaptureFailure
from gnnmd.predict.partitioned import PartitionedPotential

EXACT = InferenceSettings(dtype="float64")


def crystal():
    return bulk("Ag", cubic=True) * (4, 3, 3)


def unit():
    return PredictUnit(emt(), device="cpu", settings=EXACT)


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


#: Networks to which spare entries of lists make no difference.
SPARED = {
    "escn_md": EscnMDConfig(
        r_cut=4.0, lmax=1, mmax=1, channels=4, hidden_channels=4, edge_channels=4, num_basis=8, num_layers=2
    ),
    "dpa3": DPA3Config(
        type_map=("Ag",),
        n_dim=8,
        e_dim=4,
        a_dim=4,
        nlayers=3,
        e_rcut=4.0,
        e_rcut_smth=3.0,
        a_rcut=3.2,
        a_rcut_smth=2.5,
        activation_function="silu",  # "silut" looks at its values on a CPU
        fitting_net=FittingNetConfig(activation_function="silu"),
    ),
}
networks = pytest.mark.parametrize("network", SPARED)


def network_of(config: EscnMDConfig | DPA3Config) -> PredictUnit:
    torch.manual_seed(0)
    return PredictUnit(build_potential(PotentialConfig(config)), device="cpu", settings=EXACT)


def spared(network: str) -> PredictUnit:
    return network_of(SPARED[network])


def with_room(monkeypatch, spare: int | None = None) -> list[Engine]:
    """Let lists have room for more edges, as on a GPU; return the engines that have it.

    Args:
        monkeypatch: of pytest.
        spare: see `gnnmd.md.evaluation.SPARE`; None leaves it.
    """
    engines, begin = [], Engine.begin

    def begin_with_room(self: Engine, *args):
        self.evaluation.has_room = self.potential.backbone.spares_are_free
        engines.append(self)
        return begin(self, *args)

    monkeypatch.setattr("gnnmd.md.simulation._HEAR", 1e9)  # the caller's questions are readings too
    monkeypatch.setattr(Engine, "begin", begin_with_room)
    if spare is not None:
        monkeypatch.setattr("gnnmd.md.evaluation.FEWEST_SPARE", 0)
        monkeypatch.setattr("gnnmd.md.evaluation.SPARE", spare)
    return engines


@networks
@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_with_room_for_more_edges_the_host_waits_for_readings_only(network, evaluation, monkeypatch):
    roomy, found = with_room(monkeypatch), []
    options = {"temperature": 10, "skin": 2.0, "evaluation": evaluation}
    for steps in (20, 60):
        simulation = Simulation(crystal(), spared(network), NVE(1), **options)
        with Waits() as waits:
            simulation.run(steps)
        assert simulation.counters.rebuilds == simulation.counters.repeated == 0
        found.append((waits.count, simulation.counters.readings))
    (few, few_readings), (many, many_readings) = found
    # The reading itself; whether there was room, or the lengths of lists, now and the longest of lately.
    waits_each = 2 if evaluation == "captured" else 3 if network == "escn_md" else 4
    assert many - few == waits_each * (many_readings - few_readings)
    assert len(roomy) == 2
    assert all(engine.evaluation.has_room for engine in roomy)


HOT = {"temperature": 900, "skin": 0.6}


@networks
@pytest.mark.parametrize("enough", [True, False])
@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_room_for_more_edges_changes_nothing_even_if_it_does_not_suffice(
    network, evaluation, enough, monkeypatch
):
    roomy = with_room(monkeypatch, spare=2 if enough else 10**9)
    simulation = Simulation(crystal(), spared(network), NVE(4), **HOT, evaluation=evaluation).run(40)
    assert roomy.pop().evaluation.has_room
    assert (simulation.counters.repeated == 0) == enough
    monkeypatch.undo()
    expected = Simulation(crystal(), spared(network), NVE(4), **HOT).run(40)
    assert expected.counters.rebuilds > 0
    np.testing.assert_allclose(simulation.atoms.positions, expected.atoms.positions, rtol=0, atol=1e-12)


def end_of(group, network: str, evaluation: str) -> tuple[np.ndarray, int]:
    """Return where atoms are after steps whose lists had too little room now and then."""
    unit = spared(network)
    if group.size() > 1:
        unit._together = PartitionedPotential(unit.potential, unit.settings, Ranks(group))
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_room(monkeypatch, spare=10**9)
        simulation = Simulation(crystal(), unit, NVE(4), **HOT, evaluation=evaluation).run(20)
        return simulation.atoms.positions, simulation.counters.repeated


@networks
@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_too_little_room_on_one_rank_is_repeated_on_all(pool, network, evaluation):
    (expected, repeated), *_ = pool.run(1, end_of, network, evaluation)
    assert repeated > 0
    for positions, repeated in pool.run(3, end_of, network, evaluation):
        assert repeated > 0
        np.testing.assert_allclose(positions, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("evaluation", ["compact", "captured"])
def test_room_follows_lists_that_grow(evaluation, monkeypatch):
    """Atoms of a perfect crystal that is set moving enter and leave the angles' cutoff, near a shell."""
    roomy = with_room(monkeypatch, spare=50)
    unit = network_of(replace(SPARED["dpa3"], a_rcut=3.0))
    simulation = Simulation(crystal(), unit, NVE(4), temperature=900, skin=2.0, evaluation=evaluation).run(60)
    assert roomy.pop().evaluation.has_room
    assert 1 <= simulation.counters.repeated <= 2  # 5 and 4 times with 2 % of room


def test_steps_that_cannot_be_captured_are_launched(monkeypatch):
    def capture(self, *args, **options):
        raise CaptureFailure("a step could not be captured as a CUDA graph: out of memory")

    engines, begin = [], Engine.begin

    def begin_with_a_choice(self: Engine, *args):
        self.evaluation.choices = ("captured", "compact")
        self.evaluation.switch("captured")
        engines.append(self)
        return begin(self, *args)

    monkeypatch.setattr(CapturedPotential, "__call__", capture)
    monkeypatch.setattr(Engine, "begin", begin_with_a_choice)
    with pytest.warns(UserWarning, match="out of memory. Steps are launched one by one"):
        end = Simulation(crystal(), unit(), NVE(timestep=5), **HOT).run(5).atoms
    assert engines[0].evaluation.how == "compact"
    assert engines[0].evaluation.choices == ("compact",)  # it is not tried again
    monkeypatch.undo()
    expected = Simulation(crystal(), unit(), NVE(timestep=5), **HOT).run(5).atoms
    np.testing.assert_array_equal(end.positions, expected.positions)
    monkeypatch.setattr(CapturedPotential, "__call__", capture)
    with pytest.raises(CaptureFailure, match="out of memory"):  # it was asked for
        Simulation(crystal(), unit(), NVE(timestep=5), **HOT, evaluation="captured")


def test_what_was_found_to_be_cheapest_is_taken(monkeypatch):
    engines = with_room(monkeypatch)
    monkeypatch.setattr("gnnmd.md.loop.cheapest", lambda *_: ("standing", 0.4))
    simulation = Simulation(crystal(), unit(), NVE(timestep=5), temperature=300).run(40)
    assert simulation.counters.skin == 0.4
    assert engines[0].evaluation.how == "standing"
