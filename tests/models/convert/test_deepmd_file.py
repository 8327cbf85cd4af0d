"""The layout of checkpoints; numbers are those of tests/golden/deepmd."""

import copy

import pytest
import torch

from gnnmd.models.convert import deepmd_file
from tests.models.convert.test_deepmd import SYSTEMS, atoms_of, deviations
from tests.models.systems import predict
from tests.upstream.make_deepmd_checkpoint import model

#: What the second head adds per atom, eV, in the order of its own type map.
SHIFT = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)


def single(name: str = "dpa3_fixed") -> dict:
    section, state = model(name)
    params = section | {"resuming": False, "model_branch_alias": [], "info": {}}
    return {f"model.Default.{key}": x for key, x in state.items()} | {
        "_extra_state": {"model_params": params, "train_infos": {"step": 1}}
    }


def two_heads() -> dict:
    """Two heads with one descriptor, the second with another order of the elements and other biases."""
    section, state = model("dpa3_fixed")
    other_section, other, order = copy.deepcopy(section), dict(state), [2, 0, 3, 1]
    other_section["type_map"] = [section["type_map"][t] for t in order]
    other_section["model_branch_alias"] = ["alloy"]
    up = "atomic_model."
    for key in ("mean", "stddev"):
        other[f"{up}descriptor.repflows.{key}"] = state[f"{up}descriptor.repflows.{key}"][order]
    table = f"{up}descriptor.type_embedding.embedding.embedding_net.layers.0.matrix"
    other[table] = state[table][order]
    other[up + "out_bias"] = state[up + "out_bias"][:, order] + SHIFT[None, :, None]
    other[up + "fitting_net.bias_atom_e"] = state[up + "fitting_net.bias_atom_e"][order]
    heads = {"Water": (section, state), "Domains_Alloy": (other_section, other)}
    content = {f"model.{head}.{key}": x for head, (_, s) in heads.items() for key, x in s.items()}
    sections = {head: section for head, (section, _) in heads.items()}
    return content | {"_extra_state": {"model_params": {"model_dict": sections, "resuming": True}}}


@pytest.mark.parametrize("name", ["dpa3_fixed", "dpa2_tb"])
def test_single_task(name):
    potential, origin = deepmd_file.build(single(name), None)
    assert origin == {"head": "Default"}
    for system in SYSTEMS:
        atoms = atoms_of(system)
        found = predict(potential.eval(), atoms, descriptors=True)
        assert max(deviations(found, name, system, atoms.cell.volume).values()) < 1e-9, system


def test_a_head_has_its_own_order_of_elements_and_its_own_biases():
    water, _ = deepmd_file.build(two_heads(), "Water")
    alloy, origin = deepmd_file.build(two_heads(), "Domains_Alloy")
    assert origin == {"head": "Domains_Alloy"}
    assert deepmd_file.build(two_heads(), "alloy")[1] == origin
    atoms = atoms_of("mix40_ortho")
    one, other = predict(water.eval(), atoms), predict(alloy.eval(), atoms)
    order = alloy.config.model.type_map
    added = sum(SHIFT[order.index(symbol)] for symbol in atoms.get_chemical_symbols())
    torch.testing.assert_close(other.energy - one.energy, added[None], atol=1e-9, rtol=0)
    torch.testing.assert_close(other.forces, one.forces, atol=1e-10, rtol=0)
    assert (
        max(deviations(predict(water, atoms, descriptors=True), "dpa3_fixed", "mix40_ortho", 0).values())
        < 1e-9
    )


def with_case(name: str) -> dict:
    """A network that is also told its head, by a vector that the first bias makes up for."""
    content, up = single(name), "model.Default.atomic_model.fitting_net."
    case = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    rows = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for copy_of in ("networks", "_networks"):
        layer = f"{up}filter_layers.{copy_of}.0.layers.0."
        content[layer + "matrix"] = torch.cat([content[layer + "matrix"], rows])
        content[layer + "bias"] = content[layer + "bias"] - case @ rows
    params = content["_extra_state"]["model_params"]
    params["fitting_net"]["dim_case_embd"] = 3
    return content | {f"{up}case_embd": case}


def test_a_shared_fitting_net_that_is_told_its_head():
    potential, _ = deepmd_file.build(with_case("dpa2_tb"), None)
    atoms = atoms_of("mix40_ortho")
    found = predict(potential.eval(), atoms, descriptors=True)
    assert max(deviations(found, "dpa2_tb", "mix40_ortho", atoms.cell.volume).values()) < 1e-9
    with pytest.raises(ValueError, match="20 columns for 23 inputs is not supported: it adds its input"):
        deepmd_file.build(with_case("dpa3_fixed"), None)  # without the vector it would add its input
    content = {key: x for key, x in with_case("dpa2_tb").items() if not key.endswith("case_embd")}
    with pytest.raises(ValueError, match="there is no model.Default.atomic_model.fitting_net.case_embd"):
        deepmd_file.build(content, None)


@pytest.mark.parametrize(
    ("content", "head", "message"),
    [
        (two_heads, None, "heads Water, Domains_Alloy; choose one with head="),
        (two_heads, "Steel", "head 'Steel' is not in the file, which has Water, Domains_Alloy, alloy"),
        (single, "Water", "head 'Water' is not in the file, which has Default"),
    ],
)
def test_a_head_that_is_not_there_is_refused(content, head, message):
    with pytest.raises(ValueError, match=message):
        deepmd_file.build(content(), head)
