import torch

from gnnmd.graph.angles import angle_pairs


def test_all_ordered_pairs_of_edges_of_one_centre():
    """Against two loops; atoms 1 and 4 have no edges."""
    centre = torch.tensor([0, 0, 0, 2, 3, 3])
    expected = [(a, b) for a in range(6) for b in range(6) if centre[a] == centre[b]]
    ij, ik = angle_pairs(centre, 5)
    assert list(zip(ij.tolist(), ik.tolist(), strict=True)) == expected
    assert ij.dtype == ik.dtype == torch.int64


def test_no_edges_have_no_angles():
    ij, ik = angle_pairs(torch.zeros(0, dtype=torch.int64), 3)
    assert len(ij) == len(ik) == 0
    assert len(angle_pairs(torch.zeros(0, dtype=torch.int64), 0)[0]) == 0
