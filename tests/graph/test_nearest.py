import torch

from gnnmd.graph.nearest import cut_between_atoms, nearness


def test_nearness_counts_within_an_atom():
    target = torch.tensor([0, 0, 0, 2, 2, 3])
    vector = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 9.0])[:, None] * torch.tensor([0.6, 0.0, -0.8])
    assert nearness(vector, target, 4).tolist() == [2, 0, 1, 1, 0, 0]
    assert len(nearness(vector[:0], target[:0], 4)) == 0


def test_equally_near_neighbours_have_one_order_whatever_their_rows_and_rounding():
    generator = torch.Generator().manual_seed(1)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).to(torch.float64)
    shell = (
        torch.cat((1.7 * signs, 2 * 1.7 * signs))
        @ torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    )
    target = torch.zeros(len(shell), dtype=torch.int64)
    expected = nearness(shell, target, 1)
    assert (expected[:8] < 8).all()
    for _ in range(5):
        rows = torch.randperm(len(shell), generator=generator)
        noise = 1e-14 * torch.randn(len(shell), 3, generator=generator, dtype=torch.float64)
        assert torch.equal(nearness((shell + noise)[rows], target, 1), expected[rows])


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
