import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from torch_geometric.data import Batch

from gnnmd.data.dataset import AtomsDataset
from gnnmd.graph import AtomBatch, neighbor_list


def frames() -> list[Atoms]:
    crystal = bulk("Ag", cubic=True)
    crystal.rattle(0.1, seed=1)
    crystal.calc = SinglePointCalculator(crystal, energy=-1.0, forces=crystal.positions, stress=range(6))
    crystal.info.update(dataset="omat")
    lone = Atoms("He", [[50.0, 0, 0]])
    ion = Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])
    ion.info.update(charge=-1, spin=1, dataset="omol")
    return [crystal, lone, ion, bulk("Cu") * (1, 1, 2)]


def test_a_collated_batch_is_the_batch_of_its_frames() -> None:
    dataset = AtomsDataset(frames(), 4.0)
    order = [3, 0, 2, 1]
    batch = Batch.from_data_list([dataset[i] for i in order])
    direct = AtomBatch.from_ase([frames()[i] for i in order])
    collated = AtomBatch.from_data(batch)
    for name in (
        "positions",
        "numbers",
        "system",
        "cell",
        "pbc",
        "charge",
        "spin",
        "energy",
        "forces",
        "stress",
    ):
        torch.testing.assert_close(
            getattr(collated, name), getattr(direct, name), rtol=0, atol=0, equal_nan=True
        )
    assert collated.dataset == direct.dataset == ("", "omat", "omol", "")
    assert batch.dataset == ["", "omat", "omol", ""]
    assert batch.cell.shape == (4, 3, 3)


def test_edges_of_a_collated_batch_are_the_neighbour_list_of_the_batch() -> None:
    """Indices are renumbered, shifts are not, and the order stays the sorted one."""
    dataset = AtomsDataset(frames(), 4.0)
    batch = Batch.from_data_list([dataset[i] for i in (1, 0, 3, 2)])
    expected = neighbor_list(AtomBatch.from_data(batch), 4.0)
    assert batch.edge_index.dtype == batch.shift.dtype == torch.int64
    assert torch.equal(batch.edge_index, expected.edge_index)
    assert torch.equal(batch.shift, expected.shift)
    assert batch.n_edges.tolist() == dataset.n_edges[[1, 0, 3, 2]].tolist()
    assert batch.n_edges.sum() == len(batch.shift) > 0


def test_sizes_are_known_without_looking_at_items() -> None:
    dataset = AtomsDataset(frames(), 4.0)
    assert len(dataset) == 4
    assert dataset.n_atoms.tolist() == [4, 1, 2, 2]
    assert dataset.n_edges.tolist() == [dataset[i].n_edges for i in range(4)]
    assert dataset.n_edges[1] == 0
    assert dataset.n_edges[2] == 2


def test_a_limit_on_neighbours_reaches_the_list() -> None:
    (crystal, *_) = frames()
    assert AtomsDataset([crystal], 6.0, max_neighbors=4).n_edges < AtomsDataset([crystal], 6.0).n_edges


def test_changing_an_item_leaves_the_data_set_alone() -> None:
    dataset = AtomsDataset(frames(), 4.0)
    dataset[0].pos = dataset[0].pos + 1
    assert torch.equal(dataset[0].pos, AtomBatch.from_ase(frames()[0]).positions)


def test_edges_are_counted_or_left_out_for_ranks_that_share_them() -> None:
    kept = AtomsDataset(frames(), 4.0)
    counted, skipped = (AtomsDataset(frames(), 4.0, edges=edges) for edges in ("count", "skip"))
    assert torch.equal(counted.n_edges, kept.n_edges)
    assert skipped.n_edges is None
    for dataset in (counted, skipped):
        batch = Batch.from_data_list([dataset[i] for i in range(4)])
        assert "edge_index" not in batch
        assert torch.equal(AtomBatch.from_data(batch).system, AtomBatch.from_ase(frames()).system)


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="got no frames"):
        AtomsDataset([], 4.0)
