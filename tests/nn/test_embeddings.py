import pytest
import torch
from torch.testing import assert_close

from gnnmd.nn.embeddings import SystemEmbedding

CHARGE, SPIN = torch.tensor([0, 0, 1, -3]), torch.tensor([0, 1, 2, 1])


def embedding(kind: str, rows: tuple[int, ...] = ()) -> SystemEmbedding:
    torch.manual_seed(0)
    return SystemEmbedding(6, kind, rows).double()


@pytest.mark.parametrize("kind", ["rand_emb", "pos_emb", "lin_emb"])
def test_charges_and_spins_are_told_apart(kind):
    found = embedding(kind)(CHARGE, SPIN, torch.zeros(4, dtype=torch.int64))
    distances = torch.cdist(found, found) + torch.eye(4)
    assert found.shape == (4, 6)
    assert distances.min() > 1e-3


def test_waves_of_an_unknown_spin_are_zero():
    e = embedding("pos_emb")
    assert e.spin(torch.tensor([0])).abs().max() == 0
    assert_close(e.charge(torch.tensor([0])), torch.tensor([[0.0, 0, 0, 1, 1, 1]], dtype=torch.float64))


def test_linear_unknown_spin_is_minus_100():
    e = embedding("lin_emb")
    assert_close(e.spin(torch.tensor([0])), e.spin.linear(torch.tensor([[-100.0]], dtype=torch.float64)))


def test_mapped_data_sets_share_a_row():
    e, zero = embedding("rand_emb", (0, 2, 2)), torch.zeros(3, dtype=torch.int64)
    found = e(zero, zero, torch.arange(3))
    assert_close(found[1], found[2])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_freezing():
    e = embedding("rand_emb", (0, 1))
    e.freeze(charge_spin=True, dataset=False)
    assert {n for n, p in e.named_parameters() if not p.requires_grad} == {
        "charge.table.weight",
        "spin.table.weight",
    }
