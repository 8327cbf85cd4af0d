"""Reference values of deepmd-kit (float64, random weights); see the README beside the files."""

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from gnnmd.graph import AtomBatch
from gnnmd.models.convert import deepmd
from gnnmd.models.potential import Potential, Prediction
from tests.models.systems import predict

GOLDEN = Path(__file__).parents[2] / "golden" / "deepmd"
NAMES = sorted(path.name.removesuffix(".config.json") for path in GOLDEN.glob("*.config.json"))
STRUCTURES = dict(np.load(GOLDEN / "structures.npz"))
SYSTEMS = sorted({key.split("/")[0] for key in STRUCTURES})
ELEMENTS = ["O", "H", "Cu", "Ag"]


@cache
def golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, np.ndarray]]:
    config = json.loads((GOLDEN / f"{name}.config.json").read_text())
    state = {key: torch.tensor(x) for key, x in np.load(GOLDEN / f"{name}.weights.npz").items()}
    return config, state, dict(np.load(GOLDEN / f"{name}.out.npz"))


def build(name: str, state=None, **descriptor) -> Potential:
    config = copy.deepcopy(golden(name)[0])
    config["descriptor"].update(descriptor)
    return deepmd.build(config, golden(name)[1] if state is None else state).eval()


def atoms_of(system: str) -> Atoms:
    box = STRUCTURES[f"{system}/box"]
    symbols = [ELEMENTS[t] for t in STRUCTURES[f"{system}/type"]]
    cell = box if len(box) else None
    return Atoms(symbols, positions=STRUCTURES[f"{system}/coord"], cell=cell, pbc=bool(len(box)))


def deviations(found: Prediction, name: str, system: str, volume: float) -> dict[str, float]:
    """Return the deviation of everything, relative to the largest force, the descriptor absolutely."""
    out = {key.split("/")[1]: x for key, x in golden(name)[2].items() if key.startswith(f"{system}/")}
    force = max(1.0, abs(out["force"]).max())
    result = {
        "energy": abs(found.energy.numpy() - out["energy"]).max() / force / len(out["force"]),
        "node energies": abs(found.node_energies.numpy() - out["atom_energy"][:, 0]).max() / force,
        "forces": abs(found.forces.numpy() - out["force"]).max() / force,
        "descriptors": abs(found.descriptors.numpy() - out["descriptor"]).max(),
    }
    if volume:
        virial = -found.stress[0].numpy() * volume
        result["virial"] = abs(virial.ravel() - out["virial"]).max() / force
    return result


@pytest.mark.parametrize("name", NAMES)
def test_reference_values(name):
    potential = build(name)
    for system in SYSTEMS:
        atoms = atoms_of(system)
        found = predict(potential, atoms, descriptors=True)
        errors = deviations(found, name, system, atoms.cell.volume)
        assert max(errors.values()) < 1e-9, (system, errors)


def test_the_later_copy_of_a_network_wins():
    """Every network is stored twice; in these files the copies differ."""
    _, state, _ = golden("dpa3_dyn")
    atoms = atoms_of("mix40_ortho")
    expected = predict(build("dpa3_dyn"), atoms).energy
    first = {key: x for key, x in state.items() if "._networks.0." not in key}
    assert abs(predict(build("dpa3_dyn", first), atoms).energy - expected) > 1e-3
    later = {key: x for key, x in state.items() if ".networks.0." not in key}
    assert predict(build("dpa3_dyn", later), atoms).energy == expected


def test_statistics_repeated_for_every_neighbour():
    _, state, _ = golden("dpa3_resavg_poly")
    key = "atomic_model.descriptor.repflows.stddev"
    rows = {k: x for k, x in state.items() if not k.startswith(key)}
    rows[key] = state[f"{key}[:,0]"][:, None].repeat(1, 120, 1)
    atoms = atoms_of("mix40_ortho")
    expected = predict(build("dpa3_resavg_poly"), atoms).energy
    assert predict(build("dpa3_resavg_poly", rows), atoms).energy == expected
    rows[key][1, 7, 0] += 0.1
    with pytest.raises(ValueError, match="stddev differs from neighbour to neighbour"):
        build("dpa3_resavg_poly", rows)


def test_a_prefix_of_all_keys_is_dropped():
    state = {f"model.Default.{key}": x for key, x in golden("dpa3_dyn")[1].items()}
    atoms = atoms_of("dimer_nopbc")
    assert predict(build("dpa3_dyn", state), atoms).energy == predict(build("dpa3_dyn"), atoms).energy
    state |= {key.replace("Default", "other"): x for key, x in state.items()}
    with pytest.raises(ValueError, match="2 models"):
        build("dpa3_dyn", state)


def test_energies_of_elements_are_exact_in_float32():
    """They are thousands of eV and stay in float64 when the network is cast."""
    potential = build("dpa3_dyn")
    bias = golden("dpa3_dyn")[1]["atomic_model.out_bias"].reshape(-1)
    assert potential.float().element_energies[[8, 1, 29, 47]].equal(bias)
    assert potential.element_energies.count_nonzero() == bias.count_nonzero() == 4
    state = dict(golden("dpa3_dyn")[1])
    state["atomic_model.fitting_net.bias_atom_e"] = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double()
    found = build("dpa3_dyn", state).element_energies[[8, 1, 29, 47]]
    torch.testing.assert_close(found, bias + torch.arange(1.0, 5.0).double())


def test_elements_outside_the_type_map_are_refused():
    with pytest.raises(ValueError, match="not trained on Au"):
        predict(build("dpa3_dyn"), Atoms("Au2", positions=[[0, 0, 0], [0, 0, 2.5]]))


def test_the_order_of_the_type_map_is_free():
    """Another order with the rows of the tables in it is the same function; so are excluded pairs."""
    config, state, _ = golden("dpa3_resavg_poly")
    config, state, order = copy.deepcopy(config), dict(state), [2, 0, 3, 1]
    config["descriptor"]["exclude_types"] = [[0, 2]]
    expected = predict(build("dpa3_resavg_poly", exclude_types=[[0, 2]]), atoms_of("mix40_ortho"))
    config["type_map"] = [ELEMENTS[t] for t in order]
    config["descriptor"]["exclude_types"] = [[1, 0]]
    up = "atomic_model."
    for key in ("descriptor.repflows.mean[:,0]", "descriptor.repflows.stddev[:,0]"):
        state[up + key] = state[up + key][order]
    key = up + "descriptor.type_embedding.embedding.embedding_net.layers.0.matrix"
    state[key] = state[key][order]
    state[up + "out_bias"] = state[up + "out_bias"][:, order]
    state[up + "fitting_net.bias_atom_e"] = state[up + "fitting_net.bias_atom_e"][order]
    found = predict(deepmd.build(config, state).eval(), atoms_of("mix40_ortho"))
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.forces, expected.forces)


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("descriptor", "edge_use_rbf", True, r"\['edge_use_rbf'\] of descriptor"),
        ("repflow", "edge_use_rbf", True, r"\['edge_use_rbf'\] of descriptor.repflow"),
        ("fitting_net", "numb_fparam", 2, "fitting_net.numb_fparam=2"),
        ("fitting_net", "dim_case_embd", 3, "fitting_net.dim_case_embd=3"),
        ("fitting_net", "type", "dipole", "fitting_net.type='dipole'"),
        ("model", "pair_exclude_types", [[0, 1]], "model.pair_exclude_types"),
        ("model", "bridging_method", "ZBL", "model.bridging_method='ZBL' is not supported, only 'none'"),
        ("model", "modifier", {}, r"\['modifier'\] of model"),
        ("descriptor", "type", "se_e2_a", "'se_e2_a' is not supported"),
        ("repflow", "axis_neuron", 5, "node_sym.weight have shape"),
        ("repflow", "nlayers", 2, "not used .*layers.2"),
        ("repflow", "nlayers", 4, "missing .*layers.3"),
        ("descriptor", "use_tebd_bias", True, "missing .*type_embedding"),
    ],
)
def test_what_is_not_known_is_refused_by_name(section, option, value, message):
    config, state, _ = golden("dpa3_dyn")
    config = copy.deepcopy(config)
    sections = {"model": config, "repflow": config["descriptor"]["repflow"], **config}
    sections[section][option] = value
    with pytest.raises(ValueError, match=message):
        deepmd.build(config, state)


def test_a_tensor_that_nobody_reads_is_refused():
    state = dict(golden("dpa3_dyn")[1])
    state["atomic_model.descriptor.repflows.layers.0.surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match="not used .*surprise"):
        build("dpa3_dyn", state)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("dpa3")])
def test_pieces_and_single_precision(name):
    potential, atoms = build(name), atoms_of("cuag32_triclinic")
    expected = predict(potential, atoms)
    potential.backbone.edge_chunk = 300
    found = predict(potential, atoms)
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-11)
    found = predict(potential.float(), atoms)
    assert (found.forces - expected.forces).abs().max() < 1e-5 * max(1.0, float(expected.forces.abs().max()))


def batch_of(systems: list[str]) -> AtomBatch:
    return AtomBatch.from_ase([atoms_of(system) for system in systems])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_all_systems(name):
    systems = [system for system in SYSTEMS if system != "water192_pbc"]
    found = predict(build(name), batch_of(systems))
    for energy, system in zip(found.energy, systems, strict=True):
        assert abs(float(energy) - golden(name)[2][f"{system}/energy"][0]) < 1e-9


@pytest.mark.parametrize("part", ["descriptor", "fitting_net"])
def test_no_weight_is_rounded_where_precisions_differ(part):
    """Descriptor and fitting network have a precision each; a potential has one."""
    state = {k: x.float() if f".{part}." in k else x for k, x in golden("dpa3_dyn")[1].items()}
    assert {x.dtype for x in state.values()} == {torch.float32, torch.float64}
    potential = build("dpa3_dyn", state)
    assert next(potential.parameters()).dtype == torch.float64
    single = build("dpa3_dyn", {k: x.float() for k, x in state.items()})
    assert next(single.parameters()).dtype == torch.float32
    assert single.element_energies.dtype == torch.float64
