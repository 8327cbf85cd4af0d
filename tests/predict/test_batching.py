import torch
from ase import Atoms
from ase.build import bulk

from gnnmd.graph import AtomBatch, neighbor_list
from gnnmd.predict.batching import edges_per_system, split_by_atoms, take_neighbors, take_systems

SYSTEMS = [
    bulk("Ag", cubic=True),
    Atoms("Au", [[0, 0, 0]]),
    bulk("Cu") * 2,
    Atoms("H2", [[0, 0, 0], [0, 0, 1]]),
]


def test_pieces_have_the_neighbour_lists_of_their_systems() -> None:
    batch = AtomBatch.from_ase(SYSTEMS)
    whole = neighbor_list(batch, 4.0)
    assert edges_per_system(batch, whole) == [
        len(neighbor_list(AtomBatch.from_ase(a), 4.0).shift) for a in SYSTEMS
    ]
    for start in range(4):
        for stop in range(start + 1, 5):
            expected = AtomBatch.from_ase(SYSTEMS[start:stop])
            piece = take_systems(batch, start, stop)
            for name in ("positions", "numbers", "system", "cell", "pbc", "charge", "spin"):
                assert torch.equal(getattr(piece, name), getattr(expected, name))
            assert piece.dataset == expected.dataset
            edges, fresh = take_neighbors(batch, whole, start, stop), neighbor_list(expected, 4.0)
            assert torch.equal(edges.edge_index, fresh.edge_index)
            assert torch.equal(edges.shift, fresh.shift)


def test_stretches_of_systems_keep_below_the_limit_unless_one_alone_is_above() -> None:
    batch = AtomBatch.from_ase(SYSTEMS)  # 4, 1, 8 and 2 atoms
    assert [b.n_atoms.tolist() for b in split_by_atoms(batch, 5)] == [[4, 1], [8], [2]]
    assert [b.n_atoms.tolist() for b in split_by_atoms(batch, 1)] == [[4], [1], [8], [2]]
    assert [b.n_atoms.tolist() for b in split_by_atoms(batch, 100)] == [[4, 1, 8, 2]]
