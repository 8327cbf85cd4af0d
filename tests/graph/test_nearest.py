import torch

from gnnmd.graph.nearest import cut_between_atoms, nearness


def test_nearness_counts_within_an_atom():
    target = torch.tensor([0, 0, 0, 2, 2, 3])
    distance = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 9.0])
    assert nearness(distance, target, 4).tolist() == [2, 0, 1, 1, 0, 0]
    assert len(nearness(distance[:0], target[:0], 4)) == 0


def test_pieces_are_whole_atoms_and_no_longer_than_wanted():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 30, (200,), generator=generator).sort().values
    target = target[target != 7]  # an atom without edges
    for longest in (1, 12, 50, 1000):
        cuts = cut_between_atoms(target, 31, longest)
        assert cuts[0] == (0, 0)
        assert cuts[-1] == (31, len(target))
        for (first, start), (end, stop) in zip(cuts, cuts[1:], strict=False):
            assert end > first
            assert ((target[start:stop] >= first) & (target[start:stop] < end)).all()
            assert stop - start <= longest or end == first + 1
    assert cut_between_atoms(target, 31, 1000) == [(0, 0), (31, len(target))]
    assert len(cut_between_atoms(target, 31, 50)) <= 2 * len(target) // 50 + 2
