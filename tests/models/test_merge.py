import pytest
import torch
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.models.build import build_potential, from_dict, to_dict
from gnnmd.models.escn_md import ExpertsConfig
from gnnmd.models.merge import merged
from tests.models.systems import crystal, ethanol, predict, slab
from tests.models.test_escn_md import escn_md


def test_same_function_without_experts():
    potential = escn_md(experts=ExpertsConfig(count=3, where="all"))
    plain = merged(potential, AtomBatch.from_ase(crystal()))
    found, expected = predict(plain, crystal(4)), predict(potential, crystal(4))
    assert_close(found.energy, expected.energy, rtol=0, atol=1e-12)
    assert_close(found.forces, expected.forces, rtol=0, atol=1e-12)
    assert plain.config.model.experts is None
    assert sum(p.numel() for p in plain.parameters()) < 0.6 * sum(p.numel() for p in potential.parameters())


def test_larger_cell_of_the_same_composition_is_accepted():
    potential = escn_md(experts=ExpertsConfig(count=3))
    plain, atoms = merged(potential, AtomBatch.from_ase(slab())), slab().repeat((2, 1, 1))
    assert_close(predict(plain, atoms).energy, predict(potential, atoms).energy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["composition", "charge", "spin"])
def test_another_mixture_is_refused(change):
    """Negative control: the unmerged potential has another energy there, which the weights would miss."""
    plain = merged(escn_md(experts=ExpertsConfig(count=3)), AtomBatch.from_ase(ethanol()))
    atoms = ethanol()
    if change == "composition":
        atoms = atoms[:-1]
    else:
        atoms.info[change] = 3
    with pytest.raises(ValueError, match="the experts were merged for"):
        predict(plain, atoms)


def test_without_composition_routing_any_composition_is_accepted():
    plain = merged(escn_md(experts=ExpertsConfig(count=3, composition=False)), AtomBatch.from_ase(crystal()))
    predict(plain, slab())


def test_extensivity_quirk_fixes_the_number_of_atoms():
    plain = merged(
        escn_md(experts=ExpertsConfig(count=3, mean_counts_one_more=True)), AtomBatch.from_ase(slab())
    )
    with pytest.raises(ValueError, match="the experts were merged for"):
        predict(plain, slab().repeat((2, 1, 1)))


def test_a_stored_merged_potential_still_refuses():
    plain = merged(escn_md(experts=ExpertsConfig(count=3)), AtomBatch.from_ase(ethanol()))
    again = build_potential(from_dict(to_dict(plain.config)))
    with pytest.raises(ValueError, match="the experts were merged for"):
        again.graph(AtomBatch.from_ase(crystal()))


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="no mixture of experts"):
        merged(escn_md(), AtomBatch.from_ase(crystal()))
    with pytest.raises(ValueError, match="holds 2"):
        merged(escn_md(experts=ExpertsConfig()), AtomBatch.from_ase([crystal(), slab()]))


def test_merging_leaves_the_original():
    potential = escn_md(experts=ExpertsConfig(count=3))
    before = {key: value.clone() for key, value in potential.state_dict().items()}
    merged(potential, AtomBatch.from_ase(crystal()))
    assert all(torch.equal(value, before[key]) for key, value in potential.state_dict().items())
