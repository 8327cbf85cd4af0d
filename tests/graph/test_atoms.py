"""AtomBatch to and from ASE and PyG without loss."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from gnnmd.graph import AtomBatch, LabelKeys


def labelled() -> list[Atoms]:
    """A crystal with all labels, an ion with energy only, a slab with none, an atom with forces only."""
    rng = np.random.default_rng(0)
    crystal = bulk("Ag", cubic=True)
    crystal.positions += rng.normal(size=(4, 3)) * 30  # unwrapped
    crystal.calc = SinglePointCalculator(
        crystal, energy=-1.25, forces=rng.normal(size=(4, 3)), stress=rng.normal(size=6)
    )
    ion = molecule("CH3", info={"charge": -1, "spin": 3, "dataset": "omol"})
    ion.calc = SinglePointCalculator(ion, energy=0.0)
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, False, True)
    slab.cell[1] = 0.0
    atom = Atoms("H", info={"dataset": "omat"})
    atom.calc = SinglePointCalculator(atom, forces=np.zeros((1, 3)))
    return [crystal, ion, slab, atom]


def assert_same(a: AtomBatch, b: AtomBatch) -> None:
    for f in fields(AtomBatch):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name == "dataset":
            assert x == y
        else:
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_batch_holds_what_the_atoms_say():
    images = labelled()
    batch = AtomBatch.from_ase(images)
    assert batch.n_systems == len(batch) == 4
    assert batch.n_atoms.tolist() == [4, 4, 4, 1]
    assert batch.system.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert batch.charge.tolist() == [0, -1, 0, 0]
    assert batch.spin.tolist() == [0, 3, 0, 0]
    assert batch.dataset == ("", "omol", "", "omat")
    assert batch.pbc.tolist() == [[True] * 3, [False] * 3, [True, False, True], [False] * 3]
    assert batch.energy.isnan().tolist() == [False, False, True, True]
    assert batch.forces.isnan().any(1).tolist() == [False] * 4 + [True] * 8 + [False]
    assert batch.stress.isnan().flatten(1).any(1).tolist() == [False, True, True, True]
    xx, yy, zz, yz, xz, xy = images[0].calc.results["stress"]
    expected = torch.tensor([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], dtype=torch.float64)
    torch.testing.assert_close(batch.stress[0], expected, rtol=0, atol=0)
    assert torch.equal(batch.positions[:4], torch.from_numpy(images[0].positions))


def test_round_trip_through_ase_loses_nothing():
    batch = AtomBatch.from_ase(labelled())
    images = batch.to_ase()
    assert_same(AtomBatch.from_ase(images), batch)
    assert images[0].get_potential_energy() == -1.25
    assert images[1].info == {"charge": -1, "spin": 3, "dataset": "omol"}
    assert images[2].calc is None
    assert images[2].info == {}


def test_round_trip_keeps_forces_that_only_some_atoms_have():
    batch = AtomBatch.from_ase(labelled())
    batch.forces[1] = float("nan")
    assert_same(AtomBatch.from_ase(batch.to_ase()), batch)


def test_round_trip_through_pyg_loses_nothing():
    batch = AtomBatch.from_ase(labelled())
    items = batch.to_data()
    assert_same(AtomBatch.from_data(Batch.from_data_list(items)), batch)
    assert_same(AtomBatch.from_data(items[1]), AtomBatch.from_ase(labelled()[1]))
    assert_same(AtomBatch.from_data(next(iter(DataLoader(items, batch_size=4)))), batch)


def test_batch_without_atoms_survives_both_round_trips():
    batch = AtomBatch.from_ase([Atoms(), Atoms("H"), Atoms()])
    assert batch.n_atoms.tolist() == [0, 1, 0]
    assert_same(AtomBatch.from_ase(batch.to_ase()), batch)
    assert_same(AtomBatch.from_data(Batch.from_data_list(batch.to_data())), batch)


def test_labels_are_read_under_the_names_that_are_asked_for():
    atoms = molecule("H2O", info={"dft_energy": -3.0, "dft_stress": np.arange(9.0)})
    atoms.arrays["dft_forces"] = np.ones((3, 3))
    assert AtomBatch.from_ase(atoms).energy.isnan().all()
    batch = AtomBatch.from_ase(atoms, LabelKeys("dft_energy", "dft_forces", "dft_stress"))
    assert batch.energy.tolist() == [-3.0]
    assert batch.forces.eq(1.0).all()
    assert batch.stress[0].flatten().tolist() == list(range(9))


def test_reading_labels_computes_nothing_and_takes_nothing_stale():
    atoms = bulk("Ag", cubic=True)
    atoms.calc = EMT()
    assert AtomBatch.from_ase(atoms).energy.isnan().all()
    energy = atoms.get_potential_energy()
    assert AtomBatch.from_ase(atoms).energy.tolist() == [energy]
    atoms.rattle(0.1)
    assert AtomBatch.from_ase(atoms).energy.isnan().all()


@pytest.mark.parametrize("value", [0.5, float("nan"), "one", None])
@pytest.mark.parametrize("key", ["charge", "spin"])
def test_charge_and_spin_must_be_integers(key, value):
    with pytest.raises(ValueError, match=f"{key}.* must be an integer, got"):
        AtomBatch.from_ase(Atoms("H", info={key: value}))


def test_charge_may_be_written_as_a_float():
    assert AtomBatch.from_ase(Atoms("H", info={"charge": -2.0, "spin": np.int32(3)})).charge.tolist() == [-2]


def test_no_atoms_objects_are_refused():
    with pytest.raises(ValueError, match="empty list"):
        AtomBatch.from_ase([])


def test_moving_to_a_device_keeps_everything():
    batch = AtomBatch.from_ase(labelled())
    assert_same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert {getattr(moved, f.name).device.type for f in fields(batch) if f.name != "dataset"} == {"meta"}
    assert moved.dataset == batch.dataset


def test_batch_cannot_be_reassigned():
    with pytest.raises(AttributeError):
        AtomBatch.from_ase(Atoms("H")).charge = torch.tensor([1])
    assert replace(AtomBatch.from_ase(Atoms("H")), charge=torch.tensor([1])).charge.tolist() == [1]
