import pytest
import torch

from gnnmd.graph.angles import angle_pairs

#: Atoms 1 and 4 have no edges.
CENTRE = torch.tensor([0, 0, 0, 2, 3, 3])
PAIRS = [(a, b) for a in range(6) for b in range(6) if CENTRE[a] == CENTRE[b]]


def test_all_ordered_pairs_of_edges_of_one_centre():
    found = angle_pairs(CENTRE, 5)
    assert list(zip(found.ij.tolist(), found.ik.tolist(), strict=True)) == PAIRS
    assert found.ij.dtype == found.ik.dtype == torch.int64
    assert found.by_ik.equal(torch.argsort(found.ik, stable=True))


@pytest.mark.parametrize("room", [len(PAIRS), 20])
@pytest.mark.parametrize("spare_edges", [[], [4, 0]])
def test_room_for_more_holds_the_same_pairs(room, spare_edges):
    counts = torch.tensor([3, 0, 1, 2, 0])
    found = angle_pairs(
        torch.cat([CENTRE, torch.tensor(spare_edges, dtype=torch.int64)]), 5, counts=counts, room=room
    )
    assert found.count == len(PAIRS)
    assert list(zip(found.ij.tolist(), found.ik.tolist(), strict=True))[: len(PAIRS)] == PAIRS
    last = len(CENTRE) + len(spare_edges) - 1
    assert (found.ij[len(PAIRS) :] == last).all()
    assert (found.ik[len(PAIRS) :] == last).all()
    assert found.by_ik.equal(torch.argsort(found.ik, stable=True))


@pytest.mark.parametrize(
    "room", [7, 9]
)  # 7: where an angle is missing whose edges change places with one there
def test_too_little_room_shows_and_stays_within_the_lists(room):
    found = angle_pairs(CENTRE[:5], 5, counts=torch.tensor([3, 0, 1, 2, 0]), room=room)
    assert found.count > room
    for rows, n in ((found.ij, 5), (found.ik, 5), (found.by_ik, room)):
        assert len(rows) == room
        assert rows.min() >= 0
        assert rows.max() < n


@pytest.mark.parametrize("n_atoms", [0, 3])
def test_no_edges_have_no_angles(n_atoms):
    none = torch.zeros(0, dtype=torch.int64)
    assert len(angle_pairs(none, n_atoms).ij) == 0
    found = angle_pairs(none, n_atoms, counts=torch.zeros(n_atoms, dtype=torch.int64), room=7)
    assert len(found.ij) == len(found.ik) == len(found.by_ik) == found.count == 0
