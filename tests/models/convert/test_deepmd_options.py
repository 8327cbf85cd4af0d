"""Every option of DPA-3 and DPA-2 against deepmd-kit itself, where it is installed.

Its models are made with random weights and statistics, one option after the other being changed; the section
"model" is completed with defaults as deepmd-kit does before it trains and stores it.
"""

import copy
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.data import chemical_symbols

from gnnmd.graph import AtomBatch
from gnnmd.models.convert import deepmd
from gnnmd.models.potential import Prediction
from gnnmd.nn.type_embedding import electron_configuration_vector
from tests.models.systems import crystal, ethanol, predict, slab

pytestmark = pytest.mark.upstream
pytest.importorskip("deepmd.pt", reason="needs deepmd-kit with its PyTorch backend")

TYPES = ["O", "H", "Cu", "Ag", "C"]
FITTING = {"neuron": [6, 6], "activation_function": "tanh", "resnet_dt": True, "precision": "float64"}

REPFLOW = {
    **{"n_dim": 10, "e_dim": 8, "a_dim": 4, "nlayers": 3, "axis_neuron": 2, "update_residual": 0.3},
    **{"e_rcut": 4.5, "e_rcut_smth": 3.9, "e_sel": 80, "a_rcut": 3.4, "a_rcut_smth": 2.9, "a_sel": 40},
}
EXAMPLE = {
    **{"a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True},
    **{"smooth_edge_update": True, "edge_init_use_dist": True, "use_exp_switch": True},
}
DYNAMIC = {**EXAMPLE, "use_dynamic_sel": True, "e_sel": 800, "a_sel": 300}

#: Changes of the section "repflow", and of the sections around it.
DPA3: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}, {}),
    "example": (EXAMPLE, {"activation_function": "silut:10.0"}, {"activation_function": "silut:10.0"}),
    "dynamic": (DYNAMIC, {"activation_function": "silut:3.0"}, {}),
    "truncated": ({"e_sel": 25, "a_sel": 9}, {}, {}),
    "truncated smooth": ({**EXAMPLE, "e_sel": 25, "a_sel": 9}, {}, {}),
    "res_avg": ({"update_style": "res_avg"}, {}, {}),
    "res_incr": ({"update_style": "res_incr"}, {}, {}),
    "residuals normal": ({"update_residual_init": "norm"}, {}, {}),
    "sequential": ({"sequential_update": True}, {}, {}),
    "sequential dynamic": ({**DYNAMIC, "sequential_update": True}, {}, {}),
    "sequential compressed": (
        {"sequential_update": True, "a_compress_rate": 1, "n_multi_edge_message": 2},
        {},
        {},
    ),
    "heads": ({"n_multi_edge_message": 3}, {}, {}),
    "heads res_avg": ({"n_multi_edge_message": 2, "update_style": "res_avg"}, {}, {}),
    "axis": ({"axis_neuron": 5}, {}, {}),
    "no angles": ({"update_angle": False}, {}, {}),
    "no angles res_incr": ({"update_angle": False, "update_style": "res_incr"}, {}, {}),
    "linear compression": ({"a_compress_rate": 2, "a_compress_e_rate": 3}, {}, {}),
    "split compression": ({"a_compress_rate": 2, "a_compress_use_split": True}, {}, {}),
    "exponential switch": ({"use_exp_switch": True}, {}, {}),
    "distances": ({"edge_init_use_dist": True}, {}, {}),
    "smooth": ({"smooth_edge_update": True}, {}, {}),
    "plain products": ({"optim_update": False}, {}, {}),
    "statistics": ({"fix_stat_std": 0.0}, {}, {}),
    "skip_stat": ({"skip_stat": True}, {}, {}),
    "reduction": ({**DYNAMIC, "sel_reduce_factor": 4.0}, {}, {}),
    "one layer": ({"nlayers": 1}, {}, {}),
    "econf": ({}, {"use_econf_tebd": True}, {}),
    "econf with bias": ({}, {"use_econf_tebd": True, "use_tebd_bias": True}, {}),
    "bias": ({}, {"use_tebd_bias": True}, {}),
    "output with types": ({}, {"concat_output_tebd": True}, {}),
    "excluded": ({}, {"exclude_types": [[0, 1], [2, 3]]}, {}),
    "excluded truncated": ({"e_sel": 25, "a_sel": 9}, {"exclude_types": [[2, 3]]}, {}),
    "excluded dynamic": (DYNAMIC, {"exclude_types": [[2, 3], [2, 2]]}, {}),
    "protection": ({}, {"env_protection": 0.3}, {}),
    "charge and spin": ({}, {"add_chg_spin_ebd": True}, {}),
    "charge and spin dynamic": (DYNAMIC, {"add_chg_spin_ebd": True, "use_econf_tebd": True}, {}),
    "no map": ({}, {"use_loc_mapping": False}, {}),
    "no idt": ({}, {}, {"resnet_dt": False}),
    "fitting widths": ({}, {}, {"neuron": [10, 20, 40, 40, 7]}),
    "one hidden layer": ({}, {}, {"neuron": [9]}),
    **{
        f"activation {name}": ({}, {"activation_function": name}, {"activation_function": name})
        for name in ("tanh", "relu", "gelu", "gelu_tf", "relu6", "softplus", "sigmoid", "linear", "none")
    },
}

REPINIT = {
    **{"rcut": 4.5, "rcut_smth": 1.0, "nsel": 80, "neuron": [4, 8, 16], "axis_neuron": 3, "tebd_dim": 4},
    **{"three_body_sel": 40, "three_body_rcut": 3.4, "three_body_rcut_smth": 2.0},
}
REPFORMER = {
    **{"rcut": 3.4, "rcut_smth": 2.4, "nsel": 40, "nlayers": 3, "g1_dim": 10, "g2_dim": 6, "axis_neuron": 2},
    **{"attn1_hidden": 6, "attn1_nhead": 2, "attn2_hidden": 5, "attn2_nhead": 3, "update_residual": 0.3},
}

#: Changes of the sections "repinit" and "repformer", and of the section around them.
DPA2: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}, {}),
    "medium": (
        {"use_three_body": True},
        {
            **{"update_g1_has_attn": False, "update_g2_has_g1g1": False, "attn2_has_gate": True},
            **{"update_style": "res_residual", "g1_out_conv": True, "g1_out_mlp": True},
        },
        {},
    ),
    "small": ({"use_three_body": True}, {"update_g2_has_attn": False, "update_g1_has_attn": False}, {}),
    "strip": ({"tebd_input_mode": "strip"}, {}, {}),
    "strip, three bodies": ({"tebd_input_mode": "strip", "use_three_body": True}, {}, {}),
    "one side": ({"type_one_side": True}, {}, {}),
    "one side, strip, three bodies": (
        {"type_one_side": True, "tebd_input_mode": "strip", "use_three_body": True},
        {},
        {},
    ),
    "one side, three bodies": ({"type_one_side": True, "use_three_body": True}, {}, {}),
    "three bodies, widths": ({"use_three_body": True, "three_body_neuron": [3, 6, 5]}, {}, {}),
    "skip of the embedding": ({"tebd_dim": 5}, {}, {"use_tebd_bias": True}),
    "repinit idt": ({"resnet_dt": True, "use_three_body": True}, {}, {}),
    "repinit idt strip": ({"resnet_dt": True, "tebd_input_mode": "strip"}, {}, {}),
    "repinit activation": ({"activation_function": "gelu"}, {"activation_function": "silu"}, {}),
    "no transform": ({"neuron": [5, 5], "axis_neuron": 2}, {}, {}),
    "truncated": ({"nsel": 25}, {"nsel": 9}, {}),
    "truncated three bodies": ({"nsel": 25, "use_three_body": True, "three_body_sel": 8}, {"nsel": 9}, {}),
    "vectors": ({}, {"update_h2": True}, {}),
    "vectors, residual": ({}, {"update_h2": True, "update_style": "res_residual"}, {}),
    "vectors, res_incr": ({}, {"update_h2": True, "update_style": "res_incr"}, {}),
    "vectors without attention": ({}, {"update_h2": True, "update_g2_has_attn": False}, {}),
    "gate": ({}, {"attn2_has_gate": True, "update_h2": True}, {}),
    "res_residual": ({}, {"update_style": "res_residual"}, {}),
    "res_residual const": ({}, {"update_style": "res_residual", "update_residual_init": "const"}, {}),
    "res_incr": ({}, {"update_style": "res_incr"}, {}),
    "direct": ({}, {"direct_dist": True}, {}),
    "no conv": ({}, {"update_g1_has_conv": False}, {}),
    "no drrd": ({}, {"update_g1_has_drrd": False}, {}),
    "no grrg": ({}, {"update_g1_has_grrg": False}, {}),
    "no g1 attention": ({}, {"update_g1_has_attn": False}, {}),
    "no g1g1": ({}, {"update_g2_has_g1g1": False}, {}),
    "no g2 attention": ({}, {"update_g2_has_attn": False}, {}),
    "divided by nnei": ({}, {"use_sqrt_nnei": False}, {}),
    "conv inside": ({}, {"g1_out_conv": False}, {}),
    "mlp inside": ({}, {"g1_out_mlp": False}, {}),
    "all inside": ({}, {"g1_out_conv": False, "g1_out_mlp": False, "update_style": "res_residual"}, {}),
    "norm eps": ({}, {"ln_eps": 1e-2}, {}),
    "norm fixed": ({}, {"trainable_ln": False}, {}),
    "one layer": ({}, {"nlayers": 1}, {}),
    "without types": ({}, {}, {"concat_output_tebd": False}),
    "types added": ({}, {}, {"add_tebd_to_repinit_out": True}),
    "econf": ({"use_three_body": True}, {}, {"use_econf_tebd": True, "use_tebd_bias": True}),
    "bias": ({}, {}, {"use_tebd_bias": True}),
    "protection": ({"use_three_body": True}, {}, {"env_protection": 0.3}),
    "excluded": ({}, {}, {"exclude_types": [[0, 1], [2, 3]]}),
    "excluded three bodies": (
        {"use_three_body": True, "nsel": 25, "three_body_sel": 8},
        {"nsel": 9},
        {"exclude_types": [[2, 3], [2, 2]]},
    ),
}


def section(descriptor: dict[str, Any], fitting: dict[str, Any]) -> dict[str, Any]:
    """Return the section "model" as deepmd-kit stores it, with all defaults."""
    from deepmd.utils.argcheck import model_args

    config = {"type_map": TYPES, "descriptor": descriptor, "fitting_net": {**FITTING, **fitting}}
    return model_args().normalize_value(config, trim_pattern="_*")


def randomised_model(config: dict[str, Any]) -> torch.nn.Module:
    """Return upstream's model with noise on every weight and statistics that differ from type to type."""
    from deepmd.pt.model.model import get_model

    torch.manual_seed(0)
    model = get_model(copy.deepcopy(config)).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("stddev"):
                buffer.copy_((0.1 + 0.4 * torch.rand(len(buffer), 1, 1)).expand_as(buffer))
            if name.endswith(("out_bias", "bias_atom_e")):
                buffer.copy_(torch.randn_like(buffer))
    return model


def said_by_upstream(model: torch.nn.Module, atoms: Atoms) -> dict[str, torch.Tensor]:
    coord = torch.tensor(atoms.positions)[None].requires_grad_()
    types = torch.tensor([[TYPES.index(s) for s in atoms.get_chemical_symbols()]])
    box = torch.tensor(atoms.cell.array).reshape(1, 9) if atoms.pbc.any() else None
    given = {}
    if model.atomic_model.has_chg_spin_ebd():
        info = [atoms.info.get("charge", 0), atoms.info.get("spin", 0)]
        given["charge_spin"] = torch.tensor([info], dtype=torch.float64)
    out = model(coord, types, box, **given)
    return {key: out[key].detach()[0] for key in ("energy", "atom_energy", "force", "virial")}


def assert_agrees(config: dict[str, Any]) -> Prediction:
    model = randomised_model(config)
    potential = deepmd.build(config, model.state_dict()).eval()
    for atoms in (crystal(), ethanol(), slab()):
        if atoms.pbc.any():
            atoms.pbc = True  # deepmd-kit knows no other
        expected, found = said_by_upstream(model, atoms), predict(potential, atoms)
        scale = float(expected["force"].abs().max())
        assert scale > 1e-5
        close = {"rtol": 0, "atol": 1e-9 * max(1.0, scale)}
        torch.testing.assert_close(found.energy, expected["energy"], **close)
        torch.testing.assert_close(found.node_energies, expected["atom_energy"][:, 0], **close)
        torch.testing.assert_close(found.forces, expected["force"], **close)
        if atoms.pbc.any():
            virial = -found.stress[0] * atoms.cell.volume
            torch.testing.assert_close(virial.reshape(-1), expected["virial"], **close)
    return found


@pytest.mark.parametrize("name", DPA3)
def test_dpa3(name: str) -> None:
    repflow, around, fitting = DPA3[name]
    around = {key: value for key, value in around.items() if key != "types"}
    assert_agrees(section({"type": "dpa3", "repflow": {**REPFLOW, **repflow}, **around}, fitting))


@pytest.mark.parametrize("name", DPA2)
def test_dpa2(name: str) -> None:
    repinit, repformer, around = DPA2[name]
    descriptor = {"type": "dpa2", "repinit": {**REPINIT, **repinit}, "repformer": {**REPFORMER, **repformer}}
    assert_agrees(section({**descriptor, **around}, {}))


@pytest.mark.parametrize(
    "descriptor",
    [
        {"type": "dpa3", "repflow": {**REPFLOW, "fix_stat_std": 0.0}},
        {"type": "dpa3", "repflow": {**REPFLOW, **DYNAMIC, "fix_stat_std": 0.0}, "exclude_types": [[2, 3]]},
        {"type": "dpa3", "repflow": {**REPFLOW, "fix_stat_std": 0.0, "e_sel": 25, "a_sel": 9}},
        {"type": "dpa2", "repinit": {**REPINIT, "use_three_body": True}, "repformer": REPFORMER},
    ],
    ids=["dpa3", "dpa3 dynamic, excluded", "dpa3 truncated", "dpa2"],
)
def test_statistics_of_data(descriptor: dict[str, Any]) -> None:
    """Deviations that upstream computes before training; one element does not occur."""
    from deepmd.pt.model.model import get_model

    config = section(descriptor, {})
    config["type_map"] = [*TYPES, "Au"]
    model = get_model(copy.deepcopy(config)).to(torch.float64)
    potential = deepmd.build(config, model.state_dict())
    frames, samples = [crystal(1), crystal(2), slab()], []
    frames[-1].pbc = True
    for atoms in frames:
        types = torch.tensor([[TYPES.index(s) for s in atoms.get_chemical_symbols()]])
        box = torch.tensor(atoms.cell.array).reshape(1, 9)
        samples.append({"coord": torch.tensor(atoms.positions)[None], "atype": types, "box": box})
        samples[-1]["natoms"] = torch.tensor([[len(atoms), len(atoms), *[0] * 6]])
    model.atomic_model.descriptor.compute_input_stats(samples)
    expected = deepmd.build(config, model.state_dict()).backbone
    batch = AtomBatch.from_ase(frames)
    g = potential.graph(batch).with_positions(batch.positions, batch.cell)
    potential.backbone.set_statistics(potential.backbone.statistics(g, len(batch.numbers)))
    found, n = dict(potential.backbone.named_buffers()), 0
    for name, value in expected.named_buffers():
        if name.endswith(("environment.std", "environment.mean")):
            assert len(value.unique()) > 2 or name.endswith("mean")
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
            n += 1
    assert n >= 2


def test_electron_configurations_of_all_elements() -> None:
    from deepmd.dpmodel.utils.type_embed import get_econf_tebd

    table, width = get_econf_tebd(chemical_symbols[1:], precision="float64")
    assert width == 118
    found = torch.stack([electron_configuration_vector(z) for z in range(1, 119)])
    torch.testing.assert_close(found, torch.tensor(table), rtol=0, atol=1e-12)
