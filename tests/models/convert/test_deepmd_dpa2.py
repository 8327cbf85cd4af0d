"""DPA-2 from deepmd-kit: what `test_deepmd.py` does not check for every model."""

import copy

import numpy as np
import pytest
import torch

from gnnmd.models.convert import deepmd
from gnnmd.models.potential import Potential
from tests.models import dpa2_oracle as oracle
from tests.models.convert.test_deepmd import SYSTEMS, atoms_of, deviations, golden
from tests.models.systems import predict

NAMES = ("dpa2_tb", "dpa2_tb_g2attn")
UP = "atomic_model.descriptor."
RADIAL_MEAN = torch.tensor([[0.1, 0.0, 0.0, 0.0]]).expand(4, 4)


def build(name: str, repinit=None, repformer=None, state=None, **descriptor) -> Potential:
    config, published, _ = golden(name)
    config = copy.deepcopy(config)
    config["descriptor"].update(descriptor)
    config["descriptor"]["repinit"].update(repinit or {})
    config["descriptor"]["repformer"].update(repformer or {})
    return deepmd.build(config, {**published, **(state or {})}).eval()


def errors(potential: Potential, name: str, system: str) -> dict[str, float]:
    atoms = atoms_of(system)
    return deviations(predict(potential, atoms, descriptors=True), name, system, atoms.cell.volume)


@pytest.mark.parametrize("name", NAMES)
def test_reference_values_far_below_the_tolerance(name):
    potential = build(name)
    for system in SYSTEMS:
        assert max(errors(potential, name, system).values()) < 1e-12


def test_neighbours_that_are_not_there_are_part_of_the_softmax(monkeypatch):
    """Negative control: a softmax over edges only is seen, most of all in water."""

    def edges_only(logits, switch, room):
        weights = torch.exp((logits + 20) * switch - 20) * (switch != 0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    monkeypatch.setattr("gnnmd.nn.edge_attention.switched_softmax", edges_only)
    name = "dpa2_tb_g2attn"
    assert errors(build(name), name, "water192_pbc")["forces"] > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_pieces_and_single_precision(name):
    potential, atoms = build(name), atoms_of("cuag32_triclinic")
    expected = predict(potential, atoms)
    potential.backbone.edge_chunk = 300
    found = predict(potential, atoms)
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-12)
    found = predict(potential.float(), atoms)
    assert (found.forces - expected.forces).abs().max() < 1e-5


def test_options_that_are_left_out_have_upstreams_defaults():
    """The options of the oracle are all given; the same ones may be left out where they are defaults."""
    full = oracle.model(
        {"neuron": [25, 50, 100], "axis_neuron": 16, "tebd_dim": 8, "three_body_neuron": [2, 4, 8]}
        | {"three_body_sel": 40, "three_body_rcut": 4.0, "three_body_rcut_smth": 0.5},
        {"g1_dim": 128, "g2_dim": 16, "axis_neuron": 4, "attn1_hidden": 64, "attn1_nhead": 4}
        | {"attn2_hidden": 16, "attn2_nhead": 4},
    )
    full["fitting_net"] = {"neuron": [8, 8], "resnet_dt": True}
    short = copy.deepcopy(full)
    for section in ("repinit", "repformer"):
        needed = ("rcut", "rcut_smth", "nsel")
        given = full["descriptor"][section]
        short["descriptor"][section] = {option: given[option] for option in needed}
    short["descriptor"] = {k: short["descriptor"][k] for k in ("type", "repinit", "repformer")}
    state = {k: torch.tensor(x) for k, x in oracle.random_state(full).items()}
    found, expected = deepmd.build(short, state), deepmd.build(full, state)
    assert found.backbone.config == expected.backbone.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repinit": {"attn_layer": 2}}, r"\['attn_layer'\] of descriptor.repinit"),
        ({"repformer": {"attn3_hidden": 2}}, r"\['attn3_hidden'\] of descriptor.repformer"),
        ({"smooth": False}, "descriptor.smooth=False is not supported"),
        ({"add_chg_spin_ebd": True}, r"\['add_chg_spin_ebd'\] of descriptor"),
        ({"repformer": {"update_g1_has_attn": True}}, "missing .*loc_attn.mapq"),
        ({"repformer": {"update_h2": True}}, "missing .*attn2_ev_apply"),
        ({"repformer": {"nlayers": 2}}, "not used .*layers.2"),
        ({"repformer": {"g1_dim": 23}}, "have shape"),
        ({"repinit": {"use_three_body": False}}, "not used .*repinit_three_body"),
        ({"repinit": {"tebd_input_mode": "strip"}}, "missing .*filter_layers_strip"),
        ({"add_tebd_to_repinit_out": True}, "missing .*tebd_transform"),
        ({"state": {f"{UP}repinit.compress_info.0": torch.ones(6)}}, "the model was compressed"),
        ({"state": {f"{UP}repformers.mean[:,0]": torch.full((4, 4), 0.1)}}, "repformers.mean is not zero"),
        ({"state": {f"{UP}repinit.mean[:,0]": RADIAL_MEAN}}, "repinit.mean is not zero"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        build("dpa2_tb_g2attn", **changes)


def test_a_cutoff_must_be_given():
    config, state, _ = golden("dpa2_tb")
    config = copy.deepcopy(config)
    del config["descriptor"]["repformer"]["nsel"]
    with pytest.raises(ValueError, match=r"descriptor.repformer lacks nsel"):
        deepmd.build(config, state)


def test_the_later_copy_of_every_network_wins():
    """Also of the networks of elements in strip mode, which the reference files do not have."""
    config = oracle.model({"tebd_input_mode": "strip", "use_three_body": True})
    state = oracle.random_state(config)
    atoms, rng = atoms_of("cluster22_nopbc"), np.random.default_rng(0)
    found = []
    for copies in ("networks.0", "_networks.0"):
        changed = {
            key: torch.tensor(x + 0.1 * rng.normal(size=x.shape) if f".{copies}." in key else x)
            for key, x in state.items()
        }
        assert any(not torch.equal(changed[k], torch.tensor(x)) for k, x in state.items())
        found.append(predict(deepmd.build(config, changed).eval(), atoms).energy)
    expected = predict(
        deepmd.build(config, {k: torch.tensor(x) for k, x in state.items()}).eval(), atoms
    ).energy
    assert found[0] == expected
    assert abs(found[1] - expected) > 1e-4
