import torch

from gnnmd.parallel.morton import morton_keys


def test_bits_come_from_the_longest_remaining_edge():
    """A 4 x 1 x 1 rod is halved twice along x before y and z are touched."""
    edge = torch.tensor([[4.0, 1.0, 1.0]], dtype=torch.float64)
    u = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.9], [0.6, 0.1, 0.1]], dtype=torch.float64)
    top = morton_keys(u, edge, torch.zeros(3, dtype=torch.int64)) >> 61
    assert top.tolist() == [0b11, 0b00, 0b10]


def test_each_system_has_its_own_schedule():
    edge = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    u = torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1]], dtype=torch.float64)
    assert (morton_keys(u, edge, torch.tensor([0, 1])) >> 62).tolist() == [1, 0]


def test_keys_are_not_negative_and_tell_near_atoms_apart():
    u = torch.tensor(
        [[1 - 2.0**-53] * 3, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5 + 2e-6], [0, 0, 0]], dtype=torch.float64
    )
    key = morton_keys(u, torch.ones(1, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
    assert key.min() == 0
    assert key.unique().numel() == 4
    assert key.argmax() == 0
