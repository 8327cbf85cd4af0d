import copy
from dataclasses import replace

import pytest
import torch
from ase import Atoms
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import NeighborList, neighbor_list
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.convert import deepmd
from gnnmd.models.dpa3 import dpa3_potential
from gnnmd.models.dpa3_config import DPA3Config
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential
from gnnmd.nn.switch import poly_switch
from gnnmd.parallel import GPContext
from tests.models.conformance import Conformance, assert_same
from tests.models.dpa3_oracle import Model
from tests.models.systems import crystal, dimer, ethanol, moved, predict, randomised, slab

#: Cutoffs in the ratio of the published ones, so that the exponential switch is as large at the cutoff.
SMALL = {
    "type_map": ("H", "C", "O", "Cu", "Ag"),
    "n_dim": 12,
    "e_dim": 8,
    "a_dim": 4,
    "nlayers": 3,
    "e_rcut": 4.5,
    "e_rcut_smth": 3.975,
    "a_rcut": 3.4,
    "a_rcut_smth": 2.975,
    "e_sel": 100,
    "a_sel": 40,
    "fitting_net": FittingNetConfig((10, 10), "silut:10"),
}


def dpa3(scale: float = 10.0, **options) -> Potential:
    """Return a small float64 potential with random weights everywhere, its energies times a factor."""
    torch.manual_seed(0)
    config = PotentialConfig(DPA3Config(**{**SMALL, **options}))
    potential = randomised(build_potential(config).double().eval())
    potential.energy_scale.fill_(scale)
    return potential


class TestSmooth(Conformance):
    strain_tolerance = 2e-7  # the switch falls to 1 / e within 0.2 A

    @pytest.fixture
    def potential(self):
        return dpa3(taper=0.4)


class TestAsPublished(Conformance):
    """The published switch is cut off where it is still 8e-7, so that the energy has a step."""

    strain_tolerance = 2e-7

    @pytest.fixture
    def potential(self):
        return dpa3(activation_function="silut:3")

    def test_smoothness_at_the_cutoff(self, potential):
        r, width = potential.r_cut, 3e-5
        inside, outside = predict(potential, dimer(r - width)), predict(potential, dimer(r + width))
        assert 1e-10 < abs(inside.energy - outside.energy) < 1e-6
        assert outside.forces.abs().max() == 0


class TestAverages(Conformance):
    """Fixed numbers of neighbours, plain means of updates, two messages, no compression."""

    @pytest.fixture
    def potential(self):
        return dpa3(
            scale=15.0,
            e_rcut_smth=1.0,
            a_rcut_smth=0.5,
            e_sel=40,
            a_sel=30,
            use_dynamic_sel=False,
            edge_init_use_dist=False,
            use_exp_switch=False,
            update_style="res_avg",
            n_multi_edge_message=2,
            a_compress_rate=0,
            activation_function="tanh",
            env_protection=0.1,
            exclude_types=(("O", "H"),),
        )


class TestSequential(Conformance):
    """Each feature reads what was just updated; charge and spin; linear compression."""

    strain_tolerance = 2e-7

    @pytest.fixture
    def potential(self):
        return dpa3(
            nlayers=2,
            sequential_update=True,
            a_compress_use_split=False,
            use_econf_tebd=True,
            use_tebd_bias=True,
            concat_output_tebd=True,
            add_chg_spin_ebd=True,
            taper=0.4,
        )


class TestWithoutAngles(Conformance):
    strain_tolerance = 2e-7

    @pytest.fixture
    def potential(self):
        return dpa3(nlayers=2, update_angle=False, update_style="res_incr", taper=0.4)


def test_charge_and_spin_change_the_energy():
    potential, atoms = dpa3(add_chg_spin_ebd=True), ethanol()
    energies = set()
    for charge, spin in [(0, 0), (1, 0), (-1, 0), (0, 1), (0, 3)]:
        atoms.info.update(charge=charge, spin=spin)
        energies.add(float(predict(potential, atoms).energy))
    assert len(energies) == 5
    atoms.info.update(charge=100)
    with pytest.raises(ValueError, match="charge"):
        predict(potential, atoms)


def test_excluded_pairs_do_not_see_each_other():
    excluded = dpa3(exclude_types=(("Ag", "Cu"),))
    far = predict(excluded, dimer(30.0)).energy
    assert_close(predict(excluded, dimer(2.5)).energy, far, rtol=0, atol=1e-13)
    assert predict(excluded, Atoms("Ag2", positions=[[0, 0, 0], [0, 0, 2.5]])).forces.abs().max() > 1e-3


def test_fixed_and_dynamic_numbers_of_neighbours_agree_without_truncation():
    """Both divide sums by 15 and by the root of 10."""
    fixed = dpa3(use_dynamic_sel=False, e_sel=15, a_sel=10)
    wide = dpa3(use_dynamic_sel=True, e_sel=150, a_sel=100)
    atoms = slab()
    found, expected = predict(fixed, atoms), predict(wide, atoms)
    edges = neighbor_list(AtomBatch.from_ase(atoms), 4.5).row_pointers(len(atoms)).diff()
    assert edges.max() > 15
    assert abs(found.energy - expected.energy) > 1e-6
    assert_close(predict(fixed, ethanol()).forces, predict(wide, ethanol()).forces, rtol=0, atol=1e-13)


def test_edges_that_do_not_count_may_stay(monkeypatch):
    """As on a GPU: a switch of zero is as good as removing them, also for gradients of the weights."""
    limits = {"use_dynamic_sel": False, "e_sel": 15, "a_sel": 7, "exclude_types": (("Cu", "Ag"),)}
    batch, results = AtomBatch.from_ase([crystal(), slab()]), []
    for devices in (("cpu",), ()):
        monkeypatch.setattr("gnnmd.models.dpa3.REMOVING_DEVICES", devices)
        potential = dpa3(**limits).train()
        wide = neighbor_list(batch, potential.r_cut + 1.0)
        g = potential.graph(batch, NeighborList(wide.edge_index, wide.shift, potential.r_cut))
        p = potential(batch.positions, g, GPContext.single(len(batch.numbers)))
        (p.energy.sum() + p.forces.square().sum() + 100 * p.stress[0].square().sum()).backward()
        gradients = [w.grad for w in potential.parameters() if w.grad is not None]
        results.append([p.energy, p.forces, p.stress[0], *gradients])
        g = g.with_positions(batch.positions, batch.cell)
        (shell,) = potential.backbone.edge_basis(g, len(batch.numbers), lambda x: x).shells
        assert (len(shell.e) < g.edge_index.shape[1]) == bool(devices)
    for removed, stayed in zip(*results, strict=True):
        assert_close(stayed, removed, rtol=1e-10, atol=1e-10)


def test_truncation_keeps_the_nearest_neighbours():
    """A model with room for one neighbour sees a line of three atoms as its nearest pair."""
    potential = dpa3(nlayers=1, use_dynamic_sel=False, e_sel=1, a_sel=1)
    line = Atoms("AgCuO", positions=[[0, 0, 0], [2.0, 0, 0], [4.3, 0, 0]])
    whole, pair = predict(potential, line), predict(potential, line[:2])
    assert_close(whole.node_energies[:2], pair.node_energies, rtol=0, atol=1e-13)
    assert (whole.node_energies[2] - predict(potential, line[2:]).node_energies[0]).abs() > 1e-6


def test_angles_are_cut_at_their_own_limit():
    """With room for one edge in angles, two angles of three atoms remain, each with itself."""
    potential = dpa3(use_dynamic_sel=False, e_sel=20, a_sel=1)
    atoms = ethanol()
    batch = AtomBatch.from_ase(atoms)
    g = potential.graph(batch).with_positions(batch.positions, batch.cell)
    (shell,) = potential.backbone.edge_basis(g, len(atoms), lambda x: x).shells
    assert len(shell.links.ij.index) == len(atoms)
    assert shell.links.ij.index.equal(shell.links.ik.index)


def test_angles_are_sorted_and_complete():
    batch = AtomBatch.from_ase([crystal(), ethanol()])
    potential = dpa3()
    g = potential.graph(batch).with_positions(batch.positions, batch.cell)
    (shell,) = potential.backbone.edge_basis(g, len(batch.numbers), lambda x: x).shells
    links = shell.links
    assert (links.ij.index.diff() >= 0).all()
    counts = torch.bincount(links.near_target, minlength=len(batch.numbers))
    assert len(links.ij.index) == int((counts**2).sum())
    assert len(links.near) < len(shell.e)


def test_weights_without_influence_have_no_gradient_and_are_kept():
    """The output reads atoms only: the last layer moves no edge, the last but one no angle."""
    potential = dpa3(nlayers=3).train()
    p = predict(potential, crystal())
    (p.energy.sum() + p.forces.square().sum()).backward()
    dead = {n.removeprefix("backbone.blocks.") for n, w in potential.named_parameters() if w.grad is None}
    blocks = {n.split(".")[0] for n in dead}
    assert blocks == {"1", "2"}
    assert {n.split(".")[1] for n in dead if n.startswith("1")} == {"angle_self", "angle_update"}
    edges = {"edge_self", "edge_update", "edge_angle_1", "edge_angle_2", "angle_self", "angle_update"}
    assert {n.split(".")[1] for n in dead if n.startswith("2")} == edges
    for parameter in potential.parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0


def test_all_weights_of_a_sequential_model_count():
    potential = dpa3(nlayers=2, sequential_update=True).train()
    p = predict(potential, crystal())
    p.energy.sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in potential.parameters())


def saved_bytes(potential: Potential, atoms: Atoms, chunk: int | None) -> int:
    """Return what one evaluation keeps for the forces, without the weights."""
    potential.backbone.edge_chunk = chunk
    batch = AtomBatch.from_ase(atoms)
    g = potential.graph(batch)
    x = batch.positions.clone().requires_grad_()
    weights = {w.untyped_storage().data_ptr() for w in potential.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        features = potential.backbone(g.with_positions(x, batch.cell), GPContext.single(len(atoms)))
        potential.heads["energy"](features, g)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@pytest.mark.parametrize(("chunk", "per_angle"), [(None, 9.5 * 1024), (1500, 1.5 * 1024)])
def test_bytes_per_angle(chunk, per_angle):
    """A quarter of the 38 KiB per angle with its edges that upstream keeps; a 25th in pieces."""
    torch.manual_seed(0)
    potential = dpa3_potential(DPA3Config(type_map=("Ag", "Cu"))).eval()
    atoms = crystal().repeat((2, 2, 2))
    batch = AtomBatch.from_ase(atoms)
    g = potential.graph(batch).with_positions(batch.positions, batch.cell)
    shells = potential.backbone.edge_basis(g, len(atoms), lambda x: x).shells
    n_angles = sum(len(shell.a) for shell in shells)
    assert saved_bytes(potential, atoms, chunk) < per_angle * n_angles


def test_statistics_of_the_environment_come_from_data():
    """Padding to e_sel counts as zero; batches add up; a type that does not occur keeps a default."""
    potential = dpa3(fix_stat_std=0, e_sel=60, a_sel=40, use_dynamic_sel=False)
    backbone = potential.backbone
    assert backbone.needs_statistics
    assert not dpa3().backbone.needs_statistics

    def sums(systems):
        batch = AtomBatch.from_ase(systems)
        g = potential.graph(batch).with_positions(batch.positions, batch.cell)
        return backbone.statistics(g, len(batch.numbers))

    backbone.set_statistics(sums([crystal(), crystal(3)]))
    together = backbone.environment.std.clone()
    backbone.set_statistics(sums(crystal()) + sums(crystal(3)))
    assert_close(backbone.environment.std, together)

    raw = []  # of silver, every neighbour on its own
    for atoms in (crystal(), crystal(3)):
        batch = AtomBatch.from_ase(atoms)
        g = potential.graph(batch).with_positions(batch.positions, batch.cell)
        vector = (
            batch.positions[g.edge_index[0]]
            - batch.positions[g.edge_index[1]]
            + g.shift.double() @ batch.cell[0]
        )
        r = vector.norm(dim=1)
        s = poly_switch(r, 3.975, 4.5)
        silver = batch.numbers == 47
        mine = silver[g.edge_index[1]]
        table = torch.cat([(s / r)[:, None], (s / r**2)[:, None] * vector], dim=1)[mine]
        raw.append(torch.cat([table, table.new_zeros(60 * int(silver.sum()) - len(table), 4)]))
    rows = torch.cat(raw)
    radial = rows[:, 0].std(unbiased=False)
    angular = rows[:, 1:].std(unbiased=False)
    assert_close(together[4], torch.stack([radial, angular, angular, angular]))
    assert_close(together[0], torch.full((4,), 0.1, dtype=torch.float64))
    assert backbone.environment.mean.abs().max() == 0
    with pytest.raises(ValueError, match="fix_stat_std=0.3"):
        dpa3().backbone.set_statistics(sums(crystal()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type_map": ("Ag", "Xx")}, "symbols of elements"),
        ({"type_map": ("Ag", "Ag")}, "twice"),
        ({"exclude_types": (("Ag", "Au"),)}, "elements of type_map"),
        ({"a_rcut": 5.0}, "among the edges"),
        ({"e_rcut_smth": 4.5}, "before their cutoff"),
        ({"a_compress_rate": 3}, "must divide"),
        ({"update_style": "res"}, "update_style='res'"),
        ({"sequential_update": True, "update_style": "res_avg"}, "sequential_update"),
        ({"smooth_edge_update": False}, "use_dynamic_sel needs"),
        ({"activation_function": "swish"}, "'swish' is not known"),
        ({"nlayers": 0}, "nlayers=0"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPA3Config(**{**SMALL, **options})


def test_no_type_map_means_all_elements():
    torch.manual_seed(0)
    potential = dpa3_potential(DPA3Config(**{**SMALL, "type_map": ()}))
    assert potential.elements == tuple(range(1, 119))


def test_bfloat16_products_are_close():
    """In mixed precision geometry and sums over edges stay exact."""
    potential = copy.deepcopy(dpa3(taper=0.4)).float()
    expected = predict(potential, crystal())
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(potential, crystal())
    error = (found.forces - expected.forces).abs().max()
    assert 0 < error < 0.05 * max(1.0, float(expected.forces.abs().max()))


def test_an_empty_piece_of_the_graph():
    """A rank may own no atom."""
    potential, batch = dpa3(), AtomBatch.from_ase(crystal())
    g = potential.graph(batch)
    keep = torch.zeros(g.edge_index.shape[1], dtype=torch.bool)
    g = replace(g, edge_index=g.edge_index[:, keep], shift=g.shift[keep])
    g = replace(g, numbers=g.numbers[:0], system=g.system[:0])
    found = potential(batch.positions[:0], g, GPContext.single(0))
    assert found.energy == 0
    assert found.forces.shape == (0, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequential_update": True},
        {"sequential_update": True, "update_angle": False},
        {"sequential_update": True, "smooth_edge_update": False, "nlayers": 1},
        {"a_compress_use_split": False},
        {"a_compress_rate": 2, "a_compress_e_rate": 3, "sequential_update": True},
        {"a_compress_rate": 0, "update_style": "res_incr", "n_multi_edge_message": 3},
        {"update_angle": False, "update_style": "res_avg"},
        {"n_multi_edge_message": 2, "edge_init_use_dist": False, "env_protection": 0.3},
        {"e_sel": 4, "a_sel": 2, "smooth_edge_update": False, "nlayers": 3},
        {"e_sel": 5, "a_sel": 2, "exclude_types": [[0, 1]]},
        {"exclude_types": [[1, 1]], "use_exp_switch": False},
        {"use_econf_tebd": True, "use_tebd_bias": True, "concat_output_tebd": True},
        {"add_chg_spin_ebd": True, "concat_output_tebd": True},
    ],
    ids=str,
)
def test_options_without_reference_values(options):
    """Against loops over atoms, edges and angles."""
    atoms, oracle = ethanol(), Model(**options)
    expected = oracle.energy(atoms, charge=1, spin=2)
    state = {key: torch.tensor(x) for key, x in oracle.state.items()}
    found = predict(deepmd.build(oracle.config, state).eval(), atoms)
    assert found.energy.item() == pytest.approx(expected, rel=1e-11)
    if options:
        assert abs(Model().energy(atoms) - expected) > 1e-6


@pytest.mark.parametrize("options", [{}, {"use_dynamic_sel": False, "e_sel": 15, "a_sel": 7}])
@pytest.mark.parametrize("chunk", [None, 60])
def test_angles_listed_once_serve_all_positions_within_the_skin(options, chunk):
    """Those that do not count add zero; a skin that is too small is noticed."""
    potential, atoms, skin = dpa3(**options), slab(), 0.8
    potential.backbone.edge_chunk = chunk
    batch = AtomBatch.from_ase(atoms)
    wide, gp = neighbor_list(batch, potential.r_cut + skin), GPContext.single(len(atoms))
    g = potential.graph(batch, replace(wide, r_cut=potential.r_cut))
    steps = torch.randn(len(atoms), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = batch.positions + 0.9 * (skin / 2) * steps / steps.norm(dim=1, keepdim=True)
    expected = predict(potential, moved(batch, x))
    linked = potential.linked(batch.positions, g, gp, skin=skin)
    assert_same(potential(x, linked, gp), expected)
    assert_same(potential(batch.positions, linked, gp), predict(potential, batch))
    too_few = potential.linked(batch.positions, g, gp, skin=-0.5)
    assert (potential(x, too_few, gp).energy - expected.energy).abs() > 1e-6


def test_edges_outside_angles_are_listed_in_every_call_if_that_matters():
    potential = dpa3(smooth_edge_update=False, use_dynamic_sel=False)
    batch = AtomBatch.from_ase(slab())
    gp = GPContext.single(len(batch.numbers))
    assert potential.linked(batch.positions, potential.graph(batch), gp).links is None
