import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.convert.deepmd import build
from gnnmd.models.dpa2_config import DPA2Config, RepformerConfig, RepinitConfig
from gnnmd.models.heads import FittingNetConfig
from gnnmd.models.potential import Potential
from gnnmd.parallel import GPContext
from tests.models import dpa2_oracle as oracle
from tests.models.conformance import Conformance
from tests.models.systems import crystal, dimer, ethanol, predict, randomised, slab

ELEMENTS = ("H", "C", "O", "Cu", "Ag")

#: Every update there is.
ALL = {"update_g1_has_attn": True, "update_g2_has_g1g1": True, "update_h2": True}


def dpa2(repinit=None, repformer=None, scale: float = 5.0, std: float = 0.3, **options) -> Potential:
    """Return a small float64 potential with random weights everywhere, its energies times a factor.

    With a small ``std`` neighbours matter much, but finite differences of forces are less exact.
    """
    torch.manual_seed(0)
    wide = {"rcut": 4.5, "nsel": 30, "neuron": (4, 8), "axis_neuron": 3, "tebd_dim": 4}
    three_body = {"three_body_rcut": 3.6, "three_body_rcut_smth": 1.0, "three_body_sel": 20}
    near = {
        "rcut": 4.0,
        "rcut_smth": 1.0,
        "nsel": 25,
        "nlayers": 3,
        "g1_dim": 10,
        "g2_dim": 6,
        "axis_neuron": 2,
    }
    heads = {"attn1_hidden": 4, "attn1_nhead": 2, "attn2_hidden": 3, "attn2_nhead": 2}
    config = DPA2Config(
        type_map=ELEMENTS,
        repinit=RepinitConfig(**{**wide, **three_body, **(repinit or {})}),
        repformer=RepformerConfig(**{**near, **heads, **(repformer or {})}),
        fitting_net=FittingNetConfig(neuron=(8, 8)),
        **options,
    )
    potential = randomised(build_potential(PotentialConfig(model=config)).double().eval(), spread=0.2)
    for i, neighborhood in enumerate(potential.backbone.neighborhoods):
        radial = std + 0.02 * torch.arange(len(ELEMENTS))[:, None] + 0.01 * i
        neighborhood.environment.std.copy_(torch.cat([radial, 0.7 * radial.expand(-1, 3)], dim=1))
    potential.energy_scale.fill_(scale)
    return potential


class TestMediumStyle(Conformance):
    @pytest.fixture
    def potential(self):
        return dpa2()


class TestEveryUpdate(Conformance):
    @pytest.fixture
    def potential(self):
        style = {"g1_out_mlp": False, "g1_out_conv": False, "update_style": "res_avg"}
        return dpa2({"tebd_input_mode": "strip", "resnet_dt": True}, {**ALL, **style}, scale=0.5, std=0.8)


class TestDirectDistances(Conformance):
    @pytest.fixture
    def potential(self):
        changes = {**ALL, "direct_dist": True, "use_sqrt_nnei": False, "attn2_has_gate": False}
        wide = {"use_three_body": False, "type_one_side": True, "activation_function": "silu"}
        return dpa2(
            wide, {**changes, "update_style": "res_incr"}, env_protection=0.1, exclude_types=(("H", "O"),)
        )


def drawn(seed: int) -> dict:
    """Return a model section in which every option is drawn by chance."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    def flags(*names):
        return {name: one_of(True, False) for name in names}

    repinit = {
        "tebd_input_mode": one_of("concat", "strip"),
        "tebd_dim": one_of(3, 4, 8),  # 4 and 8 columns of 4 types add their input
        "activation_function": one_of("tanh", "silu"),
        **flags("resnet_dt", "type_one_side", "use_three_body"),
    }
    repformer = {
        "activation_function": one_of("tanh", "silu"),
        "update_style": one_of("res_avg", "res_incr", "res_residual"),
        "use_sqrt_nnei": one_of(True, False),
        **one_of({}, {"update_g1_has_grrg": False}, {"update_g1_has_drrd": False}),
        **flags("direct_dist", "attn2_has_gate", "g1_out_conv", "g1_out_mlp", "update_g1_has_conv"),
        **flags("update_g1_has_attn", "update_g2_has_g1g1", "update_g2_has_attn", "update_h2"),
        **flags("set_davg_zero"),
    }
    rest = flags("concat_output_tebd", "add_tebd_to_repinit_out", "use_econf_tebd", "use_tebd_bias")
    return oracle.model(repinit, repformer, **rest, env_protection=one_of(0.0, 0.2))


#: Options that draws do not reach.
SPECIAL = {
    "nearest neighbours only": oracle.model(
        {"nsel": 9, "use_three_body": True, "three_body_sel": 4}, {"nsel": 5, "update_h2": True}
    ),
    "excluded pairs use up room": oracle.model(
        {"nsel": 12, "use_three_body": True, "three_body_sel": 6},
        {"nsel": 7, "update_h2": True},
        exclude_types=[[0, 1], [2, 2]],
    ),
    "no map after the first descriptor": oracle.model({"neuron": [2, 4], "axis_neuron": 2}, {"g1_dim": 8}),
    "one layer": oracle.model({}, {"nlayers": 1}),
    "another epsilon": oracle.model({}, {"ln_eps": 0.3, "trainable_ln": False}),
    "three bodies wider than the rest": oracle.model({"use_three_body": True, "three_body_rcut": 4.9}),
}


def molecule() -> Atoms:
    atoms = ethanol()
    atoms.numbers[atoms.numbers == 6] = 47
    return atoms


def deviation(config: dict, atoms: Atoms, seed: int = 0) -> float:
    """Return the largest difference to the oracle: of descriptors and energies of atoms."""
    state = oracle.random_state(config, seed)
    types = np.array([oracle.TYPE_MAP.index(symbol) for symbol in atoms.get_chemical_symbols()])
    potential = build(config, {key: torch.tensor(value) for key, value in state.items()}).eval()
    found = predict(potential, atoms, descriptors=True)
    cell = atoms.cell.array if atoms.pbc.any() else None
    expected = oracle.Oracle(config, state, types, atoms.positions, cell, atoms.pbc)
    descriptors = expected.descriptors()
    assert np.abs(descriptors).max() > 0.1
    return max(
        np.abs(found.descriptors.numpy() - descriptors).max() / np.abs(descriptors).max(),
        np.abs(found.node_energies.numpy() - expected.energies()).max(),
    )


@pytest.mark.parametrize("seed", range(16))
def test_any_options_agree_with_the_literal_definition(seed):
    assert max(deviation(drawn(seed), atoms, seed) for atoms in (molecule(), slab())) < 1e-12


@pytest.mark.parametrize("name", SPECIAL)
def test_special_options_agree_with_the_literal_definition(name):
    assert max(deviation(SPECIAL[name], atoms) for atoms in (molecule(), slab())) < 1e-12


def test_the_draws_reach_every_value():
    sections = [drawn(seed)["descriptor"] for seed in range(16)]
    for name in ("repinit", "repformer"):
        for option, value in sections[0][name].items():
            if isinstance(value, bool) and option != "trainable_ln":
                assert len({section[name][option] for section in sections}) == 2, (name, option)
        assert {section[name]["activation_function"] for section in sections} == {"tanh", "silu"}
    assert {s["repformer"]["update_style"] for s in sections} == {"res_avg", "res_incr", "res_residual"}
    assert {s["repinit"]["tebd_input_mode"] for s in sections} == {"concat", "strip"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("the order of residuals", {"update_style": "res_residual", "update_g1_has_attn": True}),
        ("neighbours that are not there", {"update_g2_has_attn": True}),
    ],
)
def test_a_broken_convention_is_noticed(name, change, monkeypatch):
    """Negative control: the comparison sees what energies of large systems hide."""
    if name == "the order of residuals":
        exact = "gnnmd.models.dpa2.Update.forward"
        plain = copy.copy(dpa2().backbone.blocks[1].g1_update.__class__.forward)
        monkeypatch.setattr(exact, lambda self, x, updates: plain(self, x, updates[::-1]))
    else:
        monkeypatch.setattr("gnnmd.nn.edge_attention.SHIFT", 40.0)
    assert deviation(oracle.model({}, change), slab()) > 1e-7


def test_attention_is_smooth_where_a_neighbour_enters():
    """Forces do not jump at the cutoff: neighbours that are not there keep their share of the sum."""
    potential = dpa2({}, ALL)
    r, width = potential.backbone.config.repformer.rcut, 1e-6
    atoms = dimer(r - width)
    atoms += Atoms("O", [[1.0, 2.0, 0.5]])  # an edge at the cutoff attends to this one
    inside = predict(potential, atoms)
    atoms.positions[1] *= (r + width) / (r - width)
    outside = predict(potential, atoms)
    assert (inside.forces - outside.forces).abs().max() < 1e-5
    assert inside.forces.abs().max() > 1e-2


def test_layers_read_near_neighbours_only():
    """Rows of farther ghosts are missing in a spread graph, so nothing may point to them."""
    potential = dpa2({"rcut": 6.0, "nsel": 150}, ALL)
    assert potential.backbone.exchange_cut == 4.0
    batch = AtomBatch.from_ase(crystal() * (1, 2, 2))
    seen = []
    for block in potential.backbone.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2].pieces))
    predict(potential, batch)
    wide, near = seen[0][0].shells[0], seen[1][0].near
    assert len(near.source) < len(wide.source) / 2
    distances = near.environment.detach()[:, 0]
    assert (distances > 0).all()


def test_excluded_elements_do_not_see_each_other():
    apart, together = dpa2(exclude_types=(("Cu", "Ag"),)), dpa2()
    near, far = dimer(2.5), dimer(50.0)
    assert_close(predict(apart, near).energy, predict(apart, far).energy)
    assert abs(predict(together, near).energy - predict(together, far).energy) > 1e-3


def test_statistics_are_the_spread_of_the_environment_matrix():
    """Over all room for neighbours: one number for the radial, one for the three angular components."""
    potential, batch = dpa2(), AtomBatch.from_ase(slab())
    backbone = potential.backbone
    backbone.near.environment.mean[:, 0] = 0.2  # what is there before makes no difference
    graph = potential.graph(batch).with_positions(batch.positions, batch.cell)
    sums = backbone.statistics(graph, len(batch.numbers))
    backbone.set_statistics(sums + sums)
    near = potential.backbone.config.repformer
    symbols = np.array(slab().get_chemical_symbols())
    config = oracle.model({}, {"rcut": near.rcut, "rcut_smth": near.rcut_smth, "nsel": near.nsel})
    state = oracle.random_state(config)
    state["atomic_model.descriptor.repformers.stddev"][:] = 1.0
    atoms = slab()
    types = np.array([oracle.TYPE_MAP.index(s) for s in symbols])
    shells = oracle.Oracle(config, state, types, atoms.positions, atoms.cell.array, atoms.pbc)
    for symbol in ("Cu", "O"):
        rows = np.concatenate(
            [
                shells.shell(i, "repformers", near.rcut, near.rcut_smth, near.nsel)[2]
                for i in np.flatnonzero(symbols == symbol)
            ]
        )
        std = backbone.near.environment.std[ELEMENTS.index(symbol)].numpy()
        assert std[0] == pytest.approx(max(rows[:, 0].std(), 0.01), rel=1e-12)
        assert std[1:] == pytest.approx(max(rows[:, 1:].std(), 0.01), rel=1e-12)
    absent = backbone.near.environment.std[ELEMENTS.index("Ag")]
    assert_close(absent, torch.full((4,), 0.1, dtype=torch.float64))


def test_the_norm_is_trained_only_if_wanted():
    for trained in (True, False):
        norm = dpa2({}, {"trainable_ln": trained}).backbone.blocks[1].norm
        assert norm.weight.requires_grad is norm.bias.requires_grad is trained


def test_the_last_layer_has_no_weights_without_influence():
    potential = dpa2({}, ALL).train()
    p = predict(potential, [crystal(), ethanol()])
    (p.energy.sum() + p.forces.square().sum()).backward()
    idle = [name for name, w in potential.named_parameters() if w.grad is None or not w.grad.any()]
    assert idle == []


def test_bfloat16_training_step_runs():
    """Mixed precision keeps geometry, heads and sums in full precision."""
    model = dpa2({}, ALL).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = predict(model, [crystal(), slab()])
        loss = p.forces.square().mean() + p.energy.square().mean()
    loss.backward()
    assert all(w.grad.isfinite().all() for w in model.parameters() if w.grad is not None)
    exact = predict(copy.deepcopy(model).eval(), [crystal(), slab()])
    assert_close(p.forces.detach(), exact.forces, rtol=0, atol=0.1 * float(exact.forces.abs().max()))


def test_the_order_of_neighbours_does_not_matter():
    """Edges of an atom come in any order; the table is made of them as they are."""
    potential, atoms = dpa2({}, ALL), slab()
    batch = AtomBatch.from_ase(atoms)
    graph, expected = potential.graph(batch), predict(potential, batch)
    target = graph.edge_index[1]
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    order = order[target[order].argsort(stable=True)]
    shuffled = type(graph)(
        **{**vars(graph), "edge_index": graph.edge_index[:, order], "shift": graph.shift[order]}
    )
    found = potential(batch.positions, shuffled, GPContext.single(len(atoms)))
    assert_close(found.forces, expected.forces, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type_map": ("Xx",)}, "must hold symbols of elements"),
        ({"type_map": ("H", "H")}, "names an element twice"),
        ({"type_map": ("H",), "exclude_types": (("H", "O"),)}, "must hold elements of type_map"),
        ({"repinit": {"rcut_smth": 7.0}}, "repinit: rcut_smth=7.0 A must lie below rcut=6.0 A"),
        ({"repinit": {"three_body_sel": 0}}, "three_body: .* nsel=0 be at least 1"),
        ({"repinit": {"tebd_input_mode": "stripe"}}, "tebd_input_mode='stripe' must be one of concat, strip"),
        ({"repinit": {"axis_neuron": 101}}, "axis_neuron=101"),
        ({"repinit": {"activation_function": "sine"}}, "activation 'sine' is not known"),
        ({"repformer": {"nlayers": 0}}, "nlayers=0 must be at least 1"),
        ({"repformer": {"update_style": "res"}}, "update_style='res' must be one of res_residual"),
        (
            {"repformer": {"update_g1_has_grrg": False, "update_g1_has_drrd": False}},
            "one of update_g1_has_grrg and update_g1_has_drrd must be set",
        ),
    ],
)
def test_a_wrong_shape_is_refused(change, message):
    sections = {"repinit": RepinitConfig, "repformer": RepformerConfig}
    with pytest.raises(ValueError, match=message):
        DPA2Config(**{k: sections[k](**v) if k in sections else v for k, v in change.items()})
