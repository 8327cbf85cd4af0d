import pytest
import torch
from ase import Atoms
from torch.testing import assert_close

from gnnmd.graph import AtomBatch
from gnnmd.graph.neighbors import neighbor_list
from gnnmd.models.build import PotentialConfig, build_potential
from gnnmd.models.escn_md import EscnMDConfig
from gnnmd.parallel import GPContext
from tests.lennard_jones import lennard_jones
from tests.models.systems import crystal, dimer, ethanol, predict, slab
from tests.models.test_escn_md import SMALL, escn_md


def refused(potential, atoms: Atoms, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        potential.graph(AtomBatch.from_ase(atoms))


def test_stress_of_a_known_potential():
    """Positive under tension: Lennard-Jones stretched beyond its minimum pulls back."""
    potential = lennard_jones()
    for scale, sign in [(1.05, 1.0), (0.9, -1.0)]:
        atoms = Atoms("Ag", cell=torch.eye(3).numpy() * 2.9 * scale, pbc=True)
        assert sign * predict(potential, atoms).stress[0].trace() > 0


def test_scale_and_element_energies():
    potential = escn_md()
    before = predict(potential, crystal())
    potential.energy_scale *= 2
    potential.element_energies[29] = -3.5
    after = predict(potential, crystal())
    copper = crystal().numbers == 29
    assert_close(after.node_energies, 2 * before.node_energies - 3.5 * torch.tensor(copper))
    assert_close(after.energy, 2 * before.energy - 3.5 * copper.sum())
    assert_close(after.forces, 2 * before.forces)
    assert_close(after.stress, 2 * before.stress)


def test_direct_heads_are_scaled_too():
    potential = escn_md(heads="direct")
    before = predict(potential, crystal())
    potential.energy_scale *= 2
    assert_close(predict(potential, crystal()).forces, 2 * before.forces)
    assert_close(predict(potential, crystal()).stress, 2 * before.stress)


def test_direct_forces_are_no_gradient():
    """Negative control for the conservative ones: a head of its own does not sum to zero."""
    assert predict(escn_md(heads="direct"), crystal()).forces.sum(0).abs().max() > 1e-3


def test_float64_results_survive_a_cast():
    """References and scale keep all digits in a float32 model: a total of 1e6 atoms shows them."""
    potential = build_potential(PotentialConfig(model=EscnMDConfig(**SMALL)))
    potential.element_energies[47] = 1 / 3
    potential.energy_scale.fill_(1 / 7)
    potential.float()
    assert potential.element_energies[47] == torch.tensor(1 / 3, dtype=torch.float64)
    assert potential.energy_scale == torch.tensor(1 / 7, dtype=torch.float64)


def test_evaluation_is_detached_and_training_is_not():
    potential = escn_md()
    assert not any(t.requires_grad for t in vars(predict(potential, slab(), descriptors=True)).values())
    assert all(t.requires_grad for t in vars(predict(potential.train(), slab(), descriptors=True)).values())


def test_frozen_weights_change_nothing():
    potential = escn_md()
    expected = predict(potential, [slab(), dimer(100.0)])
    found = predict(potential.requires_grad_(False), [slab(), dimer(100.0)])
    assert_close(found.forces, expected.forces, rtol=0, atol=1e-14)
    assert predict(potential, dimer(100.0)).forces.abs().max() == 0


def test_works_without_recording_gradients():
    potential = escn_md()
    with torch.no_grad():
        found = predict(potential, slab())
    assert torch.equal(found.forces, predict(potential, slab()).forces)


def test_what_is_not_asked_for_is_not_there():
    p = predict(escn_md(), slab(), stress=False)
    assert p.stress is None
    assert p.descriptors is None
    assert predict(escn_md(), slab(), descriptors=True).descriptors.shape == (5, 8)


def test_positions_may_be_part_of_a_graph():
    potential, batch = escn_md().train(), AtomBatch.from_ase(ethanol())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    p = potential(
        scale * batch.positions, potential.graph(batch), GPContext.single(len(batch.numbers)), stress=False
    )
    (slope,) = torch.autograd.grad(p.energy.sum(), scale)
    assert_close(slope, -(p.forces * batch.positions).sum())


def test_neighbours_may_be_given():
    potential, batch = escn_md(), AtomBatch.from_ase(slab())
    graph = potential.graph(batch, neighbor_list(batch, potential.r_cut))
    assert torch.equal(graph.edge_index, potential.graph(batch).edge_index)
    with pytest.raises(ValueError, match=r"r_cut=3.0 A but the model needs 4.5 A"):
        potential.graph(batch, neighbor_list(batch, 3.0))


def test_limited_neighbours_are_used():
    few, all_of_them = escn_md(max_neighbors=4), escn_md()
    batch = AtomBatch.from_ase(crystal())
    assert few.graph(batch).edge_index.shape[1] < all_of_them.graph(batch).edge_index.shape[1]


def test_unknown_element_is_refused_by_name():
    potential = lennard_jones(elements=(29, 47))
    refused(potential, Atoms("AgAu", positions=[[0, 0, 0], [3, 0, 0]]), "not trained on Au; it knows Cu, Ag")
    refused(escn_md(), Atoms("Pu"), r"atomic numbers \[94\] are outside 1..60")
    refused(escn_md(), Atoms("X"), r"atomic numbers \[0\] are outside 1..60")


def test_charge_and_spin_outside_their_tables_are_refused():
    atoms = slab()
    atoms.info["charge"] = -101
    refused(escn_md(), atoms, r"charge \[-101\] is outside \(-100, 100\)")
    atoms.info.update(charge=0, spin=101)
    refused(escn_md(), atoms, r"spin \[101\] is outside \(0, 100\)")
    escn_md(charge_spin_embedding="pos_emb").graph(AtomBatch.from_ase(atoms))


def named(dataset: str) -> Atoms:
    atoms = slab()
    atoms.info["dataset"] = dataset
    return atoms


def test_a_model_of_one_data_set_needs_no_name():
    potential = escn_md()
    assert potential.graph(AtomBatch.from_ase(named("anything"))).dataset.tolist() == [0]
    one = lennard_jones(datasets=("pbe",))
    assert one.graph(AtomBatch.from_ase([named(""), named("pbe")])).dataset.tolist() == [0, 0]
    refused(one, named("scan"), "dataset 'scan' is not known; the model knows pbe")


def test_a_model_of_several_data_sets_needs_a_name():
    two = lennard_jones(datasets=("pbe", "scan"))
    assert two.graph(AtomBatch.from_ase([named("scan"), named("pbe")])).dataset.tolist() == [1, 0]
    refused(two, named(""), "no dataset is given; the model knows pbe, scan. Set atoms.info")
    refused(two, named("b3lyp"), "dataset 'b3lyp' is not known")


def test_data_sets_have_energies_of_their_own():
    config = PotentialConfig(
        model=EscnMDConfig(**SMALL),
        datasets=("a", "b", "c"),
        dataset_mapping={"c": "b"},
        dataset_heads="experts",
    )
    potential = build_potential(config).double().eval()
    p = predict(potential, [named(d) for d in ("a", "b", "c")])
    assert abs(p.energy[0] - p.energy[1]) > 1e-6
    assert_close(p.energy[1], p.energy[2], rtol=0, atol=1e-14)


def test_slab_without_third_vector_has_no_stress():
    atoms = slab()
    atoms.cell[2] = 0
    p = predict(escn_md(), [atoms, crystal()])
    assert p.stress[0].isnan().all()
    assert p.stress[1].isfinite().all()
    assert_close(p.forces[:5], predict(escn_md(), slab()).forces)
