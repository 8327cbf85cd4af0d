import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.environment import Environment

GENERATOR = torch.Generator().manual_seed(0)
VECTOR = 3 * torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR)
DISTANCE = VECTOR.norm(dim=1)
SWITCH = torch.rand(6, dtype=torch.float64, generator=GENERATOR)
TYPE = torch.tensor([0, 0, 1, 1, 1, 0])


def test_by_its_definition():
    environment = Environment(3, protection=0.25)
    environment.mean.copy_(torch.arange(12.0).reshape(3, 4) / 10)
    environment.std.copy_(1 + torch.arange(12.0).reshape(3, 4))
    found = environment(VECTOR, DISTANCE, SWITCH, TYPE)
    for e in range(6):
        r = DISTANCE[e] + 0.25
        raw = SWITCH[e] * torch.cat([1 / r[None], VECTOR[e] / r**2])
        t = TYPE[e]
        assert_close(found[e], (raw - environment.mean[t]) / environment.std[t])


def test_it_stays_in_float64():
    environment = Environment(2, std=0.3).float()
    assert environment(VECTOR, DISTANCE, SWITCH, TYPE).dtype == torch.float64
    assert environment.std.dtype == torch.float64
    assert environment.std[0, 0].item() == 0.3


def test_statistics_over_atoms_with_and_without_neighbours():
    """Two atoms of type 0 and one of type 1 have room for four neighbours each; type 2 does not occur."""
    environment = Environment(3)
    raw = environment.raw(VECTOR, DISTANCE, SWITCH)
    part = environment.sums(raw, TYPE, torch.tensor([0, 1, 0]), slots=4)
    halves = [
        environment.sums(raw[half], TYPE[half], torch.tensor(owned), slots=4)
        for half, owned in [(slice(0, 3), [0]), (slice(3, 6), [1, 0])]
    ]
    for keep_mean_zero in (True, False):
        environment.set_statistics(part, keep_mean_zero=keep_mean_zero)
        std, mean = environment.std.clone(), environment.mean.clone()
        for t, atoms in [(0, 2), (1, 1)]:
            slots = torch.zeros(4 * atoms, 4, dtype=torch.float64)
            mine = raw[t == TYPE]
            slots[: len(mine)] = mine
            assert_close(std[t, 0], slots[:, 0].std(unbiased=False))
            assert_close(std[t, 1:], slots[:, 1:].std(unbiased=False).expand(3))
            assert slots[:, 1:].mean().abs() > 1e-3  # it enters
            expected = 0.0 if keep_mean_zero else slots[:, 0].mean().item()
            assert mean[t].tolist() == pytest.approx([expected, 0, 0, 0])
        assert std[2].tolist() == [0.1] * 4
        environment.set_statistics(sum(halves), keep_mean_zero=keep_mean_zero)
        assert_close(environment.std, std)
        assert_close(environment.mean, mean)


def test_deviations_have_a_floor():
    environment = Environment(1)
    raw = torch.zeros(2, 4, dtype=torch.float64)
    environment.set_statistics(environment.sums(raw, torch.zeros(2).long(), torch.zeros(1).long(), 5))
    assert environment.std.unique().tolist() == [0.01]
